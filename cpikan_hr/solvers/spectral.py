"""Closed-form quadtrees of sparse Chebyshev tiles: one pass over the file, two small GEMMs per tile and size.

With the `sine` map a tile's terms are the cosine basis, orthonormal on its pixel centres, so the least-squares
coefficients are projections, and dropping a term costs exactly its square. A term is kept where it is larger than a
threshold: `sigmas` standard errors of the known noise (hard thresholding, Donoho and Johnstone 1994), or the price that
a target sets (see `budget.py`), whichever is larger. The same threshold prices the leaves of the quadtree.
"""

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from cpikan_hr.fields import Field
from cpikan_hr.networks import Chebyshev2D
from cpikan_hr.parallel import in_threads
from cpikan_hr.solvers.blocks import Block, Pixels, ReadTarget, blocks_of, read_block, shares_of
from cpikan_hr.solvers.quadtree import prune
from cpikan_hr.solvers.terms import NOTHING, Found, Terms, divide

BLOCK = 2**18  # pixels of one block: all sizes' coefficients of it stay in the last-level cache


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
        n = torch.arange(self.pixels, dtype=torch.float64)
        angle = math.pi - math.pi * (n + 0.5) / self.pixels
        rows = torch.cos(n[:, None] * angle) * math.sqrt(2 / self.pixels)
        rows[0] *= math.sqrt(0.5)
        return rows.to(like)


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
    along_x = pixels.values.unfold(2, p, s) @ basis.T  # [C, h, nx, N]
    both = along_x.unfold(1, p, s) @ basis.T  # [C, ny, nx, N, M]
    return both.permute(1, 2, 0, 4, 3) * size.share


def thresholds(pixels: Pixels, size: Size, price: float, sigmas: float) -> Tensor:
    """What a scaled coefficient must exceed, [ny, nx, 1, 1, 1]."""
    if pixels.noise is None or not sigmas:
        return torch.tensor(price).to(pixels.values)
    known = pixels.known if pixels.known is not None else torch.ones_like(pixels.noise, dtype=torch.bool)
    both = torch.stack([pixels.noise.square() * known, known.to(pixels.noise)])
    sums = both.unfold(1, size.pixels, size.stride).unfold(2, size.pixels, size.stride).sum((3, 4))
    noise = (sums[0] / sums[1].clamp_min(1)).sqrt() * (sigmas * size.share)
    return noise.clamp_min(price)[:, :, None, None, None]


def exists(block: Block, size: Size, coarsest: Size) -> Tensor:
    """Which tiles of a block lie in the grid, [ny, nx]."""
    factor = coarsest.stride // size.stride
    y = block.row * factor + torch.arange(block.rows * factor)
    x = block.column * factor + torch.arange(block.columns * factor)
    return (y < size.counts[0])[:, None] & (x < size.counts[1])


def fit_block(block: Block, pixels: Pixels, sizes: list[Size], price: float, sigmas: float) -> dict[int, Found]:
    """Chooses leaves and terms of one block, per level number."""
    found: dict[int, Found] = {}
    scaled = [coefficients(pixels, size) for size in sizes]
    limits = [thresholds(pixels, size, price, sigmas) for size in sizes]
    present = [exists(block, size, sizes[0]).to(pixels.values.device) for size in sizes]
    leaves = choose(scaled, limits, present)
    for size, coefficient, limit, leaf in zip(sizes, scaled, limits, leaves, strict=True):
        chosen = coefficient[leaf]  # [t, C, M, N]
        if not len(chosen):
            found[size.level] = NOTHING
            continue
        limit = limit.expand(*leaf.shape, 1, 1, 1)[leaf]
        keep = chosen.abs() > limit
        counts = keep.flatten(1).sum(1)
        tile, flat = torch.nonzero(keep.flatten(1), as_tuple=True)
        norm = torch.full((size.pixels,), math.sqrt(2 / size.pixels))  # orthonormal coefficient -> that of T_m T_n
        norm[0] = math.sqrt(1 / size.pixels)
        values = (chosen * (norm[:, None] * norm / size.share).to(chosen)).flatten(1)[tile, flat]
        factor = sizes[0].stride // size.stride
        y, x = torch.nonzero(leaf, as_tuple=True)
        number = (block.row * factor + y) * size.counts[1] + block.column * factor + x
        used = counts > 0
        parts = (number[used].int(), counts[used].int(), flat.int(), values)
        found[size.level] = Found(*(part.cpu().numpy() for part in parts))
    return found


def choose(scaled: list[Tensor], limits: list[Tensor], present: list[Tensor]) -> list[Tensor]:
    """The leaves of the quadtree, per size a bool mask [ny, nx]: least sum of min(coefficient^2, threshold^2)."""
    if len(scaled) == 1:
        return present
    costs = [
        torch.minimum(c.square(), limit.square()).sum((2, 3, 4)) * here
        for c, limit, here in zip(scaled, limits, present, strict=True)
    ]
    return [leaf & here for leaf, here in zip(prune(costs), present, strict=True)]


def fit_spectral(
    field: Field,
    group: int,
    target: ReadTarget,
    shape: tuple[int, int],
    price: float,
    sigmas: float,
    share: int = 0,
    shares: int = 1,
    progress: Callable[[float], None] | None = None,
) -> dict[int, Terms]:
    """The terms of this process' share of the blocks, per level number; `set_terms` puts them into the field."""
    sizes, halo = sizes_of(field, group)
    terms = {size.level: Terms(field.mix.shape[0] * size.pixels**2) for size in sizes}
    blocks = blocks_of(shape, sizes[0].stride, BLOCK)
    mine = list(shares_of(blocks, share, shares))

    @torch.no_grad()
    def fit(numbered: tuple[int, Block]) -> dict[int, Found]:
        pixels = read_block(field, group, target, shape, numbered[1], sizes[0].stride, halo)
        return fit_block(numbered[1], pixels, sizes, price, sigmas)

    own = {number for number, _ in mine}
    with closing(in_threads(fit, mine, field.device)) as fitted:
        for _, row in groupby(enumerate(blocks), lambda numbered: numbered[1].row):
            parts = []
            for number in (number for number, _ in row if number in own):
                parts.append(next(fitted))
                if progress:
                    progress((number + 1) / len(blocks))
            for level, gathered in terms.items():
                gathered.add([part[level] for part in parts])
    return terms


def set_terms(field: Field, terms: dict[int, Terms]) -> None:
    """Gives each level (by number) its terms, which stay in their files.

    Coefficients are stored in units of one scale per level.
    """
    for number, gathered in terms.items():
        tiles, offset, index, values = gathered.tensors()
        level = field.levels[number]
        channels, device = field.mix.shape[0], field.mix.device
        size = tuple(round(2 * axis.half) for axis in level.tile_grid.axes)
        network = None
        if len(tiles):
            degree = (size[0] - 1, size[1] - 1)
            with torch.device("meta"):  # its terms come from elsewhere
                network = Chebyshev2D(len(tiles), 2, channels, degree=degree, input_map="sine", sparse=True)
            scale = max(gathered.rms, 1e-12)
            divide(values, scale)
            network.adopt_terms(offset, index, values)
        level.set_tiles(tiles, network, channels)
        if network is not None:
            level.scale.fill_(scale)
        level.to(device)
