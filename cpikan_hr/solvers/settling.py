"""Which tiles are good enough to leave first-order training, by a pass over the part of the picture they see.

A tile's error is that of the whole field, weighted with the tile's window. Windows of a level sum to one, so where all
its tiles have an error of at most e, so has the picture. Nothing but the present weights decides: a run that is resumed
comes to the same tiles, and a noisy loss or a learning rate that has decayed is not taken for convergence.
"""

from contextlib import closing

import torch
from torch import Tensor

from cpikan_hr.fields import Field, pixel_axis
from cpikan_hr.fields.region import lattice_windows
from cpikan_hr.parallel import in_threads
from cpikan_hr.processes import Processes
from cpikan_hr.recipe import FieldOptions
from cpikan_hr.solvers.blocks import ReadTarget

SIDE = 512  # pixels of a window that is compared at once


def settled_tiles(
    field: Field,
    options: FieldOptions,
    groups: int | None,
    target: ReadTarget,
    shape: tuple[int, int],
    rmse: float,
    processes: Processes,
) -> dict[int, Tensor]:
    """Collective. Per level number which of the tiles that train may leave, bool [t].

    Those of the recipe's first `groups` levels (None: all) whose error is at or below `rmse`, in the field's unit, and
    all of levels that have no learning rate.
    """
    errors = tile_errors(field, groups, target, shape, processes)
    still = {
        k for group, choice in zip(field.groups, options.levels, strict=True) if not choice.lr_scale for k in group
    }
    return {k: (error <= rmse**2) | (k in still) for k, error in errors.items()}


@torch.no_grad()
def tile_errors(
    field: Field, groups: int | None, target: ReadTarget, shape: tuple[int, int], processes: Processes
) -> dict[int, Tensor]:
    """Collective. The mean squared error under each tile that trains, float64 [t] per level number.

    Mean over the channels and, by the tile's window, over the known pixels; 0 where none is known.
    """
    device = field.mix.device
    numbers = [k for group in field.groups[:groups] for k in group if field.levels[k].network is not None]
    counts = [len(field.levels[k].active_tiles) for k in numbers]
    sums = torch.zeros(2, sum(counts), dtype=torch.float64, device=device)
    views = dict(zip(numbers, sums.split(counts, dim=1), strict=True))

    def compare(corner: tuple[int, int]) -> list[tuple[int, Tensor, Tensor]]:
        (y0, x0), (y1, x1) = corner, (min(n + SIDE, size) for n, size in zip(corner, shape, strict=True))
        ys, xs = (pixel_axis(low, high, device) for low, high in ((y0, y1), (x0, x1)))
        seen = {}
        for k in numbers:
            tiles, rows, columns = lattice_windows(field.levels[k].tile_grid, ys, xs)
            slots = field.levels[k].slots_of(tiles)
            if (slots >= 0).any():
                seen[k] = slots, rows, columns
        if not seen:
            return []
        values, weight, _ = target(y0, y1, x0, x1, 1)
        error = field.pixels(y0, y1, x0, x1, groups) - torch.from_numpy(values).to(device).movedim(-1, 0)
        known = torch.from_numpy(weight > 0).to(device)
        planes = torch.stack([error.double().square().mean(0) * known, known.double()])
        return [(k, slots, rows @ planes @ columns.T) for k, (slots, rows, columns) in seen.items()]

    corners = [(y, x) for y in range(0, shape[0], SIDE) for x in range(0, shape[1], SIDE)]
    with closing(in_threads(compare, corners[processes.rank :: processes.ranks], device)) as compared:
        for parts in compared:
            for k, slots, found in parts:
                here = slots >= 0
                views[k].index_add_(1, slots[here], found[:, here])
    processes.sum(sums)
    return {k: view[0] / view[1].clamp_min(1e-300) for k, view in views.items()}
