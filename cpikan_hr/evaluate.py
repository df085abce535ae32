"""Compares a trained field with a reference, strip by strip, and measures its seams. The field is rendered once."""

import math
from collections.abc import Iterator
from contextlib import closing
from itertools import product

import numpy as np
import torch
from skimage.metrics import structural_similarity

from cpikan_hr.data.once import Once
from cpikan_hr.data.source import Source
from cpikan_hr.errors import UserError
from cpikan_hr.fields import Field, Level, pixel_axis
from cpikan_hr.parallel import at_once, in_threads
from cpikan_hr.problems.surface import surface_figures
from cpikan_hr.quantities import stack_mask
from cpikan_hr.runtime import peak_rss_mb
from cpikan_hr.training.weights import Trained

STRIP = 2**20  # pixels of one strip
HALO = 3  # half of the SSIM window


def rendered_once(trained: Trained, rows: int | None = None) -> Once:
    """The field at its pixels, float32 [h, W, C], in strips of so many rows."""
    field, _, about = trained
    shape = *about["shape"], about["channels"]
    rows = rows or max(2 * HALO + 1, at_once(STRIP, field.device) // shape[1])

    def values(*window: int) -> np.ndarray:
        return field.pixels(*window).permute(1, 2, 0).cpu().numpy()

    return Once("the rendered field", values, shape, (rows, shape[1]))


def evaluate(
    trained: Trained, reference: Source, file_bytes: int, remove: str = "plane", rendered: Once | None = None
) -> dict:
    """rmse, psnr (dB), ssim, rel_l2 and seam in the field's unit over the pixels where the reference is finite.

    psnr and ssim use the full range of 8/16-bit pictures and the range of the reference for maps. For heights also
    what `surface` gives. `rendered`: the field, where the caller wants it too.
    """
    field, recipe, about = trained
    shape = tuple(about["shape"])
    if tuple(reference.shape) != (*shape, about["channels"]):
        expected = (*shape, about["channels"])
        raise UserError(f"reference {reference.name}: its shape {tuple(reference.shape)} is not the field's {expected}")
    rendered = rendered or rendered_once(trained)
    total, count, low, high = np.zeros(3), 0, math.inf, -math.inf
    for _, truth, value in strips(rendered, reference, field.device):
        known = np.isfinite(truth)
        truth, error = truth[known].astype(np.float64), (value - truth)[known].astype(np.float64)
        total += [error.sum(), np.square(error).sum(), np.square(truth).sum()]
        count += truth.size
        low, high = min(low, truth.min(initial=math.inf)), max(high, truth.max(initial=-math.inf))
    if not count:
        raise UserError(f"reference {reference.name}: no finite pixel to compare with; give another")
    offset = total[0] / count if getattr(recipe.problem, "remove_offset", False) else 0.0
    squared = max(total[1] / count - (2 * offset * total[0] / count - offset**2), 0.0)
    kind = np.dtype(reference.dtype)
    full = float(np.iinfo(kind).max) if kind.kind == "u" else max(high - low, 1e-30)
    return {
        "rmse": math.sqrt(squared),
        "psnr": 10 * math.log10(full**2 / max(squared, 1e-30)),
        "ssim": similarity(rendered, reference, field.device, offset, full),
        "rel_l2": math.sqrt(squared * count / max(total[2], 1e-30)),
        "seam": seam(field, shape),
        **surface(trained, remove, rendered),
        **costs(trained, file_bytes),
    }


def costs(trained: Trained, file_bytes: int) -> dict:
    """What is known of a field without a reference: its size, what its training took, and the unit of the data."""
    shape, about = trained.about["shape"], trained.about
    return {
        "params": about["params"],
        "bytes": file_bytes,
        "params_per_px": about["params"] / (shape[0] * shape[1]),
        "train_seconds": about["train_seconds"],
        "peak_rss_mb": max(about["peak_rss_mb"], peak_rss_mb()),
        "gpu_peak_mb": about["gpu_peak_mb"],
        "unit": about["unit"],
    }


def surface(trained: Trained, remove: str = "plane", rendered: Once | None = None) -> dict:
    """pv, sq, sa, bow and warp of a height map inside the stack's mask (`problems/surface.py`); {} of a picture."""
    field, recipe, about = trained
    if about["unit"] != "nm":
        return {}
    height, width = about["shape"]
    rendered, inside, xs = rendered or rendered_once(trained), stack_mask(recipe), pixel_axis(0, width)
    rows = rendered.cell[0]

    def strip(y0: int) -> tuple[int, np.ndarray]:
        y1 = min(y0 + rows, height)
        heights = rendered.read(y0, y1, 0, width)[..., 0]
        return y0, heights if inside is None else np.where(inside(pixel_axis(y0, y1), xs), heights, np.nan)

    def heights() -> Iterator[tuple[int, np.ndarray]]:
        with closing(in_threads(strip, range(0, height, rows), field.device)) as strips:
            yield from strips

    return surface_figures(heights, (height, width), remove) | {"removed": remove}


def strips(rendered: Once, reference: Source, device: torch.device, halo: int = 0):
    """Yields (rows of halo above, truth, value), float32 [h, W, C], over strips of the frame."""
    (height, width), rows = rendered.shape[:2], rendered.cell[0]

    def compare(start: int) -> tuple[tuple[int, int], np.ndarray, np.ndarray]:
        window = max(0, start - halo), min(height, start + rows + halo), 0, width
        truth = reference.read(*window).astype(np.float32)
        return (start - window[0], min(rows, height - start)), truth, rendered.read(*window)

    with closing(in_threads(compare, range(0, height, rows), device)) as compared:
        yield from compared


def similarity(rendered: Once, reference: Source, device: torch.device, offset: float, full: float) -> float | None:
    """Mean structural similarity (Wang et al. 2004, 7 x 7 windows); None for frames smaller than its window."""
    if min(rendered.shape[:2]) < 2 * HALO + 1:
        return None
    total, count = 0.0, 0
    for (above, rows), truth, value in strips(rendered, reference, device, HALO):
        known = np.isfinite(truth)
        value = np.where(known, value.astype(np.float64) - offset, 0)
        truth = np.where(known, truth, 0).astype(np.float64)
        if len(truth) < 2 * HALO + 1:
            continue
        _, each = structural_similarity(truth, value, data_range=full, channel_axis=2, full=True)
        inner = each[above : above + rows][known[above : above + rows]].clip(-1, 1)  # beyond it is rounding
        total, count = total + float(inner.sum()), count + inner.size
    return total / max(count, 1)


def seam(field: Field, shape: tuple[int, int], step: float = 0.01, lines: int = 32) -> float:
    """Largest jump across a tile border minus the median jump beside it, in the field's unit.

    Jumps are taken over 2 x `step` px, so that what the picture itself does there does not count. Borders are those of
    cores and of supports, at most `lines` per level and axis.
    """
    device = field.device
    offsets = torch.tensor([-7, -5, -3, -1, 1, 3, 5, 7], dtype=torch.float64, device=device) * step

    def worst(level_and_axis: tuple[Level, int]) -> float:
        level, number = level_and_axis
        axis = level.tile_grid.axes[number]
        cores = torch.arange(1, axis.count, dtype=torch.float64, device=device) * axis.stride
        reach = axis.overlap * axis.stride / 2
        borders = torch.cat([cores, cores - reach, cores + reach])
        borders = borders[(borders > 1) & (borders < shape[number] - 1)].unique()
        borders = borders[:: max(1, len(borders) // lines)]
        if not len(borders):
            return 0.0
        length = shape[1 - number]
        along = torch.linspace(0.5, length - 0.5, min(length, 512), dtype=torch.float64, device=device)
        points, order = (borders[:, None] + offsets).flatten().sort()  # of one border and the next may overlap
        lattice = field.lattice(points, along)[0] if number == 0 else field.lattice(along, points)[0].transpose(1, 2)
        rows = torch.empty_like(lattice)
        rows[:, order] = lattice
        rows = rows.unflatten(1, (len(borders), len(offsets))).movedim(2, 0)  # across the border first
        jumps = (rows[1:] - rows[:-1])[::2].abs()  # over (-7, -5), (-3, -1) ... ; the border lies in between
        across = (rows[4] - rows[3]).abs()
        beside = jumps.median(dim=0).values
        return float((across - beside).max())

    with closing(in_threads(worst, product(field.levels, (0, 1)), device)) as found:
        return max(0.0, *found)
