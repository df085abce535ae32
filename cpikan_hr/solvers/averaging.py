"""Noise averaged out before terms are chosen: shifted quadtrees, each thresholded by itself, blended into one estimate.

A quadtree that stands a few pixels aside makes other errors at edges and keeps other noise; their average is closer to
the truth than each of them (translation-invariant denoising, Coifman and Donoho 1995). Each tile counts by the inverse
of the variance it passes on, kept terms x noise^2 / pixels (Guleryuz 2007), so that a smooth large tile outweighs a
small one full of terms.

What that drops below its threshold is gone, fine texture too. So a second average may follow, of quadtrees whose terms
are shrunk by e / (e + noise^2) instead, e the energy that the first average says they hold (an empirical Wiener filter:
Ghael, Sayeed and Baraniuk 1997). On measured surfaces that is 2 to 12 % nearer the truth, and another 3 to 7 % where
the surface's own texture says what terms hold (`texture.py`; docs/benchmarks.md).

The same sums give the risk of a single quadtree, after Stein's rule (SURE): the noise in what is kept and what is
dropped above its noise. (Terms that noise alone lifts above the threshold are missing there; `uncertainty.py` measures
the factor.)
"""

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from cpikan_hr.errors import UserError
from cpikan_hr.fields import Field
from cpikan_hr.fields.windows import ramp
from cpikan_hr.recipe import StartOptions
from cpikan_hr.solvers.blocks import Block, Pixels, ReadTarget, read_block
from cpikan_hr.solvers.leaves import LEAST, Size, choose, coefficients, thresholds
from cpikan_hr.solvers.quadtree import prune
from cpikan_hr.solvers.texture import LEFT, Texture

PLASTIC = 1.32471795724474602596  # its powers spread points evenly over the square (Roberts' R2 sequence)


@dataclass(frozen=True)
class Averaged:
    """An estimate of the noiseless values and, per pixel, the mean squared error expected of one shift, [h, w]."""

    pixels: Pixels
    risk: Tensor


def read_averaged(
    field: Field, group: int, target: ReadTarget, shape: tuple[int, int], block: Block, sizes: list[Size], halo: int,
    start: StartOptions, texture: Texture | None = None,
) -> Averaged:  # fmt: skip
    """A block as `read_block` gives it, with its noise averaged out."""
    stride = sizes[0].stride
    wide = read_block(field, group, target, shape, block, stride, 2 * stride if start.wiener else stride)
    if wide.noise is None:
        raise UserError("start.shifts: the noise of this problem is not known; give 0")
    if stride < 4 * halo:
        raise UserError(f"start.shifts: tiles of {stride} px cannot be shifted with a blend of {2 * halo} px")
    window = field.levels[sizes[0].level].tile_grid.axes[0].window
    order, sigmas = shifts(start.shifts + start.wiener, stride, halo), start.shifted_threshold
    averaged = average(wide, sizes, halo, sigmas, order[: start.shifts], window)
    if not start.wiener:
        return averaged
    pilot, narrow = averaged.pixels.values, _part(wide, *(slice(stride, n - stride) for n in wide.values.shape[1:]))
    pilot = pilot[:, halo : pilot.shape[1] - halo, halo : pilot.shape[2] - halo]
    return average(narrow, sizes, halo, sigmas, order[start.shifts :], window, pilot, texture)


def shifts(count: int, stride: int, halo: int) -> list[tuple[int, int]]:
    """So many shifts (rows, columns) in px, each in [2 halo, stride - 2 halo], evenly spread and always the same.

    Less would leave the outermost pixels of a block without one of the tiles that blend there.
    """
    width = stride - 4 * halo + 1
    return [
        tuple(2 * halo + int(((0.5 + (k + 1) * PLASTIC**-power) % 1) * width) for power in (1, 2)) for k in range(count)
    ]


@torch.no_grad()
def average(
    wide: Pixels, sizes: list[Size], halo: int, sigmas: float, order: list[tuple[int, int]], window: str,
    pilot: Tensor | None = None, texture: Texture | None = None,
) -> Averaged:  # fmt: skip
    """The block inside `wide`, which reaches one coarsest stride beyond its tiles, with `halo` pixels around it.

    sigmas: terms below so many standard errors of the noise are dropped. order: the shifts that are averaged.
    pilot: an estimate of `wide`'s values, by which terms are shrunk instead. texture: what they hold beside it.
    """
    stride, reach = sizes[0].stride, sizes[0].stride - halo
    channels, height, width = wide.values.shape
    inner = slice(reach, height - reach), slice(reach, width - reach)
    sums = wide.values.new_zeros(channels + 2, height, width)  # weighted estimate, risk, and the weights
    grid = height // stride - 1, width // stride - 1  # coarsest tiles of a shifted grid
    for shift in order:
        rows, columns = (slice(d - halo, d + n * stride + halo) for d, n in zip(shift, grid, strict=True))
        corner = rows.start, columns.start
        known = None if pilot is None else pilot[:, rows, columns]
        add_quadtree(sums, corner, _part(wide, rows, columns), sizes, halo, sigmas, window, known, texture)
    estimate, risk = sums[:-2] / sums[-1], sums[-2] / sums[-1]
    whole = _part(wide, *inner)
    return Averaged(replace(whole, values=estimate[:, *inner].contiguous()), risk[inner])


def _part(pixels: Pixels, rows: slice, columns: slice) -> Pixels:
    """A window of a block."""
    known, noise = (None if plane is None else plane[rows, columns] for plane in (pixels.known, pixels.noise))
    return Pixels(pixels.values[:, rows, columns], known, noise)


def add_quadtree(
    sums: Tensor, corner: tuple[int, int], pixels: Pixels, sizes: list[Size], halo: int, sigmas: float, window: str,
    pilot: Tensor | None = None, texture: Texture | None = None, plain: bool = False,
) -> None:  # fmt: skip
    """Adds one quadtree of `pixels`, whose first one is `corner`, to `sums` [C + 2, h, w].

    Its terms are thresholded, or shrunk by what `pilot`, an estimate of the values, says of them; with a `texture` also
    by that, and the leaves are those of least risk.
    plain: as in a field: all tiles have weight one, and a mean is a term like others.
    """
    scaled = [coefficients(pixels, size) for size in sizes]
    limits = [thresholds(pixels, size, 0.0, sigmas) for size in sizes]
    if texture is None:
        gains = [None] * len(sizes)
        everywhere = [torch.ones(each.shape[:2], dtype=torch.bool, device=sums.device) for each in scaled]
        leaves = choose(scaled, limits, everywhere)
    else:
        estimate = replace(pixels, values=pilot)
        shrunk = [
            texture.shrunk(size.level, each, _variance(limit, sigmas), coefficients(estimate, size))
            for size, each, limit in zip(sizes, scaled, limits, strict=True)
        ]
        gains, risks = zip(*shrunk, strict=True)
        leaves = prune(risks)
    for size, coefficient, limit, gain, leaf in zip(sizes, scaled, limits, gains, leaves, strict=True):
        y, x = torch.nonzero(leaf, as_tuple=True)
        if not len(y):
            continue
        chosen, limit = coefficient[leaf], limit[leaf]  # [t, C, P, P], [t, 1, 1, 1]
        variance = _variance(limit, sigmas)
        if gain is not None:
            kept = gain[leaf]
        elif pilot is None:
            kept = (chosen.abs() > limit).to(chosen)
        else:
            energy = coefficients(replace(pixels, values=pilot), size)[leaf].square()
            kept = (energy - LEFT * variance).clamp_min_(0)
            kept /= kept + variance
        if not plain:
            kept[..., 0, 0] = 1  # a tile's mean is never lost
        dropped = ((1 - kept).square() * (chosen.square() - variance)).flatten(1).sum(1)
        least = kept.square().flatten(1).sum(1).clamp_min(1) * variance.flatten()
        scale = 1 / (size.share * size.pixels) ** 2  # scaled energy of a tile -> mean square of its pixels
        basis = size.basis(sums)
        values = (chosen * kept / size.share).flatten(0, 2) @ basis  # [t C M, x]; as one product, like `coefficients`
        values = values.view_as(chosen).transpose(2, 3).reshape(-1, size.pixels) @ basis  # [t C x, y]
        values = values.view_as(chosen).transpose(2, 3)
        weight = torch.ones_like(least) if plain else 1 / (least * scale)
        weight = weight[:, None, None, None] * _window(size.pixels, halo, window, sums.dtype, sums.device)
        risk = (least + dropped.clamp_min(0))[:, None, None, None] * scale / chosen.shape[1]
        planes = torch.cat([values * weight, risk * weight, weight], dim=1)  # [t, C + 2, P, P]
        along = torch.arange(size.pixels, device=sums.device)
        rows = (corner[0] + y * size.stride)[:, None, None] + along[:, None]
        columns = (corner[1] + x * size.stride)[:, None, None] + along
        places = (rows * sums.shape[2] + columns).flatten()
        sums.flatten(1).index_add_(1, places, planes.transpose(0, 1).flatten(1))


def _variance(limit: Tensor, sigmas: float) -> Tensor:
    """Of the noise in a scaled coefficient whose threshold is so many standard errors."""
    return (limit / sigmas).square().clamp_min(LEAST)


@lru_cache(maxsize=64)
def _window(pixels: int, halo: int, window: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The blend [P, P] of a tile with its neighbours, at pixel centres."""
    profile = torch.ones(pixels, dtype=torch.float64)
    if halo:
        rise = ramp((torch.arange(2 * halo, dtype=torch.float64) + 0.5) / (2 * halo), window)[0]
        profile[: 2 * halo] = rise
        profile[-2 * halo :] *= rise.flip(0)
    profile = profile.to(dtype)
    return (profile[:, None] * profile).to(device)
