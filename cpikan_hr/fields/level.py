"""One level of a field: equal tiles over the domain, one batched network, windows that sum to one.

Two geometries, one formula. Scattered points are sent to the tiles that see them (`forward`, for training);
coordinate vectors span a grid whose tiles are evaluated row by row (`grid`, for start and rendering).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cpikan_hr.fields.tiles import TileGrid, product_rows
from cpikan_hr.jets import Jet, multiply, row_count, seed
from cpikan_hr.networks import Chebyshev2D, TiledNetwork

GROUP = 4096  # most points of one tile handled together; bounds the padding of a level with few tiles


@dataclass(frozen=True)
class Dispatch:
    """Points grouped by tile and padded: point number (N where padded), tile and window of every slot."""

    tiles: Tensor  # [t]
    points: Tensor  # [t, P]
    windows: Tensor  # [t, P, R] float64, zero where padded


class Level(nn.Module):
    """Sum over tiles of window * (mean + scale * network(local coordinates)), outputs [.., C] in the data's unit."""

    def __init__(self, grid: TileGrid, network: TiledNetwork, channels: int, chunk: int, recompute: bool = False):
        super().__init__()
        self.tile_grid = grid
        self.network = network
        self.chunk = chunk
        self.recompute = recompute
        self.register_buffer("mean", torch.zeros(grid.tiles, channels))
        self.register_buffer("scale", torch.ones(grid.tiles, channels))

    def forward(self, points: Tensor, order: str) -> Tensor:
        """Jet rows [R, N, C] at float64 points [N, D]."""
        dispatch = self.dispatch(points, order)
        rows = self.mean.new_zeros(row_count(order, points.shape[1]), len(points) + 1, self.mean.shape[1])
        padded = torch.cat([points, points.new_zeros(1, points.shape[1])])
        step = max(1, self.chunk // (dispatch.points.shape[1] * rows.shape[0]))
        for start in range(0, len(dispatch.tiles), step):
            part = slice(start, start + step)
            numbers = dispatch.points[part]
            arguments = (padded[numbers], dispatch.tiles[part], dispatch.windows[part], order)
            if self.recompute and torch.is_grad_enabled():
                out = checkpoint(self.blend, *arguments, use_reentrant=False, preserve_rng_state=False)
            else:
                out = self.blend(*arguments)
            rows = rows.index_add(1, numbers.flatten(), out.transpose(0, 1).flatten(1, 2))
        return rows[:, :-1]

    def blend(self, points: Tensor, tiles: Tensor, windows: Tensor, order: str) -> Tensor:
        """Windowed jet rows [t, R, P, C] of tiles [t] at points [t, P, D]."""
        local = self.tile_grid.local(points, tiles[:, None])
        dtype = self.mean.dtype
        inverse = self.tile_grid.inverse_half.to(points.device)
        jet = self.network(seed(local.to(dtype), order, inverse.to(dtype)), tiles)
        return self._windowed(jet, tiles, windows)

    def _windowed(self, jet: Jet, tiles: Tensor, windows: Tensor) -> Tensor:
        rows = jet.rows.to(self.mean.dtype) * self.scale[tiles][:, None, None]
        value = rows[:, :1] + self.mean[tiles][:, None, None]
        rows = torch.cat([value, rows[:, 1:]], dim=1)
        window = windows.to(rows.dtype).transpose(-1, -2)[..., None]
        return multiply(Jet(rows, jet.order, jet.dim), Jet(window, jet.order, jet.dim)).rows

    @torch.no_grad()
    def dispatch(self, points: Tensor, order: str) -> Dispatch:
        """Sends every point to the tiles whose window is positive there."""
        point, tile, window = self.tile_grid.cover(points, order)
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
        return Dispatch(torch.repeat_interleave(tiles, parts), numbers, windows)

    @torch.no_grad()
    def grid(self, ys: Tensor, xs: Tensor, order: str = "value") -> Tensor:
        """Jet rows [R, H, W, C] on the product of ascending float64 coordinates ys [H] and xs [W]; two axes only."""
        axis_y, axis_x = self.tile_grid.axes
        span_y, span_x = span(axis_y, ys), span(axis_x, xs)
        rows = self.mean.new_zeros(row_count(order, 2), len(ys), len(xs) + 1, self.mean.shape[1])
        per_tile = span_y.numbers.shape[1] * span_x.numbers.shape[1] * rows.shape[0]
        step = max(1, self.chunk // per_tile)
        for i, row in enumerate(span_y.tiles.tolist()):
            number_y = span_y.numbers[i]
            first, height = int(number_y[0]), int((number_y < len(ys)).sum())
            strip = rows.new_zeros(rows.shape[0], len(number_y), *rows.shape[2:])
            for start in range(0, len(span_x.tiles), step):
                part = slice(start, start + step)
                tiles = row * axis_x.count + span_x.tiles[part]
                out = self._grid_tiles(span_y.pick(slice(i, i + 1)), span_x.pick(part), tiles, order)
                strip.index_add_(2, span_x.numbers[part].flatten(), out)  # neighbours overlap: their sum is the blend
            rows[:, first : first + height] += strip[:, :height]
        return rows[:, :, :-1]

    def _grid_tiles(self, span_y: "Span", span_x: "Span", tiles: Tensor, order: str) -> Tensor:
        """Windowed rows [R, Py, t * Px, C] of one row of tiles."""
        height, width = span_y.points.shape[1], span_x.points.shape[1]
        count, dtype = len(tiles), self.mean.dtype
        factor_y = span_y.windows[:, :, :, None].expand(-1, count, -1, width).reshape(3, -1)
        factor_x = span_x.windows[:, :, None, :].expand(-1, -1, height, -1).reshape(3, -1)
        windows = product_rows([factor_y, factor_x], order).reshape(count, height * width, -1)
        inverse = self.tile_grid.inverse_half.to(tiles.device).to(dtype)
        local_y, local_x = span_y.local.to(dtype).expand(count, -1), span_x.local.to(dtype)
        if isinstance(self.network, Chebyshev2D):
            jet = self.network.grid(local_y, local_x, order, inverse, tiles)
        else:
            pairs = torch.stack([local_y[:, :, None].expand(-1, -1, width), local_x[:, None].expand(-1, height, -1)], -1)
            jet = self.network(seed(pairs.reshape(count, -1, 2), order, inverse), tiles)
        out = self._windowed(jet, tiles, windows)
        return out.unflatten(2, (height, width)).permute(1, 2, 0, 3, 4).flatten(2, 3)


@dataclass(frozen=True)
class Span:
    """The tiles of one axis that see some of the coordinates, padded: see `span`."""

    tiles: Tensor  # [t]
    numbers: Tensor  # [t, P] index of each coordinate
    points: Tensor  # [t, P]
    local: Tensor  # [t, P]
    windows: Tensor  # [3, t, P], zero where padded

    def pick(self, part: slice) -> "Span":
        return Span(self.tiles[part], self.numbers[part], self.points[part], self.local[part], self.windows[:, part])


def span(axis, x: Tensor) -> Span:
    """Which ascending coordinates x [n] each tile of an axis sees; padding has number n and window zero."""
    low, high = zip(*(axis.bounds(i) for i in range(axis.count)), strict=True)
    first = torch.searchsorted(x, torch.tensor(low, dtype=x.dtype, device=x.device), right=False)
    last = torch.searchsorted(x, torch.tensor(high, dtype=x.dtype, device=x.device), right=True)
    tiles = torch.nonzero(last > first)[:, 0]
    first, last = first[tiles], last[tiles]
    width = int((last - first).max())
    numbers = first[:, None] + torch.arange(width, device=x.device)
    padded = numbers >= last[:, None]
    points = x[numbers.clamp(max=len(x) - 1)]
    local = (points - axis.centre(tiles)[:, None]) / axis.half
    windows = torch.stack(axis.windows(points, tiles[:, None]))
    windows = windows.masked_fill(padded, 0.0)
    return Span(tiles, numbers.masked_fill(padded, len(x)), points, local.masked_fill(padded, 0.0), windows)
