"""Tile grids: where a level's tiles lie, which of them see a point, and with what window.

Along each axis tiles have one stride d and one overlap o d (o <= 1): tile i has the core [i d, (i + 1) d] and the
support [(i - o/2) d, (i + 1 + o/2) d]. Invariant: at every point of the domain, the border included, at most two tiles
per axis have a positive window and the windows sum to one; there is no taper at the border of the domain.
"""

from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from cpikan_hr.fields.windows import ramp
from cpikan_hr.jets import row_orders


@dataclass(frozen=True)
class TileAxis:
    """One axis of a grid: `count` tiles of stride `stride` from `origin`, in units of the domain."""

    count: int
    stride: float
    overlap: float
    origin: float = 0.0
    window: str = "quintic"

    @property
    def half(self) -> float:
        """Half-size s of every tile's support; local coordinates are (x - centre) / half."""
        return self.stride * (1 + self.overlap) / 2

    def centre(self, index: Tensor) -> Tensor:
        return self.origin + (index.double() + 0.5) * self.stride

    def bounds(self, index: int) -> tuple[float, float]:
        """Where the window of tile `index` is positive; unbounded at the border of the domain."""
        reach = self.overlap * self.stride / 2
        low = self.origin + index * self.stride - reach if index > 0 else -float("inf")
        high = self.origin + (index + 1) * self.stride + reach if index < self.count - 1 else float("inf")
        return low, high

    def windows(self, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Value, first and second derivative (with respect to x) of the windows of tiles `index` at `x`; broadcasts."""
        rise, rise1, rise2 = self._interface(x, index, first=True)
        fall, fall1, fall2 = self._interface(x, index + 1, first=False)
        value = rise * fall
        return value, rise1 * fall + rise * fall1, rise2 * fall + 2 * rise1 * fall1 + rise * fall2

    def _interface(self, x: Tensor, interface: Tensor, first: bool) -> tuple[Tensor, Tensor, Tensor]:
        """The ramp across an interface: rising for the tile behind it (`first`), falling for the one before it."""
        width = self.overlap * self.stride
        offset = x - (self.origin + interface.double() * self.stride)
        if width > 0:
            s, s1, s2 = ramp(offset / width + 0.5, self.window)
            s1, s2 = s1 / width, s2 / width**2
        else:  # a hard edge: each point belongs to the tile whose core holds it
            s = (offset >= 0).to(x.dtype)
            s1 = s2 = torch.zeros_like(s)
        if not first:
            s, s1, s2 = 1 - s, -s1, -s2
        outer = (interface <= 0) if first else (interface >= self.count)
        one, zero = torch.ones_like(s), torch.zeros_like(s)
        return torch.where(outer, one, s), torch.where(outer, zero, s1), torch.where(outer, zero, s2)

    def candidates(self, x: Tensor) -> Tensor:
        """The two tiles around the interface nearest to each point: int64 [2, *x.shape].

        Equal where only one can see it.
        """
        nearest = torch.round((x - self.origin) / self.stride).long()
        return torch.stack([nearest - 1, nearest]).clamp(0, self.count - 1)


@dataclass(frozen=True)
class TileGrid:
    """The product of one `TileAxis` per axis of the domain; tiles are numbered in row-major order."""

    axes: tuple[TileAxis, ...]

    @classmethod
    def over(
        cls,
        extent,
        *,
        stride: float | None = None,
        counts=None,
        overlap: float,
        window: str = "quintic",
        origin: tuple[float, ...] | None = None,
    ) -> "TileGrid":
        """Covers [origin_a, origin_a + extent_a] per axis, from 0 on by default, with tiles of a stride (the last may
        reach beyond) or with a number of tiles.
        """
        axes = []
        for axis, length in enumerate(extent):
            count = counts[axis] if counts else max(1, -int(-length // stride))
            step = length / count if counts else float(stride)
            # The one tile of a whole axis has nobody to blend with.
            begin = float(origin[axis]) if origin else 0.0
            axes.append(TileAxis(count, step, 0.0 if counts and count == 1 else overlap, begin, window))
        return cls(tuple(axes))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(axis.count for axis in self.axes)

    @property
    def tiles(self) -> int:
        total = 1
        for axis in self.axes:
            total *= axis.count
        return total

    @property
    def inverse_half(self) -> Tensor:
        """1 / s per axis, float64 [D]: the chain rule's factor."""
        return torch.tensor([1 / axis.half for axis in self.axes], dtype=torch.float64)

    def unravel(self, tiles: Tensor) -> list[Tensor]:
        """The numbers along each axis. (`torch.unravel_index` imports sympy, which takes seconds.)"""
        index = []
        for count in reversed(self.shape):
            index.append(tiles % count)
            tiles = tiles // count
        return index[::-1]

    def local(self, points: Tensor, tiles: Tensor) -> Tensor:
        """Local coordinates (x - c) / s of float64 points [..., D] in tiles [...] (broadcast), float64.

        In double precision, because single precision resolves a pixel of a 9344 px domain only to 1e-3.
        """
        index = self.unravel(tiles)
        columns = [(points[..., a] - axis.centre(index[a])) / axis.half for a, axis in enumerate(self.axes)]
        return torch.stack(columns, dim=-1)

    def place(self, local: Tensor, tiles: Tensor) -> Tensor:
        """Global coordinates of local ones: what `local` inverts."""
        index = self.unravel(tiles)
        columns = [axis.centre(index[a]) + axis.half * local[..., a] for a, axis in enumerate(self.axes)]
        return torch.stack(columns, dim=-1)

    def windows(self, points: Tensor, tiles: Tensor, order: str) -> Tensor:
        """The windows' jets [..., R] of tiles [...] (broadcast) at points [..., D]: as `cover` gives them where they
        are positive, but with a graph to the points."""
        index = self.unravel(tiles)
        factors = [torch.stack(axis.windows(points[..., a], index[a])) for a, axis in enumerate(self.axes)]
        return product_rows(factors, order)

    def around(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """The tiles that may see points [N, D], int64 [S, N], S = 2^D at most; bool [S, N], where one is there again.

        Of a size that does not depend on where the points are, for `torch.func.vmap`.
        """
        flat = torch.zeros(1, len(points), dtype=torch.long, device=points.device)
        again = torch.zeros_like(flat, dtype=torch.bool)
        for a, axis in enumerate(self.axes):
            index = axis.candidates(points[:, a])
            twice = torch.stack([index[0] == index[1], index[0] != index[0]])
            index, twice = (index, twice) if axis.count > 1 else (index[1:], twice[1:])
            flat = (flat[:, None] * axis.count + index).flatten(0, 1)
            again = (again[:, None] | twice).flatten(0, 1)
        return flat, again

    def cover(self, points: Tensor, order: str) -> tuple[Tensor, Tensor, Tensor]:
        """All (point, tile) pairs with a positive window.

        points: float64 [N, D]. Returns point int64 [M], tile int64 [M] and the windows' jets float64 [M, R].
        """
        per_axis = []
        for a, axis in enumerate(self.axes):
            x = points[:, a]
            index = axis.candidates(x)
            value, first, second = axis.windows(x.expand_as(index), index)
            twice = index[0] == index[1]  # the same tile from both sides counts once
            keep = torch.stack([~twice, torch.ones_like(twice)]) & (value > 0)
            per_axis.append((index, torch.stack([value, first, second]), keep))
        number = torch.arange(len(points), device=points.device)
        point, tile, window = [], [], []
        for sides in product((0, 1), repeat=len(self.axes)):
            keep = torch.ones(len(points), dtype=torch.bool, device=points.device)
            flat = torch.zeros_like(number)
            for (index, _, kept), side, axis in zip(per_axis, sides, self.axes, strict=True):
                keep &= kept[side]
                flat = flat * axis.count + index[side]
            factors = [jets[:, side][:, keep] for (_, jets, _), side in zip(per_axis, sides, strict=True)]
            point.append(number[keep])
            tile.append(flat[keep])
            window.append(product_rows(factors, order))
        return torch.cat(point), torch.cat(tile), torch.cat(window)


def product_rows(factors: list[Tensor], order: str) -> Tensor:
    """Jet rows [M, R] of prod_a f_a(x_a) from value, first and second derivative [3, M] of each factor."""
    rows = []
    for terms in row_orders(order, len(factors)):
        total = 0
        for powers in terms:  # a row is one product of derivatives, the Laplacian's row a sum of D of them
            term = 1
            for factor, power in zip(factors, powers, strict=True):
                term = term * factor[power]
            total = total + term
        rows.append(total)
    return torch.stack(rows, dim=-1)
