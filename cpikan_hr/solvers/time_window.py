"""Windows of time that are solved one after the other (time marching: Wight and Zhao 2021; Mattey and Ghosh 2022).

In a window those tiles vary whose support reaches into it, and residuals count from where the first of these tiles
begins. Tiles cut in time without overlap are so solved slab by slab, each from what the one before has left; one tile
over all times sees all that came before once more.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cpikan_hr.fields import Level

EDGE = 1e-6  # of a window: what counts as its border


@dataclass(frozen=True)
class Window:
    """Times `since` to `until`; `axis`: which coordinate is time."""

    axis: int
    since: float
    until: float

    @classmethod
    def split(cls, axis: int, low: float, high: float, count: int) -> "list[Window]":
        """`count` windows of one length."""
        ends = [low + (high - low) * k / count for k in range(count)] + [high]
        return [cls(axis, begin, end) for begin, end in zip(ends[:-1], ends[1:], strict=True)]

    @property
    def _edge(self) -> float:
        return EDGE * (self.until - self.since)

    def _reaches(self, level: Level) -> list[tuple[int, float]]:
        """Rows of tiles along the axis that vary, and where their supports begin."""
        axis = level.tile_grid.axes[self.axis]
        bounds = [(k, *axis.bounds(k)) for k in range(axis.count)]
        return [
            (k, low) for k, low, high in bounds if high > self.since + self._edge and low < self.until - self._edge
        ]

    def varying(self, level: Level) -> Tensor:
        """Which of the level's networks vary, bool [t]."""
        rows = torch.tensor([k for k, _ in self._reaches(level)])
        return torch.isin(level.tile_grid.unravel(level.active_tiles)[self.axis], rows.to(level.mean.device))

    def counts(self, points: Tensor, levels: Sequence[Level]) -> Tensor:
        """Which residuals count, bool [n], of points [n, per, D]."""
        begin = min(low for level in levels for _, low in self._reaches(level))
        last = points[:, :, self.axis].amax(1)  # both points of a pair that meets at the beginning count
        return (last > begin) & (last <= self.until)

    @torch.no_grad()
    def begin(self, levels: Sequence[Level]) -> None:
        """Gives the tiles that a window before this one did not see the parameters of the last ones that it did."""
        for level in levels:
            grid = level.tile_grid
            fresh = [k for k, low in self._reaches(level) if k > 0 and low > self.since - self._edge]
            if not fresh:
                continue
            rows = grid.unravel(level.active_tiles)[self.axis]
            here = torch.nonzero(torch.isin(rows, rows.new_tensor(fresh)))[:, 0]
            stride = math.prod(grid.shape[self.axis + 1 :])  # in tile numbers, from one row to the next
            before = level.slots_of(level.active_tiles[here] - (rows[here] - fresh[0] + 1) * stride)
            for parameter in level.network.parameters():
                parameter[here] = parameter[before]
