"""Where the tiles that train are: which pixels they see."""

import torch
from torch import Tensor

from cpikan_hr.fields.field import Field
from cpikan_hr.fields.level import slots_in
from cpikan_hr.fields.tiles import TileGrid


class Region:
    """Where the window of a tile that `field` still trains is positive.

    A copy, on the CPU: threads may ask it while the field changes.
    """

    def __init__(self, field: Field):
        self._tiles = [(level.tile_grid, level.active_tiles.cpu()) for level in field.levels if level.network]

    def lattice(self, ys: Tensor, xs: Tensor) -> Tensor:
        """bool [H, W] on the product of ascending float64 coordinates."""
        held = torch.zeros(len(ys), len(xs), dtype=torch.bool)
        for grid, active in self._tiles:
            tiles, rows, columns = lattice_windows(grid, ys, xs)
            trained = (slots_in(active, tiles) >= 0).float()
            held |= (rows.T > 0).float() @ trained @ (columns > 0).float() > 0
        return held


def lattice_windows(grid: TileGrid, ys: Tensor, xs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tiles [r, c] that may see a lattice of ascending coordinates, and factors [r, H], [c, W] of their windows.

    The window of tile (i, j) is the product of the factors i and j.
    """
    tiles, windows = [], []
    for axis, x in zip(grid.axes, (ys, xs), strict=True):
        ends = axis.candidates(x[[0, -1]])
        tiles.append(torch.arange(int(ends.min()), int(ends.max()) + 1, device=x.device))
        windows.append(axis.windows(x, tiles[-1][:, None])[0])
    return tiles[0][:, None] * grid.shape[1] + tiles[1], *windows
