"""The recipe: every option of a run, typed once. YAML, command line and `docs/recipes.md` come from these classes.

Invariant: a recipe that loads is complete and of the right types; everything else is one `UserError` line that names
the key, the file and the nearest key that exists. This file imports nothing of the program but its errors, so that
every layer may name these types.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cpikan_hr.errors import UserError


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


# ---------------------------------------------------------------- problems


class ImageProblem(Section):
    """A neural field of a picture: loss is the mean squared error of the samples."""

    kind: Literal["image"] = "image"
    path: str = Field(description="picture file: PNG, JPEG, TIFF, BMP, npy or Zarr; any size")
    rotate: Literal[0, 90, 180, 270] = Field(0, description="turn the picture counter-clockwise by so many degrees")
    flip: Literal["none", "rows", "columns"] = Field("none", description="mirror after turning")
    laplacian: float = Field(0.0, ge=0, description="weight of the mean squared Laplacian (px^-2), a smoothness prior")
    variation: float = Field(
        0.0, ge=0, description="weight of the total variation of the gradient (px^-2), a prior that leaves edges"
    )


class InterferometryProblem(Section):
    """Height from phase-shifted frames: I = A + B cos(4 pi h / lambda + delta), A and B eliminated per pixel."""

    kind: Literal["interferometry"] = "interferometry"
    stack: str = Field(description="folder that holds stack.yaml, or the file itself")
    rotate: Literal[0, 90, 180, 270] = Field(0, description="turn the frames counter-clockwise by so many degrees")
    flip: Literal["none", "rows", "columns"] = Field("none", description="mirror after turning")
    steps: Literal["nominal", "refine", "unknown"] = Field(
        "nominal",
        description="phase steps: as the stack says; refined from there on a sample of the frame; or found from "
        "nothing: then they ascend by convention, and the sign of the height follows from that",
    )
    harmonic: bool = Field(
        False, description="estimate a second harmonic of the fringes (camera or projector gamma), one per wavelength"
    )
    noise: float = Field(2.0, gt=0, description="standard deviation of one frame's read noise in grey levels")
    gain: float = Field(0.0, ge=0, description="shot noise: variance per grey level; quantisation is added to both")
    robust: float | None = Field(
        None, gt=0, description="loss grows linearly beyond so many standard deviations (Huber; null: off), e.g. 3"
    )
    quality: float = Field(
        0.0, ge=0, le=1, description="pixels whose classical decode has a lower quality are left out"
    )
    repair: bool = Field(
        True, description="decide orders that noise got wrong again, with their surroundings; needs the right `noise`"
    )
    laplacian: float = Field(
        0.0, ge=0, description="weight of the mean squared Laplacian (nm px^-2), a smoothness prior"
    )
    variation: float = Field(
        0.0, ge=0, description="weight of the total variation of the gradient (nm px^-2), a prior that leaves edges"
    )
    remove_offset: bool = Field(
        False, description="evaluate after removing the mean difference (heights known up to a constant)"
    )


Problem = Annotated[ImageProblem | InterferometryProblem, Field(discriminator="kind")]

# ---------------------------------------------------------------- field

InputMap = Literal["tanh", "identity", "sine"]


def _check_hidden(hidden: list[int]) -> None:
    if not all(1 <= width <= 65536 for width in hidden):
        raise ValueError(f"`hidden` {hidden}: a layer has from 1 to 65536 units")


class CPIKANNetwork(Section):
    """Scaled-cPIKAN: Chebyshev-KAN layers on local coordinates in [-1, 1]."""

    kind: Literal["cpikan"] = "cpikan"
    hidden: list[int] = Field([8, 8], description="widths of the hidden layers")
    degree: int | list[int] = Field(
        5, description="highest Chebyshev degree, of every layer or a list with one for each"
    )
    input_map: InputMap = Field("tanh", description="what brings a layer's input into [-1, 1]")
    first_input_map: InputMap = Field("tanh", description="the same for the first layer, whose input is scaled already")
    layer_norm: bool = Field(False, description="LayerNorm after each hidden layer")
    shared_constant: bool = Field(
        False, description="one T_0 per output instead of one per edge: the same functions, fewer numbers"
    )
    init: Literal["xavier_normal", "chebykan", "moments"] = Field(
        "xavier_normal",
        description="published Xavier normal, ChebyKAN's, or Glorot-like from the basis' second moments",
    )

    @model_validator(mode="after")
    def _layers(self) -> "CPIKANNetwork":
        _check_hidden(self.hidden)
        degrees, layers = [self.degree] if isinstance(self.degree, int) else self.degree, len(self.hidden) + 1
        if isinstance(self.degree, list) and len(degrees) != layers:
            raise ValueError(f"`degree` {degrees}: give one number, or one for each of the {layers} layers")
        if not all(1 <= degree <= 64 for degree in degrees):
            raise ValueError(f"`degree` {self.degree}: a degree is from 1 to 64")
        return self


class SIRENNetwork(Section):
    """Sine network (Sitzmann et al. 2020)."""

    kind: Literal["siren"] = "siren"
    hidden: list[int] = Field([64, 64], description="widths of the hidden layers")
    first_omega: float = Field(30.0, gt=0, description="frequency of the first layer")
    hidden_omega: float = Field(30.0, gt=0, description="frequency of the other layers")

    @model_validator(mode="after")
    def _layers(self) -> "SIRENNetwork":
        if not self.hidden:
            raise ValueError("`hidden`: siren needs at least one hidden layer, e.g. [64]")
        _check_hidden(self.hidden)
        return self


class FourierMLPNetwork(Section):
    """MLP on NeRF positional encoding (Mildenhall et al. 2020)."""

    kind: Literal["fourier_mlp"] = "fourier_mlp"
    hidden: list[int] = Field([64, 64], description="widths of the hidden layers")
    bands: int = Field(6, ge=0, le=24, description="octaves of the encoding, 2^k pi")
    activation: Literal["tanh", "silu", "gelu"] = Field("silu", description="activation of the hidden layers")

    @model_validator(mode="after")
    def _layers(self) -> "FourierMLPNetwork":
        _check_hidden(self.hidden)
        return self


class Chebyshev2DNetwork(Section):
    """Linear tensor-product Chebyshev expansion; with `input_map: sine` the cosine basis."""

    kind: Literal["chebyshev2d"] = "chebyshev2d"
    degree: int | None = Field(
        7, ge=0, le=511, description="highest degree per axis (null: as many terms as the tile has pixels)"
    )
    input_map: Literal["identity", "sine"] = Field(
        "sine", description="sine: orthogonal on pixels; identity: polynomials"
    )
    sparse: bool = Field(
        False,
        description="each tile keeps the terms that stand out (see `start` and `target`), no others; "
        "needs `degree: null`",
    )


Network = Annotated[CPIKANNetwork | SIRENNetwork | FourierMLPNetwork | Chebyshev2DNetwork, Field(discriminator="kind")]


class LevelOptions(Section):
    """One level: tiles that cover the domain, one network each; several strides make a quadtree of tiles."""

    tile: int | list[int] | None = Field(
        None,
        description="tile stride in px, or the strides of a quadtree's leaves, each half the one before "
        "(give this or `grid`)",
    )
    grid: tuple[int, int] | None = Field(None, description="number of tiles [rows, columns] (give this or `tile`)")
    overlap: float = Field(
        0.25, ge=0, le=1, description="width of the blend between neighbours over the (smallest) tile stride"
    )
    grow: bool = Field(
        False,
        description="cpikan, siren with one hidden layer: each tile gets the units that pay, up to `hidden`, "
        "by Gauss-Newton",
    )
    lr_scale: float = Field(1.0, ge=0, description="this level's learning rate over `training.lr`; 0 keeps its start")
    network: Network

    @model_validator(mode="after")
    def _one_size(self) -> "LevelOptions":
        if (self.tile is None) == (self.grid is None):
            raise ValueError("give either `tile` (px) or `grid` ([rows, columns])")
        if self.grid is not None and min(self.grid) < 1:
            raise ValueError("`grid` needs at least one tile per axis")
        strides = self.strides
        if strides is not None and (not strides or min(strides) < 2):
            raise ValueError("`tile` is at least 2 px")
        if strides is not None and any(large != 2 * small for large, small in zip(strides, strides[1:], strict=False)):
            raise ValueError("`tile`: each stride of a quadtree is half the one before, e.g. [64, 32, 16, 8]")
        sparse = getattr(self.network, "sparse", False)
        adaptive = self.grow or sparse
        if sparse and self.network.degree is not None:
            raise ValueError("`sparse` chooses among as many terms as the tile has pixels: give `degree: null`")
        if self.grow and (self.network.kind not in ("cpikan", "siren") or len(self.network.hidden) != 1):
            raise ValueError("`grow` needs cpikan or siren with one hidden layer, e.g. hidden: [6]")
        if strides is not None and len(strides) > 1 and not adaptive:
            raise ValueError("`tile`: a quadtree needs a network that adapts: chebyshev2d with `sparse`, or `grow`")
        if adaptive and strides is None:
            raise ValueError("an adaptive level needs `tile`, the strides of its leaves in px")
        if adaptive and (
            round(self.overlap * strides[-1], 6) % 2
            or self.network.kind == "chebyshev2d"
            and self.network.input_map != "sine"
        ):
            raise ValueError(
                "an adaptive level blends over an even number of px (`overlap` times the smallest `tile`), "
                "on `input_map: sine`"
            )
        if self.grid is not None and self.network.kind == "chebyshev2d" and self.network.degree is None:
            raise ValueError("`degree: null` needs tiles of a number of pixels: give `tile`")
        return self

    @property
    def strides(self) -> list[int] | None:
        """Tile strides in px, largest first; None for a level given by `grid`."""
        return [self.tile] if isinstance(self.tile, int) else self.tile


class FieldOptions(Section):
    """u(x) = sum over levels and tiles of window * (mean + scale * network(local x))."""

    window: Literal["quintic", "cosine", "bump"] = Field(
        "quintic", description="blend: quintic smoothstep (C2), raised cosine (C1), bump (C-infinity)"
    )
    channels: Literal["plain", "principal"] = Field(
        "principal",
        description="levels work in the data's own channels, or in its principal components (colours decorrelate)",
    )
    mode: Literal["joint", "progressive"] = Field(
        "joint", description="train all levels together, or let them join one after another, coarse to fine"
    )
    levels: list[LevelOptions] = Field(min_length=1, description="coarse to fine")
    chunk: int = Field(262144, ge=1024, description="largest number of jet rows x points evaluated at once")
    checkpoint: bool = Field(False, description="recompute activations in the backward pass (non-reentrant)")
    compile: bool = Field(False, description="torch.compile the jet kernels")


class StartOptions(Section):
    """Closed-form start: per-tile least squares of each level's linear layer, coarse to fine, before training."""

    enabled: bool = Field(True, description="off: networks start as initialised, tiles normalised by the data range")
    threshold: float = Field(
        3.0, ge=0, description="sparse chebyshev2d: drop terms below so many standard errors of the noise"
    )
    shifts: int = Field(
        0,
        ge=0,
        le=64,
        description="sparse chebyshev2d, noise known: average so many shifted quadtrees before terms are chosen; "
        "`threshold` may then be below 1",
    )
    shifted_threshold: float = Field(2.8, gt=0, description="what `threshold` is in each of the shifted quadtrees")
    sweeps: int = Field(
        0, ge=0, description="coloured sweeps over grown tiles after the start, so that neighbours see each other"
    )
    ridge: float = Field(1e-6, gt=0, description="relative Tikhonov term of the normal equations")


class TargetOptions(Section):
    """What adaptive levels aim at; all null: only the noise limits them (`start.threshold`)."""

    psnr: float | None = Field(None, gt=0, description="dB, over the full range of 8/16-bit pictures (1 for floats)")
    rmse: float | None = Field(None, gt=0, description="in the unit of the field")
    params_per_px: float | None = Field(None, gt=0, description="most parameters per pixel and channel")
    seconds: float | None = Field(
        None,
        gt=0,
        description="wall time of the whole run: passes, sweeps and training end with it; "
        "alone, it allows 0.25 parameters per pixel and channel",
    )


class BatchOptions(Section):
    """One update sees `blocks` windows of the picture and draws one pixel from each stride x stride square of them."""

    blocks: int = Field(16, ge=1, description="windows per update over all processes and accumulation steps")
    size: int = Field(256, ge=8, description="side of a window in px")
    stride: int = Field(4, ge=1, description="side of the squares one pixel is drawn from; 1: every pixel")


class TrainingOptions(Section):
    steps: int = Field(200, ge=0, description="optimizer updates")
    seed: int = Field(0, ge=0, description="of weights, pixels and order")
    optimizer: Literal["adam", "adamw", "nadam", "radam", "adamax", "rmsprop", "sgd", "soap"] = Field(
        "adam", description="torch.optim's; soap: pytorch-optimizer's, not under DeepSpeed or FSDP2"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.99), description="moment decay of the Adam family and of soap")
    weight_decay: float = Field(0.0, ge=0, description="decoupled for adamw and soap, L2 otherwise")
    schedule: Literal["constant", "cosine", "exponential"] = Field("cosine", description="decay after the warm-up")
    warmup: int = Field(10, ge=0, description="updates of linear warm-up")
    final_lr: float = Field(0.01, gt=0, le=1, description="learning rate at the end over the peak")
    accumulate: int = Field(1, ge=1, description="micro-batches per update")
    clip: float | None = Field(None, gt=0, description="largest gradient norm (null: off)")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of the averaged weights that are kept (null: off)")
    precision: Literal["no", "bf16", "fp16"] | None = Field(
        None,
        description="mixed precision (null: as the accelerate file says); interferometry and derivatives stay fp32",
    )
    sweep_every: int | None = Field(
        None, ge=1, description="updates between sweeps of local solves over grown tiles (null: off)"
    )
    settle_rmse: float | None = Field(
        None,
        gt=0,
        description="tiles leave the training where the field's error under their window, root mean square in its "
        "unit (grey levels, nm), is at or below this; the run ends when all have (null: off)",
    )
    settle_every: int = Field(
        200, ge=1, description="updates between looks at which tiles may leave, the first before the first update"
    )
    log_every: int = Field(10, ge=1, description="updates between lines of metrics.jsonl")
    checkpoint_steps: int | None = Field(None, ge=1, description="updates between checkpoints (null: off)")
    checkpoint_minutes: float | None = Field(10.0, gt=0, description="minutes between checkpoints (null: off)")
    keep: int = Field(2, ge=1, description="checkpoints kept")


class Recipe(Section):
    """A run: what is learned, by which field, and how it is trained."""

    output: str = Field(description="run folder, created")
    resume: str = Field("auto", description="auto: newest checkpoint if there is one; never; or a checkpoint folder")
    problem: Problem
    field: FieldOptions
    start: StartOptions = StartOptions()
    target: TargetOptions = TargetOptions()
    batch: BatchOptions = BatchOptions()
    training: TrainingOptions = TrainingOptions()

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        if not any(level.grow for level in self.field.levels):
            for key, given in (
                ("start.sweeps", self.start.sweeps),
                ("training.sweep_every", self.training.sweep_every),
            ):
                if given:
                    raise ValueError(f"'{key}': sweeps are over grown tiles, and no level has `grow: true`")
        if self.problem.kind == "interferometry" and self.target.psnr is not None:
            raise ValueError("'target.psnr': heights have no full range: give target.rmse in nm")
        return self

    @property
    def full_precision(self) -> bool:
        """Whether the loss sees phases or derivatives: 8 bits of a height are many wavelengths off."""
        return self.problem.kind == "interferometry" or self.problem.laplacian > 0 or self.problem.variation > 0


# ---------------------------------------------------------------- loading


def load_recipe(path: str | Path, overrides: list[str] = ()) -> Recipe:
    """Reads a YAML recipe and applies `--section.option value` pairs.

    List items by number (`--field.levels.1.tile 32`).
    Raises UserError with one line for a missing file, broken YAML, an unknown key, a wrong type or a bad value.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the recipe ({getattr(error, 'strerror', None) or 'not text'})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{path}: not valid YAML{where}: {getattr(error, 'problem', None) or 'check the syntax'}"
        ) from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections ({', '.join(Recipe.model_fields)})")
    for key, text in _pairs(list(overrides)):
        _assign(tree, key, text)
    return parse_recipe(tree, str(path))


def parse_recipe(tree: dict[str, Any], where: str) -> Recipe:
    """Validates a tree of plain values; `where` names its origin in messages."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error)}") from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _pairs(words: list[str]) -> list[tuple[str, str]]:
    pairs = []
    while words:
        word = words.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise UserError(f"command line: '{word}' is not an option; write --section.option value")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not words:
                raise UserError(f"command line: --{key} needs a value")
            text = words.pop(0)
        pairs.append((key, text))
    return pairs


def _assign(tree: Any, key: str, text: str) -> None:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    *parents, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    node = tree
    for part in parents:
        if isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
        elif isinstance(node, dict):
            node = node.setdefault(part, {})
        else:
            raise UserError(f"command line: --{key}: there is no '{part}' to set an option in")
    if isinstance(node, list) and isinstance(last, int) and last < len(node) or isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"command line: --{key}: there is no '{last}' to set")


def _explain(error: ValidationError) -> str:
    """The first mistake, an unknown key before the errors it may have caused."""
    problems = sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    item = problems[0]
    path = [part for part in item["loc"] if part not in _TAGS]
    key = ".".join(str(part) for part in path)
    if item["type"] == "extra_forbidden":
        siblings = _keys_at(item["loc"][:-1])
        near = difflib.get_close_matches(str(path[-1]), siblings, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(sorted(siblings))}"
        return f"unknown key '{key}'; {hint}"
    if item["type"] == "missing":
        return f"'{key}' is missing; add it"
    if item["type"].startswith("union_tag"):
        return f"'{key}.kind' must be one of {item.get('ctx', {}).get('expected_tags', 'the known kinds')}"
    message = item["msg"].removeprefix("Value error, ")
    value = "" if isinstance(item["input"], dict | list) else f", not {item['input']!r}"
    return f"'{key}': {message[0].lower()}{message[1:]}{value}" if key else message


def _members(annotation: Any) -> list[type[Section]]:
    """The section classes inside an annotation such as list[X], X | None or Annotated[X | Y, ...]."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [member for part in get_args(annotation) for member in _members(part)]


def _tags() -> dict[str, type[Section]]:
    kinds = [*_members(Problem), *_members(Network)]
    return {kind.model_fields["kind"].default: kind for kind in kinds}


_TAGS = _tags()


def _keys_at(location: tuple) -> list[str]:
    sections: list[type[Section]] = [Recipe]
    for part in location:
        if part in _TAGS:
            sections = [_TAGS[part]]
        elif isinstance(part, str):
            sections = [
                m for s in sections if part in s.model_fields for m in _members(s.model_fields[part].annotation)
            ]
    return sorted({key for section in sections for key in section.model_fields})
