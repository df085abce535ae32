"""One picture or map on disk, known by its content: `open_source(path).read(y0, y1, x0, x1)`.

Formats: BMP, TIFF/BigTIFF (strips, tiles, pages), .npy, Zarr, PGM and its kin, and what Pillow reads (PNG, JPEG, ...).
Invariant: every format gives the same `Source` (see `windows`), so nothing behind this line asks what the file was.
"""

import os
from pathlib import Path

import numpy as np

from cpikan_hr.data import bmp
from cpikan_hr.data.arrays import count_npy_pages, count_zarr_pages, open_npy, open_zarr
from cpikan_hr.data.orientation import UPRIGHT, Oriented
from cpikan_hr.data.pages import page_of, split_page
from cpikan_hr.data.picture import Picture, count_pictures
from cpikan_hr.data.pnm import MAGIC, open_pnm
from cpikan_hr.data.said import say_once
from cpikan_hr.data.tiff import open_tiff, open_tiff_pages
from cpikan_hr.data.windows import MAX_PIXELS, Converted, PackedRows, RawRows, Source
from cpikan_hr.errors import UserError

__all__ = ["MAX_PIXELS", "Source", "open_pages", "open_source", "tell_orientation"]


def open_source(path: str | os.PathLike, page: int | None = None, *, upright: bool | None = None) -> Source | Oriented:
    """Opens the picture or map `path`; `FILE[2]` is the third picture of FILE (see `pages`), as `page` = 2 is.

    `page`: which picture of a file with several, or which [H, W] slice of an .npy or Zarr array [N, H, W] or
    [J, K, H, W] (flat index); without it a file has to hold one picture, an array [H, W] or [H, W, C] with C <= 4.
    `upright`: turned as its orientation tag asks (True), or as it is stored (False); None: that, and said on stderr.
    UserError: file missing, truncated, not an image, above `MAX_PIXELS`, unsupported bit depth, several pictures and
    none chosen, no such page.
    """
    if page is None:
        path, page = split_page(path)
    source = _open(Path(path), page)
    if upright and source.orientation != 1:
        return Oriented(source, *UPRIGHT[source.orientation])
    if upright is None:
        tell_orientation(source)
    return source


def open_pages(path: str | os.PathLike) -> list[Source]:
    """All pictures of `path`, or the one that it chooses, as stored: TIFF pages, or the axes before the last two."""
    path, page = split_page(path)
    kind = _kind(path)
    if page is None and kind == "tiff":
        return open_tiff_pages(path)
    if page is not None:
        return [_open(path, page)]
    count = {"npy": count_npy_pages, "zarr": count_zarr_pages, "picture": count_pictures}.get(kind)
    pages = count(path) if count else 1
    return [_open(path, page if pages > 1 else None) for page in range(pages)]


def tell_orientation(source: Source) -> None:
    """Warns once, on stderr, where the file asks to be turned."""
    if source.orientation == 1:
        return
    rotate, flip = UPRIGHT[source.orientation]
    asked = " and ".join([f"a turn by {rotate} degrees"] * (rotate > 0) + [f"mirrored {flip}"] * (flip != "none"))
    say_once(
        f"{source.name}: its orientation tag {source.orientation} asks for {asked}; it is read as it is stored "
        "(problem.rotate and problem.flip turn it; a picture also problem.orientation file)"
    )


def _open(path: Path, page: int | None) -> Source:
    kind = _kind(path)
    if kind == "npy":
        return open_npy(path, page)
    if kind == "zarr":
        return open_zarr(path, page)
    if kind == "tiff":
        return open_tiff(path, page)
    if kind == "picture":
        return Picture(path, page)
    page_of(path, page, 1)
    return _open_bmp(path) if kind == "bmp" else open_pnm(path)


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
    if MAGIC.match(magic):
        return "pnm"
    return "npy" if magic == b"\x93NUMPY" else "bmp" if magic[:2] == b"BM" else "picture"


def _open_bmp(path: Path) -> Source:
    header, name = bmp.read_header(path), str(path)
    if header.runs:
        return Picture(path)
    fd = os.open(path, os.O_RDONLY)
    if header.bits < 8:
        stored: Source = PackedRows(fd, name, header.shape, header.bits, header.offset, header.stride)
    else:
        values = 3 if header.bits == 24 else 1
        dtype = np.dtype(f"<u{header.bits // 8 // values}")
        stored = RawRows(fd, name, (*header.shape, values), dtype, header.offset, header.stride)
    function = header.pixels()
    source = Converted(stored, header.channels, np.uint8, function) if function else stored
    source.stored = np.dtype(bool if header.bits == 1 else np.uint8)
    return source
