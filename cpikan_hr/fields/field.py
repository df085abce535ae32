"""The field: the sum of its levels, and the only module a training loop calls."""

import torch
from torch import Tensor, nn

from cpikan_hr.fields.level import Level
from cpikan_hr.fields.tiles import TileGrid
from cpikan_hr.jets import Jet
from cpikan_hr.networks import Chebyshev2D, build_network
from cpikan_hr.recipe import FieldOptions


class Field(nn.Module):
    """Levels from coarse to fine over the domain [0, extent_a], one output per channel, in the data's unit."""

    def __init__(self, levels: list[Level], extent: tuple[float, ...]):
        super().__init__()
        self.levels = nn.ModuleList(levels)
        self.extent = tuple(float(length) for length in extent)

    @classmethod
    def build(cls, options: FieldOptions, extent: tuple[float, ...], channels: int, seed: int = 0) -> "Field":
        """From the recipe; weights are a function of the seed alone, and a fresh field is zero."""
        levels = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for level in options.levels:
                grid = TileGrid.over(
                    extent, stride=level.tile, counts=level.grid, overlap=level.overlap, window=options.window
                )
                network = build_network(
                    tiles=grid.tiles, in_features=len(extent), out_features=channels, **level.network.model_dump()
                )
                network.zero_last()
                levels.append(Level(grid, network, channels, options.chunk, options.checkpoint))
        return cls(levels, extent)

    def forward(self, points: Tensor, order: str = "value", active: int | None = None) -> Jet:
        """The jet [R, N, C] at float64 points [N, D]; only the first `active` levels contribute (None: all).

        A level that does not contribute yet is evaluated at one point and weighted with zero, because data-parallel
        backends wait for a gradient of every parameter.
        """
        rows = 0
        for number, level in enumerate(self.levels):
            if active is None or number < active:
                rows = rows + level(points, order)
            elif torch.is_grad_enabled():
                rows = rows + 0.0 * level(points[:1], order)
        return Jet(rows, order, points.shape[1])

    @torch.no_grad()
    def grid(self, ys: Tensor, xs: Tensor, order: str = "value", levels: int | None = None) -> Tensor:
        """Jet rows [R, H, W, C] on the product of ascending float64 coordinates; the first `levels` levels (None: all)."""
        return sum(level.grid(ys, xs, order) for level in self.levels[:levels])

    @property
    def device(self) -> torch.device:
        return self.levels[0].mean.device

    def count_parameters(self) -> int:
        """Trained numbers: parameters, for a sparse Chebyshev level the terms in use."""
        total = 0
        for level in self.levels:
            network = level.network
            sparse = isinstance(network, Chebyshev2D)
            total += network.count_terms() if sparse else sum(p.numel() for p in network.parameters())
        return total
