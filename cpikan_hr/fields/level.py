"""One level of a field: equal tiles, one batched network, windows that sum to one over all tiles of the grid.

Only the `active` tiles have a network; the others contribute nothing. A quadtree is several levels of one blend width
whose active tiles together cover the domain once (see `solvers/quadtree.py`).

Two geometries, one formula. Scattered points are sent to the tiles that see them (`forward`, for training); coordinate
vectors span a lattice (`fields/lattice.py`, for start and rendering). Where torch differentiates with respect to the
points themselves, windows and local coordinates are made with a graph to them (`followed`).
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cpikan_hr.fields.tiles import TileGrid
from cpikan_hr.jets import Jet, chain, multiply, row_count, seed, transformed, unwrapped
from cpikan_hr.networks import TiledNetwork
from cpikan_hr.parallel import at_once

GROUP = 4096  # most points of one tile handled together; bounds the padding of a level with few tiles


@dataclass(frozen=True)
class Dispatch:
    """Points grouped by tile and padded: tile, its slot in the network, point numbers (N where padded), windows."""

    tiles: Tensor  # [t]
    slots: Tensor  # [t]
    points: Tensor  # [t, P]
    windows: Tensor  # [t, P, R] float64, zero where padded


def slots_in(active: Tensor, tiles: Tensor) -> Tensor:
    """Places of `tiles` in the ascending numbers `active` [t]; negative where they are not among them."""
    if not len(active):
        return torch.full_like(tiles, -1)
    # A search, not a table: a table would be as large as the grid, of which a quadtree uses a small part.
    wanted = tiles.to(active.dtype)
    found = torch.searchsorted(active, wanted).clamp(max=len(active) - 1)
    return torch.where(active[found] == wanted, found, -1)


class Level(nn.Module):
    """Sum over active tiles of window * (mean + scale * network(local coordinates)).

    Outputs [.., C] in the data's unit.
    `mean` and `scale` are one row for all tiles, or (`per_tile`) one per active tile: then they count as parameters.
    `active`: ascending numbers of the tiles that have a network; None: all.
    `scaled`: off, networks see the global coordinates instead, for comparison. `periodic`: axes that networks see as a
    point of the unit circle, cos and sin of pi times the local coordinate, so that both ends of one tile are the same.
    """

    def __init__(
        self,
        grid: TileGrid,
        network: TiledNetwork | None,
        channels: int,
        chunk: int,
        recompute: bool = False,
        active: Tensor | None = None,
        per_tile: bool = False,
        scaled: bool = True,
        periodic: tuple[int, ...] = (),
    ):
        super().__init__()
        self.scaled, self.periodic = scaled, periodic
        self.tile_grid = grid
        self.chunk = chunk
        self.recompute = recompute
        self.per_tile = per_tile
        self.set_tiles(active, network, channels)

    def set_tiles(self, active: Tensor | None, network: TiledNetwork | None, channels: int) -> None:
        """Gives the level a network for other tiles; None where `active` is empty. Comes before any optimizer."""
        self.network = network
        rows = network.tiles if self.per_tile and network is not None else 1
        self.register_buffer("mean", torch.zeros(rows, channels))
        self.register_buffer("scale", torch.ones(rows, channels))
        self.register_buffer("active", None if active is None else active.to(torch.int32))

    @property
    def active_tiles(self) -> Tensor:
        """Numbers [t] of the tiles that have a network, in the network's order."""
        if self.active is not None:
            return self.active.long()
        return torch.arange(self.tile_grid.tiles, device=self.mean.device)

    def slots_of(self, tiles: Tensor) -> Tensor:
        """Index of tiles in the network; negative where they have none."""
        return tiles if self.active is None else slots_in(self.active, tiles)

    def tile_of(self, slot: int) -> int:
        """Number in the grid of the tile that has this index in the network."""
        return slot if self.active is None else int(self.active[slot])

    def subset(self, slots: Tensor) -> "Level":
        """The tiles with these ascending indices in the network alone, with parameters of their own."""
        return self._picked(self.active_tiles[slots], slots)

    def joined(self, other: "Level") -> "Level":
        """The tiles of both, which share a grid and no tile, in one level with parameters of its own."""
        if self.network is None:
            return other.subset(torch.arange(len(other.active_tiles), device=other.mean.device))
        tiles = torch.cat([self.active_tiles, other.active_tiles])
        order = tiles.argsort()
        return self._picked(tiles[order], order, other)

    def _picked(self, tiles: Tensor, slots: Tensor, other: "Level | None" = None) -> "Level":
        """A level of `tiles`, whose indices here are `slots`; `other`'s count on from the last."""
        network = self.network.pick(slots, other and other.network) if len(tiles) else None
        channels = self.mean.shape[1]
        level = Level(
            self.tile_grid, network, channels, self.chunk, self.recompute, tiles, self.per_tile,
            self.scaled, self.periodic,
        )  # fmt: skip
        level.to(self.mean)  # device and precision
        for name in ("mean", "scale"):
            value = getattr(self, name)
            if self.per_tile and network is not None:
                value = (value if other is None else torch.cat([value, getattr(other, name)]))[slots]
            getattr(level, name).copy_(value[: len(getattr(level, name))])
        return level

    def mean_of(self, slots: Tensor) -> Tensor:
        return self.mean[slots] if self.per_tile else self.mean

    def scale_of(self, slots: Tensor) -> Tensor:
        return self.scale[slots] if self.per_tile else self.scale

    def normalised(self, jet: Jet, slots: Tensor) -> Jet:
        """mean + scale * jet, rows [t, R, P, C]."""
        rows = jet.rows.to(self.mean.dtype) * self.scale_of(slots)[:, None, None]
        value = rows[:, :1] + self.mean_of(slots)[:, None, None]
        return jet._replace(rows=torch.cat([value, rows[:, 1:]], dim=1))

    def forward(self, points: Tensor, order: str, cover: tuple[Tensor, Tensor, Tensor] | None = None) -> Tensor:
        """Jet rows [R, N, C] at float64 points [N, D]; `cover`: what the grid's `cover` gives there, where known."""
        if self.network is None:
            return self.mean.new_zeros(row_count(order, points.shape[1]), len(points), self.mean.shape[1])
        follow = self.followed if differentiated(points) else self.dispatch
        return self.evaluate(points, order, follow(points, order, cover))

    def evaluate(self, points: Tensor, order: str, dispatch: Dispatch) -> Tensor:
        """`forward` at points whose dispatch is known."""
        rows = self.mean.new_zeros(row_count(order, points.shape[1]), len(points) + 1, self.mean.shape[1])
        padded = torch.cat([points, points.new_zeros(1, points.shape[1])])
        step = max(1, at_once(self.chunk, points.device) // max(1, dispatch.points.shape[1] * rows.shape[0]))
        for start in range(0, len(dispatch.tiles), step):
            part = slice(start, start + step)
            numbers = dispatch.points[part]
            arguments = (padded[numbers], dispatch.tiles[part], dispatch.slots[part], dispatch.windows[part], order)
            if self.recompute and torch.is_grad_enabled() and not transformed():
                out = checkpoint(self.blend, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                out = self.blend(*arguments)
            rows = rows.index_add(1, numbers.flatten(), out.transpose(0, 1).flatten(1, 2))
        return rows[:, :-1]

    def blend(self, points: Tensor, tiles: Tensor, slots: Tensor, windows: Tensor, order: str) -> Tensor:
        """Windowed jet rows [t, R, P, C] of tiles [t] at points [t, P, D]."""
        return self.windowed(self.network(self.inputs(points, tiles, order), slots), slots, windows)

    def windowed(self, jet: Jet, slots: Tensor, windows: Tensor) -> Tensor:
        """Rows [t, R, P, C] of what the networks give, `jet`, in the data's unit and times windows [t, P, R]."""
        jet = self.normalised(jet, slots)
        window = windows.to(self.mean.dtype).transpose(-1, -2)[..., None]
        return multiply(jet, Jet(window, jet.order, jet.dim)).rows

    def inputs(self, points: Tensor, tiles: Tensor, order: str) -> Jet:
        """What the networks of tiles [t] see at points [t, P, D]: the jet of the local coordinates."""
        # Padding lies outside the tile, where polynomials overflow: their zero window could not undo that.
        local = self.tile_grid.local(points, tiles[:, None])
        if differentiated(points):  # a point that rounding puts beyond the end of its tile keeps its slope
            local = local + (local.clamp(-1, 1) - local).detach()
        else:
            local = local.clamp(-1, 1)
        inverse = self.tile_grid.inverse_half.to(points.device)
        jet = seed(local.to(self.mean.dtype), order, inverse.to(self.mean.dtype))
        if self.scaled:
            return on_circle(jet, self.periodic) if self.periodic else jet
        bare = seed(self.tile_grid.place(local, tiles[:, None]).to(self.mean.dtype), order)
        if not self.periodic:
            return bare
        turned = on_circle(jet, self.periodic)  # a circle closes at the ends of the box, whatever its units
        others = [a for a in range(jet.dim) if a not in self.periodic]
        turned.rows[..., others] = bare.rows[..., others]
        return turned

    @torch.no_grad()
    def dispatch(self, points: Tensor, order: str, cover: tuple[Tensor, Tensor, Tensor] | None = None) -> Dispatch:
        """Sends every point to the active tiles whose window is positive there.

        Where there is none, the first tile gets no point: data-parallel backends wait for a gradient of every
        parameter, and that of an empty batch is zero whatever the parameters are (zero times an evaluated NaN is not).
        """
        point, tile, window = self.tile_grid.cover(points, order) if cover is None else cover
        if self.active is not None:
            here = self.slots_of(tile) >= 0
            point, tile, window = point[here], tile[here], window[here]
        if not len(tile):
            first = self.active_tiles[:1]
            return Dispatch(first, self.slots_of(first), point.view(1, 0), window.view(1, 0, window.shape[1]))
        tile, by_tile = torch.sort(tile, stable=True)
        point, window = point[by_tile], window[by_tile]
        tiles, counts = torch.unique_consecutive(tile, return_counts=True)
        slot = torch.arange(len(tile), device=tile.device) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        # A tile with very many points takes several rows of the padded table.
        parts = -(-counts // GROUP)
        first = parts.cumsum(0) - parts
        row = torch.repeat_interleave(first, counts) + slot // GROUP
        width = int(counts.max().clamp(max=GROUP))
        numbers = torch.full((int(parts.sum()), width), len(points), dtype=torch.long, device=points.device)
        windows = window.new_zeros(*numbers.shape, window.shape[1])
        numbers[row, slot % GROUP] = point
        windows[row, slot % GROUP] = window
        tiles = torch.repeat_interleave(tiles, parts)
        return Dispatch(tiles, self.slots_of(tiles), numbers, windows)

    def followed(self, points: Tensor, order: str, cover: tuple | None = None) -> Dispatch:
        """`dispatch` with windows that are functions of the points, to torch too: it differentiates them as often as it
        likes. Which tiles see a point is no function of it: where that changes, windows are zero."""
        plain = unwrapped(points)
        found = self._everywhere(points) if plain is None else self.dispatch(plain, "value", cover)
        at = torch.cat([points, points.new_zeros(1, points.shape[1])])[found.points]
        windows = self.tile_grid.windows(at, found.tiles[:, None], order)
        return replace(found, windows=torch.where(found.windows[..., :1] > 0, windows, 0.0))

    @torch.no_grad()
    def _everywhere(self, points: Tensor) -> Dispatch:
        """What `dispatch` says of points [N, D], of a size that does not depend on them: a row for every point and tile
        around it, with a window of 0 for tiles without a network. (Windows are 0 or 1 here.)"""
        numbers = torch.arange(len(points), device=points.device)
        if self.tile_grid.tiles == 1:  # one row: networks of tiles are gathered, one by one
            first = numbers.new_zeros(1)
            return Dispatch(first, first, numbers[None], torch.ones_like(points[:, :1])[None])
        tiles, again = self.tile_grid.around(points.detach())
        slots = self.slots_of(tiles.flatten())
        seen = ~again.flatten() & (slots >= 0)
        numbers = numbers.expand(len(tiles), -1).reshape(-1, 1)
        return Dispatch(tiles.flatten(), slots.clamp(min=0), numbers, seen[:, None, None].to(points.dtype))

    def count_parameters(self) -> int:
        """Fitted numbers: the network's parameters and, per tile, mean and scale."""
        if self.network is None:
            return 0
        fitted = sum(p.numel() for p in self.network.parameters())
        return fitted + (self.mean.numel() + self.scale.numel() if self.per_tile else 0)


def differentiated(points: Tensor) -> bool:
    """Whether torch may be asked for derivatives with respect to these points."""
    return points.requires_grad and torch.is_grad_enabled() or transformed()


def on_circle(jet: Jet, axes: tuple[int, ...]) -> Jet:
    """Coordinates `axes` of a jet `[..., R, P, D]` replaced by cos(pi u), and sin(pi u) after the last channel."""
    turned = jet._replace(rows=math.pi * jet.rows[..., list(axes)])
    c, s = torch.cos(turned.value), torch.sin(turned.value)
    rows = jet.rows.clone()
    rows[..., list(axes)] = chain(turned, c, -s, -c).rows
    return jet._replace(rows=torch.cat([rows, chain(turned, s, c, -s).rows], dim=-1))
