"""Writes the report: head, sections, tiles, data, script. Tiles go to the file as they are made."""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import numpy as np

from cpikan_hr.evaluate import evaluate, rendered_once
from cpikan_hr.files import whole_file
from cpikan_hr.owned import refuse_foreign
from cpikan_hr.problems import keep_data, reference_of, refuse_unit
from cpikan_hr.processes import compute_device
from cpikan_hr.report import sections
from cpikan_hr.report.equation import write_equation_report
from cpikan_hr.report.figures import classical_rmse, metrics_of
from cpikan_hr.report.layers import Strip, data_of, strip_rows, strips
from cpikan_hr.report.page import COLOURS, colours, embedded, encoded, head, limits, script
from cpikan_hr.report.plan import Layer, encoder, planned
from cpikan_hr.report.pyramid import Pyramid
from cpikan_hr.training.weights import Trained, load_field

SCRIPTS = ("tiles.js", "map.js", "plot.js", "report.js")


def write_report(
    run: Path,
    out: Path | None = None,
    *,
    reference: Path | None = None,
    reference_unit: str | None = None,
    remove: str = "plane",
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes one HTML file about `run`, a folder or a field's file: `out`, by default report.html beside the field.

    `reference`: a map or picture to compare with instead of the problem's own; `reference_unit`: of its heights, if
    it does not say it; `remove`: see `problems/surface.py`.
    Where the run's data are gone, their parts say so. UserError: no field, damaged data, another size, no room.
    """
    trained = load_field(run, compute_device(), mapped=True)
    file = run / "field.safetensors" if run.is_dir() else run
    out = out or file.with_name("report.html")
    keep_data(trained.recipe, out)
    refuse_foreign(out)
    if trained.recipe.problem.kind == "pde":
        refuse_unit(reference_unit, "an equation")
        return write_equation_report(trained, file, out, reference, progress)
    problem = data_of(trained.recipe)
    truth = reference_of(trained.recipe, reference, reference_unit) if reference or problem else None
    found = trained.about.get("phase_steps_rad")
    rendered = rendered_once(trained, strip_rows(tuple(trained.about["shape"])))
    lines = metrics_of(file.parent)
    with whole_file(out) as part, part.open("w", encoding="utf-8") as page:
        layers, missing = planned(trained, problem, truth)
        name = file.resolve().parent.name or file.stem
        page.write(head(name) + sections.header(name, trained.about, trained.recipe))
        page.write("<main>\n" + sections.the_map(layers[0]))
        values = evaluate(trained, truth, file.stat().st_size, remove, rendered)
        offset = getattr(trained.recipe.problem, "remove_offset", False)
        classical = classical_rmse(problem, out.parent, offset)
        values["classical_rmse"] = classical
        values["over_classical"] = values["rmse"] / classical if classical and "rmse" in values else None
        note = "" if truth is not None else "No reference is known, so no error is: give --reference FILE."
        if trained.about.get("regions", 1) > 1:
            note += f" {trained.about['regions']} regions of the mask do not touch; each has a piston of its own."
        page.write(sections.figures(values, note) + sections.maps(layers[1:], missing))
        page.write(sections.training(lines, trained.about["unit"]))
        stack = getattr(problem, "stack", None)
        if stack is not None:
            nominal = None if stack.phase_steps_rad is None else stack.phase_steps_rad.tolist()
            page.write(sections.phase_steps(nominal, found, stack.wavelengths_um))
        page.write(sections.settings(trained) + sections.versions() + "</main>\n")
        profiles = write_tiles(page, layers, trained, strips(trained, problem, truth, rendered), offset, progress)
        data = {
            "layers": [asdict(layer) for layer in layers],
            "profiles": profiles,
            "pitch": trained.about["pixel_pitch_um"],
            "curves": curves(lines),
            "colours": {name: colours(name) for name in COLOURS},
        }
        page.write(f'<script type="application/json" id="data">{embedded(data)}</script>\n')
        page.write(f"<script>{script(SCRIPTS)}</script>\n</body>\n</html>\n")
    return out


def write_tiles(
    page: TextIO,
    layers: list[Layer],
    trained: Trained,
    passed: Iterable[Strip],
    remove_offset: bool,
    progress: Callable[[int, int], None] | None,
) -> dict:
    """Writes the layers' tiles and completes `layers`; the exact profiles through the middle of the map."""
    height, width = trained.about["shape"]
    channels = 3 if layers[0].kind == "picture" and trained.about["channels"] == 3 else 1
    pyramid = Pyramid("field", (height, width), encoder(layers[0], trained), page.write)
    blocks: dict[str, list[np.ndarray]] = {"small": [], "error": [], "residual": [], "sigma": []}
    row, column = height // 2, []
    for strip in passed:
        pyramid.add(strip.value[..., :channels])
        for name, parts in blocks.items():
            parts.append(getattr(strip, name))
        if strip.y0 <= row < strip.y0 + len(strip.value):
            along = strip.value[row - strip.y0, :, :channels].copy()
        column.append(strip.value[:, width // 2, :channels].copy())
        if progress:
            progress(strip.y0 + len(strip.value), height)
    layers[0].levels = pyramid.finish()
    layers[0].low, layers[0].high = limits(np.concatenate(blocks["small"])[..., :1], layers[0].colours)
    for layer in layers[1:]:
        values = np.concatenate(blocks[layer.name])
        if layer.name == "error" and remove_offset and np.isfinite(values).any():
            values -= np.nanmean(values)  # a piston that the frames cannot know
        layer.low, layer.high = limits(values, layer.colours)
        pyramid = Pyramid(layer.name, values.shape[:2], encoder(layer, trained), page.write)
        pyramid.add(values)
        layer.levels = pyramid.finish()
    lines = {"x": along, "y": np.concatenate(column)}
    return {"at": [width // 2, row]} | {axis: encoded(line.T.astype("<f4")) for axis, line in lines.items()}


def curves(lines: list[dict]) -> dict[str, list]:
    """The steps and what was logged at them; no more than 2000 of them, evenly."""
    steps = [line for line in lines if "loss" in line]
    steps = steps[:: -(-len(steps) // 2000) or 1]
    return {name: [line.get(name) for line in steps] for name in ["step", *sections.curve_names(lines)]}
