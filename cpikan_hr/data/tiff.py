"""TIFF and BigTIFF as a `Source`: uncompressed rows by `pread`, anything else by the strips or tiles a window touches.

Invariant: a window decodes only the segments it overlaps; segments of more than `_LARGE` samples (a picture in one
strip) are decoded once, one at a time, into a temporary file. tifffile parses the file and decodes segments; reading
bytes is ours (`pread`), so that threads never share a file position. What samples mean: `tiff_samples`.
"""

import logging
import math
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, reduce
from pathlib import Path

import numpy as np
import tifffile

from cpikan_hr.data.orientation import UPRIGHT
from cpikan_hr.data.pages import page_of
from cpikan_hr.data.spool import SpooledMap
from cpikan_hr.data.tiff_samples import meaning
from cpikan_hr.data.windows import Converted, RawRows, Source, native
from cpikan_hr.errors import UserError

_LARGE = 2**22  # samples of a strip or tile that is decoded only once
_RANGES = ("MaxSampleValue", "SMinSampleValue", "SMaxSampleValue")


class _Complaints(logging.Filter):
    """What tifffile logs of files that it can only read in part: kept here instead of on stderr."""

    def __init__(self):
        super().__init__()
        self.said: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno >= logging.ERROR:
            self.said.append(record.getMessage())
        return record.levelno < logging.ERROR


_complaints = _Complaints()
logging.getLogger("tifffile").addFilter(_complaints)


def open_tiff(path: Path, page: int | None) -> Source:
    """Picture `page` of `path`. UserError: several and none chosen, truncated, a sample format or colour scheme that is
    not read."""
    with _opened(path) as tif:
        pictures = _pictures(tif, path)
        return _open_page(tif, path, pictures, page_of(path, page, len(pictures), _arrangement(tif, pictures)))


def open_tiff_pages(path: Path) -> list[Source]:
    """All pictures of `path`, in the order of the file."""
    with _opened(path) as tif:
        pictures = _pictures(tif, path)
        return [_open_page(tif, path, pictures, page) for page in range(len(pictures))]


def _pictures(tif: tifffile.TiffFile, path: Path) -> list[tuple[tifffile.TiffPage, int]]:
    """The pages of `path`, less thumbnails, smaller copies and masks, each with the byte where its pixels stand in
    those of its page: ImageJ and others describe many pictures that follow each other by one page."""
    _complaints.said.clear()
    number = len(tif.pages)
    if _complaints.said:
        raise UserError(f"{path}: truncated: it ends where page {number} should follow; copy the file again")
    pages = [tif.pages[i] for i in range(number)]
    full = [page for page in pages if not (page.is_reduced or page.is_mask)]
    if not full and any(page.subifds for page in pages):
        raise UserError(f"{path}: shows a small copy only, its pictures stand deeper (a raw file?); convert it to RGB")
    if number == 1:
        return [(pages[0], i * pages[0].nbytes) for i in range(_following(tif, path))]
    return [(page, 0) for page in full or pages]


def _following(tif: tifffile.TiffFile, path: Path) -> int:
    """How many pictures the one page of a file describes."""
    if not (tif.is_imagej or tif.is_shaped or tif.is_stk):
        return 1
    series, page = tif.series[0], tif.pages[0]
    said = int((tif.imagej_metadata or {}).get("images", 1)) if tif.is_imagej else 1
    shape = tuple(tif.shaped_metadata[0].get("shape", ())) if tif.is_shaped and tif.shaped_metadata else ()
    if shape[-page.ndim :] == page.shape:
        said = math.prod(shape[: -page.ndim])
    if series.dataoffset is not None and page.size:
        said = max(said, series.size // page.size)
    if said == 1 or not page.is_contiguous:
        return 1
    behind = path.stat().st_size - page.dataoffsets[0] - page.nbytes
    if behind >= (said - 1) * page.nbytes:
        return said
    if behind > page.nbytes // 2:
        raise UserError(f"{path}: truncated: it says that it holds {said} pictures; copy the file again")
    return 1  # taken out of a stack, with the words of the stack


def _arrangement(tif: tifffile.TiffFile, pictures: list[tuple[tifffile.TiffPage, int]]) -> str:
    """How several pictures belong together, in words."""
    shapes = list(dict.fromkeys(page.shape for page, _ in pictures))
    sizes = ", ".join(" x ".join(str(n) for n in shape) for shape in shapes[:4]) + (", ..." if len(shapes) > 4 else "")
    if len(pictures) < 2 or not (tif.is_imagej or tif.is_ome):
        return sizes
    series = tif.series[0]
    return f"axes {series.axes}: {' x '.join(str(n) for n in series.shape)}"


def _open_page(tif: tifffile.TiffFile, path: Path, pictures: list, page: int) -> Source:
    ifd, skipped = pictures[page]
    name = f"{path}[{page}]" if len(pictures) > 1 else str(path)
    planes, depth, height, width, samples = ifd.shaped
    if ifd.dtype is None:
        raise UserError(f"{name}: unsupported bit depth: {ifd.bitspersample} bits per sample; convert to 8 or 16")
    dtype = np.dtype(ifd.dtype)
    native(name, dtype)
    if depth > 1:
        raise UserError(f"{name}: a TIFF page of shape {ifd.shape}; save its slices as pages")
    channels, seen, steps = meaning(ifd, name, dtype)
    if not ifd.dataoffsets:
        raise UserError(f"{name}: a TIFF page without pixel data; save it again")
    end = max(o + n for o, n in zip(ifd.dataoffsets, ifd.databytecounts, strict=False))
    if end > path.stat().st_size:
        raise UserError(
            f"{name}: truncated: {path.stat().st_size} bytes, but its header promises {end}; copy the file again"
        )
    shape, fd = (height, width, planes * samples), os.open(path, os.O_RDONLY)
    if ifd.is_final and planes == 1:
        row = width * samples * dtype.itemsize
        source: Source = RawRows(fd, name, shape, dtype.newbyteorder(tif.byteorder), ifd.dataoffsets[0] + skipped, row)
    else:
        source = _Segments(fd, name, shape, ifd, planes)
    if steps:
        all_steps = partial(reduce, lambda pixels, step: step(pixels), steps)
        source = Converted(source, channels, seen, all_steps)
    if ifd.bitspersample == 1:
        source.stored = np.dtype(bool)
    nodata = _nodata(ifd, name)
    if nodata is not None and steps:  # as the pixels are seen, of which one has been given that value
        nodata = float(all_steps(np.full((1, 1, planes * samples), nodata).astype(dtype)).flat[0])
    source.nodata, source.range = nodata, _range(ifd, dtype) or source.range
    asked = ifd.tags.valueof(274)
    source.orientation = int(asked) if asked in UPRIGHT else 1
    return source


def _nodata(ifd: tifffile.TiffPage, name: str) -> float | None:
    """What GDAL calls the no-data value; None where the tag is missing, empty or NaN, which holds no data anyway."""
    tag = ifd.tags.get("GDAL_NODATA")
    said = "" if tag is None else str(tag.value).strip(" \0")
    try:
        value = float(said.replace(",", ".") or "nan")
    except ValueError:
        raise UserError(f"{name}: its no-data value (tag GDAL_NODATA) is {said!r}, no number; mend the tag") from None
    return value if math.isfinite(value) else None


def _range(ifd: tifffile.TiffPage, dtype: np.dtype) -> float | None:
    """Of the samples, by the tags MaxSampleValue, or SMinSampleValue and SMaxSampleValue; those of 8 bits have 255."""
    found = {name: np.atleast_1d(ifd.tags[name].value) for name in _RANGES if name in ifd.tags}
    if dtype.kind == "u" and dtype.itemsize > 1:
        tops = [found[name].max() for name in ("SMaxSampleValue", "MaxSampleValue") if name in found]
        return float(tops[0]) if tops and tops[0] > 0 else None
    if dtype.kind == "f" and {"SMinSampleValue", "SMaxSampleValue"} <= found.keys():
        size = float(found["SMaxSampleValue"].max()) - float(found["SMinSampleValue"].min())
        return size if 0 < size < math.inf else None
    return None


class _Segments(Source):
    """Strips or tiles of one page, decoded one by one; those too large to be decoded again and again, once."""

    def __init__(self, fd: int, name: str, shape: tuple[int, int, int], ifd: tifffile.TiffPage, planes: int):
        self._fd = fd
        self._close = weakref.finalize(self, os.close, fd)
        super().__init__(name, shape, ifd.dtype)
        try:
            self._decode = ifd.decode
        except (ValueError, KeyError, ImportError) as error:  # what tifffile raises for a missing codec
            raise UserError(f"{name}: {error}; save the TIFF uncompressed or with deflate") from None
        self._offsets, self._sizes, self._tables = ifd.dataoffsets, ifd.databytecounts, ifd.jpegtables
        self._tile = (ifd.tilelength, ifd.tilewidth) if ifd.is_tiled else (min(ifd.rowsperstrip, shape[0]), shape[1])
        self._planes, self._unpacked, self._lock = planes, None, threading.Lock()
        down, across = -(-shape[0] // self._tile[0]), -(-shape[1] // self._tile[1])
        if min(len(self._offsets), len(self._sizes)) < planes * down * across:
            raise UserError(f"{name}: damaged: its header lists too few strips or tiles; save the TIFF again")

    def _read(self, y0, y1, x0, x1):
        (th, tw), (height, width, channels) = self._tile, self.shape
        if th * tw * (channels // self._planes) <= _LARGE:
            return self._decoded(y0, y1, x0, x1)
        with self._lock:
            if self._unpacked is None:
                unpacked = SpooledMap(self.name, self.shape, self.stored)
                for y in range(0, height, th):
                    for x in range(0, width, tw):
                        unpacked.write(y, x, self._decoded(y, min(y + th, height), x, min(x + tw, width)))
                self._unpacked = unpacked
        return self._unpacked._read(y0, y1, x0, x1)

    def _decoded(self, y0, y1, x0, x1):
        out = np.zeros((y1 - y0, x1 - x0, self.shape[2]), self.stored)
        th, tw = self._tile
        down, across = -(-self.shape[0] // th), -(-self.shape[1] // tw)
        for plane in range(self._planes):
            channel = slice(plane, plane + 1) if self._planes > 1 else slice(None)
            for ty in range(y0 // th, -(-y1 // th)):
                for tx in range(x0 // tw, -(-x1 // tw)):
                    tile = self._segment((plane * down + ty) * across + tx)
                    if tile is None:  # an absent segment is zero by the TIFF specification
                        continue
                    top, left = max(y0, ty * th), max(x0, tx * tw)
                    bottom, right = min(y1, ty * th + tile.shape[0]), min(x1, tx * tw + tile.shape[1])
                    out[top - y0 : bottom - y0, left - x0 : right - x0, channel] = tile[
                        top - ty * th : bottom - ty * th, left - tx * tw : right - tx * tw
                    ]
        return out

    def _segment(self, index: int) -> np.ndarray | None:
        """Segment `index` as [rows, columns, samples]."""
        if not self._sizes[index]:
            return None
        data = os.pread(self._fd, self._sizes[index], self._offsets[index])
        try:
            tile, _, _ = self._decode(data, index, jpegtables=self._tables)
        except Exception as error:  # each codec raises its own classes, all meaning: cannot be decoded
            raise UserError(f"{self.name}: segment {index} cannot be decoded ({error}); save the TIFF again") from None
        return None if tile is None else tile[0]


@contextmanager
def _opened(path: Path) -> Iterator[tifffile.TiffFile]:
    """The parsed file. A damaged header fails anywhere in the parser, with errors of any class: each is one line."""
    try:
        with tifffile.TiffFile(path) as tif:
            yield tif
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: broken or truncated TIFF ({error}); copy the file again") from None
