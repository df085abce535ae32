"""Arrays on disk as a `Source`: .npy by `pread`, Zarr by the chunks a window touches.

Invariant: axes are [H, W] or [H, W, C] for a picture, and [N, H, W] or [J, K, H, W] for pages, which are numbered flat.
"""

import os
from pathlib import Path
from tokenize import TokenError

import numpy as np

from cpikan_hr.data.windows import RawRows, Source
from cpikan_hr.errors import UserError


class ZarrSource(Source):
    """Page `page` (or the whole) of a Zarr array; zarr decodes only the chunks that a window touches."""

    def __init__(self, name: str, array, page: tuple[int, ...]):
        shape = array.shape[len(page) :]
        super().__init__(name, (*shape, 1)[:3], array.dtype)
        self._array, self._page = array, page

    def _read(self, y0, y1, x0, x1):
        window = np.asarray(self._array[(*self._page, slice(y0, y1), slice(x0, x1))])
        return window.reshape(y1 - y0, x1 - x0, self.shape[2])


def _npy_header(path: Path) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, Fortran order, dtype and where the data start."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with open(path, "rb") as file:
            shape, fortran, dtype = readers[np.lib.format.read_magic(file)](file)
            return shape, fortran, dtype, file.tell()
    except (ValueError, KeyError, EOFError, SyntaxError, TokenError) as error:
        raise UserError(f"{path}: broken .npy header ({error}); save the array again") from None


def _page_index(name: str, axes: tuple[int, ...], page: int | None) -> tuple[int, ...]:
    """Index of flat page `page` in the leading `axes`; () for a single picture."""
    if page is None:
        if len(axes) == 2 or (len(axes) == 3 and axes[2] <= 4):
            return ()
        raise UserError(
            f"{name}: an array of shape {axes} is no picture [H, W] or [H, W, C <= 4]; choose a page, as in {name}[0]"
        )
    pages = int(np.prod(axes[:-2]))
    if len(axes) < 2 or not 0 <= page < pages:
        raise UserError(f"{name}: page {page} of an array of shape {axes}: it holds {pages} pages [H, W]")
    return tuple(int(i) for i in np.unravel_index(page, axes[:-2])) if len(axes) > 2 else ()


def open_npy(path: Path, page: int | None) -> Source:
    axes, fortran, dtype, offset = _npy_header(path)
    name = str(path) if page is None else f"{path}[{page}]"
    if fortran and len(axes) > 1:
        raise UserError(f"{path}: column-major (Fortran) array; save it with numpy.ascontiguousarray")
    _page_index(name, axes, page)
    shape = (*axes, 1)[:3] if page is None else (*axes[-2:], 1)
    stride = shape[1] * shape[2] * dtype.itemsize
    start = offset + (page or 0) * shape[0] * stride
    return RawRows(os.open(path, os.O_RDONLY), name, shape, dtype, start, stride)


def _zarr_array(path: Path):
    import zarr  # a third of a second that other files need not wait for

    try:
        array = zarr.open(path, mode="r")
    except (FileNotFoundError, ValueError, KeyError, zarr.errors.BaseZarrError) as error:
        raise UserError(f"{path}: a folder, but not a Zarr array ({error}); name a file") from None
    if not isinstance(array, zarr.Array):
        raise UserError(f"{path}: a Zarr group; name one of its arrays: {', '.join(sorted(array.array_keys()))}")
    return array


def open_zarr(path: Path, page: int | None) -> Source:
    array = _zarr_array(path)
    name = str(path) if page is None else f"{path}[{page}]"
    return ZarrSource(name, array, _page_index(name, array.shape, page))


def count_npy_pages(path: Path) -> int:
    return int(np.prod(_npy_header(path)[0][:-2]))


def count_zarr_pages(path: Path) -> int:
    return int(np.prod(_zarr_array(path).shape[:-2]))
