"""The field: the sum of its levels, and the only module a training loop calls."""

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from cpikan_hr.fields.box import Box, Constants
from cpikan_hr.fields.lattice import add_lattice, margin
from cpikan_hr.fields.level import Level, differentiated
from cpikan_hr.fields.tiles import TileGrid
from cpikan_hr.jets import Jet, full_precision, row_count
from cpikan_hr.mapped import release
from cpikan_hr.networks import build_network
from cpikan_hr.recipe import FieldOptions, LevelOptions

ROUNDING = 2.0**-22  # of an axis' largest coordinate: two roundings of single precision
OUTSIDE = ("nan", "raise", "unchecked")


class Field(nn.Module):
    """Levels from coarse to fine over the domain [0, extent_a], one output per channel, in the data's unit.

    Levels work in channels of their own: `mix` `[C, C]`, orthonormal, turns them into the data's (the identity where
    the recipe says `channels: plain`), so squared errors are the same on both sides.
    `spread` `[C]`: standard deviation of the data in those channels, the unit that solvers think in.
    `groups[k]`: which levels the recipe's level number k stands for (several for a quadtree).
    `settled[k]`: tiles of level number k that have left the training: frozen, they still contribute. `levels[k]` then
    has the others alone.
    `box`: where the domain is not that of a picture; its constants come as channels after the field's own, the same at
    all points: the unknown coefficients of an inverse problem, in the order of `problem.unknown`.
    `constraint`: what makes u of the sum of the levels, where an equation's conditions are hard (`load_field` sets it);
    None: the sum is u.
    """

    constraint: Callable[[Jet, Tensor], Jet] | None = None

    def __init__(
        self,
        levels: list[Level],
        extent: tuple[float, ...],
        groups: list[list[int]] | None = None,
        settled: dict[int, Level] | None = None,
        box: Box | None = None,
    ):
        super().__init__()
        self.box = box
        self.constants = Constants(box.constants) if box is not None and box.constants else None
        self.levels = nn.ModuleList(levels)
        self.settled = nn.ModuleDict({str(k): level for k, level in (settled or {}).items()}).requires_grad_(False)
        self.extent = tuple(float(length) for length in extent)
        self.groups = groups or [[k] for k in range(len(levels))]
        channels = levels[0].mean.shape[1]
        self.register_buffer("mix", torch.zeros(channels, channels).fill_diagonal_(1))
        self.register_buffer("spread", torch.ones(channels))

    @classmethod
    def build(
        cls,
        options: FieldOptions,
        extent: tuple[float, ...],
        channels: int,
        seed: int = 0,
        active: dict[int, Tensor] | None = None,
        settled: dict[int, Tensor] | None = None,
        box: Box | None = None,
    ) -> "Field":
        """From the recipe; weights are a function of the seed alone, and a fresh field of pixels is zero.

        `active`: per level number the tiles that have a network; a quadtree without it is its coarsest grid.
        `settled`: the same for those that have left the training.
        """
        active, settled = active or {}, settled or {}
        levels: list[Level] = []
        frozen: dict[int, Level] = {}
        groups: list[list[int]] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for choice in options.levels:
                shapes = level_shapes(choice, extent, options.window, box)
                groups.append(list(range(len(levels), len(levels) + len(shapes))))
                for place, (grid, network) in enumerate(shapes):
                    number = len(levels)
                    if number in settled:
                        frozen[number] = _build_level(
                            options, grid, network, extent, channels, settled[number], choice, box
                        )
                    tiles = active.get(number)
                    if tiles is None and len(shapes) > 1:
                        tiles = torch.arange(grid.tiles if place == 0 else 0)
                    levels.append(_build_level(options, grid, network, extent, channels, tiles, choice, box))
        field = cls(levels, extent, groups, frozen, box)
        return field.double() if options.precision == "double" else field

    @classmethod
    def from_layout(
        cls,
        options: FieldOptions,
        extent: tuple[float, ...],
        channels: int,
        state: dict[str, Tensor],
        seed: int = 0,
        box: Box | None = None,
    ) -> "Field":
        """The field whose `layout` (or `state_dict`) `state` is, copied. RuntimeError where it does not fit."""
        field = cls.build(options, extent, channels, seed, *_active_tiles(state), box)
        missing, unexpected = field.load_state_dict(state, strict=False)
        parameters = dict(field.named_parameters())
        _refuse([*unexpected, *(name for name in missing if name not in parameters)])
        return field

    @classmethod
    def from_state(
        cls,
        options: FieldOptions,
        extent: tuple[float, ...],
        channels: int,
        state: dict[str, Tensor],
        box: Box | None = None,
    ) -> "Field":
        """The field whose `state_dict` `state` is: its tensors are those of `state`, uncopied where the type is right.

        RuntimeError where it does not fit.
        """
        with torch.device("meta"):  # some operators (arange, eye, cumsum) would import sympy there, for a second
            field = cls.build(options, extent, channels, 0, *_active_tiles(state), box)
        types = {name: value.dtype for name, value in field.state_dict().items()}
        state = {name: value.to(types.get(name, value.dtype)) for name, value in state.items()}
        missing, unexpected = field.load_state_dict(state, strict=False, assign=True)
        _refuse([*unexpected, *missing])
        return field

    def forward(self, points: Tensor, order: str = "value", active: int | None = None, outside: str = "nan") -> Jet:
        """The jet [R, N, C + K] at points [N, D]; only the recipe's first `active` levels contribute.

        `active` None: all. K: the box's constants. Points are rows (y, x) in pixels, pixel (i, j) being the square
        around (i + 0.5, j + 0.5), or the coordinates of an equation's axes in their order; a tensor, an array or lists,
        on any device, taken as float64: single precision resolves a pixel of 9344 only to 1e-3. The networks see them
        relative to their tile, rounded to their own precision: by at most 2^-25 of the tile where that is single.

        `outside`: of the closed domain, which is widened by `ROUNDING`, and at NaN the jet is NaN; "raise": ValueError;
        "unchecked": the points are known to be inside. The same in `train` and `eval` mode.

        Derivatives with respect to the points come as `order`, or from torch: `torch.autograd.grad` of any order,
        also in a loss, and `torch.func`'s transforms, `vmap` included. Those are exact too, but slower; autocast has no
        part in the forward pass then (take the backward pass outside of it). Between tiles windows are smooth twice
        (quintic), once (cosine) or infinitely often (bump); without overlap the field may jump there. A higher
        derivative jumps, and is taken from one side there.

        A level that does not contribute yet is evaluated at no point, because data-parallel backends wait for a
        gradient of every parameter. ValueError or TypeError for what are no such points, or an unknown order.
        """
        if outside not in OUTSIDE:
            raise ValueError(f"outside {outside!r}: choose one of {', '.join(OUTSIDE)}")
        points = self._points(points)
        follow = differentiated(points)
        with full_precision("gradient") if follow else nullcontext():
            jet = Jet(self._sum(points, order, active, follow), order, points.shape[1])
            if self.constraint is not None:
                jet = self.constraint(jet, points)
        return jet if outside == "unchecked" else jet._replace(rows=self._bounded(jet.rows, points, outside))

    def _sum(self, points: Tensor, order: str, active: int | None, follow: bool) -> Tensor:
        """Rows [R, N, C + K] of the levels' sum and the constants; `follow`: torch differentiates by the points."""
        rows = 0
        for number, group in enumerate(self.groups):
            for k in group:
                level = self.levels[k]
                if active is not None and number >= active:
                    rows = rows + level(points[:0], order).sum() if torch.is_grad_enabled() else rows
                elif str(k) in self.settled:
                    cover = None if follow else level.tile_grid.cover(points, order)
                    rows = rows + level(points, order, cover) + self.settled[str(k)](points, order, cover)
                else:
                    rows = rows + level(points, order)
        rows = rows @ self.mix
        return rows if self.constants is None else torch.cat([rows, self.constants(rows)], dim=-1)

    def _points(self, points: Tensor) -> Tensor:
        """float64 on the field's device, [N, D]."""
        if not isinstance(points, Tensor):
            try:
                points = np.asarray(points)
            except ValueError as error:
                raise TypeError(f"points: rows differ in length ({error})") from None
            if points.dtype.kind not in "fiu":
                raise TypeError(f"points of {points.dtype}: give real numbers")
            points = torch.from_numpy(points.astype(np.float64))
        if points.is_complex() or points.dtype == torch.bool:
            raise TypeError(f"points of {points.dtype}: give real numbers")
        if points.ndim != 2 or points.shape[1] != len(self.extent):
            raise ValueError(
                f"points of shape {tuple(points.shape)}: give [N, {len(self.extent)}], one row for a point; "
                "points[None] for a single one, points.flatten(0, -2) for a lattice"
            )
        return points.to(self.device, torch.float64)

    def _bounded(self, rows: Tensor, points: Tensor, outside: str) -> Tensor:
        """Rows [R, N, C], NaN at points outside of the domain. ValueError there where they should `raise`."""
        inside = torch.ones_like(points[:, 0], dtype=torch.bool)
        for x, (low, high) in zip(points.unbind(1), self.domain, strict=True):
            inside = inside & _within(x, low, high)
        if outside == "raise" and not inside.all():
            first = points[~inside][0].tolist()
            count = int((~inside).sum())
            raise ValueError(f"point {first} is outside of the domain, {self.domain}: {count} such points")
        # Not a plain NaN: torch's derivatives with respect to the points are NaN too, those of the parameters are not.
        beyond = (points * torch.where(inside, 0.0, torch.nan)[:, None]).sum(1).exp().to(rows.dtype)
        return torch.where(inside[:, None], rows, beyond[:, None])

    @property
    def domain(self) -> list[tuple[float, float]]:
        """Both ends of every axis."""
        if self.box is not None:
            return list(zip(self.box.low, self.box.high, strict=True))
        return [(0.0, length) for length in self.extent]

    @torch.no_grad()
    def lattice(self, ys: Tensor, xs: Tensor, order: str = "value", groups: int | None = None) -> Tensor:
        """Jet rows [R, C, H, W] on the product of ascending coordinates [H], [W]; the recipe's first `groups` levels.

        NaN outside of the domain, as in `forward`. ValueError for coordinates in another order, and for the field of an
        equation, which is evaluated point by point.
        """
        if self.box is not None:
            raise ValueError("the field of an equation has no lattice of pixels: give its points, field(points)")
        chosen = [level for group in self.groups[:groups] for level in self.parts(group)]
        channels, axes = self.mix.shape[0], (ys.double().cpu(), xs.double().cpu())
        if any((x.diff() < 0).any() for x in axes):
            raise ValueError("coordinates of a lattice do not ascend: sort them, or give points, field(points)")
        beyond_y, beyond_x = (max((margin(level, a, x) for level in chosen), default=0) for a, x in enumerate(axes))
        shape = row_count(order, 2), len(ys) + 2 * beyond_y, channels, len(xs) + 2 * beyond_x
        out = self.mix.new_zeros(shape)
        for level in chosen:
            add_lattice(level, out, *axes, order, (beyond_y, beyond_x))
        release()
        out = out[:, beyond_y : beyond_y + len(ys), :, beyond_x : beyond_x + len(xs)].transpose(1, 2)
        out = torch.einsum("rkhw,kc->rchw", out, self.mix) if channels > 1 else out
        for dim, x, ends in zip((2, 3), axes, self.domain, strict=True):
            inside = _within(x, *ends)
            if not inside.all():
                out.index_fill_(dim, torch.nonzero(~inside)[:, 0].to(out.device), torch.nan)
        return out

    def pixels(self, y0: int, y1: int, x0: int, x1: int, groups: int | None = None, stride: int = 1) -> Tensor:
        """Values [C, h, w] at every stride-th pixel centre of a window, of the recipe's first `groups` levels."""
        ys, xs = (pixel_axis(low, high, self.device, stride) for low, high in ((y0, y1), (x0, x1)))
        return self.lattice(ys, xs, groups=groups)[0]

    def parts(self, group: list[int]) -> list[Level]:
        """The levels of these numbers, each followed by its tiles that have settled."""
        settled = {int(k): level for k, level in self.settled.items()}
        return [level for k in group for level in (self.levels[k], settled.get(k)) if level is not None]

    def settle(self, leaving: dict[int, Tensor]) -> tuple["Field", dict[str, Tensor]]:
        """The field with parameters of its own in which more tiles have left the training.

        `leaving[k]`: bool [t], which of the tiles of level number k. Returns also, by name, which rows of this field's
        parameters those are that the new one trains.
        """
        levels, settled, rows = [], {}, {}
        for k, level in enumerate(self.levels):
            before = self.settled[str(k)] if str(k) in self.settled else None
            gone = leaving.get(k)
            if level.network is None or gone is None:
                gone = torch.zeros(len(level.active_tiles), dtype=torch.bool, device=self.device)
            if gone.any():
                left = level.subset(torch.nonzero(gone)[:, 0])
                before = left if before is None else before.joined(left)
            if before is not None:
                settled[k] = before
            stay = torch.nonzero(~gone)[:, 0]
            levels.append(level.subset(stay) if level.network is not None else level)
            if level.active is None and before is None:
                levels[-1].active = None
            if levels[-1].network is not None:
                numbers = level.network.rows(stay)
                rows |= {f"levels.{k}.network.{name}": numbers for name, _ in levels[-1].network.named_parameters()}
        return self._of(levels, settled), rows

    def joined(self) -> "Field":
        """The same field without a difference between tiles that have settled and others, as the recipe lays it out."""
        levels = list(self.levels)
        for k in map(int, self.settled):
            levels[k] = levels[k].joined(self.settled[str(k)])
            if [k] in self.groups and len(levels[k].active_tiles) == levels[k].tile_grid.tiles:
                levels[k].active = None
        return self._of(levels, {})

    def _of(self, levels: list[Level], settled: dict[int, Level]) -> "Field":
        field = Field(levels, self.extent, self.groups, settled, self.box)
        field.mix, field.spread = self.mix, self.spread
        return field

    @property
    def trained_tiles(self) -> int:
        """How many tiles have not settled."""
        return sum(len(level.active_tiles) for level in self.levels if level.network is not None)

    def layout(self) -> dict[str, Tensor]:
        """What `state_dict` holds beside the parameters: tiles and terms in use, means, scales.

        Enough to build it again.
        """
        parameters = dict(self.named_parameters())
        return {name: value for name, value in self.state_dict().items() if name not in parameters}

    @property
    def device(self) -> torch.device:
        return self.levels[0].mean.device

    def count_parameters(self) -> int:
        """Fitted numbers of all levels."""
        constants = 0 if self.constants is None else self.constants.values.numel()
        return constants + sum(level.count_parameters() for level in (*self.levels, *self.settled.values()))


def pixel_axis(low: int, high: int, device: torch.device | str = "cpu", stride: int = 1) -> Tensor:
    """Coordinates, float64, of the centres of pixels low, low + stride, ... below high."""
    return torch.arange(low, high, stride, dtype=torch.float64, device=device) + 0.5


def _within(x: Tensor, low: float, high: float) -> Tensor:
    """Where coordinates lie in a closed range, which is widened by what rounding to single precision moves its ends."""
    reach = ROUNDING * max(abs(low), abs(high))
    return (x >= low - reach) & (x <= high + reach)


def _active_tiles(state: dict[str, Tensor]) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """The active tiles of a state by level number: of those that train, and of those that have settled."""
    tiles: dict[str, dict[int, Tensor]] = {"levels": {}, "settled": {}}
    for name, value in state.items():
        kind, _, rest = name.partition(".")
        number, _, rest = rest.partition(".")
        if rest == "active" and kind in tiles:
            tiles[kind][int(number)] = value
    return tiles["levels"], tiles["settled"]


def _refuse(names: list[str]) -> None:
    if names:
        raise RuntimeError(f"tensors do not fit the recipe: {', '.join(names[:3])}")


def level_shapes(
    choice: LevelOptions, extent: tuple[float, ...], window: str, box: Box | None = None
) -> list[tuple[TileGrid, dict]]:
    """The grids and networks that a recipe's level stands for.

    One; or for a quadtree one per leaf size, all with one blend width; times one per number of units where tiles grow.
    """
    network = choice.network.model_dump()
    if choice.grid is not None:
        origin = None if box is None else box.low
        grid = TileGrid.over(extent, counts=choice.grid, overlap=choice.overlap, window=window, origin=origin)
        return [(grid, network)]
    strides, shapes = choice.strides, []
    for stride in strides:
        grid = TileGrid.over(extent, stride=stride, overlap=choice.overlap * strides[-1] / stride, window=window)
        if network["kind"] == "chebyshev2d" and network["degree"] is None:  # as many terms as pixels
            degree = tuple(max(0, round(2 * axis.half) - 1) for axis in grid.axes)
            shapes.append((grid, network | {"degree": degree}))
        elif choice.grow:
            shapes += [(grid, grown_network(choice, units)) for units in range(1 + network["hidden"][0])]
        else:
            shapes.append((grid, network))
    return shapes


def grown_network(choice: LevelOptions, units: int) -> dict:
    """Options of the network that a growing level gives a tile with so many hidden units."""
    if not units:
        return {"kind": "chebyshev2d", "degree": 0}
    options = choice.network.model_dump() | {"hidden": [units]}
    return options | {"shared_constant": True, "layer_norm": False} if choice.network.kind == "cpikan" else options


def _build_level(
    options: FieldOptions,
    grid: TileGrid,
    network: dict,
    extent: tuple[float, ...],
    channels: int,
    active: Tensor | None,
    choice: LevelOptions,
    box: Box | None,
) -> Level:
    tiles, built = grid.tiles if active is None else len(active), None
    periodic = () if box is None else box.periodic
    if tiles:
        inputs = len(extent) + len(periodic)
        built = build_network(tiles=tiles, in_features=inputs, out_features=channels, **network)
        if box is None:
            built.zero_last()
    # Data normalise a picture's tiles; an equation has no data to do it with.
    per_tile = box is None and network["kind"] != "chebyshev2d" and not choice.grow
    checkpoint, scaled = options.checkpoint, choice.scaled
    return Level(grid, built, channels, options.chunk, checkpoint, active, per_tile, scaled, periodic)
