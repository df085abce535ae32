"""A level on a lattice: the product of two ascending coordinate vectors, tile by tile, without touching other tiles.

Tiles that see their coordinates alike are evaluated together, as many as the chunk holds, and added into the caller's
accumulator. Windows are products of one factor per axis, so a separable network takes them into its one-dimensional
bases, and value, blend and derivatives come out of two GEMMs. Neighbours overlap: their sum in the accumulator is the
blend. Where coordinates are evenly spaced, small separable tiles that reach beyond them are evaluated whole, so that
they see alike too; the accumulator has a margin for what falls beside. Which tiles see what is reckoned on the CPU: a
GPU would be waited for at every step. There tiles that overlap are added in any order, as the last bit may show.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby, pairwise

import torch
from torch import Tensor

from cpikan_hr.fields.tiles import TileAxis, product_rows
from cpikan_hr.jets import Jet, multiply, row_orders, seed
from cpikan_hr.mapped import release
from cpikan_hr.parallel import at_once

SPARSE = 2  # coordinates per tile and axis, below which points are evaluated one by one
FEW = 2  # tiles at a border that are evaluated one by one
LARGE = 1024  # points per tile from which tiles are added one by one
WHOLE = 64  # coordinates of a tile up to which it is evaluated whole
KNOWN = 2**16  # coordinates: the runs of longer vectors are not remembered
KEPT = 8  # rows or chunks of tiles whose pages are kept: rows far apart touch pages all over a field's file


@dataclass(frozen=True)
class Span:
    """The tiles of one axis that see some of the coordinates, padded to the widest: see `span`."""

    tiles: Tensor  # [t] ascending
    first: Tensor  # [t] index of the first coordinate each sees; negative before the first of all
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

    def alike(self) -> bool:
        """Whether all tiles see their coordinates in the same way."""
        even = bool((self.count == self.count[0]).all())
        return even and torch.allclose(self.local, self.local[:1], rtol=0, atol=1e-9)


@dataclass(frozen=True)
class Run:
    """Neighbouring tiles of one axis that all see `alike`, or each in its own way."""

    tiles: Span
    alike: bool
    known: dict = field(default_factory=dict)  # bases that all tiles share

    def basis(self, level, axis: int, order: str, places: Tensor) -> Tensor:
        """Windowed bases of a separable network for the tiles at `places` [t]: one serves all that see alike."""
        if not self.alike:
            return _windowed_basis(level, self.tiles.pick(places), axis, order)
        kind = axis, order, level.network.shape, level.network.input_map, level.mean.dtype, level.mean.device
        if kind not in self.known:
            self.known[kind] = _windowed_basis(level, self.tiles.pick(slice(0, 1)), axis, order)
        return self.known[kind]

    @classmethod
    def of_one(cls, tile: Span) -> "Run":
        """A single tile, without its padding."""
        return cls(next(tile.cut(int(tile.count))), True)

    def split(self) -> list["Run"]:
        """The same tiles in runs that see alike."""
        if self.alike:
            return [self]
        return [Run.of_one(self.tiles.pick(slice(k, k + 1))) for k in range(len(self.tiles.tiles))]


def margin(level, axis: int, x: Tensor) -> int:
    """How many coordinates beyond both ends of ascending x [n] the level's tiles are evaluated at, to see all alike."""
    separable = level.network is not None and level.network.separable
    spacing = float(x[1] - x[0]) if len(x) > 1 else 0.0
    if not separable or not spacing or not torch.allclose(x.diff(), x.new_tensor(spacing), rtol=1e-9):
        return 0
    reach = math.ceil(2 * level.tile_grid.axes[axis].half / spacing) + 1
    return reach if reach <= min(WHOLE, len(x)) else 0


def span(axis: TileAxis, x: Tensor, beyond: int = 0) -> Span:
    """Which ascending coordinates x [n], and up to `beyond` more on both sides, each tile sees that sees some of x."""
    reach = axis.overlap * axis.stride / 2
    edge = axis.origin + torch.arange(axis.count + 1, dtype=x.dtype, device=x.device) * axis.stride
    begin, end = edge[:-1] - reach, edge[1:] + reach
    first = torch.searchsorted(x, begin)
    last = torch.searchsorted(x, end, right=True)
    first[0], last[-1] = 0, len(x)  # tiles at the border see everything beyond it
    tiles = torch.nonzero(last > first)[:, 0]
    if beyond:
        steps = torch.arange(1, beyond + 1, dtype=x.dtype, device=x.device) * (x[1] - x[0])
        x = torch.cat([x[0] - steps.flip(0), x, x[-1] + steps])
        inner = (tiles > 0) & (tiles < axis.count - 1)  # the others see no further than they are asked for
        first = torch.where(inner, torch.searchsorted(x, begin[tiles]), first[tiles] + beyond)
        count = torch.where(inner, torch.searchsorted(x, end[tiles], right=True), last[tiles] + beyond) - first
    else:
        first, count = first[tiles], (last - first)[tiles]
    place = torch.arange(int(count.max()), device=x.device)
    padded = place >= count[:, None]
    points = x[(first[:, None] + place.minimum(count[:, None] - 1)).clamp(max=len(x) - 1)]
    local = (points - axis.centre(tiles)[:, None]) / axis.half
    windows = torch.stack(axis.windows(points, tiles[:, None])).masked_fill(padded, 0.0)
    seen = (windows[0] > 0).any(1)  # a coordinate exactly on the end of a support does not count
    return Span(tiles, first - beyond, count, local, windows).pick(seen)


def runs(tiles: Span) -> list[Run]:
    """Neighbours that see alike together, and what lies between such runs."""
    near = (torch.isclose(part.diff(dim=-2), part.new_zeros(()), atol=1e-9) for part in (tiles.local, tiles.windows))
    alike = next(near).all(1) & next(near).all(2).all(0) & (tiles.tiles.diff() == 1) & (tiles.count.diff() == 0)
    bounds = [0, *(torch.nonzero(~alike)[:, 0] + 1).tolist(), len(tiles.tiles)]
    parts = [slice(*ends) for ends in pairwise(bounds)]
    along = [(part, part.stop - part.start > 1 and tiles.pick(part).alike()) for part in parts]
    found = []
    for same, group in groupby(along, lambda pair: pair[1]):
        some = [part for part, _ in group]
        if same:
            found += [Run(tiles.pick(part), True) for part in some]
        else:
            between = Run(tiles.pick(slice(some[0].start, some[-1].stop)), False)
            found += between.split() if len(between.tiles.tiles) <= FEW else [between]
    return found


def add_lattice(level, out: Tensor, ys: Tensor, xs: Tensor, order: str, corner: tuple[int, int] = (0, 0)) -> None:
    """Adds the jet of `level` on ys x xs to `out` [R, H, C, W], contiguous, in which they begin at `corner`.

    ys, xs: float64, on the CPU. The level's `margin`, if `corner` is not (0, 0), is written to on all sides.
    """
    if level.network is None:
        return
    along_y, along_x = (
        _runs_on(level.tile_grid.axes[a], x, margin(level, a, x) if corner[a] else 0) for a, x in enumerate((ys, xs))
    )
    if _coarse(along_y, len(ys)) and _coarse(along_x, len(xs)):
        _add_points(level, out[:, corner[0] :, :, corner[1] :], ys, xs, order)
        return
    for number, rows in enumerate(rows for run in along_y for rows in run.split()):
        if number % KEPT == KEPT - 1:
            release()
        for columns, *active in _active(level, rows.tiles.tiles, along_x):
            _add_tiles(level, out, rows, columns, active, order, corner)


def _runs_on(axis: TileAxis, x: Tensor, beyond: int) -> list[Run]:
    """The runs of coordinates x; those of the columns are the same in all strips of a map."""
    assert x.dtype == torch.float64, "coordinates are float64: single precision resolves a pixel of 9344 only to 1e-3"
    return _known_runs(axis, x.numpy().tobytes(), beyond) if len(x) <= KNOWN else runs(span(axis, x, beyond))


@lru_cache(maxsize=32)
def _known_runs(axis: TileAxis, coordinates: bytes, beyond: int) -> list[Run]:
    return runs(span(axis, torch.frombuffer(bytearray(coordinates), dtype=torch.float64), beyond))


def _coarse(along: list[Run], count: int) -> bool:
    """Whether tiles see so few coordinates, and so unalike, that point by point is quicker."""
    alike = max((len(run.tiles.tiles) for run in along if run.alike), default=1)
    return alike == 1 and count <= SPARSE * sum(len(run.tiles.tiles) for run in along)


def _add_points(level, out: Tensor, ys: Tensor, xs: Tensor, order: str) -> None:
    """The same as `add_lattice`, each point by itself."""
    height = max(1, at_once(level.chunk, out.device) // (len(out) * len(xs)))
    for start in range(0, len(ys), height):
        some = ys[start : start + height]
        rows = level(torch.cartesian_prod(some, xs).to(out.device), order)  # [R, N, C]
        out[:, start : start + len(some), :, : len(xs)] += rows.unflatten(1, (len(some), len(xs))).transpose(2, 3)
        release()


def _add_tiles(
    level, out: Tensor, rows: Run, columns: Run, active: list[Tensor], order: str, corner: tuple[int, int]
) -> None:
    """Adds `active` tiles in these rows, which see alike, and columns: places in both, and slots, [t] each."""
    device, chunk = out.device, at_once(level.chunk, out.device)
    terms = level.network.shape if level.network.separable else (1, 1)
    tall = max(len(out) * rows.tiles.local.shape[1], terms[0])  # numbers per column of pixels of a tile
    share = chunk // (tall * max(columns.tiles.local.shape[1], terms[1]))
    pieces = zip(*(numbers.split(max(1, share)) for numbers in active), strict=True)
    for number, (y, x, slots) in enumerate(pieces if len(active[0]) else ()):
        if number % KEPT == KEPT - 1:
            release()
        chosen = slots.to(device)
        runs, places = [(rows, columns)], (y, x)
        if not share:
            one = (Run.of_one(run.tiles.pick(part)).tiles for run, part in ((rows, y), (columns, x)))
            runs, places = _cells(*one, chunk, len(out), terms[0]), (y - y, x - x)
        for along in runs:
            values = _evaluate(level, along, places, chosen, order)
            first = (run.tiles.first[k] + begin for run, k, begin in zip(along, places, corner, strict=True))
            _add(out, values, *first)


def _evaluate(level, along: tuple[Run, Run], places: tuple[Tensor, Tensor], slots: Tensor, order: str) -> Tensor:
    """Windowed jets [R, Py, C, t, Px] of the tiles at these places [t] of a run of rows and one of columns."""
    if level.network.separable:
        bases = (run.basis(level, axis, order, places[axis]) for axis, run in enumerate(along))
        return _separable(level, *bases, slots, order)
    return _scattered(level, *(run.tiles.pick(k) for run, k in zip(along, places, strict=True)), slots, order)


def _active(level, rows: Tensor, along_x: list[Run]) -> Iterator[tuple[Run, Tensor, Tensor, Tensor]]:
    """For every run of columns the active tiles in it and in these rows [r]: places in both, and slots, [t] each."""
    count = level.tile_grid.axes[1].count
    if level.active is None:
        for run in along_x:
            columns = run.tiles.tiles
            y, x = (part.flatten() for part in torch.meshgrid(*map(_numbers, (rows, columns)), indexing="ij"))
            yield run, y, x, rows[y] * count + columns[x]
        return
    columns = torch.cat([run.tiles.tiles for run in along_x])
    ends = torch.stack([rows * count + columns[0], rows * count + columns[-1] + 1])
    low, high = torch.searchsorted(level.active, ends.to(level.active)).cpu()
    counts = high - low
    y = torch.repeat_interleave(_numbers(rows), counts)
    slots = _numbers(y) + (low - counts.cumsum(0) + counts)[y]
    tiles = level.active[slots.to(level.active.device)].cpu() - (rows * count)[y]
    x = torch.searchsorted(columns, tiles)
    wanted, start = columns[x] == tiles, 0
    for run in along_x:
        stop = start + len(run.tiles.tiles)
        here = torch.nonzero(wanted & (x >= start) & (x < stop))[:, 0]
        yield run, y[here], x[here] - start, slots[here]
        start = stop


def _numbers(of: Tensor) -> Tensor:
    return torch.arange(len(of))


def _cells(row: Span, column: Span, chunk: int, rows: int, terms: int) -> Iterator[tuple[Run, Run]]:
    """One tile in parts of at most `chunk` jet rows x points, or x terms along y of a separable one.

    Tall before wide, since contractions along x serve all rows.
    """
    height, width = row.local.shape[1], column.local.shape[1]
    if max(rows * height, terms) * width > chunk:
        width = max(1, chunk // max(rows * height, terms))
        height = max(1, chunk // max(rows * width, terms))
    for strip in row.cut(height):
        for cell in column.cut(width):
            yield Run(strip, True), Run(cell, True)


def _add(out: Tensor, values: Tensor, y: Tensor, x: Tensor) -> None:
    """Adds tiles [R, Py, C, t, Px] whose first coordinates are y and x [t]; zeros of padding fall anywhere."""
    rows, high, channels, _, wide = values.shape
    if high * wide >= at_once(LARGE, out.device):
        for k, (down, across) in enumerate(zip(y.tolist(), x.tolist(), strict=True)):
            place = out[:, down : down + high, :, across : across + wide]
            place += values[:, : place.shape[1], :, k, : place.shape[3]]
        return
    jet, line, channel, column = (torch.arange(n, device=out.device) for n in (rows, high, channels, wide))
    along = out.stride()
    inside = jet[:, None, None, None] * along[0] + line[:, None, None] * along[1] + channel[:, None] * along[2] + column
    first = y * along[1] + x  # [t], on the CPU
    places = inside.unsqueeze(3) + first.to(out.device)[:, None]
    if int(first.max()) + int(inside[-1, -1, -1, -1]) >= out.numel():
        places.clamp_(max=out.numel() - 1)
    out.view(-1).scatter_add_(0, places.flatten(), values.flatten())


def _scattered(level, row: Span, column: Span, slots: Tensor, order: str) -> Tensor:
    """`_evaluate` point by point: of tiles [t], one of each of their rows and columns."""
    like = level.mean
    inverse = level.tile_grid.inverse_half.to(like)
    y, x = (part.local.to(like) for part in (row, column))
    axes = torch.stack([y, torch.zeros_like(y)], -1), torch.stack([torch.zeros_like(x), x], -1)
    jets = (seed(points, order, inverse) for points in (*axes, y.new_zeros(len(slots), 1, 2)))
    out = level.normalised(level.network.on_lattice(*jets, slots), slots)
    factors = [row.windows.to(like)[..., :, None], column.windows.to(like)[..., None, :]]
    window = product_rows(factors, order).flatten(1, 2).transpose(1, 2)[..., None]  # [t, R, Py Px, 1]
    rows = multiply(out, Jet(window, order, 2)).rows  # [t, R, Py Px, C]
    return rows.unflatten(2, (y.shape[1], x.shape[1])).permute(1, 2, 4, 0, 3)


def _separable(level, by: Tensor, bx: Tensor, slots: Tensor, order: str) -> Tensor:
    """`_evaluate` by two contractions with windowed bases: of a row and a column for all tiles, or one for each."""
    coefficients = level.network.lattice_coefficients(slots)  # [M, C, t, N]
    coefficients *= level.scale_of(slots).T[:, :, None]
    coefficients[0, :, :, 0] += level.mean_of(slots).T  # T_0 = 1
    by, shape = by[0], coefficients.shape[:3]
    out = []
    along_x: dict[int, Tensor] = {}
    for terms in row_orders(order, 2):
        total = None
        for dy, dx in terms:
            if dx not in along_x:
                if len(bx) == 1:
                    along_x[dx] = (coefficients.flatten(0, 2) @ bx[0, dx].T).view(shape[0], -1)
                else:
                    along_x[dx] = torch.einsum("mctn,tpn->mctp", coefficients, bx[:, dx]).flatten(1)
            total = by[dy] @ along_x[dx] if total is None else total.addmm_(by[dy], along_x[dx])
        out.append(total.view(by.shape[1], *shape[1:], -1))
    return torch.stack(out) if len(out) > 1 else out[0][None]


def _windowed_basis(level, tiles: Span, axis: int, order: str) -> Tensor:
    """window * T_m and its derivatives with respect to the global coordinate: [t, 1 to 3, P, M + 1]."""
    basis, scale = level.network.basis(tiles.local, axis, order), 1 / level.tile_grid.axes[axis].half
    window = tiles.windows[..., None]
    rows = [window[0] * basis[:, 0]]
    if basis.shape[1] > 1:
        first = basis[:, 1] * scale
        rows.append(window[1] * basis[:, 0] + window[0] * first)
    if basis.shape[1] > 2:
        rows.append(window[2] * basis[:, 0] + 2 * window[1] * first + window[0] * basis[:, 2] * scale**2)
    return torch.stack(rows, dim=1).to(level.mean)
