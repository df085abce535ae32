"""The field: the sum of its levels, and the only module a training loop calls."""

import torch
from torch import Tensor, nn

from cpikan_hr.fields.lattice import add_lattice
from cpikan_hr.fields.level import Level
from cpikan_hr.fields.tiles import TileGrid
from cpikan_hr.jets import Jet, row_count
from cpikan_hr.mapped import release
from cpikan_hr.networks import build_network
from cpikan_hr.recipe import FieldOptions, LevelOptions


class Field(nn.Module):
    """Levels from coarse to fine over the domain [0, extent_a], one output per channel, in the data's unit.

    Levels work in channels of their own: `mix` `[C, C]`, orthonormal, turns them into the data's (the identity where
    the recipe says `channels: plain`), so squared errors are the same on both sides.
    `spread` `[C]`: standard deviation of the data in those channels, the unit that solvers think in.
    `groups[k]`: which levels the recipe's level number k stands for (several for a quadtree).
    """

    def __init__(self, levels: list[Level], extent: tuple[float, ...], groups: list[list[int]] | None = None):
        super().__init__()
        self.levels = nn.ModuleList(levels)
        self.extent = tuple(float(length) for length in extent)
        self.groups = groups or [[k] for k in range(len(levels))]
        self.register_buffer("mix", torch.eye(levels[0].mean.shape[1]))
        self.register_buffer("spread", torch.ones(levels[0].mean.shape[1]))

    @classmethod
    def build(
        cls,
        options: FieldOptions,
        extent: tuple[float, ...],
        channels: int,
        seed: int = 0,
        active: dict[int, Tensor] | None = None,
    ) -> "Field":
        """From the recipe; weights are a function of the seed alone, and a fresh field is zero.

        `active`: per level number the tiles that have a network; a quadtree without it is its coarsest grid.
        """
        active = active or {}
        levels: list[Level] = []
        groups: list[list[int]] = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for choice in options.levels:
                shapes = level_shapes(choice, extent, options.window)
                groups.append(list(range(len(levels), len(levels) + len(shapes))))
                for place, (grid, network) in enumerate(shapes):
                    tiles = active.get(len(levels))
                    if tiles is None and len(shapes) > 1:
                        tiles = torch.arange(grid.tiles if place == 0 else 0)
                    levels.append(_build_level(options, grid, network, extent, channels, tiles, choice.grow))
        return cls(levels, extent, groups)

    @classmethod
    def from_layout(
        cls, options: FieldOptions, extent: tuple[float, ...], channels: int, state: dict[str, Tensor], seed: int = 0
    ) -> "Field":
        """The field whose `layout` (or `state_dict`) `state` is, copied. RuntimeError where it does not fit."""
        field = cls.build(options, extent, channels, seed, _active_tiles(state))
        missing, unexpected = field.load_state_dict(state, strict=False)
        parameters = dict(field.named_parameters())
        _refuse([*unexpected, *(name for name in missing if name not in parameters)])
        return field

    @classmethod
    def from_state(
        cls, options: FieldOptions, extent: tuple[float, ...], channels: int, state: dict[str, Tensor]
    ) -> "Field":
        """The field whose `state_dict` `state` is: its tensors are those of `state`, uncopied where the type is right.

        RuntimeError where it does not fit.
        """
        with torch.device("meta"):
            field = cls.build(options, extent, channels, active=_active_tiles(state))
        types = {name: value.dtype for name, value in field.state_dict().items()}
        state = {name: value.to(types.get(name, value.dtype)) for name, value in state.items()}
        missing, unexpected = field.load_state_dict(state, strict=False, assign=True)
        _refuse([*unexpected, *missing])
        return field

    def forward(self, points: Tensor, order: str = "value", active: int | None = None) -> Jet:
        """The jet [R, N, C] at float64 points [N, D]; only the recipe's first `active` levels contribute (None: all).

        A level that does not contribute yet is evaluated at one point and weighted with zero, because data-parallel
        backends wait for a gradient of every parameter.
        """
        rows = 0
        for number, group in enumerate(self.groups):
            for level in (self.levels[k] for k in group):
                if active is None or number < active:
                    rows = rows + level(points, order)
                elif torch.is_grad_enabled():
                    rows = rows + 0.0 * level(points[:1], order)
        return Jet(rows @ self.mix, order, points.shape[1])

    @torch.no_grad()
    def lattice(self, ys: Tensor, xs: Tensor, order: str = "value", groups: int | None = None) -> Tensor:
        """Jet rows [R, C, H, W] on the product of ascending float64 coordinates; the recipe's first `groups` levels."""
        chosen = [self.levels[k] for group in self.groups[:groups] for k in group]
        margin = max((_points_per_tile(level, xs) for level in chosen), default=0)
        channels = self.mix.shape[0]
        out = self.mix.new_zeros(row_count(order, 2), len(ys), channels, len(xs) + margin)
        for level in chosen:
            add_lattice(level, out, ys, xs, order)
        release()
        out = out[..., : len(xs)].transpose(1, 2)
        return torch.einsum("rkhw,kc->rchw", out, self.mix) if channels > 1 else out

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
        return sum(level.count_parameters() for level in self.levels)


def _active_tiles(state: dict[str, Tensor]) -> dict[int, Tensor]:
    """The active tiles of a state, by level number."""
    split = {name: name.removeprefix("levels.").partition(".") for name in state}
    return {int(first): state[name] for name, (first, _, rest) in split.items() if rest == "active"}


def _refuse(names: list[str]) -> None:
    if names:
        raise RuntimeError(f"tensors do not fit the recipe: {', '.join(names[:3])}")


def level_shapes(choice: LevelOptions, extent: tuple[float, ...], window: str) -> list[tuple[TileGrid, dict]]:
    """The grids and networks that a recipe's level stands for.

    One; or for a quadtree one per leaf size, all with one blend width; times one per number of units where tiles grow.
    """
    network = choice.network.model_dump()
    if choice.grid is not None:
        return [(TileGrid.over(extent, counts=choice.grid, overlap=choice.overlap, window=window), network)]
    strides, shapes = choice.strides, []
    for stride in strides:
        grid = TileGrid.over(extent, stride=stride, overlap=choice.overlap * strides[-1] / stride, window=window)
        if network["kind"] == "chebyshev2d" and network["degree"] is None:  # as many terms as pixels
            degree = tuple(max(0, round(2 * axis.half) - 1) for axis in grid.axes)
            shapes.append((grid, network | {"degree": degree}))
        elif choice.grow:
            shapes += [(grid, choice.grown(units)) for units in range(1 + network["hidden"][0])]
        else:
            shapes.append((grid, network))
    return shapes


def _build_level(
    options: FieldOptions, grid: TileGrid, network: dict, extent, channels: int, active: Tensor | None, grown: bool
) -> Level:
    tiles, built = grid.tiles if active is None else len(active), None
    if tiles:
        built = build_network(tiles=tiles, in_features=len(extent), out_features=channels, **network)
        built.zero_last()
    per_tile = network["kind"] != "chebyshev2d" and not grown
    return Level(grid, built, channels, options.chunk, options.checkpoint, active, per_tile)


def _points_per_tile(level: Level, xs: Tensor) -> int:
    """An upper bound of the lattice points that one tile sees along x."""
    axis = level.tile_grid.axes[1]
    if len(xs) < 2:
        return len(xs)
    spacing = float((xs[1:] - xs[:-1]).min())
    return min(len(xs), int(2 * axis.half / max(spacing, 1e-9)) + 2)
