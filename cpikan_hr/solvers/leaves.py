"""A block of pixels in the cosine basis of every leaf size of a quadtree, and the leaves that need the fewest terms."""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from cpikan_hr.fields import Field
from cpikan_hr.solvers.blocks import Block, Pixels
from cpikan_hr.solvers.quadtree import prune

LEAST = 2e-19  # variance of a coefficient, so that it can be divided by where there is no noise, or nothing is known


@dataclass(frozen=True)
class Size:
    """One leaf size: stride, pixels P of the support per axis, and how many tiles the frame has."""

    level: int
    stride: int
    pixels: int
    counts: tuple[int, int]

    @property
    def share(self) -> float:
        """A support's energy counts for its core only: neighbours hold the rest."""
        return self.stride / self.pixels

    def basis(self, like: Tensor) -> Tensor:
        """Orthonormal basis on pixel centres, [P, P]: row n is T_n(sin(pi xi / 2)), the DCT-II up to its sign."""
        return _basis(self.pixels, like.dtype, like.device)


@lru_cache(maxsize=64)
def _basis(pixels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    n = torch.arange(pixels, dtype=torch.float64)
    angle = math.pi - math.pi * (n + 0.5) / pixels
    rows = torch.cos(n[:, None] * angle) * math.sqrt(2 / pixels)
    rows[0] *= math.sqrt(0.5)
    return rows.to(device, dtype)


def sizes_of(field: Field, group: int) -> tuple[list[Size], int]:
    """The leaf sizes of a recipe's level, coarse to fine, and the halo (half the blend) in px."""
    sizes = []
    for number in field.groups[group]:
        axis_y, axis_x = field.levels[number].tile_grid.axes
        stride = round(axis_x.stride)
        sizes.append(Size(number, stride, round(2 * axis_x.half), (axis_y.count, axis_x.count)))
    return sizes, (sizes[0].pixels - sizes[0].stride) // 2


def coefficients(pixels: Pixels, size: Size) -> Tensor:
    """Orthonormal coefficients [ny, nx, C, P, P] of the block's tiles of one size, scaled to the core's energy."""
    basis, p, s = size.basis(pixels.values), size.pixels, size.stride
    along_y = (basis * size.share) @ pixels.values.unfold(1, p, s).transpose(2, 3)  # [C, ny, M, w], of whole rows
    along_x = along_y.unfold(3, p, s)  # [C, ny, M, nx, P]
    both = along_x.reshape(-1, p) @ basis.T  # one product of many rows: one for each small tile takes far longer
    return both.view(*along_x.shape).permute(1, 3, 0, 2, 4).contiguous()  # what sums over tiles reads in one go


def thresholds(pixels: Pixels, size: Size, price: float, sigmas: float) -> Tensor:
    """What a scaled coefficient must exceed, [ny, nx, 1, 1, 1]."""
    if pixels.noise is None or not sigmas:
        return torch.tensor(price).to(pixels.values)
    mean = avg_pool2d(pixels.noise.square()[None], size.pixels, size.stride)[0]
    noise = mean.sqrt() * (sigmas * size.share)
    return noise.clamp_min(price)[:, :, None, None, None]


def exists(block: Block, size: Size, coarsest: Size, device: torch.device) -> Tensor:
    """Which tiles of a block lie in the grid, [ny, nx]."""
    factor = coarsest.stride // size.stride
    y = block.row * factor + torch.arange(block.rows * factor, device=device)
    x = block.column * factor + torch.arange(block.columns * factor, device=device)
    return (y < size.counts[0])[:, None] & (x < size.counts[1])


def choose(scaled: list[Tensor], limits: list[Tensor], present: list[Tensor]) -> list[Tensor]:
    """The leaves of the quadtree, per size a bool mask [ny, nx]: least sum of min(coefficient^2, threshold^2)."""
    if len(scaled) == 1:
        return present
    costs = [
        torch.minimum(c.square(), limit.square()).flatten(2).sum(2) * here
        for c, limit, here in zip(scaled, limits, present, strict=True)
    ]
    return [leaf & here for leaf, here in zip(prune(costs), present, strict=True)]
