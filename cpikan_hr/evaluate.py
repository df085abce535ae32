"""Compares a trained field with a reference, strip by strip, and measures its seams. The field is rendered once."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import product
from typing import Any

import numpy as np
import torch
from skimage.metrics import structural_similarity

from cpikan_hr.data.once import Once
from cpikan_hr.data.source import Source
from cpikan_hr.errors import UserError
from cpikan_hr.fields import Field, Level, pixel_axis
from cpikan_hr.mapped import release
from cpikan_hr.parallel import at_once, in_threads
from cpikan_hr.problems.surface import surface_figures
from cpikan_hr.quantities import data_mask, full_range
from cpikan_hr.recipe import Recipe
from cpikan_hr.runtime import peak_rss_mb
from cpikan_hr.training.weights import Trained

_log = logging.getLogger(__name__)
STRIP = 2**20  # pixels rendered at a time
COMPARED = 2**19  # and compared by one thread
ALIKE, OFFSET = 0.9, 10  # correlation with the reference, and mean over the rest of the error, from which on it is said
HALO = 3  # half of the SSIM window
POINTS = 2**13  # evaluated at a time, one by one


def rendered_once(trained: Trained, rows: int | None = None) -> Once:
    """The field at its pixels, float32 [h, W, C], in strips of so many rows."""
    field, _, about = trained
    shape = *about["shape"], about["channels"]
    rows = rows or max(2 * HALO + 1, at_once(STRIP, field.device) // shape[1])

    def values(*window: int) -> np.ndarray:
        return field.pixels(*window).permute(1, 2, 0).cpu().numpy()

    return Once("the rendered field", values, shape, (rows, shape[1]))


def evaluate(
    trained: Trained, reference: Source | None, file_bytes: int, remove: str = "plane", rendered: Once | None = None
) -> dict:
    """rmse, psnr (dB), ssim, rel_l2 and seam in the field's unit over the pixels where the reference is finite.

    psnr and ssim refer to `range`: of pictures that of the training, of heights that of the reference. For heights also
    what `surface` gives. Without a reference what needs none. `rendered`: the field, where the caller wants it too.
    """
    field, recipe, about = trained
    if reference is None:
        flaw = {"seam": seam(field, tuple(about["shape"]))}
        return {**flaw, **surface(trained, remove, rendered), **costs(trained, file_bytes)}
    shape = tuple(about["shape"])
    if tuple(reference.shape) != (*shape, about["channels"]):
        expected = (*shape, about["channels"])
        raise UserError(f"reference {reference.name}: its shape {tuple(reference.shape)} is not the field's {expected}")
    rendered = rendered or rendered_once(trained)

    def compare(rows: slice, truth: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, int, float, float]:
        known = np.isfinite(truth)
        truth, error = truth[known].astype(np.float64), (value - truth)[known].astype(np.float64)
        each = error, np.square(error), np.square(truth), truth, error * truth
        sums = np.array([part.sum() for part in each])
        return sums, truth.size, truth.min(initial=math.inf), truth.max(initial=-math.inf)

    total, count, low, high = zip(*strips(rendered, reference, compare), strict=True)
    total, count, low, high = sum(total), sum(count), min(low), max(high)
    if not count:
        raise UserError(f"reference {reference.name}: no finite pixel to compare with; give another")
    offset = total[0] / count if getattr(recipe.problem, "remove_offset", False) else 0.0
    squared = max(total[1] / count - (2 * offset * total[0] / count - offset**2), 0.0)
    if about["unit"] == "nm":
        tell_doubts(reference.name, total / count, recipe)
    full = full_range(about) or max(float(high - low), 1e-30)
    return {
        "rmse": math.sqrt(squared),
        "psnr": 10 * math.log10(full**2 / max(squared, 1e-30)),
        "range": full,
        "ssim": similarity(rendered, reference, offset, full),
        "rel_l2": math.sqrt(squared * count / max(total[2], 1e-30)),
        "seam": seam(field, shape),
        **surface(trained, remove, rendered),
        **costs(trained, file_bytes),
    }


def tell_doubts(name: str, moments: np.ndarray, recipe: Recipe) -> None:
    """One line where heights and reference differ by a factor or a sign that a unit or a convention explains.

    `moments`: means of error, error^2, truth^2, truth and error * truth.
    """
    bias, squared, power, mean, product = moments.tolist()
    spread, error = power - mean**2, squared - bias**2
    if spread <= 0:
        return
    slope = 1 + (product - bias * mean) / spread  # of the heights over the reference
    variance = error + spread + 2 * (product - bias * mean)  # of the heights
    correlation = slope * math.sqrt(spread / variance) if variance > 0 else 0.0
    if correlation < -ALIKE:
        _log.warning("%s: the heights run against it (correlation %.2f): is its sign another?", name, correlation)
    elif correlation > ALIKE and not 0.5 < slope < 2:
        _log.warning("%s: the heights are %.3g times as large: is its unit another? Give --reference-unit", name, slope)
    elif bias**2 > (OFFSET**2) * error and not recipe.problem.remove_offset:
        _log.warning("%s: the heights lie %.4g nm above it on average; is it known up to a constant only? Then set "
                     "problem.remove_offset", name, bias)  # fmt: skip


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
    _, recipe, about = trained
    if about["unit"] != "nm":
        return {}
    height, width = about["shape"]
    rendered, inside, xs = rendered or rendered_once(trained), data_mask(recipe, about), pixel_axis(0, width)
    rows = _compared_rows(rendered)

    def strip(y0: int) -> tuple[int, np.ndarray]:
        y1 = min(y0 + rows, height)
        heights = rendered.read(y0, y1, 0, width)[..., 0]
        return y0, heights if inside is None else np.where(inside(pixel_axis(y0, y1), xs), heights, np.nan)

    def heights() -> Iterator[tuple[int, np.ndarray]]:
        with closing(in_threads(strip, range(0, height, rows))) as strips:
            yield from strips

    return surface_figures(heights, (height, width), remove) | {"removed": remove}


def _compared_rows(rendered: Once) -> int:
    """On the host, whatever rendered them."""
    return min(rendered.cell[0], max(2 * HALO + 1, COMPARED // rendered.shape[1]))


def strips(
    rendered: Once, reference: Source, function: Callable[[slice, np.ndarray, np.ndarray], Any], halo: int = 0
) -> Iterator[Any]:
    """Yields `function(rows, truth, value)` over strips of the frame, which is called in threads.

    truth and value [h, W, C] are float32 and reach `halo` rows beyond the strip, where there are any; rows: the strip.
    """
    height, width = rendered.shape[:2]
    rows = _compared_rows(rendered)

    def strip(start: int) -> Any:
        window = max(0, start - halo), min(height, start + rows + halo), 0, width
        truth = reference.read(*window).astype(np.float32)
        above = start - window[0]
        return function(slice(above, above + min(rows, height - start)), truth, rendered.read(*window))

    with closing(in_threads(strip, range(0, height, rows))) as done:
        yield from done


def similarity(rendered: Once, reference: Source, offset: float, full: float) -> float | None:
    """Mean structural similarity (Wang et al. 2004, 7 x 7 windows); None for frames smaller than its window."""
    if min(rendered.shape[:2]) < 2 * HALO + 1:
        return None

    def compare(rows: slice, truth: np.ndarray, value: np.ndarray) -> tuple[float, int]:
        if len(truth) < 2 * HALO + 1:
            return 0.0, 0
        known = np.isfinite(truth)
        value = np.where(known, value.astype(np.float64) - offset, 0)
        truth = np.where(known, truth, 0).astype(np.float64)
        _, each = structural_similarity(truth, value, data_range=full, channel_axis=2, full=True)
        inner = each[rows][known[rows]].clip(-1, 1)  # beyond it is rounding
        return float(inner.sum()), inner.size

    total, count = zip(*strips(rendered, reference, compare, HALO), strict=True)
    return sum(total) / max(sum(count), 1)


def seam(field: Field, shape: tuple[int, int], step: float = 0.01, lines: int = 32) -> float:
    """Largest jump across a tile border minus the median jump beside it, in the field's unit.

    Jumps are taken over 2 x `step` px, so that what the picture itself does there does not count. Borders are those of
    cores and of supports, at most `lines` per level and axis, evenly spread.
    """
    device = field.device
    offsets = torch.tensor([-7, -5, -3, -1, 1, 3, 5, 7], dtype=torch.float64, device=device) * step

    @torch.no_grad()
    def worst(level_and_axis: tuple[Level, int]) -> float:
        level, number = level_and_axis
        axis = level.tile_grid.axes[number]
        cores = torch.arange(1, axis.count, dtype=torch.float64, device=device) * axis.stride
        reach = axis.overlap * axis.stride / 2
        borders = torch.cat([cores, cores - reach, cores + reach])
        borders = borders[(borders > 1) & (borders < shape[number] - 1)].unique()
        if not len(borders):
            return 0.0
        borders = borders[torch.linspace(0, len(borders) - 1, min(lines, len(borders))).round().long().to(device)]
        length = shape[1 - number]
        along = torch.linspace(0.5, length - 0.5, min(length, 512), dtype=torch.float64, device=device)
        across = (borders[:, None] + offsets).flatten()
        ys, xs = (along, across) if number else (across, along)
        values = []
        for some in torch.cartesian_prod(ys, xs).split(at_once(POINTS, device)):  # row by row, as tiles lie in a file
            values.append(field(some, "value").value)
            release()
        rows = torch.cat(values).view(len(ys), len(xs), -1)
        rows = (rows.transpose(0, 1) if number else rows).unflatten(0, (-1, len(offsets))).movedim(1, 0)  # across first
        jumps = (rows[1:] - rows[:-1])[::2].abs()  # over (-7, -5), (-3, -1) ... ; the border lies in between
        across = (rows[4] - rows[3]).abs()
        beside = jumps.median(dim=0).values
        return float((across - beside).max())

    with closing(in_threads(worst, product(field.levels, (0, 1)), device)) as found:
        return float(np.max([0.0, *found]))  # keeps a NaN, which max may not
