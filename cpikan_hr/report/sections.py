"""The sections of the page: HTML of tables and of the places where the script draws. Each knows only its own part."""

import importlib.metadata
import math
import platform
from html import escape

import numpy as np

from cpikan_hr.recipe import Recipe, dump_recipe
from cpikan_hr.report.plan import Layer
from cpikan_hr.training.weights import Trained

PACKAGES = ("cpikan_hr", "torch", "accelerate", "deepspeed", "numpy", "scipy", "scikit-image", "tifffile")
# key of `evaluate`: what it is called, its unit ("" none, None the field's), what it means
FIGURES = {
    "rmse": ("RMSE", None, "root mean square error against the reference"),
    "classical_rmse": ("RMSE of the classical decode", None, "the same stack, decoded pixel by pixel"),
    "over_classical": ("RMSE over that of the decode", "", ""),
    "psnr": ("PSNR", "dB", "of the range below"),
    "range": ("Range", None, "what the PSNR refers to: of the picture, or of the reference's heights"),
    "ssim": ("SSIM", "", "structural similarity, 7 x 7 windows"),
    "rel_l2": ("Relative L2 error", "", ""),
    "linf": ("Largest error", None, "against the reference"),
    "compared": ("Compared", "", "share of the values that the reference has"),
    "residual": ("Residual", "", "root mean square of the equation's residual at fresh points"),
    "seam": ("Largest seam", None, "jump across a tile's border beyond the jumps beside it"),
    "pv": ("PV", None, "highest minus lowest"),
    "sq": ("Sq", None, "root mean square height, ISO 25178"),
    "sa": ("Sa", None, "arithmetical mean height, ISO 25178"),
    "bow": ("Bow", None, "centre above the least-squares plane, as in SEMI MF1390, of this one side"),
    "warp": ("Warp", None, "range of the deviations from that plane, as in SEMI MF1390, of this one side"),
    "params": ("Parameters", "", ""),
    "params_per_px": ("Parameters per pixel", "", ""),
    "bytes": ("Field's file", "bytes", ""),
    "train_seconds": ("Training", "s", ""),
    "peak_rss_mb": ("Peak memory", "MB", "of the training, or of this report where that was more"),
    "gpu_peak_mb": ("Peak memory of the GPU", "MB", ""),
}
DASH = "\u2013"
REMOVED = {"none": "the mean", "plane": "the plane", "bow": "the second-order surface"}


def number(value: float | None) -> str:
    """Five digits, whole numbers with their thousands set apart; a dash for what is not finite."""
    if value is None or not math.isfinite(value):
        return DASH
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace(",", "\u202f")
    return f"{value:.5g}"


def section(name: str, title: str, body: str) -> str:
    return (
        f'<section id="{name}" aria-labelledby="{name}-title"><h2 id="{name}-title">{title}</h2>\n{body}\n</section>\n'
    )


def header(title: str, about: dict, recipe: Recipe) -> str:
    height, width = about["shape"]
    pitch = about["pixel_pitch_um"]
    parts = [recipe.problem.kind, f"{width} \u00d7 {height} px"]
    if pitch:
        parts.append(f"{width * pitch / 1000:.4g} \u00d7 {height * pitch / 1000:.4g} mm at {pitch:g} \u00b5m per px")
    return f"<header><h1>{escape(title)}</h1><p>{escape(', '.join(parts))}</p></header>\n"


def viewer(layer: Layer, profiles: bool = False, axes: tuple[str, str] | None = None) -> str:
    """A place for a layer: a canvas to move in, its scale and what is under the cursor.

    `axes`: names of those to the right and down, with numbers of their own at the canvas; None: they count px.
    """
    name, title = layer.name, escape(layer.title)
    bar = "" if layer.kind == "picture" else '<div class="bar"><canvas></canvas><div class="ticks"></div></div>'
    fit = "" if layer.kind == "picture" else '<button type="button" data-do="fit">Colours of this view</button>'
    point = ""
    if profiles:
        x, y = axes or ("x", "y")
        bounds = ['step="any"'] * 2 if axes else [f'min="0" max="{n - 1}"' for n in (layer.width, layer.height)]
        fields = [
            f'<label>{name} <input name="{key}" type="number" {bound}></label>'
            for key, name, bound in (("x", x, bounds[0]), ("y", y, bounds[1]))
        ]
        fields = "".join(fields[::-1] if axes else fields)  # of an equation the first axis goes down
        point = f'<form class="point">{fields}<button>Profiles here</button></form>'
    canvas = (
        f'<canvas class="map" tabindex="0" role="img" aria-label="{title}. Arrow keys move, plus and minus zoom, '
        '0 shows the whole map, Enter chooses the point in the middle." '
        f'style="aspect-ratio: {layer.width} / {layer.height}"></canvas>'
    )
    if axes:
        shape = f"--shape: {layer.width / layer.height:g}"
        rules = '<div class="rule down"></div>', '<div class="rule across"></div>'
        canvas = f'<div class="framed" style="{shape}">{rules[0]}{canvas}{rules[1]}</div>'
    return f"""<figure class="view" data-layer="{name}">
<div class="tools" role="group" aria-label="{title}">
<button type="button" data-do="in" aria-label="Zoom in">+</button>
<button type="button" data-do="out" aria-label="Zoom out">&minus;</button>
<button type="button" data-do="whole">Whole map</button>{fit}{point}
</div>
{canvas}
{bar}
<figcaption><output aria-live="polite">&nbsp;</output><span class="note">{escape(layer.note)}</span></figcaption>
</figure>"""


def the_map(layer: Layer) -> str:
    """The main map with its two profiles."""
    hint = "Drag or pinch to move, wheel to zoom, click for the profiles through a point."
    plots = "".join(
        f'<figure><figcaption id="{name}-title">{title}</figcaption>'
        f'<div class="plot" id="{name}" role="img" aria-labelledby="{name}-title"></div></figure>'
        for name, title in (("profile-x", "Horizontal profile"), ("profile-y", "Vertical profile"))
    )
    return section(
        "map", escape(layer.title), f'<p class="note">{hint}</p>{viewer(layer, True)}<div class="pair">{plots}</div>'
    )


def maps(layers: list[Layer], missing: dict[str, str]) -> str:
    """The smaller maps side by side; of one that there is not, the reason."""
    parts = [f"<div><h3>{escape(layer.title)}</h3>{viewer(layer)}</div>" for layer in layers]
    parts += [
        f"<div><h3>{escape(t)}</h3><p class=missing>Not available: {escape(w)}.</p></div>" for t, w in missing.items()
    ]
    return section("maps", "Errors", f'<div class="pair">{"".join(parts)}</div>') if parts else ""


def figures(values: dict, note: str) -> str:
    """The numbers of the run; what is None was not to be had."""
    rows = []
    for key, (name, unit, meaning) in FIGURES.items():
        value = values.get(key)
        if value is None or (key == "gpu_peak_mb" and not value):
            continue
        if key in ("pv", "sq", "sa"):
            meaning = f"{meaning}; without {REMOVED[values['removed']]}"
        unit = values["unit"] if unit is None else unit
        unit = "" if unit == "1" else unit
        rows.append(
            f'<tr data-key="{key}"><th scope="row">{escape(name)}</th><td class="number" data-value="{value!r}">'
            f"{number(value)}</td><td>{escape(unit)}</td><td class=note>{escape(meaning)}</td></tr>"
        )
    head = "<tr><th>Figure</th><th class=number>Value</th><th>Unit</th><th>Meaning</th></tr>"
    table = f'<div class="scroll"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'
    return section("figures", "Figures", table + (f"<p class=note>{escape(note)}</p>" if note else ""))


def training(lines: list[dict], unit: str) -> str:
    """What the start's levels contributed, and a place for each curve of the steps after it."""
    levels = [line for line in lines if "level" in line]
    body = ""
    if levels:
        most = max((row["rmse"] or 0 for row in levels), default=0) or 1
        cells = [
            f"<tr><td class=number>{row['level']}</td><td>{escape(str(row['network']))}</td>"
            f"<td class=number>{number(row['tiles'])}</td><td class=number>{number(row['params'])}</td>"
            f"<td class=number>{number(row['rmse'])}</td>"
            f'<td><svg class="share" viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
            f'<rect width="{100 * (row["rmse"] or 0) / most:.1f}" height="10"/></svg></td></tr>'
            for row in levels
        ]
        left = "RMS left of the data" + (f" ({escape(unit)})" if unit != "1" else "")
        titles = ("Level", "Network", "Tiles", "Parameters", left, "")
        head = "".join(f"<th{'' if k == 1 else ' class=number'}>{title}</th>" for k, title in enumerate(titles))
        body += (
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(cells)}</tbody></table></div>'
        )
    names = curve_names(lines)
    plots = "".join(
        f'<figure><figcaption id="curve-{name}-title">{escape(name)}</figcaption>'
        f'<div class="plot" id="curve-{name}" role="img" aria-labelledby="curve-{name}-title"></div></figure>'
        for name in names
    )
    body += (
        f'<div class="pair">{plots}</div>'
        if names
        else "<p class=note>No gradient steps were made after the start.</p>"
    )
    return section("training", "Training", body)


def curve_names(lines: list[dict]) -> list[str]:
    """The loss and the figure of merit, where steps were logged."""
    steps = [line for line in lines if "loss" in line]
    return [name for name in steps[0] if name == "loss" or name.startswith(("rmse", "psnr"))] if steps else []


def phase_steps(nominal, found, wavelengths_um: list[float]) -> str:
    """Nominal phase steps in rad, rows per wavelength, and those the run has found; None where there are none."""
    nominal, found = (
        rows and [[float(s) for s in row if s is not None and math.isfinite(s)] for row in rows]
        for rows in (nominal, found)
    )
    if nominal and found and all(np.allclose(a, b, atol=1e-5) for a, b in zip(nominal, found, strict=True) if a):
        found = None  # taken over as they are
    kinds = [(kind, rows) for kind, rows in (("nominal", nominal), ("found", found)) if rows]
    if not kinds:
        return ""
    count = max(len(row) for _, rows in kinds for row in rows)
    lines = []
    for j, wavelength in enumerate(wavelengths_um):
        for kind, rows in kinds:
            cells = "".join(f"<td class=number>{step:.4f}</td>" for step in rows[j])
            lines.append(f'<tr class="{kind}"><td class=number>{wavelength:g}</td><td>{kind}</td>{cells}</tr>')
    head = "<th class=number>Wavelength (\u00b5m)</th><th></th>"
    head += "".join(f"<th class=number>Step {k + 1}</th>" for k in range(count))
    body = f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    if not found:
        body += "<p class=note>The run took the nominal steps as they are.</p>"
    return section("steps", "Phase steps (rad)", body)


def settings(trained: Trained) -> str:
    text = escape(dump_recipe(trained.recipe))
    return section("settings", "Settings", f'<pre tabindex="0" aria-label="The recipe">{text}</pre>')


def versions() -> str:
    """Of the program that wrote the report."""
    rows = [("Python", platform.python_version()), ("system", platform.platform())]
    for name in PACKAGES:
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:  # run from its sources
            continue
    cells = "".join(f'<tr><th scope="row">{escape(name)}</th><td>{escape(version)}</td></tr>' for name, version in rows)
    return section(
        "versions", "Versions", f"<table><tbody>{cells}</tbody></table><p class=note>Of this report's program.</p>"
    )
