"""Coloured sweeps: tiles are solved again on what all others leave, so that overlapping neighbours see each other.

A sweep of local nonlinear solves is a nonlinear additive Schwarz step (Dryja and Hackbusch 1997); four colours, by the
parity of a tile's row and column, make it multiplicative between neighbours of one size: no two of a colour overlap.
Tile i with window w is fitted to residual + w N_i, weighted with w. A sweep that does not lower the error is undone.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cpikan_hr.fields import Field, Level
from cpikan_hr.processes import Processes
from cpikan_hr.recipe import LevelOptions
from cpikan_hr.solvers.blocks import Block, Pixels, ReadTarget, read_block, shares_of
from cpikan_hr.solvers.gauss_newton import levenberg_marquardt
from cpikan_hr.solvers.grown_networks import read, unit_of, write
from cpikan_hr.solvers.growth import blocks_to_grow, growing_sizes, prior_of, tile_data, tile_windows
from cpikan_hr.solvers.leaves import Size
from cpikan_hr.solvers.units import Unit, Units, features

COLOURS = ((0, 0), (0, 1), (1, 0), (1, 1))
ITERATIONS = 4  # of each tile's solve in a sweep: the neighbours move as well
DAMPING = 1e-2  # its first


@torch.no_grad()
def sweep(
    field: Field,
    group: int,
    choice: LevelOptions,
    target: ReadTarget,
    shape: tuple[int, int],
    processes: Processes,
    progress: Callable[[float], None] | None = None,
) -> None:
    """One sweep over all grown tiles of the recipe's level, in place and alike on all processes."""
    sizes, _, halo = growing_sizes(field, group, choice)
    blocks = blocks_to_grow(field, sizes, shape)
    unit, per_size = unit_of(choice), 1 + choice.network.hidden[0]
    levels, prior = [field.levels[k] for k in field.groups[group]], prior_of(field)
    for done, colour in enumerate(COLOURS):
        updates: dict[int, list] = {}
        for _, block in shares_of(blocks, processes.rank, processes.ranks):
            pixels = read_block(field, len(field.groups), target, shape, block, sizes[0].stride, halo)
            inside = _inside(block, sizes[0], shape, halo).to(pixels.values)
            for place, level in enumerate(levels):
                size = sizes[place // per_size]
                found = _solve(level, size, sizes[0], block, pixels, inside, colour, unit, place % per_size, prior)
                if found is not None:
                    updates.setdefault(place, []).append(found)
        for share in processes.gather(updates):
            for place, found in share.items():
                for slots, w, last in found:
                    _assign(levels[place], unit, slots, w, last)
        if progress:
            progress((done + 1) / len(COLOURS))


def _inside(block: Block, coarsest: Size, shape: tuple[int, int], halo: int) -> Tensor:
    """1 for the pixels of a block (halo included) that lie in the frame, else 0: [h, w]."""
    stride = coarsest.stride
    y = torch.arange(block.row * stride - halo, (block.row + block.rows) * stride + halo)
    x = torch.arange(block.column * stride - halo, (block.column + block.columns) * stride + halo)
    return (((y >= 0) & (y < shape[0]))[:, None] & ((x >= 0) & (x < shape[1]))).float()


def _solve(
    level: Level,
    size: Size,
    coarsest: Size,
    block: Block,
    pixels: Pixels,
    inside: Tensor,
    colour,
    unit: Unit,
    units: int,
    prior: float,
):
    """New parameters of the level's tiles of one colour in a block.

    Slots, hidden weights (None: no unit), last layers.
    """
    if level.network is None:
        return None
    factor = coarsest.stride // size.stride
    device = pixels.values.device
    y = block.row * factor + torch.arange(block.rows * factor, device=device)
    x = block.column * factor + torch.arange(block.columns * factor, device=device)
    there = (y < size.counts[0])[:, None] & (x < size.counts[1])
    there &= (y % 2 == colour[0])[:, None] & (x % 2 == colour[1])
    number = y[:, None] * size.counts[1] + x
    slots = level.slots_of(torch.where(there, number, 0))
    chosen = torch.nonzero((there & (slots >= 0)).flatten())[:, 0]
    if not len(chosen):
        return None
    slots = slots.flatten()[chosen]
    window = tile_windows(level.tile_grid, size, block, coarsest)
    seen = tile_data(Pixels(inside[None], None, None), size)[chosen, 0]
    weight = seen if window is None else seen * window.to(seen)[chosen]
    residual = tile_data(pixels, size)[chosen] * seen[:, None]
    scale = level.scale[0]
    if not units:
        constant = level.network.coefficients[slots, :, :1] * scale[:, None]  # [t, C, 1]
        energy = weight.square().sum(-1).clamp_min(1e-12)
        constant = constant + (residual * weight[:, None]).sum(-1, keepdim=True) / energy[:, None, None]
        return slots.cpu(), None, constant.cpu()
    w, last = read(level.network, unit, slots)
    phi = unit.inputs(size.pixels, size.pixels).to(residual)
    a, _ = features(unit, phi, w, weight)
    data = residual + torch.bmm(last * scale[:, None], a)
    w, last, _ = levenberg_marquardt(Units(unit, phi, prior), data, w, ITERATIONS, weight, damping=DAMPING)
    return slots.cpu(), w.cpu(), last.cpu()


def _assign(level: Level, unit: Unit, slots: Tensor, w: Tensor | None, last: Tensor) -> None:
    scale = level.scale[0].cpu()[:, None]
    device = level.scale.device
    if w is None:
        level.network.set_last(slots.to(device), (last / scale).transpose(1, 2).to(device))
    else:
        write(level.network, unit, w.to(device), (last / scale).to(device), slots.to(device))
