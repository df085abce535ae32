"""Where the tiles that train are: which pixels they see."""

import torch
from torch import Tensor

from cpikan_hr.fields.field import Field
from cpikan_hr.fields.level import slots_in
from cpikan_hr.fields.tiles import TileAxis, TileGrid


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
            (rows, sees_y), (columns, sees_x) = (_seen(*pair) for pair in zip(grid.axes, (ys, xs), strict=True))
            trained = slots_in(active, rows[:, None] * grid.shape[1] + columns) >= 0
            held |= sees_y.T @ trained.float() @ sees_x > 0
        return held


def _seen(axis: TileAxis, x: Tensor) -> tuple[Tensor, Tensor]:
    """Tiles [t] of an axis that may see ascending coordinates x [n], and 1.0 [t, n] where they do."""
    tiles = near(axis, x)
    low, high = torch.tensor([axis.bounds(k) for k in tiles.tolist()], dtype=x.dtype)[..., None].unbind(1)
    return tiles, ((x >= low) & (x <= high)).float()


def near(axis: TileAxis, x: Tensor) -> Tensor:
    """Ascending numbers [t] of an axis' tiles, those that see some of the ascending coordinates x among them."""
    ends = axis.candidates(x[[0, -1]])
    return torch.arange(int(ends.min()), int(ends.max()) + 1, device=x.device)


def lattice_windows(grid: TileGrid, ys: Tensor, xs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tiles [r, c] that may see a lattice of ascending coordinates, and factors [r, H], [c, W] of their windows.

    The window of tile (i, j) is the product of the factors i and j.
    """
    rows, columns = (near(axis, x) for axis, x in zip(grid.axes, (ys, xs), strict=True))
    by, bx = (axis.windows(x, t[:, None])[0] for axis, x, t in zip(grid.axes, (ys, xs), (rows, columns), strict=True))
    return rows[:, None] * grid.shape[1] + columns, by, bx
