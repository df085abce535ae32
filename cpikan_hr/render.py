"""Renders a trained field window by window: any region, any scale, value or derivatives, in bounded memory.

Launched as several processes (`accelerate launch -m cpikan_hr render ...`), each renders its share of the strips.
"""

import logging
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import numpy as np
import torch

from cpikan_hr.data.units import canonical, nm_per
from cpikan_hr.data.writers import MapWriter
from cpikan_hr.errors import UserError
from cpikan_hr.parallel import at_once, in_threads
from cpikan_hr.problems import keep_data
from cpikan_hr.processes import ALONE, Processes
from cpikan_hr.quantities import STARTED, Quantity, data_mask, known_pixels, quantity_of
from cpikan_hr.quantities_pde import lattice_coordinates, lattice_note
from cpikan_hr.training.weights import Trained

_log = logging.getLogger(__name__)
STRIP = 2**20  # output pixels of one strip
MAX_SIDE = 2**24  # output pixels: coordinates of both axes stand in memory


def parse_region(text: str | None, shape: tuple[int, int]) -> tuple[int, int, int, int]:
    """'y0:y1,x0:x1' in pixels of the source, clipped nowhere. UserError where it is none or lies outside."""
    if text is None:
        return 0, shape[0], 0, shape[1]
    try:
        (y0, y1), (x0, x1) = ([int(number) for number in part.split(":")] for part in text.split(","))
    except ValueError:
        raise UserError(f"--region {text}: write y0:y1,x0:x1 in pixels") from None
    if not (0 <= y0 < y1 <= shape[0] and 0 <= x0 < x1 <= shape[1]):
        raise UserError(f"--region {text}: not inside the {shape[0]} x {shape[1]} px of the source (rows x columns)")
    return y0, y1, x0, x1


def coordinates(low: int, high: int, scale: float) -> torch.Tensor:
    """Centres of output pixels between source pixels low and high, float64."""
    count = max(1, round((high - low) * scale))
    return low + (torch.arange(count, dtype=torch.float64) + 0.5) * ((high - low) / count)


def render(trained: Trained, out: Path, *, region: str | None = None, scale: float = 1.0, quantity: str = "value",
           unit: str | None = None, mask: str = "stack", processes: Processes = ALONE, progress=None) -> Path:
    """Writes the map: heights as float32, NaN where the data's mask is off; 8/16-bit pictures as such, there with the
    picture's no-data value, or 0.

    Of an equation: its lattice, `scale` times as many points; `region` is in lattice points.
    `quantity`: one of `quantities.NAMES`. `unit`: a length (`data/units.py`), of heights only; None is nm. `mask`:
    "stack", or "valid" for NaN wherever the frames tell nothing (shadows, clipped samples, undecided orders) and the
    field only fills in.
    """
    field, recipe, about = trained
    if scale <= 0 or not np.isfinite(scale):
        raise UserError(f"--scale {scale}: give a positive number")
    if unit is not None and about["unit"] != "nm":
        raise UserError(f"--unit {unit}: the field is in {about['unit']}, not a height; leave it out")
    factor = 1.0 if unit is None else 1 / nm_per(unit, "--unit")
    unit = about["unit"] if unit is None else canonical(nm_per(unit, "--unit"))
    y0, y1, x0, x1 = parse_region(region, tuple(about["shape"]))
    if max(y1 - y0, x1 - x0) * scale > MAX_SIDE:
        raise UserError(f"--scale {scale}: more than {MAX_SIDE} pixels on a side; render regions one by one")
    equation = recipe.problem.kind == "pde"
    keep_data(recipe, out)
    if equation:
        ys, xs = (
            lattice_coordinates(low, high, count, scale if count > 1 else 1.0)
            for low, high, count in zip((y0, x0), (y1, x1), about["shape"], strict=True)
        )
    else:
        ys, xs = coordinates(y0, y1, scale), coordinates(x0, x1, scale)
    shown = quantity_of(trained, quantity)
    valid = None if quantity == "valid" else known_pixels(trained) if mask == "valid" else data_mask(recipe, about)
    if quantity == "sigma" and recipe.training.steps and processes.rank == 0:
        _log.warning(STARTED)
    if valid is None and quantity != "valid" and about.get("masked") and processes.rank == 0:
        data = getattr(recipe.problem, "stack", None) or recipe.problem.path
        _log.warning("%s is not there, nor is its mask: what lies outside is guessed", data)
    picture = quantity == "value" and about["unit"] == "grey levels" or quantity == "valid"
    dtype = np.dtype(about.get("dtype", "uint8")) if picture and quantity == "value" else np.dtype(shown.dtype)
    if shown.unit.startswith(about["unit"]):
        unit += shown.unit.removeprefix(about["unit"])
    else:
        unit, factor = shown.unit, 1.0
    if out.suffix == ".png" and not picture:
        dtype = np.dtype(np.uint8)
    pitch = about["pixel_pitch_um"] and about["pixel_pitch_um"] / scale
    limits = _limits(shown, ys, xs, factor) if out.suffix == ".png" and not picture else None
    height = max(1, at_once(STRIP, field.device) // len(xs))
    starts = range(0, len(ys), height)[processes.rank :: processes.ranks]
    shape = (len(ys), len(xs), shown.channels)
    options = dict(unit=unit, pixel_pitch_um=pitch, description=lattice_note(about, quantity) if equation else None)
    options["nodata"] = about.get("nodata") if picture and quantity == "value" else None
    with opened_map(processes, out, shape, dtype, **options) as writer:
        with processes.together():

            def strip(start: int) -> None:
                part = ys[start : start + height]
                block = shown.block(part, xs)
                if valid is not None:
                    block[~valid(part, xs)] = np.nan
                if factor != 1.0:
                    block *= np.float32(factor)
                writer.write(start, 0, _convert(block, dtype, limits, options["nodata"]))

            with closing(in_threads(strip, starts, field.device)) as strips:
                for done, _ in enumerate(strips, start=1):
                    if progress:
                        progress(done, len(starts))
        with processes.together():
            if processes.rank == 0:
                writer.finish()
    return out


@contextmanager
def opened_map(processes: Processes, *arguments, **options) -> Iterator[MapWriter]:
    """One map that all processes write: rank 0 creates it, then the others open it."""
    with ExitStack() as opened:
        writer = None
        with processes.together():
            if processes.rank == 0:
                writer = opened.enter_context(MapWriter(*arguments, **options))
        with processes.together():
            if writer is None:
                writer = opened.enter_context(MapWriter(*arguments, **options, create=False))
        yield writer


def _convert(
    block: np.ndarray, dtype: np.dtype, limits: tuple[float, float] | None, nodata: float | None
) -> np.ndarray:
    if dtype.kind != "u":
        return block
    top = np.iinfo(dtype).max
    if limits is not None:
        block = (block - limits[0]) * (top / max(limits[1] - limits[0], 1e-30))
    codes = np.clip(np.rint(np.nan_to_num(block)), 0, top).astype(dtype)
    if nodata is not None:
        unknown = np.isnan(block).any(-1)
        same = (codes == nodata).all(-1) & ~unknown  # these would be taken for pixels without data
        codes[same, 0] = nodata - 1 if nodata == top else nodata + 1
        codes[unknown] = nodata
    return codes


def _limits(shown: Quantity, ys: torch.Tensor, xs: torch.Tensor, factor: float) -> tuple[float, float]:
    """Grey range of a PNG of a map: the 0.1 and 99.9 percentiles of some rows of it, all over the map."""
    starts = np.unique(np.linspace(0, len(ys) - 1, 32).astype(int))
    rows = np.concatenate([shown.block(ys[start : start + 1], xs) for start in starts])
    known = rows[np.isfinite(rows)]
    low, high = np.percentile(known, [0.1, 99.9]) if known.size else (0.0, 1.0)
    return float(low) * factor, float(high) * factor
