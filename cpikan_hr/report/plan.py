"""Which layers a report has: what each is called, its unit and its colours, before anything of it is computed."""

from dataclasses import dataclass, field

from cpikan_hr.data.source import Source
from cpikan_hr.problems import Problem
from cpikan_hr.quantities import STARTED, full_range, knows_sigma
from cpikan_hr.report.layers import block_of, has_frames, precision
from cpikan_hr.report.pyramid import QUALITY, MapTiles, PictureTiles
from cpikan_hr.training.weights import Trained


@dataclass
class Layer:
    """Pixels of a layer's finest level are `scale` px of the source wide; `low` and `high` bound its colours."""

    name: str
    title: str
    width: int  # px of the source, as all layers share its coordinates
    height: int
    unit: str
    colours: str
    note: str
    scale: int = 1
    kind: str = "map"  # or picture: 8 bits per colour, up to `full`
    full: float = 1.0
    low: float = 0.0
    high: float = 1.0
    levels: list[tuple[int, int]] = field(default_factory=list)  # [h, w], the finest first


def planned(trained: Trained, problem: Problem | None, reference: Source | None) -> tuple[list[Layer], dict[str, str]]:
    """The layers, the map first; and of those that there are not, title and reason."""
    about, kind = trained.about, trained.recipe.problem.kind
    height, width = about["shape"]
    size = dict(width=width, height=height)
    unit = "" if about["unit"] == "1" else about["unit"]
    title = "Height map" if unit == "nm" else "Picture" if kind == "image" else "Field"
    if is_picture(about):
        note = f"Shown with 8 bits per colour, WebP of quality {QUALITY}."
        full = full_range(about) or 1.0
        layers = [Layer("field", title, unit=unit, colours="", note=note, kind="picture", full=full, **size)]
    else:
        step = precision(trained)
        note = f"Stored in steps of {step:g} {unit}.".replace(" .", ".") if step else ""
        if about["channels"] > 1:
            note = f"The first of {about['channels']} channels. {note}"
        layers = [Layer("field", title, unit=unit, colours="viridis" if unit == "nm" else "gray", note=note, **size)]
    block = block_of((height, width))
    of = "" if block == 1 else f" over {block} \u00d7 {block} px"
    size |= dict(scale=block)
    missing = {}
    if reference is not None:
        note = (f"Field minus reference, mean{of}" if of else "Field minus reference") + "."
        if about["channels"] > 1:
            note += " Mean of the channels."
        layers.append(Layer("error", "Error", unit=unit, colours="RdBu_r", note=note, **size))
    else:
        missing["Error"] = "no reference is known"
    if has_frames(problem):
        noise = f"{problem.options.noise:g} grey levels"
        note = f"Root mean square{of}, in units of the noise of {noise}: 1 is the noise alone."
        layers.append(Layer("residual", "Residual of the frames", unit="\u03c3", colours="magma", note=note, **size))
    elif kind == "interferometry":
        missing["Residual of the frames"] = "the stack is not there any more"
    if has_frames(problem) and knows_sigma(trained.recipe):
        note = f"Standard deviation of each pixel{', mean' + of if of else ''}."
        note += f" ({STARTED})" if trained.recipe.training.steps else ""
        layers.append(Layer("sigma", "Uncertainty", unit=unit, colours="magma", note=note, **size))
    elif kind == "interferometry":
        missing["Uncertainty"] = "it comes from averaged quadtrees (start.shifts) and needs the stack"
    return layers, missing


def is_picture(about: dict) -> bool:
    """Whether the field is seen as it is, not through a scale of colours."""
    return about["channels"] == 3 or about["channels"] == 1 and about.get("dtype") == "uint8"


def encoder(layer: Layer, trained: Trained) -> MapTiles | PictureTiles:
    """How the layer's tiles are stored; block maps in a five hundredth of the range of their colours."""
    if layer.kind == "picture":
        return PictureTiles(layer.full)
    return MapTiles(precision(trained) if layer.name == "field" else (layer.high - layer.low) / 500)
