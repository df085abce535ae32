"""Renders a trained field window by window: any region, any scale, value or derivatives, in bounded memory.

Launched as several processes (`accelerate launch -m cpikan_hr render ...`), each renders its share of strips into one file.
"""

import os
from pathlib import Path

import numpy as np
import torch

from cpikan_hr.data.stack import open_stack
from cpikan_hr.data.orientation import OrientedStack
from cpikan_hr.data.writers import MapWriter
from cpikan_hr.errors import UserError
from cpikan_hr.fields import Field
from cpikan_hr.training.weights import Trained

STRIP = 2**20  # output pixels of one strip
ORDER = {"value": "value", "gradient": "gradient", "laplacian": "laplacian"}


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


def evaluate_field(field: Field, ys: torch.Tensor, xs: torch.Tensor, quantity: str) -> np.ndarray:
    """float32 [h, w, C']: value (C), gradient (2 C: all d/dy, then all d/dx) or Laplacian (C), per source px."""
    rows = field.grid(ys, xs, ORDER[quantity])
    if quantity == "gradient":
        return torch.cat([rows[1], rows[2]], dim=-1).numpy()
    return (rows[0] if quantity == "value" else rows[3]).numpy()


def render(trained: Trained, out: Path, *, region: str | None = None, scale: float = 1.0, quantity: str = "value",
           progress=None) -> Path:
    """Writes the map; heights as float32 in nm (NaN where the stack's mask is off), 8/16-bit pictures as such."""
    field, recipe, about = trained
    if scale <= 0 or not np.isfinite(scale):
        raise UserError(f"--scale {scale}: give a positive number")
    y0, y1, x0, x1 = parse_region(region, tuple(about["shape"]))
    ys, xs = coordinates(y0, y1, scale), coordinates(x0, x1, scale)
    mask = _mask(recipe)
    picture = quantity == "value" and about["unit"] == "grey levels"
    dtype = np.dtype(about.get("dtype", "uint8")) if picture else np.dtype(np.float32)
    unit = {"value": about["unit"], "gradient": f"{about['unit']} / px", "laplacian": f"{about['unit']} / px^2"}[quantity]
    if out.suffix == ".png" and not picture:
        dtype = np.dtype(np.uint8)
    pitch = about["pixel_pitch_um"] and about["pixel_pitch_um"] / scale
    channels = about["channels"] * (2 if quantity == "gradient" else 1)
    rank, ranks = join_processes()
    limits = _limits(field, ys, xs, quantity) if out.suffix == ".png" and not picture else None
    height = max(1, STRIP // len(xs))
    starts = list(range(0, len(ys), height))
    writer = None
    if rank == 0:
        writer = MapWriter(out, (len(ys), len(xs), channels), dtype, unit=unit, pixel_pitch_um=pitch)
        writer.__enter__()
    barrier(ranks)
    if rank:
        writer = MapWriter(out, (len(ys), len(xs), channels), dtype, unit=unit, pixel_pitch_um=pitch, create=False)
        writer.__enter__()
    try:
        for done, start in enumerate(starts[rank::ranks]):
            part = ys[start : start + height]
            block = evaluate_field(field, part, xs, quantity)
            if mask is not None:
                block[~mask(part, xs)] = np.nan
            writer.write(start, 0, _convert(block, dtype, limits))
            if progress:
                progress(done + 1, len(starts[rank::ranks]))
        barrier(ranks)
        if rank == 0:
            writer.finish()
    finally:
        writer.__exit__(None, None, None)
    barrier(ranks)
    return out


def _convert(block: np.ndarray, dtype: np.dtype, limits: tuple[float, float] | None) -> np.ndarray:
    if dtype.kind != "u":
        return block
    top = np.iinfo(dtype).max
    if limits is not None:
        block = (block - limits[0]) * (top / max(limits[1] - limits[0], 1e-12))
    return np.clip(np.rint(np.nan_to_num(block)), 0, top).astype(dtype)


def _limits(field: Field, ys: torch.Tensor, xs: torch.Tensor, quantity: str) -> tuple[float, float]:
    """Grey range of a PNG of a map: the 0.1 and 99.9 percentiles of a decimated map."""
    values = evaluate_field(field, ys[:: max(1, len(ys) // 256)], xs[:: max(1, len(xs) // 256)], quantity)
    low, high = np.percentile(values, [0.1, 99.9])
    return float(low), float(high)


def _mask(recipe):
    """A function of output coordinates, or None: the stack's mask at the nearest pixel, where the stack is still there."""
    if recipe.problem.kind != "interferometry" or not Path(recipe.problem.stack).exists():
        return None
    stack = OrientedStack(open_stack(recipe.problem.stack), recipe.problem.rotate, recipe.problem.flip)

    def valid(ys: torch.Tensor, xs: torch.Tensor) -> np.ndarray:
        iy, ix = ys.long().clamp(0, stack.shape[0] - 1).numpy(), xs.long().clamp(0, stack.shape[1] - 1).numpy()
        window = stack.mask(int(iy[0]), int(iy[-1]) + 1, int(ix[0]), int(ix[-1]) + 1)
        return window[iy - iy[0]][:, ix - ix[0]]

    return valid


def join_processes() -> tuple[int, int]:
    """Rank and number of the processes of this launch."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    return (torch.distributed.get_rank(), ranks) if ranks > 1 else (0, 1)


def barrier(ranks: int) -> None:
    if ranks > 1:
        torch.distributed.barrier()
