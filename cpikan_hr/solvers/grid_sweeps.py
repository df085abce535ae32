"""A coloured sweep (see `sweeps.py`) over an equal grid of tiles of any network: those that do not grow."""

from collections.abc import Callable, Iterator
from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from cpikan_hr.fields import Field
from cpikan_hr.fields.tiles import TileAxis
from cpikan_hr.jets import seed
from cpikan_hr.parallel import in_threads
from cpikan_hr.processes import Processes
from cpikan_hr.solvers.blocks import ReadTarget
from cpikan_hr.solvers.deep_tiles import DeepTiles, write
from cpikan_hr.solvers.gauss_newton import levenberg_marquardt
from cpikan_hr.solvers.last_layer import lattice_points, read_row
from cpikan_hr.solvers.sweeps import COLOURS, DAMPING, ITERATIONS

Solved = tuple[Tensor, Tensor, Tensor]  # slots, hidden weights and last layers of some tiles, on the CPU


@torch.no_grad()
def sweep_grid(
    field: Field,
    group: int,
    target: ReadTarget,
    shape: tuple[int, int],
    processes: Processes,
    progress: Callable[[float], None] | None = None,
) -> None:
    """One sweep over the tiles of the recipe's level number `group`, in place and alike on all processes."""
    (number,) = field.groups[group]
    level = field.levels[number]
    for done, (odd_y, odd_x) in enumerate(COLOURS):
        rows = range(odd_y, level.tile_grid.shape[0], 2)[processes.rank :: processes.ranks]

        def solve(row: int, odd_x: int = odd_x) -> list[Solved]:
            return list(_solve_row(field, number, row, odd_x, target, shape))

        with closing(in_threads(solve, rows, field.device)) as solved:
            mine = [part for parts in solved for part in parts]
        for share in processes.gather(mine):
            for part in share:
                write(level.network, *(tensor.to(field.device) for tensor in part))
        if progress:
            progress((done + 1) / len(COLOURS))


@torch.no_grad()
def _solve_row(
    field: Field, number: int, row: int, odd: int, target: ReadTarget, shape: tuple[int, int]
) -> Iterator[Solved]:
    """Every second tile of a row, from column `odd` on, fitted to what all others leave of its window."""
    level = field.levels[number]
    axis_y, axis_x = level.tile_grid.axes
    columns = np.arange(odd, axis_x.count, 2)
    for patch in read_row(field, len(field.groups), level, row, columns, target, shape):
        slots, known = level.slots_of(patch.tiles), patch.weight.float().flatten(1)
        place_y, place_x = level.tile_grid.unravel(patch.tiles)
        window_y = _windows(axis_y, place_y, patch.y, shape[0])
        window = (window_y[:, :, None] * _windows(axis_x, place_x, patch.x, shape[1])[:, None]).float().flatten(1)
        some = torch.nonzero((slots >= 0) & (known * window > 0).any(1))[:, 0]
        if not len(some):
            continue
        slots, root, window = slots[some], known[some].sqrt(), window[some]
        points = lattice_points(patch.y, patch.x).float()[some]
        fit = DeepTiles(level.network.pick(slots).float(), points)
        before = fit.network(seed(points, "value")).value  # in the networks' own unit, as what is left becomes
        left = patch.left.float().flatten(1, 2)[some] / level.scale_of(slots)[:, None]
        left = torch.where(root[..., None] > 0, left, 0.0)  # unknown pixels may hold anything
        data = ((left + window[..., None] * before) * root[..., None]).transpose(1, 2)
        w, last, _ = levenberg_marquardt(fit, data, fit.read(), ITERATIONS, window * root, damping=DAMPING)
        yield slots.cpu(), w.cpu(), last.cpu()


def _windows(axis: TileAxis, index: Tensor, local: Tensor, size: int) -> Tensor:
    """Windows [t, P] of an axis' tiles at local coordinates [t, P]; zero beyond the frame (mirrored pixels)."""
    x = axis.centre(index)[:, None] + axis.half * local
    return axis.windows(x, index[:, None])[0] * ((x > 0) & (x < size))
