"""The sections of an equation's report: HTML of tables and of the places where the script draws."""

from html import escape

from cpikan_hr.problems import PDE
from cpikan_hr.report.plan import Layer
from cpikan_hr.report.sections import number, section, viewer
from cpikan_hr.training.weights import Trained

TITLES = {
    "loss": "Loss",
    "residual": "Residual (root mean square)",
    "rel_l2": "Relative L2 error",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "evaluations": "Evaluations",
}
DASHED = "Dashed: the reference."


def header(title: str, problem: PDE, trained: Trained) -> str:
    height, width = trained.about["shape"]
    ends = zip(problem.axes, problem.box.low, problem.box.high, strict=True)
    parts = [problem.name, *(f"{axis} from {low:g} to {high:g}" for axis, low, high in ends)]
    parts.append(f"{height} \u00d7 {width} points" if len(problem.axes) > 1 else f"{width} points")
    return f"<header><h1>{escape(title)}</h1><p>{escape(', '.join(parts)).replace('-', chr(0x2212))}</p></header>\n"


def plot(name: str, title: str, kind: str = "plot") -> str:
    """A place for a plot."""
    return (
        f'<figure><figcaption id="{name}-title">{escape(title)}</figcaption>'
        f'<div class="{kind}" id="{name}" role="img" aria-labelledby="{name}-title"></div></figure>'
    )


def at_end(problem: PDE) -> str:
    """Where the map of three axes lies."""
    return f" At {problem.axes[2]} = {problem.box.high[2]:g}." if len(problem.axes) > 2 else ""


def solution(layers: list[Layer], problem: PDE) -> str:
    """The main map with its two profiles."""
    dashed = f" {DASHED}" if len(layers) > 2 else ""
    hint = f"Drag or pinch to move, wheel to zoom, click for the profiles through a point.{dashed}{at_end(problem)}"
    profiles = plot("profile-x", "Profile") + plot("profile-y", "Profile")
    down, across = problem.axes[:2]
    view = viewer(layers[0], True, (across, down))
    body = f'<p class="note">{hint}</p><div class="pair"><div>{view}</div><div>{profiles}</div></div>'
    return section("map", layers[0].title, body)


def lines(layers: list[Layer]) -> str:
    """The solution of an equation of one axis."""
    known = len(layers) > 2
    titles = {"field": "Solution", "error": "Field minus reference", "residual": "Residual"}
    names = [layer.name for layer in layers if layer.name in titles]
    body = plot("line-field", titles["field"])
    body += f"<p class=note>{DASHED}</p>" if known else "<p class=note>No answer is known.</p>"
    rest = "".join(plot(f"line-{name}", titles[name]) for name in names[1:])
    return section("line", "Solution", f'{body}<div class="pair">{rest}</div>')


def maps(layers: list[Layer], missing: dict[str, str], problem: PDE) -> str:
    """The other maps side by side; of those that there are not, the reason."""
    down, across = problem.axes[:2]
    parts = [f"<div><h3>{escape(k.title)}</h3>{viewer(k, axes=(across, down))}</div>" for k in layers]
    parts += [f"<p class=missing>{escape(t)}: not available, {escape(why)}.</p>" for t, why in missing.items()]
    title = "Reference, error and residual" if len(layers) > 1 else "Residual"
    return section("maps", title, f'<div class="pair">{"".join(parts)}</div>')


def table(columns: tuple[str, ...], rows: list[tuple]) -> str:
    """The first column names its row, the others are numbers; None is left empty."""
    head = "".join(f"<th{'' if k == 0 else ' class=number'}>{escape(name)}</th>" for k, name in enumerate(columns))
    body = ""
    for name, *values in rows:
        cells = "".join(
            "<td></td>" if v is None else f'<td class="number" data-value="{v!r}">{number(v)}</td>' for v in values
        )
        body += f'<tr data-name="{escape(name)}"><th scope="row">{escape(name)}</th>{cells}</tr>'
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def conditions(found: dict[str, dict[str, float]]) -> str:
    if not found:
        return ""
    rows = [(name, error["rms"], error["max"]) for name, error in found.items()]
    note = "<p class=note>What each condition says is zero, on a lattice of its face.</p>"
    return section("conditions", "Conditions", table(("Condition", "Root mean square", "Largest"), rows) + note)


def coefficients(found: dict[str, dict[str, float]], names: list[str]) -> str:
    """The unknowns of an inverse problem, and a place for the curve of each that was logged."""
    if not found:
        return ""
    rows = [(name, c["value"], c.get("true"), c.get("relative_error")) for name, c in found.items()]
    body = table(("Coefficient", "Value", "True value", "Relative error"), rows)
    logged = [name for name in found if f"coefficient_{name}" in names]
    plots = "".join(plot(f"curve-coefficient_{name}", f"{name} over the steps") for name in logged)
    if plots:
        body += f'<div class="pair">{plots}</div>'
    if plots and any("true" in c for c in found.values()):
        body += "<p class=note>Dashed: the true value.</p>"
    return section("coefficients", "Coefficients", body)


def times(problem: PDE, columns: list[int]) -> str:
    """The solution at some times, and as an animation; nothing where columns of the map are not times."""
    if not columns:
        return ""
    last = problem.shape[1] - 1
    animation = (
        '<div class="tools" role="group" aria-label="Animation"><button type="button" id="play" aria-pressed="false">'
        f'Play</button><label class="slide">t <input type="range" id="time" min="0" max="{last}" step="1" value="0">'
        f'</label><output id="time-said"></output></div>{plot("animation", f"u({problem.axes[0]}) at time t")}'
    )
    slices = "".join(plot(f"slice-{k}", "") for k in range(len(columns)))
    return section("times", "In time", f'{animation}<div class="many">{slices}</div>')


def points(sets: list[dict]) -> str:
    """Where the collocation points are; a choice where there are several sets."""
    if not sets:
        return ""
    drawn = [k for k, one in enumerate(sets) if one["name"] != "measurements"]
    options = ""
    for k, one in enumerate(sets):
        selected = " selected" if k == drawn[-1] else ""
        options += f'<option value="{k}"{selected}>{escape(one["name"])}, {one["count"]} points</option>'
    choice = f'<div class="tools"><label>Points <select id="points-set">{options}</select></label></div>'
    return section("points", "Collocation points", choice + plot("points-plot", "", "plot scatter"))


def title_of(name: str) -> str:
    """Of a column of metrics.jsonl."""
    if name.startswith("rms_"):
        return f"{name.removeprefix('rms_')} (root mean square)"
    return TITLES.get(name, name)


def training(names: list[str]) -> str:
    """A place for each curve; those of coefficients stand with them."""
    shown = [name for name in names if not name.startswith("coefficient_")]
    plots = "".join(plot(f"curve-{name}", title_of(name)) for name in shown)
    body = f'<div class="pair">{plots}</div>' if plots else "<p class=note>Nothing was logged.</p>"
    return section("training", "Training", body)
