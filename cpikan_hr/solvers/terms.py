"""The kept terms of a level, gathered row of blocks by row of blocks in temporary files: they may be a whole field."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpikan_hr.mapped import SpooledVector, release
from cpikan_hr.networks.chebyshev2d import index_dtype
from cpikan_hr.processes import Processes

CHUNK = 2**18  # values that are scaled at a time


class Found(NamedTuple):
    """Terms of some tiles: tile numbers, how many terms each has, and tile after tile flat indices and values."""

    tiles: np.ndarray  # int32 [t]
    counts: np.ndarray  # int32 [t]
    index: np.ndarray  # int32 [K]
    values: np.ndarray  # float32 [K]


NOTHING = Found(*(np.zeros(0, np.int32) for _ in range(3)), np.zeros(0, np.float32))


def joined(parts: Iterable[Found]) -> Found:
    """The same in order of the tile numbers."""
    tiles, counts, index, values = (np.concatenate(part) for part in zip(NOTHING, *parts, strict=True))
    order = np.argsort(tiles, kind="stable")
    start, counts_ordered = np.cumsum(counts) - counts, counts[order]
    shift = start[order] - (np.cumsum(counts_ordered) - counts_ordered)
    place = np.repeat(shift, counts_ordered) + np.arange(len(index))
    return Found(tiles[order], counts_ordered, index[place], values[place])


class Terms:
    """Terms of one level, of which a tile chooses among so many.

    Invariant: rows are added in order, and every tile of a row comes after those before it.
    """

    def __init__(self, choices: int):
        self.choices = choices
        self.tiles, self.offset = SpooledVector(torch.int32), SpooledVector(torch.int32)
        self.index, self.values = SpooledVector(index_dtype(choices)), SpooledVector(torch.float32)
        self.offset.add(np.zeros(1))
        self.rows = [(0, 0)]  # tiles and terms after so many rows
        self._squares = 0.0

    def add(self, parts: Iterable[Found]) -> None:
        """The terms of a row of blocks, in any order."""
        row = joined(parts)
        self.tiles.add(row.tiles)
        self.offset.add(self.index.count + np.cumsum(row.counts))
        self.index.add(row.index)
        self.values.add(row.values)
        self.rows.append((self.tiles.count, self.index.count))
        self._squares += float(np.square(row.values).sum(dtype=np.float64))

    @property
    def rms(self) -> float:
        return (self._squares / max(self.values.count, 1)) ** 0.5

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tile numbers [t], where each tile begins [t + 1], flat indices [K] and values [K], all mapped."""
        return self.tiles.tensor(), self.offset.tensor(), self.index.tensor(), self.values.tensor()


def divide(values: Tensor, scale: float) -> None:
    """In place, without holding all of them."""
    for part in values.split(CHUNK):
        part /= scale
        release()


def shared(mine: dict[int, Terms], processes: Processes) -> dict[int, Terms]:
    """Collective. The terms of all processes, alike on each: `mine` has as many rows everywhere."""
    if processes.ranks == 1:
        return mine
    whole = {number: Terms(terms.choices) for number, terms in mine.items()}
    own = {number: terms.tensors() for number, terms in mine.items()}
    for row in range(max((len(terms.rows) - 1 for terms in mine.values()), default=0)):
        parts = {number: _row(mine[number], own[number], row) for number in mine}
        shares = processes.gather(parts)
        for number, terms in whole.items():
            terms.add([share[number] for share in shares])
        release()
    return whole


def _row(terms: Terms, tensors: tuple[Tensor, ...], row: int) -> Found:
    """A row as it was added."""
    (first, begin), (last, end) = terms.rows[row : row + 2]
    tiles, offset, index, values = tensors
    counts = offset[first : last + 1].diff()
    return Found(*(part.numpy().copy() for part in (tiles[first:last], counts, index[begin:end], values[begin:end])))
