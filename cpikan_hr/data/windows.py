"""The reader of one picture, a window at a time: the interface `Source`, and `RawRows` for everything uncompressed.

Invariants
* Memory depends on the window, not on the image: rows come by `pread`, about 1.4 microseconds each. (The pages of a
  memory map left open count as resident, so a frame that was read once would stay in memory for good.)
* `read` returns a fresh native-endian array [h, w, C] and may be called from several threads at once.
* Sizes come from the header and are checked (`MAX_PIXELS`, file long enough) before any pixel is read.
"""

import os
import weakref
from abc import ABC, abstractmethod

import numpy as np

from cpikan_hr.errors import UserError

MAX_PIXELS = 2**30
DTYPES = ("uint8", "uint16", "float32", "float64")


class Source(ABC):
    """A picture of `shape` (H, W, C) and native `dtype`. `name` says in messages which file (and page) it is.

    What the file itself says of its values, None where it says nothing: `nodata`, which pixels without data hold, and
    `range`, from the least to the largest value that a sample may have.
    """

    nodata: float | None = None
    range: float | None = None

    def __init__(self, name: str, shape: tuple[int, int, int], dtype: np.dtype):
        if shape[0] < 1 or shape[1] < 1:
            raise UserError(f"{name}: an image of {shape[0]} x {shape[1]} pixels holds nothing")
        if shape[0] * shape[1] > MAX_PIXELS:
            raise UserError(
                f"{name}: {shape[0]} x {shape[1]} pixels are above the limit of {MAX_PIXELS}; cut the image in parts"
            )
        self.name, self.shape, self.dtype = name, shape, native(name, dtype)
        if np.dtype(dtype).kind == "b":
            self.range = 1.0

    def read(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        """Pixels [y1 - y0, x1 - x0, C] of the rows y0 <= y < y1 and columns x0 <= x < x1; a copy in `dtype`.

        Raises UserError where the file turns out to be damaged, ValueError for a window outside the image.
        """
        if not (0 <= y0 < y1 <= self.shape[0] and 0 <= x0 < x1 <= self.shape[1]):
            raise ValueError(f"{self.name}: window {y0}:{y1}, {x0}:{x1} is outside {self.shape[:2]}")
        return self._read(y0, y1, x0, x1)

    @abstractmethod
    def _read(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray: ...


def mirrored(first: int, last: int, size: int) -> np.ndarray:
    """Indices first..last - 1 folded back into [0, size): pixels beyond the frame repeat those before it."""
    position = np.arange(first, last) % (2 * size)
    return np.where(position < size, position, 2 * size - 1 - position)


def native(name: str, dtype: np.dtype) -> np.dtype:
    """The dtype an array of `dtype` is handed out in; UserError for those the project does not work with."""
    dtype = np.dtype(np.uint8 if np.dtype(dtype).kind == "b" else dtype)
    if dtype.name not in DTYPES:
        raise UserError(f"{name}: unsupported bit depth: pixels are {dtype.name}; use one of {', '.join(DTYPES)}")
    return dtype.newbyteorder("=")


class RawRows(Source):
    """Uncompressed rows in a file: row y starts at byte `offset + y * stride` and holds [W, C] values of `dtype`.

    Takes over the file descriptor `fd`. `palette` (uint8 [256, C]) is looked up after reading; `stored_channels` is the
    number of values stored per pixel where it differs from C, and `reverse` says that they stand as blue, green, red.
    """

    def __init__(self, fd, name, shape, dtype, offset, stride, *, palette=None, stored_channels=None, reverse=False):
        self._fd = fd
        self._close = weakref.finalize(self, os.close, fd)
        super().__init__(name, shape, dtype)
        self._file_dtype = np.dtype(dtype) if np.dtype(dtype).kind != "b" else self.dtype  # a bool is stored as 0 or 1
        self._offset, self._stride, self._palette, self._reverse = offset, stride, palette, reverse
        self._channels = stored_channels or shape[2]
        starts = (offset, offset + (shape[0] - 1) * stride)
        end, size = max(starts) + shape[1] * self._channels * self._file_dtype.itemsize, os.fstat(fd).st_size
        if size < end:
            raise UserError(f"{name}: truncated: {size} bytes, but its header promises {end}; copy the file again")

    def _read(self, y0, y1, x0, x1):
        pixel = self._channels * self._file_dtype.itemsize
        out = np.empty((y1 - y0, x1 - x0, self._channels), self._file_dtype)
        start = self._offset + y0 * self._stride + x0 * pixel
        if self._stride == (x1 - x0) * pixel:  # whole rows, one after the other
            self._fill(out, start)
        else:
            for i, row in enumerate(out):
                self._fill(row, start + i * self._stride)
        if self._palette is not None:
            return self._palette[out[..., 0]].reshape(*out.shape[:2], -1)
        if self._reverse:
            out = np.ascontiguousarray(out[..., 2::-1])
        return out.astype(self.dtype, copy=False)

    def _fill(self, target: np.ndarray, position: int) -> None:
        view = memoryview(target).cast("B")
        while len(view):
            got = os.preadv(self._fd, [view], position)
            if not got:
                raise UserError(f"{self.name}: truncated while it was read; copy the file again")
            view, position = view[got:], position + got
