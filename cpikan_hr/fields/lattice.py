"""A level on a lattice: the product of two ascending coordinate vectors, tile by tile, without touching other tiles.

Rows of tiles are evaluated one after the other and added into the caller's accumulator. Windows are products of one
factor per axis, so a separable network takes them into its one-dimensional bases, and value, blend and derivatives come
out of two GEMMs. Neighbours overlap: their sum in the accumulator is the blend.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cpikan_hr.fields.tiles import TileAxis, product_rows
from cpikan_hr.jets import Jet, multiply, row_orders, seed
from cpikan_hr.mapped import release

KEPT = 8  # rows of tiles whose pages are kept: rows far apart touch pages all over a field's file


@dataclass(frozen=True)
class Span:
    """The tiles of one axis that see some of the coordinates, padded to the widest: see `span`."""

    tiles: Tensor  # [t] ascending
    first: Tensor  # [t] index of the first coordinate each sees
    count: Tensor  # [t] how many
    local: Tensor  # [t, P] float64; padding repeats the last
    windows: Tensor  # [3, t, P] value, first and second derivative; zero where padded

    def pick(self, part: slice | Tensor) -> "Span":
        return Span(self.tiles[part], self.first[part], self.count[part], self.local[part], self.windows[:, part])

    def cut(self, size: int) -> Iterator["Span"]:
        """The same tiles on so many of their coordinates after the other."""
        for start in range(0, self.local.shape[1], size):
            part = slice(start, start + size)
            local, windows = self.local[:, part], self.windows[:, :, part]
            count = (self.count - start).clamp(0, local.shape[1])
            yield Span(self.tiles, self.first + start, count, local, windows)

    def uniform_step(self) -> int | None:
        """Coordinates from one of these tiles to the next in number, if all see alike; None where they do not."""
        if len(self.tiles) < 2 or not bool((self.count == self.count[0]).all()):
            return None
        steps = self.first.diff()
        numbers = self.tiles.diff()
        step = int(steps[0]) // int(numbers[0])
        alike = bool((steps == step * numbers).all()) and torch.allclose(self.local, self.local[:1], rtol=0, atol=1e-9)
        return step if alike and step < int(self.count[0]) + 1 <= 2 * step + 1 else None


def span(axis: TileAxis, x: Tensor) -> Span:
    """Which ascending coordinates x [n] each tile of an axis sees."""
    reach = axis.overlap * axis.stride / 2
    edge = axis.origin + torch.arange(axis.count + 1, dtype=x.dtype, device=x.device) * axis.stride
    first = torch.searchsorted(x, edge[:-1] - reach)
    last = torch.searchsorted(x, edge[1:] + reach, right=True)
    first[0], last[-1] = 0, len(x)  # tiles at the border see everything beyond it
    tiles = torch.nonzero(last > first)[:, 0]
    first, count = first[tiles], (last - first)[tiles]
    place = torch.arange(int(count.max()), device=x.device)
    padded = place >= count[:, None]
    points = x[(first[:, None] + place.minimum(count[:, None] - 1)).clamp(max=len(x) - 1)]
    local = (points - axis.centre(tiles)[:, None]) / axis.half
    windows = torch.stack(axis.windows(points, tiles[:, None])).masked_fill(padded, 0.0)
    seen = (windows[0] > 0).any(1)  # a coordinate exactly on the end of a support does not count
    return Span(tiles, first, count, local, windows).pick(seen)


def runs(columns: Span) -> Iterator[tuple[int, Span, int | None]]:
    """Splits a row of tiles: number of the first, the tiles, and their uniform step where all see alike, or None."""
    if len(columns.tiles) > 2:
        inner = columns.pick(slice(1, -1))
        step = inner.uniform_step()
        if step:
            yield 0, columns.pick(slice(0, 1)), None
            yield 1, inner, step
            yield len(columns.tiles) - 1, columns.pick(slice(-1, None)), None
            return
    yield 0, columns, None


def add_lattice(level, out: Tensor, ys: Tensor, xs: Tensor, order: str) -> None:
    """Adds the jet of `level` on ys x xs to `out` [R, H, C, W + margin]; the margin takes at least one tile's width."""
    if level.network is None:
        return
    separable = hasattr(level.network, "lattice_coefficients")
    axis_y, axis_x = level.tile_grid.axes
    rows, columns = span(axis_y, ys), span(axis_x, xs)
    for i, row in enumerate(rows.tiles.tolist()):
        if i % KEPT == KEPT - 1:
            release()
        slots = level.slots_of(row * axis_x.count + columns.tiles)
        active = slots >= 0
        if not active.any():
            continue
        some, slots = (columns, slots) if active.all() else (columns.pick(active), slots[active])
        one = rows.pick(slice(i, i + 1))
        terms = level.network.shape if separable else (1, 1)
        column = max(len(out) * one.local.shape[1], terms[0])  # numbers per column of pixels of a tile
        share = max(1, level.chunk // (column * max(some.local.shape[1], terms[1])))
        if separable:  # one basis along x serves a run of tiles
            pieces = [(part, slots[begin : begin + len(part.tiles)], step) for begin, part, step in runs(some)]
        else:
            pieces = [(some, slots, None)]
        for part, chosen, step in pieces:
            for start in range(0, len(chosen), share):
                piece = slice(start, start + share)
                for strip, cell in _cells(one, part.pick(piece), level.chunk, len(out), terms[0]):
                    place = _rows_of(out, strip)
                    if separable:
                        values = _separable(level, strip, cell, chosen[piece], order, step is not None)
                        _add(place, values[:, : place.shape[1]], cell, step)
                        continue
                    values = _scattered(level, strip, cell, chosen[piece], order)[:, : place.shape[1]]
                    for begin, run, step_of_run in runs(cell):
                        _add(place, values[..., begin : begin + len(run.tiles), :], run, step_of_run)


def _rows_of(out: Tensor, row: Span) -> Tensor:
    """What a row of tiles, one tile along y, adds to."""
    return out[:, int(row.first) : int(row.first) + int(row.count)]


def _cells(row: Span, columns: Span, chunk: int, rows: int, terms: int) -> Iterator[tuple[Span, Span]]:
    """One tile in parts of at most `chunk` jet rows x points, or x terms along y of a separable one.

    Tall before wide, since contractions along x serve all rows. Several tiles come in one part: they were counted
    before.
    """
    height, width = row.local.shape[1], columns.local.shape[1]
    if len(columns.tiles) > 1 or max(rows * height, terms) * width <= chunk:
        yield row, columns
        return
    width = max(1, chunk // max(rows * height, terms))
    for strip in row.cut(max(1, chunk // max(rows * width, terms))):
        for cell in columns.cut(width):
            yield strip, cell


def _add(target: Tensor, values: Tensor, columns: Span, step: int | None) -> None:
    """Adds tiles [R, Py, C, t, Px] side by side into `target` [R, Py, C, W]."""
    if step is None:
        for i, (first, count) in enumerate(zip(columns.first.tolist(), columns.count.tolist(), strict=True)):
            target[..., first : first + count] += values[..., i, :count]
        return
    numbers = columns.tiles - columns.tiles[0]
    first, whole = int(columns.first[0]), (int(numbers[-1]) + 1) * step
    dense = len(numbers) * step == whole
    for begin in range(0, int(columns.count[0]), step):  # the core, then what reaches into the next tile
        width = min(step, int(columns.count[0]) - begin)
        view = target[..., first + begin : first + begin + whole].unflatten(-1, (-1, step))[..., :width]
        piece = values[..., begin : begin + width]
        if dense:
            view += piece
        else:
            view.index_add_(-2, numbers, piece)


def _scattered(level, row: Span, columns: Span, slots: Tensor, order: str) -> Tensor:
    """Windowed rows [R, Py, C, t, Px] of one row of tiles, point by point."""
    height, width, count, dtype = row.local.shape[1], columns.local.shape[1], len(slots), level.mean.dtype
    factor_y = row.windows[:, :, :, None].expand(-1, count, -1, width).reshape(3, -1)
    factor_x = columns.windows[:, :, None, :].expand(-1, -1, height, -1).reshape(3, -1)
    windows = product_rows([factor_y, factor_x], order).reshape(count, height * width, -1)
    local_y, local_x = row.local.to(dtype).expand(count, -1), columns.local.to(dtype)
    points = torch.stack([local_y[:, :, None].expand(-1, -1, width), local_x[:, None].expand(-1, height, -1)], -1)
    inverse = level.tile_grid.inverse_half.to(slots.device).to(dtype)
    jet = level.network(seed(points.reshape(count, -1, 2), order, inverse), slots)
    out = level.normalised(jet, slots)
    window = windows.to(dtype).transpose(-1, -2)[..., None]
    rows = multiply(out, Jet(window, order, 2)).rows  # [t, R, Py Px, C]
    return rows.unflatten(2, (height, width)).permute(1, 2, 4, 0, 3)


def _separable(level, row: Span, columns: Span, slots: Tensor, order: str, alike: bool) -> Tensor:
    """The same by two contractions with windowed bases. `alike`: one basis along x serves all tiles."""
    network, dtype = level.network, level.mean.dtype
    coefficients = network.lattice_coefficients(slots)  # [M, C, t, N]
    coefficients *= level.scale_of(slots).T[:, :, None]
    coefficients[0, :, :, 0] += level.mean_of(slots).T  # T_0 = 1
    if alike:
        columns = columns.pick(slice(0, 1))
    scales = [1 / axis.half for axis in level.tile_grid.axes]
    by = _windowed_basis(network, row, 0, order, scales[0]).to(dtype)[0]  # [k, Py, M]
    bx = _windowed_basis(network, columns, 1, order, scales[1]).to(dtype)  # [t or 1, k, Px, N]
    shape = coefficients.shape[:3]
    out = []
    along_x: dict[int, Tensor] = {}
    for terms in row_orders(order, 2):
        total = 0
        for dy, dx in terms:
            if dx not in along_x:
                if alike:
                    along_x[dx] = (coefficients.flatten(0, 2) @ bx[0, dx].T).view(shape[0], -1)
                else:
                    along_x[dx] = torch.einsum("mctn,tpn->mctp", coefficients, bx[:, dx]).flatten(1)
            total = total + by[dy] @ along_x[dx]
        out.append(total.view(by.shape[1], *shape[1:], -1))
    return torch.stack(out) if len(out) > 1 else out[0][None]


def _windowed_basis(network, tiles: Span, axis: int, order: str, scale: float) -> Tensor:
    """window * T_m and its derivatives with respect to the global coordinate, float64 [t, 1 to 3, P, M + 1]."""
    basis = network.basis(tiles.local, axis, order)
    window = tiles.windows[..., None]
    rows = [window[0] * basis[:, 0]]
    if basis.shape[1] > 1:
        first = basis[:, 1] * scale
        rows.append(window[1] * basis[:, 0] + window[0] * first)
    if basis.shape[1] > 2:
        rows.append(window[2] * basis[:, 0] + 2 * window[1] * first + window[0] * basis[:, 2] * scale**2)
    return torch.stack(rows, dim=1)
