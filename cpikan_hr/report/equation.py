"""The report of an equation's run: maps on its lattice, slices in time, collocation points, curves, coefficients.

Invariant: maps pass strip by strip; memory depends on the width of the lattice, not on its number of points.
"""

import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

import numpy as np
from safetensors.numpy import load_file

from cpikan_hr.data.source import Source, open_source
from cpikan_hr.errors import UserError
from cpikan_hr.evaluate_pde import evaluate_equation, map_strips
from cpikan_hr.files import whole_file
from cpikan_hr.problems import PDE, build_problem
from cpikan_hr.report import equation_sections as parts
from cpikan_hr.report import sections
from cpikan_hr.report.figures import metrics_of
from cpikan_hr.report.layers import block_of
from cpikan_hr.report.page import COLOURS, colours, embedded, encoded, head, limits, script
from cpikan_hr.report.plan import Layer
from cpikan_hr.report.pyramid import MapTiles, Pyramid, shrink
from cpikan_hr.training.weights import Trained

SCRIPTS = ("tiles.js", "map.js", "plot.js", "report.js", "equation.js")
SLICES = 6  # times shown side by side
MOST = 4000  # points of one draw that are shown
UNSHOWN = ("step", "px_per_s", "cpu_s", "tiles")  # columns of metrics.jsonl that are no curves


def write_equation_report(
    trained: Trained,
    file: Path,
    out: Path,
    reference: Path | None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes `out` about the field in `file`; `reference`: a map to compare with instead of the known answer.

    UserError: data that the run needs are gone, a reference of another size, no room.
    """
    problem = build_problem(trained.recipe)
    given = open_source(reference) if reference else None
    table = evaluate_equation(trained, given, file.stat().st_size)
    lines = metrics_of(file.parent)
    names = curve_names(lines)
    layers = planned(problem, tuple(trained.about["shape"]), "rmse" in table)
    points = points_of(problem, file.parent / "points.safetensors")
    times = times_of(problem, layers[0])
    name = file.resolve().parent.name or file.stem
    with whole_file(out) as part, part.open("w", encoding="utf-8") as page:
        page.write(head(name) + parts.header(name, problem, trained) + "<main>\n")
        page.write(parts.solution(layers, problem) if len(problem.axes) > 1 else parts.lines(layers))
        note = "" if "rmse" in table else "No answer is known, so no error is: give --reference FILE."
        page.write(sections.figures(table, note) + parts.conditions(table["conditions"]))
        page.write(parts.coefficients(table.get("coefficients", {}), names))
        if len(problem.axes) > 1:
            missing = {} if "rmse" in table else {"Reference and error": "no answer is known"}
            page.write(parts.maps(layers[1:], missing, problem))
        page.write(parts.times(problem, times) + parts.points(points) + parts.training(names))
        page.write(sections.settings(trained) + sections.versions() + "</main>\n")
        shown = write_layers(page, layers, problem, trained, given, progress)
        data = {
            "layers": [asdict(layer) for layer in layers] if len(problem.axes) > 1 else [],
            "axes": axes_of(problem),
            "curves": curves(lines, names),
            "true": {f"coefficient_{key}": value for key, value in problem.true_coefficients().items()},
            "changed": second_phase(lines),
            "times": times,
            "points": points,
            "colours": {name: colours(name) for name in COLOURS},
            **shown,
        }
        page.write(f'<script type="application/json" id="data">{embedded(data)}</script>\n')
        page.write(f"<script>{script(SCRIPTS)}</script>\n</body>\n</html>\n")
    return out


def planned(problem: PDE, shape: tuple[int, int], known: bool) -> list[Layer]:
    """The layers, the solution first; of several functions the first one is shown."""
    size = dict(height=shape[0], width=shape[1], unit="")
    first = f"The first of {problem.channels} functions. " if problem.channels > 1 else ""
    layers = [Layer("field", "Solution", colours="viridis", note=first, **size)]
    if known:
        layers.append(Layer("reference", "Reference", colours="viridis", note=first + "Same colours.", **size))
        layers.append(Layer("error", "Error", colours="RdBu_r", note=first + "Field minus reference.", **size))
    several = problem.residual_width > 1
    note = f"Root of the sum of squares of {problem.residual_width} equations." if several else "What should be zero."
    layers.append(Layer("residual", "Residual", colours="magma" if several else "RdBu_r", note=note, **size))
    return layers


def axes_of(problem: PDE) -> dict[str, dict]:
    """Of the viewer's x (columns) and y (rows): name, coordinate of the first point, and step to the next."""
    lines = problem.lattice_lines(problem.shape)
    shown = {"x": 0} if len(lines) == 1 else {"y": 0, "x": 1}
    return {
        where: {
            "name": problem.axes[k],
            "origin": float(lines[k][0]),
            "end": float(lines[k][-1]),
            "step": float(lines[k][-1] - lines[k][0]) / max(len(lines[k]) - 1, 1),
        }
        for where, k in shown.items()
    }


def times_of(problem: PDE, layer: Layer) -> list[int]:
    """Columns of the map whose times are shown side by side; [] where columns are not times."""
    if problem.axes[1:] != ("t",):
        return []
    return sorted({round(k * (layer.width - 1) / (SLICES - 1)) for k in range(SLICES)})


def write_layers(
    page: TextIO,
    layers: list[Layer],
    problem: PDE,
    trained: Trained,
    reference: Source | None,
    progress: Callable[[int, int], None] | None,
) -> dict:
    """Writes the layers' tiles and completes `layers`; the exact profiles through the middle of the map, and for a line
    all of it."""
    height, width = shape = tuple(trained.about["shape"])
    pyramids = [Pyramid(layer.name, shape, MapTiles(0.0), page.write) for layer in layers]
    block, row, column = block_of(shape), height // 2, []
    small: list[list[np.ndarray]] = [[] for _ in layers]
    low, high = math.inf, -math.inf
    for y0, y1, points in map_strips(problem, shape):
        planes = strip_of(problem, trained, points, reference and reference.read(y0, y1, 0, width))
        stack = [planes[layer.name].reshape(y1 - y0, width, 1) for layer in layers]
        lines = np.stack([planes[name].reshape(y1 - y0, width) for name in ("field", "reference") if name in planes])
        low, high = np.fmin(low, np.nanmin(lines)), np.fmax(high, np.nanmax(lines))
        for values, pyramid, rows in zip(stack, pyramids, small, strict=True):
            if len(problem.axes) > 1:
                pyramid.add(values.astype(np.float32))
            rows.append(shrink(values, block))
        if y0 <= row < y1:
            along = lines[:, row - y0]
        column.append(lines[:, :, width // 2])
        if progress:
            progress(y1, height)
    for layer, pyramid, rows in zip(layers, pyramids, small, strict=True):
        layer.levels = pyramid.finish()
        layer.low, layer.high = limits(np.concatenate(rows), layer.colours)
    if len(layers) > 2:  # the solution and its reference share their colours
        for layer in layers[:2]:
            layer.low, layer.high = min(k.low for k in layers[:2]), max(k.high for k in layers[:2])
    if len(problem.axes) == 1:
        return {"lines": {layer.name: encoded(v.astype("<f4")) for layer, v in zip(layers, stack, strict=True)}}
    ends = {"x": along, "y": np.concatenate(column, axis=1)}
    profiles = {"at": [width // 2, row]} | {axis: encoded(line.astype("<f4")) for axis, line in ends.items()}
    return {"profiles": profiles, "range": [float(low), float(high)]}


def strip_of(problem: PDE, trained: Trained, points, truth: np.ndarray | None) -> dict[str, np.ndarray]:
    """Field, residual and where known reference and error [n] at points; float64."""
    jet = problem.evaluate(trained.field, points, problem.order)
    residual = problem.residual(jet, points).double().cpu()
    planes = {"field": jet.value[:, 0].double().cpu().numpy()}
    planes["residual"] = (residual[:, 0] if residual.shape[1] == 1 else residual.norm(dim=1)).numpy()
    if truth is None:
        truth = problem.truth(points)
        truth = None if truth is None else truth.numpy()
    if truth is not None:
        planes["reference"] = truth.reshape(len(points), -1)[:, 0].astype(np.float64)
        planes["error"] = planes["field"] - planes["reference"]
    return planes


def points_of(problem: PDE, path: Path) -> list[dict]:
    """Of each set of points: name, count, and coordinates of those shown along the viewer's axes; a line has no y."""
    sets = []
    try:
        kept = load_file(path) if path.exists() else {}
    except Exception as error:  # safetensors has its own words for a damaged file
        raise UserError(f"{path}: cannot be read ({error}); remove it") from None
    drawn = kept.get("drawn_at", [])
    for step, points in zip(drawn, kept.get("drawn", []), strict=True):
        sets.append((f"drawn by the residual before update {int(step)}", points))
    if not len(drawn) and "interior" in kept:
        sets.append(("interior points of the last draw", kept["interior"]))
    if kept and problem.collocation.measured is not None:
        sets.append(("measurements", problem.collocation.measured[0].numpy()))
    found = []
    for name, points in sets:
        some = points[:: -(-len(points) // MOST)].astype("<f4")
        places = {"x": some[:, 0]} if points.shape[1] == 1 else {"x": some[:, 1], "y": some[:, 0]}
        found.append({"name": name, "count": len(points)} | {axis: encoded(v) for axis, v in places.items()})
    return found


def curve_names(lines: list[dict]) -> list[str]:
    """The numeric columns that say how the training went, in the order in which they turn up."""
    numeric = dict.fromkeys(
        name for line in lines for name, value in line.items() if isinstance(value, int | float) and "loss" in line
    )
    return [name for name in numeric if name not in UNSHOWN]


def curves(lines: list[dict], names: list[str]) -> dict[str, list]:
    """The steps and what was logged at them; no more than 2000 of them, evenly."""
    steps = [line for line in lines if "loss" in line]
    steps = steps[:: -(-len(steps) // 2000) or 1]
    return {name: [line.get(name) for line in steps] for name in ["step", *names]}


def second_phase(lines: list[dict]) -> int | None:
    """The step before the first iteration of a second-order solver that was logged; None without updates before it."""
    steps = [line for line in lines if "loss" in line]
    before = [line["step"] for line in steps if "lr" in line]
    return max(before) if before and len(before) < len(steps) else None
