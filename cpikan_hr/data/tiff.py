"""TIFF and BigTIFF as a `Source`: uncompressed rows by `pread`, anything else by the strips or tiles a window touches.

Invariant: a window decodes only the segments it overlaps. tifffile parses the file and decodes segments; reading bytes
is ours (`pread`), so that threads never share a file position.
"""

import logging
import os
import weakref
from pathlib import Path

import numpy as np
import tifffile

from cpikan_hr.data.windows import RawRows, Source, native
from cpikan_hr.errors import UserError

_PHOTOMETRIC = (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.RGB, tifffile.PHOTOMETRIC.YCBCR)


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


def count_tiff_pages(path: Path) -> int:
    """UserError where the file ends before its last page."""
    with _opened(path) as tif:
        _complaints.said.clear()
        pages = len(tif.pages)
        if _complaints.said:
            raise UserError(f"{path}: truncated: it ends where page {pages} should follow; copy the file again")
        return pages


def open_tiff(path: Path, page: int) -> Source:
    """Page `page` of `path`. UserError: no such page, truncated, unsupported sample format or colour scheme."""
    with _opened(path) as tif:
        if not 0 <= page < len(tif.pages):
            raise UserError(f"{path}: has {len(tif.pages)} pages, so there is no page {page}")
        ifd = tif.pages[page]
        name = f"{path}[{page}]" if len(tif.pages) > 1 else str(path)
        planes, depth, height, width, samples = ifd.shaped
        if ifd.dtype is None or ifd.bitspersample not in (8, 16, 32, 64):
            raise UserError(f"{name}: unsupported bit depth: {ifd.bitspersample} bits per sample; convert to 8 or 16")
        dtype = np.dtype(ifd.dtype).newbyteorder(tif.byteorder)
        native(name, dtype)
        if depth > 1 or ifd.photometric not in _PHOTOMETRIC:
            raise UserError(f"{name}: {ifd.photometric.name} TIFF of shape {ifd.shape}; convert it to grey or RGB")
        if not ifd.dataoffsets:
            raise UserError(f"{name}: a TIFF page without pixel data; save it again")
        end = max(o + n for o, n in zip(ifd.dataoffsets, ifd.databytecounts, strict=False))
        if end > path.stat().st_size:
            raise UserError(
                f"{name}: truncated: {path.stat().st_size} bytes, but its header promises {end}; copy the file again"
            )
        shape, fd = (height, width, planes * samples), os.open(path, os.O_RDONLY)
        if ifd.is_final and ifd.is_contiguous and planes == 1 and ifd.compression == 1 and ifd.predictor == 1:
            return RawRows(fd, name, shape, dtype, ifd.dataoffsets[0], width * samples * dtype.itemsize)
        return _Segments(fd, name, shape, ifd, planes)


class _Segments(Source):
    """Strips or tiles of one page, decoded one by one."""

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
        self._planes = planes

    def _read(self, y0, y1, x0, x1):
        out = np.zeros((y1 - y0, x1 - x0, self.shape[2]), self.dtype)
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


def _opened(path: Path) -> tifffile.TiffFile:
    try:
        return tifffile.TiffFile(path)
    except (tifffile.TiffFileError, ValueError, OSError) as error:
        raise UserError(f"{path}: broken or truncated TIFF ({error}); copy the file again") from None
