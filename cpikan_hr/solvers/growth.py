"""Growing the networks of a quadtree of tiles: one hidden unit at a time, as many as pay, in leaves as small as pay.

For every tile of every leaf size a ladder of networks with 0, 1, 2, ... hidden units is fitted. A new unit comes from a
random dictionary: the entry whose functions take most of the residual's energy (orthogonal matching pursuit, Pati et
al. 1993); then all units move together by Levenberg-Marquardt. The ladder of a tile ends where one more unit cannot pay
for itself. Leaves and units are those of least distortion + price * parameters (see `quadtree.py`).

The fit of a tile is weighted with its window: windows sum to one, so the squared error of the blend is at most the
weighted sum of the tiles' errors (convexity), and the costs of tiles add up.
"""

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor

from cpikan_hr.fields import Field
from cpikan_hr.fields.field import grown_network
from cpikan_hr.fields.tiles import TileGrid
from cpikan_hr.networks import build_network
from cpikan_hr.parallel import at_once, in_threads
from cpikan_hr.recipe import LevelOptions
from cpikan_hr.solvers.blocks import Block, Pixels, ReadTarget, blocks_of, read_block, shares_of
from cpikan_hr.solvers.gauss_newton import levenberg_marquardt
from cpikan_hr.solvers.grown_networks import unit_of, write
from cpikan_hr.solvers.leaves import Size, exists, sizes_of
from cpikan_hr.solvers.quadtree import prune
from cpikan_hr.solvers.units import Unit, Units, features

BLOCK = 2**16  # pixels of one block
DICTIONARY = 512  # entries
GROWING, POLISHING = 8, 20  # iterations of a ladder's rung, and of the network chosen at last
PRIOR = 1e-2  # of the hidden weights, over the variance of the picture (see `Unit.penalty`)
MATCHED = 256  # tiles compared with the dictionary at once


@dataclass
class Rung:
    """The networks of so many hidden units: which tiles have one, hidden weights (None: no unit), last layers."""

    tiles: Tensor  # [t] ascending
    w: Tensor | None  # [t, h, 1 + 2 degree]
    last: Tensor  # [t, C, h terms + 1]


@dataclass
class Ladder:
    """All networks tried for the tiles of one size in a block: distortion [t, 1 + most units], inf where not tried."""

    size: Size
    phi: Tensor
    data: Tensor  # [t, C, P], times sqrt(window)
    weight: Tensor | None  # [t, P] sqrt(window)
    distortion: Tensor
    rungs: list[Rung]


def tile_windows(grid: TileGrid, size: Size, block: Block, coarsest: Size) -> Tensor | None:
    """Windows [t, P] of a block's tiles at their pixel centres; None without overlap (all one)."""
    if size.pixels == size.stride:
        return None
    factor, factors = coarsest.stride // size.stride, []
    for axis, first, count in zip(grid.axes, (block.row, block.column), (block.rows, block.columns), strict=True):
        index = first * factor + torch.arange(count * factor)
        place = (torch.arange(size.pixels, dtype=torch.float64) + 0.5) * (2 * axis.half / size.pixels) - axis.half
        points = axis.centre(index)[:, None] + place
        factors.append(axis.windows(points, index[:, None])[0])
    both = factors[0][:, None, :, None] * factors[1][None, :, None, :]
    return both.flatten(2).flatten(0, 1).float()


def tile_data(pixels: Pixels, size: Size) -> Tensor:
    """[C, h, w] to the supports [t, C, P] of a block's tiles, row by row."""
    views = pixels.values.unfold(1, size.pixels, size.stride).unfold(2, size.pixels, size.stride)
    return views.permute(1, 2, 0, 3, 4).flatten(3).flatten(0, 1).contiguous()


def dictionary(unit: Unit, phi: Tensor, weight: Tensor | None, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Candidate hidden weights [N, 1 + 2 degree] and their functions, orthonormal within an entry: [N, terms, P].

    Ridges of random direction, slope and place, bent a little by the higher terms.
    """
    generator = torch.Generator().manual_seed(seed)
    w = torch.zeros(DICTIONARY, 1 + 2 * unit.degree)
    angle = 2 * math.pi * torch.rand(DICTIONARY, generator=generator)
    reach = 3.0 if unit.kind == "siren" else 1.5  # of v over half a tile: about one wave, or one bend of T_2
    slope = reach * (0.5 + torch.rand(DICTIONARY, generator=generator))
    w[:, 0] = (2 * torch.rand(DICTIONARY, generator=generator) - 1) * slope
    w[:, 1], w[:, 1 + unit.degree] = slope * torch.sin(angle), slope * torch.cos(angle)
    for k in range(2, unit.degree + 1):
        for column in (k, unit.degree + k):
            w[:, column] = 1.5 * 0.3 ** (k - 1) * torch.randn(DICTIONARY, generator=generator)
    w = w.to(phi)
    values = unit.basis((w @ phi)[None], slopes=False)[0][0].permute(1, 0, 2).double()  # [N, terms, P]
    values = values - values.mean(-1, keepdim=True)
    if weight is not None:
        values = values * weight.double()
    gram = values @ values.transpose(1, 2)
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += 1e-3 * diagonal.mean(1, keepdim=True) + 1e-12
    return w, torch.linalg.solve_triangular(torch.linalg.cholesky(gram), values, upper=False).float()


def best_entries(residual: Tensor, functions: Tensor) -> Tensor:
    """Per tile the dictionary entry whose functions take most of the residual's energy, [t]."""
    entries, terms, pixels = functions.shape
    flat, found = functions.reshape(entries * terms, pixels).T.contiguous(), []
    for part in residual.split(MATCHED):
        energy = (part.reshape(-1, pixels) @ flat).square_().view(len(part), -1, entries, terms)
        found.append(energy.sum((1, 3)).argmax(1))
    return torch.cat(found)


def climb(
    unit: Unit,
    size: Size,
    data: Tensor,
    weight: Tensor | None,
    present: Tensor,
    most: int,
    price: float,
    prior: float,
    cap: Tensor | None,
    alive: Callable[[], None],
) -> Ladder:
    """The ladder of every present tile.

    `cap` [t]: cost of its best children, which a tile that is dearer never beats.
    """
    tiles, channels, _ = data.shape
    phi = unit.inputs(size.pixels, size.pixels).to(data)
    one = torch.ones_like(data[:, :1]) if weight is None else weight[:, None]
    mean = (data * one).sum(-1, keepdim=True) / one.square().sum(-1, keepdim=True).clamp_min(1e-12)
    distortion = data.new_full((tiles, most + 1), math.inf)
    distortion[:, 0] = (data - mean * one).square().sum((1, 2))
    number = torch.nonzero(present)[:, 0]
    rungs = [Rung(torch.arange(tiles, device=data.device), None, mean)]
    w, last = None, mean[number]
    entries, functions = dictionary(unit, phi, None if weight is None else weight.amax(0))
    step = unit.parameters(1, channels) - unit.parameters(0, channels)
    for units in range(1, most + 1):
        alive()
        worth = distortion[number, units - 1] > price * step
        if cap is not None:
            worth &= price * unit.parameters(units, channels) < cap[number]
            if units > 2:
                worth &= distortion[number, units - 1] < 3 * cap[number]
        number, last, w = number[worth], last[worth], None if w is None else w[worth]
        if not len(number):
            break
        mine, here = data[number], None if weight is None else weight[number]
        a = one[number] if w is None else features(unit, phi, w, here)[0]
        new = entries[best_entries(mine - torch.bmm(last, a), functions)][:, None]
        w = new if w is None else torch.cat([w, new], 1)
        w, last, distortion[number, units] = levenberg_marquardt(
            Units(unit, phi, prior), mine, w, GROWING, here
        )
        rungs.append(Rung(number, w, last))
    return Ladder(size, phi, data, weight, distortion, rungs)


class Grown:
    """A block with the ladders of all sizes: what it costs at a price, and its networks.

    `alive` is called every few seconds of work; what it raises ends the work.
    """

    def __init__(
        self,
        block: Block,
        pixels: Pixels,
        sizes: list[Size],
        grids: list[TileGrid],
        unit: Unit,
        most: int,
        price: float,
        prior: float,
        alive: Callable[[], None],
    ):
        self.block, self.unit, self.sizes, self.prior = block, unit, sizes, prior
        self.channels = pixels.values.shape[0]
        self.shapes = [(block.rows * f, block.columns * f) for f in (sizes[0].stride // size.stride for size in sizes)]
        self.present = [exists(block, size, sizes[0], pixels.values.device) for size in sizes]
        self.ladders: list[Ladder] = []
        cap = None
        for k in reversed(range(len(sizes))):  # fine to coarse: a coarse tile knows what its children cost
            window = tile_windows(grids[k], sizes[k], block, sizes[0])
            weight = None if window is None else window.sqrt().to(pixels.values)
            data = tile_data(pixels, sizes[k])
            data = data if weight is None else data * weight[:, None]
            here = self.present[k].flatten()
            self.ladders.insert(0, climb(unit, sizes[k], data, weight, here, most, price, prior, cap, alive))
            if k:
                cost = self.costs(price)[0][0]
                below = cost if cap is None else torch.minimum(cost, cap.view(self.shapes[k]))
                cap = below.unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).sum((1, 3)).flatten()

    def costs(self, price: float) -> tuple[list[Tensor], list[Tensor]]:
        """Per size: least cost of each tile as a leaf [ny, nx], and with how many units [ny, nx]."""
        costs, units = [], []
        first = len(self.sizes) - len(self.ladders)
        for ladder, shape, present in zip(self.ladders, self.shapes[first:], self.present[first:], strict=True):
            rate = torch.tensor([self.unit.parameters(h, self.channels) for h in range(ladder.distortion.shape[1])])
            cost, chosen = (ladder.distortion + price * rate.to(ladder.distortion)).min(1)
            costs.append(cost.view(shape) * present)
            units.append(chosen.view(shape))
        return costs, units

    def leaves(self, price: float) -> tuple[list[Tensor], list[Tensor]]:
        """Per size: which tiles are leaves [ny, nx], and with how many units."""
        costs, units = self.costs(price)
        leaves = prune(costs) if len(costs) > 1 else [torch.ones_like(self.present[0])]
        return [leaf & here for leaf, here in zip(leaves, self.present, strict=True)], units

    def at(self, price: float) -> tuple[float, float]:
        """Squared error (an upper bound of the blend's) and parameters at a price."""
        error = parameters = 0.0
        for ladder, leaf, units in zip(self.ladders, *self.leaves(price), strict=True):
            chosen = units[leaf]
            error += float(ladder.distortion[leaf.flatten()].gather(1, chosen[:, None]).sum(dtype=torch.float64))
            parameters += sum(self.unit.parameters(h, self.channels) for h in chosen.tolist())
        return error, parameters

    def networks(
        self, price: float, alive: Callable[[], None]
    ) -> dict[tuple[int, int], tuple[Tensor, Tensor | None, Tensor]]:
        """(size number, units) -> grid tile numbers, hidden weights and last layers of the leaves, polished."""
        found = {}
        for k, (ladder, leaf, units) in enumerate(zip(self.ladders, *self.leaves(price), strict=True)):
            for h, rung in enumerate(ladder.rungs):
                local = torch.nonzero((leaf & (units == h)).flatten())[:, 0]
                if not len(local):
                    continue
                place = torch.searchsorted(rung.tiles, local)
                w, last = None if rung.w is None else rung.w[place], rung.last[place]
                if w is not None:
                    alive()
                    here = None if ladder.weight is None else ladder.weight[local]
                    fit = Units(self.unit, ladder.phi, self.prior)
                    w, last, _ = levenberg_marquardt(fit, ladder.data[local], w, POLISHING, here, 1e-3)
                y, x = local // self.shapes[k][1], local % self.shapes[k][1]
                factor = self.sizes[0].stride // self.sizes[k].stride
                number = (self.block.row * factor + y) * self.sizes[k].counts[1] + self.block.column * factor + x
                found[k, h] = (number.cpu(), None if w is None else w.cpu(), last.cpu())
        return found


def prior_of(field: Field) -> float:
    """The prior on hidden weights, in squared units of the data."""
    return PRIOR * float(field.spread.square().mean())


def growing_sizes(field: Field, group: int, choice: LevelOptions) -> tuple[list[Size], list[TileGrid], int]:
    """Leaf sizes, their grids and the halo; a growing level has one field level per size and number of units."""
    sizes, halo = sizes_of(field, group)
    per_size = 1 + choice.network.hidden[0]
    return sizes[::per_size], [field.levels[size.level].tile_grid for size in sizes[::per_size]], halo


def grow_block(
    field: Field,
    group: int,
    choice: LevelOptions,
    target: ReadTarget,
    shape: tuple[int, int],
    block: Block,
    price: float,
    alive: Callable[[], None] = lambda: None,
) -> Grown:
    """Reads a block and fits its ladders, each as far as it pays at `price`."""
    sizes, grids, halo = growing_sizes(field, group, choice)
    pixels = read_block(field, group, target, shape, block, sizes[0].stride, halo)
    return Grown(block, pixels, sizes, grids, unit_of(choice), choice.network.hidden[0], price, prior_of(field), alive)


def blocks_to_grow(field: Field, sizes: list[Size], shape: tuple[int, int]) -> list[Block]:
    """The blocks that grown tiles are solved in; their numbers name them to `grow`."""
    return blocks_of(shape, sizes[0].stride, at_once(BLOCK, field.device))


def grow(
    field: Field,
    group: int,
    choice: LevelOptions,
    target: ReadTarget,
    shape: tuple[int, int],
    price: float,
    share: int,
    shares: int,
    known: dict[int, Grown],
    progress: Callable[[float], None] | None = None,
) -> dict:
    """The networks of this process' share of the blocks. `known`: blocks whose ladders are fitted already."""
    sizes, _, _ = growing_sizes(field, group, choice)
    blocks, pieces, done = blocks_to_grow(field, sizes, shape), {}, 0.0

    def alive() -> None:
        if progress:
            progress(done)

    def solve(numbered: tuple[int, Block]) -> dict:
        number, block = numbered
        grown = known.get(number) or grow_block(field, group, choice, target, shape, block, price, alive)
        return grown.networks(price, alive)

    mine = list(shares_of(blocks, share, shares))
    with closing(in_threads(solve, mine, field.device)) as solved:
        for (number, _), found in zip(mine, solved, strict=True):
            for key, piece in found.items():
                pieces.setdefault(key, []).append(piece)
            done = (number + 1) / len(blocks)
            alive()
    return pieces


def set_networks(field: Field, group: int, choice: LevelOptions, pieces: dict) -> None:
    """Gives the group's levels the grown networks."""
    unit, channels, device = unit_of(choice), field.mix.shape[0], field.mix.device
    numbers = field.groups[group]
    per_size = 1 + choice.network.hidden[0]
    for place, number in enumerate(numbers):
        level = field.levels[number]
        found = pieces.get(divmod(place, per_size), [])
        network, tiles = None, torch.zeros(0, dtype=torch.int64)
        if found:
            tiles = torch.cat([piece[0] for piece in found])
            order = torch.argsort(tiles)
            tiles, last = tiles[order], torch.cat([piece[2] for piece in found])[order] / field.spread.cpu()[:, None]
            units = place % per_size
            network = build_network(
                tiles=len(tiles), in_features=2, out_features=channels, **grown_network(choice, units)
            )
            if units:
                write(network, unit, torch.cat([piece[1] for piece in found])[order], last)
            else:
                network.set_last(None, last.transpose(1, 2))
        level.set_tiles(tiles, network, channels)
        level.scale.copy_(field.spread)
        level.to(device)
