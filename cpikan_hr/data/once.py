"""A map that is reckoned once: what several passes ask for goes through a temporary file."""

import threading
from collections.abc import Callable

import numpy as np

from cpikan_hr.data.spool import SpooledMap
from cpikan_hr.errors import UserError


class Once:
    """`function(y0, y1, x0, x1)`, blocks [h, w, C] of a map [H, W, C], reckoned cell by cell when first asked for.

    Invariant: what it returns does not depend on what was asked for before, in which order, by how many threads. Where
    the folder for temporary files has no room, everything is reckoned anew every time.
    """

    def __init__(
        self,
        name: str,
        function: Callable[[int, int, int, int], np.ndarray],
        shape: tuple[int, int, int],
        cell: tuple[int, int],
        dtype: np.typing.DTypeLike = np.float32,
    ):
        self.shape = shape
        self._function, self.cell, self._dtype = function, cell, dtype
        corners = [(y, x) for y in range(0, shape[0], cell[0]) for x in range(0, shape[1], cell[1])]
        self._locks = {corner: threading.Lock() for corner in corners}
        self._known: set[tuple[int, int]] = set()
        try:
            self._file: SpooledMap | None = SpooledMap(name, shape, dtype)
        except UserError:
            self._file = None

    def read(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        """The block [y1 - y0, x1 - x0, C]."""
        if self._file is None:
            return self._function(y0, y1, x0, x1).astype(self._dtype, copy=False)
        for corner in self._corners(y0, y1, x0, x1):
            self._reckon(*corner)
        return self._file.read(y0, y1, x0, x1)

    def knows(self, y0: int, y1: int, x0: int, x1: int) -> bool:
        """Whether all cells of this block have been reckoned."""
        return self._known.issuperset(self._corners(y0, y1, x0, x1))

    def _corners(self, y0: int, y1: int, x0: int, x1: int) -> list[tuple[int, int]]:
        high, wide = self.cell
        rows, columns = range(y0 // high * high, y1, high), range(x0 // wide * wide, x1, wide)
        return [(y, x) for y in rows for x in columns]

    def _reckon(self, y: int, x: int) -> None:
        with self._locks[y, x]:
            if (y, x) in self._known:
                return
            (high, wide), (height, width) = self.cell, self.shape[:2]
            self._file.write(y, x, self._function(y, min(y + high, height), x, min(x + wide, width)))
            self._known.add((y, x))
