"""A target that is reckoned once: what many passes over a stack ask for goes through a temporary file.

Invariant: the numbers are those of the target itself, whatever is asked for, in whatever order, by how many threads.
"""

import threading
from collections.abc import Callable

import numpy as np

from cpikan_hr.data.spool import SpooledMap
from cpikan_hr.errors import UserError
from cpikan_hr.problems.base import Target

CELL = 256, 512  # rows and columns that are reckoned together


class SpooledTarget:
    """Called like `target`, of a frame [H, W] with one value and its noise per pixel, known or not.

    Cells are reckoned when they are first asked for, 8 bytes a pixel. Where the folder for temporary files has no room
    for them, everything is reckoned anew every time.
    """

    def __init__(self, target: Callable[..., Target], shape: tuple[int, int]):
        self._target, self._shape = target, shape
        corners = [(y, x) for y in range(0, shape[0], CELL[0]) for x in range(0, shape[1], CELL[1])]
        self._locks = {corner: threading.Lock() for corner in corners}
        self._known: set[tuple[int, int]] = set()
        try:
            self._file: SpooledMap | None = SpooledMap("decoded heights", (*shape, 2), np.float32)
        except UserError:
            self._file = None

    def __call__(self, y0: int, y1: int, x0: int, x1: int, stride: int = 1) -> Target:
        rows = range(y0 // CELL[0] * CELL[0], y1, CELL[0])
        corners = [(y, x) for y in rows for x in range(x0 // CELL[1] * CELL[1], x1, CELL[1])]
        # A few pixels of a window are not worth all of them.
        if self._file is None or stride > 1 and not self._known.issuperset(corners):
            return self._target(y0, y1, x0, x1, stride)
        for corner in corners:
            self._reckon(corner)
        values, noise = np.moveaxis(self._file.read(y0, y1, x0, x1)[::stride, ::stride], 2, 0)
        known = np.isfinite(noise)
        return Target(values[..., None].copy(), known.astype(np.float32), np.where(known, noise, np.float32(0)))

    def _reckon(self, corner: tuple[int, int]) -> None:
        with self._locks[corner]:
            if corner in self._known:
                return
            y, x = corner
            found = self._target(y, min(y + CELL[0], self._shape[0]), x, min(x + CELL[1], self._shape[1]))
            noise = np.where(found.weight > 0, found.noise, np.float32(np.nan))
            self._file.write(y, x, np.stack([found.values[..., 0], noise], axis=2))
            self._known.add(corner)
