"""Closed-form quadtrees of sparse Chebyshev tiles: one pass over the file, two small GEMMs per tile and size.

With the `sine` map a tile's terms are the cosine basis, orthonormal on its pixel centres, so the least-squares
coefficients are projections, and dropping a term costs exactly its square. A term is kept where it is larger than a
threshold: `sigmas` standard errors of the known noise (hard thresholding, Donoho and Johnstone 1994), or the price that
a target sets (see `budget.py`), whichever is larger. The same threshold prices the leaves of the quadtree.
"""

import math
from collections.abc import Callable
from contextlib import closing
from itertools import groupby

import torch

from cpikan_hr.fields import Field
from cpikan_hr.networks import Chebyshev2D
from cpikan_hr.parallel import at_once, in_threads
from cpikan_hr.recipe import StartOptions
from cpikan_hr.solvers.averaging import read_averaged
from cpikan_hr.solvers.blocks import Block, Pixels, ReadTarget, blocks_of, read_block, shares_of
from cpikan_hr.solvers.leaves import Size, choose, coefficients, exists, sizes_of, thresholds
from cpikan_hr.solvers.terms import NOTHING, Found, Terms, divide
from cpikan_hr.solvers.texture import Texture

BLOCK = 2**17  # pixels of one block: all sizes' coefficients of it stay in the last-level cache
AVERAGED = 2**18  # and of one whose surroundings are averaged with it


def fit_block(block: Block, pixels: Pixels, sizes: list[Size], price: float, sigmas: float) -> dict[int, Found]:
    """Chooses leaves and terms of one block, per level number."""
    found: dict[int, Found] = {}
    scaled = [coefficients(pixels, size) for size in sizes]
    limits = [thresholds(pixels, size, price, sigmas) for size in sizes]
    present = [exists(block, size, sizes[0], pixels.values.device) for size in sizes]
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


def read(
    field: Field, group: int, target: ReadTarget, shape: tuple[int, int], block: Block, sizes: list[Size], halo: int,
    start: StartOptions, texture: Texture | None = None,
) -> Pixels:  # fmt: skip
    """The block that terms are chosen for, its noise averaged out where the recipe says so."""
    if start.shifts:
        return read_averaged(field, group, target, shape, block, sizes, halo, start, texture).pixels
    return read_block(field, group, target, shape, block, sizes[0].stride, halo)


def fit_spectral(
    field: Field,
    group: int,
    target: ReadTarget,
    shape: tuple[int, int],
    price: float,
    start: StartOptions,
    share: int = 0,
    shares: int = 1,
    progress: Callable[[float], None] | None = None,
    texture: Texture | None = None,
) -> dict[int, Terms]:
    """The terms of this process' share of the blocks, per level number; `set_terms` puts them into the field.

    texture: what `texture.learn` found.
    """
    sizes, halo = sizes_of(field, group)
    terms = {size.level: Terms(field.mix.shape[0] * size.pixels**2) for size in sizes}
    pixels = at_once(AVERAGED if start.shifts else BLOCK, field.device)
    blocks = blocks_of(shape, sizes[0].stride, pixels, square=start.shifts > 0)
    mine = list(shares_of(blocks, share, shares))

    @torch.no_grad()
    def fit(numbered: tuple[int, Block]) -> dict[int, Found]:
        pixels = read(field, group, target, shape, numbered[1], sizes, halo, start, texture)
        return fit_block(numbered[1], pixels, sizes, price, start.threshold)

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
