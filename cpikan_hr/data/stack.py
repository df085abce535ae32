"""A stack of phase-shifted interferograms: what `stack.yaml` says about the frames, and the frames, window by window.

Invariants
* Frames are ordered wavelength-major, first all phase steps of wavelength 0; frame k of wavelength j obeys
  I_jk = A_j + B_j cos(4 pi (h + carrier) / lambda_j + delta_jk).
* Wavelengths may have different numbers of steps: what the shorter ones lack up to K is NaN in `phase_steps_rad` and
  0 in what `read` returns.
* All frames have one size and one dtype; only the windows asked for are read.
* Every pixel handed out was checked: finite, and not above 2**bit_depth - 1 in integer frames. Outside the mask what
  is neither is handed out as 0.
"""

import difflib
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from cpikan_hr.data.masks import Mask
from cpikan_hr.data.pages import split_page
from cpikan_hr.data.plausible import check_lengths, check_steps, check_wavelengths
from cpikan_hr.data.source import Source, open_pages, tell_orientation
from cpikan_hr.data.windows import holds
from cpikan_hr.errors import UserError

STACK_FILE = "stack.yaml"
REFERENCE_UNIT = "reference_unit in stack.yaml"  # the key, in messages
_DIGITS = re.compile(r"([0-9]+)")
_MEASURED = re.compile(r"((?:(?<![^\W_])-)?[0-9]+(?:\.[0-9]+)?)")  # with a sign, unless it ties words, and decimals
MIN_STEPS = 3  # background, modulation and phase: three unknowns per wavelength



def _no_bool(value: object) -> object:
    """`yes` and `on` are no numbers, though Python would take them for 1."""
    if isinstance(value, bool):
        raise ValueError("a number, not yes or no")
    return value


Positive = Annotated[float, Field(gt=0, allow_inf_nan=False), BeforeValidator(_no_bool)]
Finite = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_no_bool)]
Whole = Annotated[int, BeforeValidator(_no_bool)]


class Circle(BaseModel):
    """A circular aperture: centre row, centre column and radius in pixels."""

    model_config = ConfigDict(extra="forbid")
    circle: tuple[Finite, Finite, Positive]


class StackFile(BaseModel):
    """The keys of `stack.yaml`. File names are relative to the folder it stands in."""

    model_config = ConfigDict(extra="forbid")
    frames: str | list[str] = Field(description="glob, list of files, or one multi-page TIFF, .npy or Zarr array")
    wavelengths_um: list[Positive] = Field(
        default=[], validate_default=False, min_length=1, description="one per wavelength, in the order of the frames"
    )
    wavelengths_nm: list[Positive] = Field(
        default=[], validate_default=False, min_length=1, description="the same in nm; one of the two"
    )
    phase_steps_rad: list[list[Finite]] | list[Finite] | None = Field(
        None,
        description="one list for all wavelengths, a list of lists (one per wavelength), or null: unknown",
    )
    pixel_pitch_um: Positive = Field(description="side of a pixel on the object")
    mask: str | Circle | None = Field(None, description="picture, 0 = invalid; or {circle: [row, column, radius]}")
    height_range_um: tuple[Finite, Finite] | None = Field(None, description="lowest and highest height that can occur")
    bit_depth: Whole = Field(8, description="bits of a grey value, 1 to 16")
    channel: Whole | None = Field(None, ge=0, le=2, description="which channel of colour frames to use")
    carrier_nm_per_px: tuple[Finite, Finite] | None = Field(
        None, description="tilt of the reference: height in nm that each row and column adds to what the fringes show"
    )
    reference: str | None = Field(None, description="map of the true height, where it is known")
    reference_unit: str | None = Field(None, description="of the reference, if its file does not say it: nm, um, ...")


@dataclass(frozen=True)
class Stack:
    """J wavelengths x up to K phase steps of frames [H, W]; see the module's docstring for their order and model."""

    wavelengths_um: list[float]
    phase_steps_rad: np.ndarray | None  # [J, K]; NaN where a wavelength has no such frame
    pixel_pitch_um: float
    height_range_um: tuple[float, float] | None
    bit_depth: int
    shape: tuple[int, int]
    frame_names: list[str]
    carrier_nm_per_px: tuple[float, float] | None
    reference: Path | None  # true height
    reference_unit: str | None  # where its file does not say it
    path: Path
    files: frozenset[Path]  # all that it consists of, resolved
    _frames: Sequence[Source] = field(repr=False)
    _channel: int = field(repr=False)
    _mask: Mask | Circle | None = field(repr=False)

    @property
    def J(self) -> int:  # noqa: N802 (the letter of the formula)
        return len(self.wavelengths_um)

    @property
    def K(self) -> int:  # noqa: N802
        return self.present.shape[1]

    @property
    def present(self) -> np.ndarray:
        """Which of the J x K frames there are, bool [J, K]."""
        if self.phase_steps_rad is None:
            return np.ones((self.J, len(self._frames) // self.J), bool)
        return np.isfinite(self.phase_steps_rad)

    @property
    def dtype(self) -> np.dtype:
        return self._frames[0].dtype

    @property
    def masked(self) -> bool:
        return self._mask is not None

    @property
    def clips(self) -> int | None:
        """The bit depth at whose ends samples are clipped; None for floats, which are not."""
        return self.bit_depth if self.dtype.kind == "u" else None

    def read(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        """Frames [J, K, y1 - y0, x1 - x0] in their dtype. UserError: damaged file, NaN/Inf, too large a value."""
        present = self.present
        out = np.empty((*present.shape, y1 - y0, x1 - x0), self.dtype)
        for (j, k), frame in zip(np.argwhere(present), self._frames, strict=True):
            out[j, k] = frame.read(y0, y1, x0, x1)[..., self._channel]
            self._check_values(frame, out[j, k], y0, x0)
        out[~present] = 0
        return out

    def mask(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        """Validity [y1 - y0, x1 - x0], bool; all True without a mask."""
        if not self.masked:
            return np.ones((y1 - y0, x1 - x0), bool)
        if isinstance(self._mask, Circle):
            row, column, radius = self._mask.circle
            y, x = np.arange(y0, y1)[:, None] + 0.5 - row, np.arange(x0, x1) + 0.5 - column
            return y * y + x * x <= radius * radius
        return self._mask.read(y0, y1, x0, x1)

    def carrier(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray | None:
        """Height in nm that the carrier adds at the pixels, float64 [y1 - y0, x1 - x0]; None without one.

        It is zero at the centre of the frame.
        """
        if self.carrier_nm_per_px is None:
            return None
        height, width = self.shape
        along_y, along_x = self.carrier_nm_per_px
        rows, columns = np.arange(y0, y1) + 0.5 - height / 2, np.arange(x0, x1) + 0.5 - width / 2
        return along_y * rows[:, None] + along_x * columns

    def _check_values(self, frame: Source, window: np.ndarray, y0: int, x0: int) -> None:
        if window.dtype.kind == "f":
            mark = self._frames[0].nodata  # of a file with all frames the first one says it
            marked = mark is not None and holds(window, mark)
            if np.isfinite(window.sum()) and not np.any(marked):  # one pass; a NaN or Inf anywhere reaches the sum
                return
            bad, what = ~np.isfinite(window) | marked, "not a finite number, or marked as no data"
        else:
            top = 2**self.bit_depth - 1
            if top >= np.iinfo(window.dtype).max or window.max() <= top:
                return
            bad, what = window > top, f"above 2**{self.bit_depth} - 1 (bit_depth in {self.path})"
        counts = bad & self.mask(y0, y0 + window.shape[0], x0, x0 + window.shape[1])
        if counts.any():
            i, j = (int(v) for v in np.argwhere(counts)[0])
            raise UserError(f"{frame.name}: pixel ({y0 + i}, {x0 + j}) is {window[i, j]}: {what}; mend the frame")
        window[bad] = 0


def open_stack(path: str | os.PathLike) -> Stack:
    """Opens the stack described by the folder `path` that holds `stack.yaml`, or by the yaml file itself.

    UserError: file or frames missing, unknown or wrong key, frames that do not fit together, fewer than three steps.
    """
    path = Path(path)
    path = path / STACK_FILE if path.is_dir() else path
    given = _read_yaml(path)
    if not 1 <= given.bit_depth <= 16:
        raise UserError(f"{path}: bit_depth: unsupported bit depth {given.bit_depth}; grey values have 1 to 16 bits")
    _check_lengths(path, given)
    files = _frame_files(path, given)
    frames = _opened(files)
    steps = _phase_steps(path, given, len(frames))
    first = frames[0]
    for frame in frames:
        if frame.stored.kind == "b":
            raise UserError(f"{frame.name}: unsupported bit depth: 1 bit shows no fringes; save the frame with 8 or 16")
        if frame.shape != first.shape or frame.stored.name != first.stored.name:
            raise UserError(
                f"{frame.name}: {frame.shape} {frame.stored.name}, but {first.name} has {first.shape} "
                f"{first.stored.name}; frames of one stack have one size and type"
            )
    if first.stored.kind in "iu" and first.dtype.kind == "f" and "bit_depth" in given.model_fields_set:
        raise UserError(
            f"{path}: bit_depth: where {first.stored.name} frames are clipped is not known; save them as uint8 or "
            "uint16, or leave it out"
        )
    if first.dtype.kind == "u" and given.bit_depth > 8 * first.dtype.itemsize:
        raise UserError(f"{path}: bit_depth: {given.bit_depth}, but the frames hold {8 * first.dtype.itemsize} bits")
    channel = given.channel or 0
    if first.shape[2] > 1 and given.channel is None:
        raise UserError(f"{path}: channel: the frames have {first.shape[2]} channels; set it to 0, 1 or 2")
    if channel >= first.shape[2]:
        raise UserError(f"{path}: channel: {channel}, but the frames have {first.shape[2]}; leave it out for grey")
    reference = path.parent / given.reference if given.reference else None
    files += [path, *_named_beside(path, given)]
    if reference and not split_page(reference)[0].exists():
        raise UserError(f"{path}: reference: {reference}: no such file; check the name or leave the key out")
    return Stack(
        wavelengths_um=given.wavelengths_um, phase_steps_rad=steps, pixel_pitch_um=given.pixel_pitch_um,
        height_range_um=given.height_range_um, bit_depth=given.bit_depth, shape=first.shape[:2],
        frame_names=[frame.name for frame in frames], reference=reference,
        reference_unit=given.reference_unit, path=path,
        carrier_nm_per_px=given.carrier_nm_per_px, files=frozenset(split_page(each)[0].resolve() for each in files),
        _frames=frames, _channel=channel,
        _mask=Mask(path.parent / given.mask, first.shape[:2]) if isinstance(given.mask, str) else given.mask,
    )  # fmt: skip


def keep_stack(stack: Stack, *outputs: str | os.PathLike | None) -> None:
    """UserError where an output would replace one of the stack's own files."""
    for out in filter(None, outputs):
        if Path(out).resolve() in stack.files:
            raise UserError(f"{out}: belongs to the stack {stack.path}; name another file")


class _Loader(yaml.SafeLoader):
    """A key that is given twice is a mistake; YAML's readers take the last."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                where = node.value[i][0].start_mark
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", where)
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> StackFile:
    try:
        text = path.read_text(encoding="utf-8")
        content = yaml.load(text, _Loader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; a stack is a folder with a {STACK_FILE} that describes it") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as text ({error}); name a {STACK_FILE} or its folder") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds no `key: value` lines; see the description of {STACK_FILE}")
    known = list(StackFile.model_fields)
    for key in content:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1, cutoff=0)[0]
            raise UserError(f"{path}: unknown key {key!r}; did you mean {near!r}?")
    try:
        return StackFile.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        key = first["loc"][0]
        says = StackFile.model_fields[key].description
        raise UserError(f"{path}: {key}: {first['msg']}" + (f"; expected: {says}" if says else "")) from None


def _check_lengths(path: Path, given: StackFile) -> None:
    """UserError where lengths are not in the unit of their key. Wavelengths in nm become micrometres."""
    if bool(given.wavelengths_um) == bool(given.wavelengths_nm):
        said = "both are given" if given.wavelengths_um else "no wavelength is given"
        raise UserError(f"{path}: wavelengths_um, wavelengths_nm: {said}; give one of the two")
    key = "wavelengths_um" if given.wavelengths_um else "wavelengths_nm"
    given.wavelengths_um = given.wavelengths_um or [nm / 1000 for nm in given.wavelengths_nm]
    check_wavelengths(str(path), given.wavelengths_um, given.height_range_um, key)
    check_lengths(str(path), given.pixel_pitch_um, given.height_range_um, given.wavelengths_um)


def _named_beside(yaml_path: Path, given: StackFile) -> list[Path]:
    """The files of the mask and of the reference."""
    names = [name for name in (given.mask, given.reference) if isinstance(name, str)]
    return [split_page(yaml_path.parent / name)[0] for name in names]


def _frame_files(yaml_path: Path, given: StackFile) -> list[Path]:
    """The files that names and globs stand for: globs in natural order, names as listed. A name that exists is no glob,
    and a glob matches neither hidden files nor the stack's mask and reference."""
    beside = {path.resolve() for path in _named_beside(yaml_path, given)}
    files: list[Path] = []
    for item in [given.frames] if isinstance(given.frames, str) else given.frames:
        named = yaml_path.parent / item  # an absolute item replaces the folder
        if split_page(named)[0].exists():
            found = [named]
        elif any(c in item for c in "*?["):
            found = [path for path in _matches(named) if path.resolve() not in beside]
            _check_order(yaml_path, found)
        else:
            raise UserError(f"{named}: no such frame; check `frames` in {yaml_path}")
        if not found:
            raise UserError(f"{yaml_path}: frames: no file matches {named}; check the folder and the pattern")
        files += found
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            raise UserError(f"{yaml_path}: frames: {file} is listed twice; list every frame once")
        seen.add(file.resolve())
    return files


def _matches(pattern: Path) -> list[Path]:
    """What `pattern` matches, in natural order. Folders that exist under their name in it are taken literally."""
    folder, rest = Path(pattern.anchor), list(pattern.parts[1:] if pattern.anchor else pattern.parts)
    while len(rest) > 1 and (folder / rest[0]).is_dir():
        folder /= rest.pop(0)
    found = folder.glob("/".join(rest))
    shown = [p for p in found if not (p.name.startswith(".") and not rest[-1].startswith("."))]
    return sorted(shown, key=lambda p: (_natural(p), str(p)))


def _check_order(yaml_path: Path, files: list[Path]) -> None:
    """UserError where names with signs or decimal points stand in another order by their numbers: -90, 0, 0.25, 0.5."""
    measured = sorted(files, key=lambda path: _natural(path, _MEASURED))
    if measured != files and len({str(_natural(path, _MEASURED)) for path in files}) == len(files):
        i = next(i for i in range(len(files)) if files[i] != measured[i])
        raise UserError(
            f"{yaml_path}: frames: does {files[i].name} or {measured[i].name} come first? Numbers with signs or points "
            "can be read either way; list the files in their order"
        )


def _opened(files: list[Path]) -> list[Source]:
    """Their frames, pages of a file in order."""
    opened = [frame for file in files for frame in open_pages(file)]
    turned = [frame for frame in opened if frame.orientation != 1]
    if turned:
        tell_orientation(turned[0])  # a camera that was turned says so in each
    return opened


def _natural(path: Path, number: re.Pattern = _DIGITS) -> list:
    """Sort key under which frame_2 comes before frame_10."""
    parts = number.split(str(path))  # text and numbers, in turn
    return [(float(part) if "." in part else int(part), "") if i % 2 else (-math.inf, part)
            for i, part in enumerate(parts)]  # fmt: skip


def _phase_steps(path: Path, given: StackFile, frames: int) -> np.ndarray | None:
    """Phase steps [J, K], with the number of frames checked against them; None where they are unknown."""
    wavelengths = len(given.wavelengths_um)
    steps = given.phase_steps_rad
    if steps is None:
        if frames % wavelengths:
            raise UserError(f"{path}: frames: {frames} frames cannot be shared among {wavelengths} wavelengths evenly")
        fewest = most = total = frames // wavelengths
        total *= wavelengths
    else:
        rows = steps if steps and isinstance(steps[0], list) else [steps] * wavelengths
        if len(rows) != wavelengths:
            raise UserError(f"{path}: phase_steps_rad: {len(rows)} lists for {wavelengths} wavelengths; write one each")
        for row in rows:
            check_steps(str(path), row)
        lengths = [len(row) for row in rows]
        fewest, most, total = min(lengths), max(lengths), sum(lengths)
        steps = np.full((wavelengths, most), np.nan)
        for target, row in zip(steps, rows, strict=True):
            target[: len(row)] = row
    if fewest < MIN_STEPS:
        raise UserError(f"{path}: too few phase steps: {fewest} per wavelength; at least {MIN_STEPS} needed")
    if frames != total:
        each = f"{wavelengths} wavelengths x {most} phase steps = " if fewest == most else "the lists of steps say "
        raise UserError(
            f"{path}: frames: {frames} frames found, but {each}{total}; check `frames`, `wavelengths_um` and "
            "`phase_steps_rad`"
        )
    return steps


