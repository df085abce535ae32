"""What a local solve sees: blocks of the picture, cut along the coarsest tiles, with the halo that their blend needs.

Invariant: a block is read, mirrored beyond the frame, reduced by the levels above and turned into the field's channels
in one place, so every solver fits the same numbers. Unknown pixels are filled smoothly and told by their weight.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cpikan_hr.data.windows import mirrored
from cpikan_hr.fields import Field

NOISY = 8.0  # times the median around: a pixel with more noise counts as unknown

ReadTarget = Callable[[int, int, int, int, int], tuple]  # y0, y1, x0, x1, stride -> values, weight, noise


@dataclass(frozen=True)
class Block:
    """Rows x columns of coarsest tiles from tile (row, column) on; pixels reach `halo` beyond them on every side."""

    row: int
    column: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Pixels:
    """The data of a block."""

    values: Tensor  # float32 [C, h, w], what is left to fit, in the field's channels
    known: Tensor | None  # bool [h, w]; None: all
    noise: Tensor | None  # float32 [h, w], standard deviation of the values; smooth where these are unknown


def blocks_of(shape: tuple[int, int], stride: int, pixels: int, square: bool = False) -> list[Block]:
    """Cuts the frame into blocks of about so many pixels: square, or one row of coarsest tiles high."""
    rows, columns = -(-shape[0] // stride), -(-shape[1] // stride)
    wide = max(1, min(columns, math.isqrt(pixels) // stride if square else pixels // stride**2))
    high = max(1, min(rows, pixels // (stride**2 * wide)))
    return [
        Block(row, column, min(high, rows - row), min(wide, columns - column))
        for row in range(0, rows, high)
        for column in range(0, columns, wide)
    ]


def sampled_blocks(shape: tuple[int, int], stride: int, pixels: int, places: int) -> list[tuple[int, Block]]:
    """Square blocks of about so many pixels in all, with their numbers; the same on all processes.

    They lie in so many places, so that no single region decides.
    """
    blocks = blocks_of(shape, stride, max(stride**2, pixels // places), square=True)
    return [(int(number), blocks[number]) for number in np.random.default_rng(0).permutation(len(blocks))[:places]]


def read_block(
    field: Field, group: int, target: ReadTarget, shape: tuple[int, int], block: Block, stride: int, halo: int
) -> Pixels:
    """Reads a block of coarsest tiles of `stride` px, less what the first `group` levels of the recipe give there."""
    device = field.mix.device
    iy = mirrored(block.row * stride - halo, (block.row + block.rows) * stride + halo, shape[0])
    ix = mirrored(block.column * stride - halo, (block.column + block.columns) * stride + halo, shape[1])
    y0, y1, x0, x1 = int(iy.min()), int(iy.max()) + 1, int(ix.min()), int(ix.max()) + 1
    values, weight, noise = target(y0, y1, x0, x1, 1)
    known = weight > 0
    if noise is not None and known.any():  # one of these would hide what all others of its tile know
        known &= noise <= NOISY * typical(noise, known, stride)
    planes = torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1))).to(device)
    if group:
        planes = planes - field.pixels(y0, y1, x0, x1, group)
    if len(planes) > 1:
        planes = torch.einsum("khw,ck->chw", planes, field.mix)
    whole = bool(known.all())
    if not whole:
        planes = torch.from_numpy(fill(planes.cpu().numpy(), known)).to(device)
        noise = None if noise is None else fill(noise[None], known)[0]
    pick = np.ix_(iy - y0, ix - x0)
    inside = len(iy) == y1 - y0 and len(ix) == x1 - x0
    if not inside:
        planes = planes[:, torch.from_numpy(pick[0]).to(device), torch.from_numpy(pick[1]).to(device)]
    return Pixels(
        planes.contiguous(),
        None if whole else torch.from_numpy(known[pick]).to(device),
        None if noise is None else torch.from_numpy(noise[pick].astype(np.float32)).to(device),
    )


def typical(noise: np.ndarray, known: np.ndarray, cell: int) -> np.ndarray:
    """The median noise of the known pixels in the cell x cell px around each pixel [h, w]; 0 where none is known."""
    height, width = noise.shape
    padded = np.pad(np.where(known, noise, np.nan), [(0, -height % cell), (0, -width % cell)], constant_values=np.nan)
    rows, columns = padded.shape[0] // cell, padded.shape[1] // cell
    cells = np.sort(padded.reshape(rows, cell, columns, cell).swapaxes(1, 2).reshape(rows, columns, -1))  # NaN last
    middle = np.maximum((np.isfinite(cells).sum(-1, keepdims=True) - 1) // 2, 0)
    medians = np.nan_to_num(np.take_along_axis(cells, middle, -1)[..., 0])
    return medians.repeat(cell, 0).repeat(cell, 1)[:height, :width]


def fill(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Gives unknown pixels of [C, h, w] smooth values: averages of what is known at ever coarser scales (push-pull)."""
    weight = known.astype(np.float32)
    values = np.where(known, values, 0).astype(np.float32)
    if not known.any() or known.all():
        return values
    if min(known.shape) == 1 and max(known.shape) == 1:
        return values
    padded = [(0, size % 2) for size in known.shape]
    sums = np.pad(values * weight, [(0, 0), *padded])
    counts = np.pad(weight, padded)
    sums = sums.reshape(len(values), sums.shape[1] // 2, 2, -1, 2).sum((2, 4))
    counts = counts.reshape(counts.shape[0] // 2, 2, -1, 2).sum((1, 3))
    coarse = fill(sums / np.maximum(counts, 1), counts > 0)
    fine = coarse.repeat(2, 1).repeat(2, 2)[:, : known.shape[0], : known.shape[1]]
    return np.where(known, values, fine)


def shares_of(blocks: list[Block], share: int, shares: int) -> Iterator[tuple[int, Block]]:
    """The blocks of one process, with their numbers."""
    yield from list(enumerate(blocks))[share::shares]
