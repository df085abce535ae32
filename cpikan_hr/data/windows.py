"""The reader of one picture, a window at a time: the interface `Source`, and `RawRows` for everything uncompressed.

Invariants
* Memory depends on the window, not on the image: rows come by `pread`, about 1.4 microseconds each. (The pages of a
  memory map left open count as resident, so a frame that was read once would stay in memory for good.)
* `read` returns a fresh native-endian array [h, w, C] and may be called from several threads at once.
* Values are those of the file: types that are not handed out themselves become the float that holds them exactly.
* Sizes come from the header and are checked (`MAX_PIXELS`, file long enough) before any pixel is read.
"""

import os
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np

from cpikan_hr.errors import UserError

MAX_PIXELS = 2**30
DTYPES = {  # of the file -> as handed out
    **{name: name for name in ("uint8", "uint16", "float32", "float64")},
    **{"bool": "uint8", "int8": "float32", "int16": "float32", "float16": "float32"},
    **dict.fromkeys(("int32", "uint32", "int64", "uint64"), "float64"),
}
_EXACT = 2**53  # integers up to here are exact in double precision


_HUGE = 1e30  # no-data values beyond it stand for the least or largest float, and are often written with few digits


def holds(stored: np.ndarray, nodata: float) -> np.ndarray:
    """Which samples are the no-data value, which floats hold rounded; bool, of the same shape."""
    with np.errstate(over="ignore", invalid="ignore"):
        if abs(nodata) > _HUGE:
            return np.isclose(stored, nodata, rtol=1e-5, atol=0)
        return stored == (stored.dtype.type(nodata) if stored.dtype.kind == "f" else nodata)


class Source(ABC):
    """A picture of `shape` (H, W, C) and native `dtype`; `stored` is the dtype in the file, bool for one bit. `name`
    says in messages which file (and page) it is, `orientation` (1 to 8, EXIF) how the file asks to be turned: nobody
    has turned it.

    What the file itself says of its values, None where it says nothing: `nodata`, which pixels without data hold, and
    `range`, from the least to the largest value that a sample may have.
    """

    orientation = 1
    nodata: float | None = None
    range: float | None = None

    def __init__(self, name: str, shape: tuple[int, int, int], dtype: np.dtype):
        if shape[0] < 1 or shape[1] < 1:
            raise UserError(f"{name}: an image of {shape[0]} x {shape[1]} pixels holds nothing")
        if shape[0] * shape[1] > MAX_PIXELS:
            raise UserError(
                f"{name}: {shape[0]} x {shape[1]} pixels are above the limit of {MAX_PIXELS}; cut the image in parts"
            )
        self.name, self.shape, self.dtype, self.stored = name, shape, native(name, dtype), np.dtype(dtype)
        if np.dtype(dtype).kind == "b":
            self.range = 1.0

    def read(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        """Pixels [y1 - y0, x1 - x0, C] of the rows y0 <= y < y1 and columns x0 <= x < x1; a copy in `dtype`.

        Raises UserError where the file turns out to be damaged or holds an integer beyond 2**53, ValueError for a
        window outside the image.
        """
        if not (0 <= y0 < y1 <= self.shape[0] and 0 <= x0 < x1 <= self.shape[1]):
            raise ValueError(f"{self.name}: window {y0}:{y1}, {x0}:{x1} is outside {self.shape[:2]}")
        window = self._read(y0, y1, x0, x1)
        if window.dtype.kind in "iu" and window.dtype.itemsize == 8:
            if (window > _EXACT).any() or (window.dtype.kind == "i" and (window < -_EXACT).any()):
                raise UserError(f"{self.name}: holds integers beyond 2**53, which no float holds; save it as float64")
        return window.astype(self.dtype, copy=False)

    @abstractmethod
    def _read(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        """The window in `dtype` or as it is stored, a copy."""


class Converted(Source):
    """`source` with the stored samples of every window [h, w, S] made into pixels [h, w, channels] by `function`."""

    def __init__(self, source: Source, channels: int, dtype: np.typing.DTypeLike, function: Callable):
        super().__init__(source.name, (*source.shape[:2], channels), dtype)
        self._source, self._function = source, function

    def _read(self, y0, y1, x0, x1):
        return self._function(self._source._read(y0, y1, x0, x1))


def mirrored(first: int, last: int, size: int) -> np.ndarray:
    """Indices first..last - 1 folded back into [0, size): pixels beyond the frame repeat those before it."""
    position = np.arange(first, last) % (2 * size)
    return np.where(position < size, position, 2 * size - 1 - position)


def native(name: str, dtype: np.dtype) -> np.dtype:
    """The dtype an array of `dtype` is handed out in; UserError for those the project does not work with."""
    found = np.dtype(dtype).name
    if found not in DTYPES:
        raise UserError(f"{name}: unsupported bit depth: pixels are {found}; use one of {', '.join(DTYPES)}")
    return np.dtype(DTYPES[found])


class RawRows(Source):
    """Uncompressed rows in a file: row y starts at byte `offset + y * stride` and holds [W, C] values of `dtype`.

    Takes over the file descriptor `fd`.
    """

    def __init__(self, fd, name, shape, dtype, offset, stride):
        self._fd = fd
        self._close = weakref.finalize(self, os.close, fd)
        super().__init__(name, shape, dtype)
        self._file_dtype = np.dtype(np.uint8 if self.stored.kind == "b" else dtype)  # a bool is stored as 0 or 1
        self._offset, self._stride = offset, stride
        starts = (offset, offset + (shape[0] - 1) * stride)
        end, size = max(starts) + shape[1] * shape[2] * self._file_dtype.itemsize, os.fstat(fd).st_size
        if size < end:
            raise UserError(f"{name}: truncated: {size} bytes, but its header promises {end}; copy the file again")

    def _read(self, y0, y1, x0, x1):
        pixel = self.shape[2] * self._file_dtype.itemsize
        out = np.empty((y1 - y0, x1 - x0, self.shape[2]), self._file_dtype)
        start = self._offset + y0 * self._stride + x0 * pixel
        if self._stride == (x1 - x0) * pixel:  # whole rows, one after the other
            self._fill(out, start)
        else:
            for i, row in enumerate(out):
                self._fill(row, start + i * self._stride)
        return out

    def _fill(self, target: np.ndarray, position: int) -> None:
        view = memoryview(target).cast("B")
        while len(view):
            got = os.preadv(self._fd, [view], position)
            if not got:
                raise UserError(f"{self.name}: truncated while it was read; copy the file again")
            view, position = view[got:], position + got


class PackedRows(Source):
    """Samples of 1, 2 or 4 `bits`, the first in a byte's high bits, each row starting at a byte; uint8 [H, W, 1]."""

    def __init__(self, fd, name, shape, bits, offset, stride):
        self._bits = bits
        self._bytes = RawRows(fd, name, (shape[0], -(-shape[1] * bits // 8), 1), np.uint8, offset, stride)
        super().__init__(name, (*shape, 1), np.uint8)

    def _read(self, y0, y1, x0, x1):
        first, last = x0 * self._bits // 8, -(-x1 * self._bits // 8)
        shifts = np.arange(8 - self._bits, -1, -self._bits, dtype=np.uint8)
        samples = self._bytes._read(y0, y1, first, last) >> shifts & np.uint8(2**self._bits - 1)
        start = x0 - first * 8 // self._bits
        return samples.reshape(y1 - y0, -1, 1)[:, start : start + x1 - x0]
