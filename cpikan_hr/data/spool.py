"""Maps that go through a temporary file, because they would not fit in memory: `SpooledMap`."""

import errno
import os

import numpy as np

from cpikan_hr.data.windows import RawRows
from cpikan_hr.files import temporary_file, writing_temporary


def _reserve(file: int, size: int) -> None:
    """Makes room for all of a file at once, where the file system can, so that it does not run out on the way."""
    try:
        os.posix_fallocate(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(file, size)


class SpooledMap(RawRows):
    """A map [H, W, C] that is written and read by windows, from several threads at once; zeros at first.

    UserError: no room in the folder for temporary files.
    """

    def __init__(self, name: str, shape: tuple[int, int, int], dtype: np.typing.DTypeLike):
        stride = shape[1] * shape[2] * np.dtype(dtype).itemsize
        with temporary_file(shape[0] * stride, name) as file:
            with writing_temporary():
                _reserve(file.fileno(), shape[0] * stride)
            super().__init__(os.dup(file.fileno()), name, shape, dtype, 0, stride)

    def write(self, y0: int, x0: int, block: np.ndarray) -> None:
        """Writes `block` [h, w, C] with its first pixel at (y0, x0)."""
        position = y0 * self._stride + x0 * self.shape[2] * self._file_dtype.itemsize
        with writing_temporary():
            for i, row in enumerate(np.ascontiguousarray(block, self._file_dtype)):
                view = memoryview(row).cast("B")
                while len(view):
                    done = os.pwrite(self._fd, view, position + i * self._stride + row.nbytes - len(view))
                    view = view[done:]
