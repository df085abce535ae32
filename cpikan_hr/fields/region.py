"""Where some tiles are: which points they see."""

import torch
from torch import Tensor

from cpikan_hr.fields.field import Field
from cpikan_hr.fields.level import slots_in


class Region:
    """The points at which the window of a tile that `field` still trains is positive.

    A copy, on the CPU: threads may ask it while the field changes.
    """

    def __init__(self, field: Field):
        self._tiles = [(level.tile_grid, level.active_tiles.cpu()) for level in field.levels if level.network]

    def holds(self, points: Tensor) -> Tensor:
        """bool [N] at float64 points [N, D]."""
        held = torch.zeros(len(points), dtype=torch.bool)
        for grid, tiles in self._tiles:
            point, tile, _ = grid.cover(points, "value")
            held[point[slots_in(tiles, tile) >= 0]] = True
        return held
