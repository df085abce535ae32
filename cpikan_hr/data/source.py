"""One picture or map on disk, known by its content: `open_source(path).read(y0, y1, x0, x1)`.

Formats: BMP, TIFF/BigTIFF (strips, tiles, pages), .npy, Zarr, and what Pillow reads (PNG, JPEG, ...).
Invariant: every format gives the same `Source` (see `windows`), so nothing behind this line asks what the file was.
"""

import os
from pathlib import Path

import numpy as np

from cpikan_hr.data import bmp
from cpikan_hr.data.arrays import count_npy_pages, count_zarr_pages, open_npy, open_zarr
from cpikan_hr.data.picture import Picture
from cpikan_hr.data.tiff import count_tiff_pages, open_tiff
from cpikan_hr.data.windows import MAX_PIXELS, RawRows, Source
from cpikan_hr.errors import UserError

__all__ = ["MAX_PIXELS", "Source", "count_pages", "open_source"]


def open_source(path: str | os.PathLike, page: int | None = None) -> Source:
    """Opens the picture or map `path`.

    `page`: which picture of a multi-page TIFF (default: the first), or which [H, W] slice of an .npy or Zarr array
    [N, H, W] or [J, K, H, W] (flat index); without it an array is one picture [H, W] or [H, W, C] with C <= 4.
    UserError: file missing, truncated, not an image, above `MAX_PIXELS`, unsupported bit depth, no such page.
    """
    path = Path(path)
    kind = _kind(path)
    if kind == "npy":
        return open_npy(path, page)
    if kind == "zarr":
        return open_zarr(path, page)
    if kind == "tiff":
        return open_tiff(path, page or 0)
    if page:
        raise UserError(f"{path}: holds one picture, so there is no page {page}")
    if kind == "bmp":
        return _open_bmp(path)
    return Picture(path)


def count_pages(path: str | os.PathLike) -> int:
    """How many pictures of one frame stack `path` holds: TIFF pages, or the product of the axes before the last two."""
    path = Path(path)
    kind = _kind(path)
    if kind == "tiff":
        return count_tiff_pages(path)
    if kind == "npy":
        return count_npy_pages(path)
    return count_zarr_pages(path) if kind == "zarr" else 1


def _kind(path: Path) -> str:
    try:
        if path.is_dir():
            return "zarr"
        with open(path, "rb") as file:
            magic = file.read(6)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the name") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    if not magic:
        raise UserError(f"{path}: truncated: the file is empty; copy it again")
    if magic[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return "tiff"
    return "npy" if magic == b"\x93NUMPY" else "bmp" if magic[:2] == b"BM" else "picture"


def _open_bmp(path: Path) -> Source:
    header = bmp.read_header(path)
    stored, palette = header.bytes_per_pixel, header.palette
    channels = 3 if stored > 1 or (palette is not None and palette.ndim == 2) else 1
    fd = os.open(path, os.O_RDONLY)
    layout = dict(palette=palette, stored_channels=stored, reverse=stored > 1)
    return RawRows(fd, str(path), (*header.shape, channels), np.uint8, header.offset, header.stride, **layout)
