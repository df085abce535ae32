"""A level on a lattice: the product of two ascending coordinate vectors, tile by tile, without touching other tiles.

Tiles that see their coordinates alike are evaluated together, as many as the chunk holds, and added into the caller's
accumulator. Windows are products of one factor per axis, so a separable network takes them into its one-dimensional
bases, and value, blend and derivatives come out of two GEMMs. Neighbours overlap: their sum in the accumulator is the
blend. Which tiles see what is reckoned on the CPU: a GPU would be waited for at every step.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise

import torch
from torch import Tensor

from cpikan_hr.fields.tiles import TileAxis, product_rows
from cpikan_hr.jets import Jet, multiply, row_orders, seed
from cpikan_hr.mapped import release
from cpikan_hr.parallel import at_once

SPARSE = 2  # coordinates per tile and axis, below which points are evaluated one by one
FEW = 2  # tiles at a border that are evaluated one by one
KEPT = 8  # chunks of tiles whose pages are kept: rows far apart touch pages all over a field's file


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

    def step(self) -> int | None:
        """Coordinates from each tile to the next, if all see alike; None where they do not."""
        first, count = self.first, int(self.count[0])
        step = int(first[1] - first[0]) if len(first) > 1 else count
        even = (self.tiles.diff() == 1).all() and (first.diff() == step).all() and (self.count == count).all()
        alike = bool(even) and torch.allclose(self.local, self.local[:1], rtol=0, atol=1e-9)
        return step if alike and step <= count <= 2 * step else None


@dataclass(frozen=True)
class Run:
    """Tiles of one axis that see alike, `step` coordinates apart; or, with step None, each in its own way."""

    tiles: Span
    step: int | None

    @classmethod
    def of_one(cls, tile: Span) -> "Run":
        """A single tile, without its padding."""
        count = int(tile.count)
        return cls(next(tile.cut(count)), count)

    def split(self) -> list["Run"]:
        """The same tiles in runs that see alike."""
        if self.step is not None:
            return [self]
        return [Run.of_one(self.tiles.pick(slice(k, k + 1))) for k in range(len(self.tiles.tiles))]

    def among(self, out: Tensor, axis: int, begin: int, size: int) -> Tensor:
        """A view of `out` in which `axis` has become two: these tiles, and coordinates begin, .. that each sees."""
        whole = len(self.tiles.tiles) * self.step
        part = out.narrow(axis, int(self.tiles.first[0]) + begin, whole)
        return part.unflatten(axis, (-1, self.step)).narrow(axis + 1, 0, size)


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


def runs(tiles: Span) -> list[Run]:
    """Neighbours that see alike together, and what lies between such runs."""
    near = (torch.isclose(part.diff(dim=-2), part.new_zeros(()), atol=1e-9) for part in (tiles.local, tiles.windows))
    alike = next(near).all(1) & next(near).all(2).all(0) & (tiles.tiles.diff() == 1) & (tiles.count.diff() == 0)
    bounds = [0, *(torch.nonzero(~alike)[:, 0] + 1).tolist(), len(tiles.tiles)]
    parts = [slice(*ends) for ends in pairwise(bounds)]
    stepped = [(part, tiles.pick(part).step() if part.stop - part.start > 1 else None) for part in parts]
    found = []
    for odd, group in groupby(stepped, lambda pair: pair[1] is None):
        some = list(group)
        if odd:
            between = Run(tiles.pick(slice(some[0][0].start, some[-1][0].stop)), None)
            found += between.split() if len(between.tiles.tiles) <= FEW else [between]
        else:
            found += [Run(tiles.pick(part), step) for part, step in some]
    return found


def margin(axis: TileAxis, x: Tensor) -> int:
    """How many coordinates the last of some tiles that see alike may see beyond its step, at most."""
    if len(x) < 2:
        return 0
    spacing = float((x[1:] - x[:-1]).min())
    return min(len(x) // 2, int(2 * axis.half / max(spacing, 1e-9)) + 2)


def add_lattice(level, out: Tensor, ys: Tensor, xs: Tensor, order: str) -> None:
    """Adds the jet of `level` on ys x xs to `out` [R, H, C, W], in which both axes are longer by their `margin`."""
    if level.network is None:
        return
    along_y, along_x = (runs(span(axis, x.cpu())) for axis, x in zip(level.tile_grid.axes, (ys, xs), strict=True))
    if _coarse(along_y, len(ys)) and _coarse(along_x, len(xs)):
        _add_points(level, out, ys, xs, order)
        return
    for run in along_y:
        for rows in run.split():
            for columns in along_x:
                _add_tiles(level, out, rows, columns, order)


def _coarse(along: list[Run], count: int) -> bool:
    """Whether tiles see so few coordinates, and so unalike, that point by point is quicker."""
    alike = max((len(run.tiles.tiles) for run in along if run.step), default=1)
    return alike == 1 and count <= SPARSE * sum(len(run.tiles.tiles) for run in along)


def _add_points(level, out: Tensor, ys: Tensor, xs: Tensor, order: str) -> None:
    """The same as `add_lattice`, each point by itself."""
    height = max(1, at_once(level.chunk, out.device) // (len(out) * len(xs)))
    for start in range(0, len(ys), height):
        some = ys[start : start + height]
        rows = level(torch.cartesian_prod(some, xs).to(out.device), order)  # [R, N, C]
        out[:, start : start + len(some), :, : len(xs)] += rows.unflatten(1, (len(some), len(xs))).transpose(2, 3)
        release()


def _add_tiles(level, out: Tensor, rows: Run, columns: Run, order: str) -> None:
    """Adds the active ones of the tiles in these rows, which see alike, and columns."""
    device, chunk = out.device, at_once(level.chunk, out.device)
    tiles = rows.tiles.tiles[:, None] * level.tile_grid.axes[1].count + columns.tiles.tiles
    slots = level.slots_of(tiles.to(device)).cpu()
    separable = hasattr(level.network, "lattice_coefficients")
    evaluate, terms = (_separable, level.network.shape) if separable else (_scattered, (1, 1))
    tall = max(len(out) * rows.tiles.local.shape[1], terms[0])  # numbers per column of pixels of a tile
    share = chunk // (tall * max(columns.tiles.local.shape[1], terms[1]))
    first = slice(0, 1)  # separable: one basis along an axis serves all tiles that see alike
    for number, (y, x, block) in enumerate(_pieces(slots >= 0, max(1, share))):
        if number % KEPT == KEPT - 1:
            release()
        chosen = slots[y, x].to(device)
        if share:
            row = rows.tiles.pick(first if separable else y)
            column = columns.tiles.pick(first if separable and columns.step else x)
            _add(out, evaluate(level, row, column, chosen, order), rows, columns, y, x, block)
            continue
        one = (Run.of_one(run.tiles.pick(part)).tiles for run, part in ((rows, y), (columns, x)))
        for row, column in _cells(*one, chunk, len(out), terms[0]):
            values = evaluate(level, row, column, chosen, order)
            _add(out, values, Run.of_one(row), Run.of_one(column), y - y, x - x, None)


def _pieces(active: Tensor, share: int) -> Iterator[tuple[Tensor, Tensor, tuple[slice, slice] | None]]:
    """The active tiles [r, c], so many at once: their rows and columns [t], and as a block where none is missing."""
    tiles, columns = torch.nonzero(active), active.shape[1]
    dense = len(tiles) == active.numel()
    if dense:  # whole rows, or parts of one
        share = share // columns * columns or share
    if not len(tiles):
        return
    for some in tiles.split(columns) if dense and share < columns else [tiles]:
        for part in some.split(share):
            block = None
            if dense:
                block = tuple(slice(low, high + 1) for low, high in zip(*part[[0, -1]].tolist(), strict=True))
            yield *part.unbind(1), block


def _cells(row: Span, column: Span, chunk: int, rows: int, terms: int) -> Iterator[tuple[Span, Span]]:
    """One tile in parts of at most `chunk` jet rows x points, or x terms along y of a separable one.

    Tall before wide, since contractions along x serve all rows.
    """
    height, width = row.local.shape[1], column.local.shape[1]
    if max(rows * height, terms) * width > chunk:
        width = max(1, chunk // max(rows * height, terms))
        height = max(1, chunk // max(rows * width, terms))
    for strip in row.cut(height):
        for cell in column.cut(width):
            yield strip, cell


def _add(
    out: Tensor, values: Tensor, rows: Run, columns: Run, y: Tensor, x: Tensor, block: tuple[slice, slice] | None
) -> None:
    """Adds tiles [R, Py, C, t, Px] at rows y and columns x [t] of two runs; `block`: the part of both they fill."""
    if columns.step is None:
        places = [
            [slice(f, f + n) for f, n in zip(run.tiles.first[k].tolist(), run.tiles.count[k].tolist(), strict=True)]
            for run, k in ((rows, y), (columns, x))
        ]
        for k, (down, across) in enumerate(zip(*places, strict=True)):
            place = out[:, down, :, across]
            place += values[:, : place.shape[1], :, k, : place.shape[3]]
        return
    y, x = y.to(out.device), x.to(out.device)
    high, wide = int(rows.tiles.count[0]), int(columns.tiles.count[0])
    for down in range(0, high, rows.step):  # the core, then what reaches into the next tile
        for across in range(0, wide, columns.step):
            piece = values[:, down : min(down + rows.step, high), ..., across : min(across + columns.step, wide)]
            view = columns.among(out, 3, across, piece.shape[-1])
            view = rows.among(view, 1, down, piece.shape[1])  # [R, r, h, C, c, w]
            if block:
                place = view[:, block[0], :, :, block[1]]
                place += piece.unflatten(3, (place.shape[1], -1)).permute(0, 3, 1, 2, 4, 5)
            else:
                view[:, y, :, :, x] += piece.permute(3, 0, 1, 2, 4)


def _scattered(level, row: Span, column: Span, slots: Tensor, order: str) -> Tensor:
    """Windowed jets [R, Py, C, t, Px] of tiles [t], one of each of their rows and columns, point by point."""
    height, width, dtype = row.local.shape[1], column.local.shape[1], level.mean.dtype
    count, device = len(slots), slots.device
    factor_y = row.windows.to(device)[:, :, :, None].expand(-1, -1, -1, width).reshape(3, -1)
    factor_x = column.windows.to(device)[:, :, None, :].expand(-1, -1, height, -1).reshape(3, -1)
    windows = product_rows([factor_y, factor_x], order).reshape(count, height * width, -1).to(dtype)
    local_y, local_x = (part.local.to(device, dtype) for part in (row, column))
    points = torch.stack([local_y[:, :, None].expand(-1, -1, width), local_x[:, None].expand(-1, height, -1)], -1)
    inverse = level.tile_grid.inverse_half.to(device, dtype)
    jet = level.network(seed(points.reshape(count, -1, 2), order, inverse), slots)
    out = level.normalised(jet, slots)
    window = windows.transpose(-1, -2)[..., None]
    rows = multiply(out, Jet(window, order, 2)).rows  # [t, R, Py Px, C]
    return rows.unflatten(2, (height, width)).permute(1, 2, 4, 0, 3)


def _separable(level, row: Span, column: Span, slots: Tensor, order: str) -> Tensor:
    """The same by two contractions with windowed bases: of one row and of one column for all tiles, or one for each."""
    network, like = level.network, level.mean
    coefficients = network.lattice_coefficients(slots)  # [M, C, t, N]
    coefficients *= level.scale_of(slots).T[:, :, None]
    coefficients[0, :, :, 0] += level.mean_of(slots).T  # T_0 = 1
    scales = [1 / axis.half for axis in level.tile_grid.axes]
    by = _windowed_basis(network, row, 0, order, scales[0]).to(like)[0]  # [k, Py, M]
    bx = _windowed_basis(network, column, 1, order, scales[1]).to(like)  # [t or 1, k, Px, N]
    shape = coefficients.shape[:3]
    out = []
    along_x: dict[int, Tensor] = {}
    for terms in row_orders(order, 2):
        total = 0
        for dy, dx in terms:
            if dx not in along_x:
                if len(bx) == 1:
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
