"""The header of an uncompressed Windows bitmap, read and written, so that its pixels can be reached a window at a time.

Invariant: what `header_bytes` writes, `read_header` reads. Only layouts whose rows lie plainly in the file are handled
(8-bit palette, 24- and 32-bit colour); packed and run-length bitmaps are refused by name.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cpikan_hr.errors import UserError

_FILE_AND_INFO = struct.Struct("<2sIHHI IiiHHIIiiII")  # BITMAPFILEHEADER followed by BITMAPINFOHEADER


@dataclass(frozen=True)
class BmpHeader:
    """Where the pixels stand: byte `offset` of row 0 (the top one), `stride` bytes from a row to the row below."""

    shape: tuple[int, int]  # rows, columns
    bytes_per_pixel: int
    offset: int
    stride: int  # negative in the usual bottom-up file
    end: int  # the size the file must at least have
    palette: np.ndarray | None  # uint8 [256] or [256, 3]; None where the stored byte is the grey value


def row_bytes(width: int, bytes_per_pixel: int) -> int:
    """A row is padded to a multiple of four bytes."""
    return (width * bytes_per_pixel + 3) // 4 * 4


def header_bytes(shape: tuple[int, int, int]) -> bytes:
    """Header (and grey palette) of a bottom-up 8-bit grey ([H, W, 1]) or 24-bit colour ([H, W, 3]) bitmap."""
    height, width, channels = shape
    palette = b"".join(struct.pack("4B", g, g, g, 0) for g in range(256)) if channels == 1 else b""
    offset, pixels = _FILE_AND_INFO.size + len(palette), height * row_bytes(width, channels)
    colours = 256 if channels == 1 else 0
    fields = (b"BM", offset + pixels, 0, 0, offset, 40, width, height, 1, 8 * channels, 0, pixels, 0, 0, colours, 0)
    return _FILE_AND_INFO.pack(*fields) + palette


def read_header(path: Path) -> BmpHeader:
    """The layout of the bitmap `path`. UserError: broken header, compression or bit depth that cannot be windowed."""
    with open(path, "rb") as file:
        head = file.read(_FILE_AND_INFO.size)
        if len(head) < _FILE_AND_INFO.size:
            raise UserError(f"{path}: truncated: {len(head)} bytes are less than a BMP header; copy the file again")
        (_, _, _, _, offset, info, width, rows, _, bits, compression, _, _, _, colours, _) = _FILE_AND_INFO.unpack(head)
        if info < 40 or width <= 0 or rows == 0:
            raise UserError(f"{path}: not an image: its BMP header makes no sense; save it again")
        if bits not in (8, 24, 32):
            raise UserError(f"{path}: unsupported bit depth: {bits} bits per pixel BMP; save it with 8 or 24 bits")
        if compression not in (0, 3) or (compression == 3 and bits != 32):
            raise UserError(f"{path}: compressed BMP (type {compression}) cannot be read; save it uncompressed")
        palette = None
        if bits == 8:
            file.seek(14 + info)
            entries = np.frombuffer(file.read(4 * (colours or 256)), np.uint8)
            palette = _palette(entries[: entries.size // 4 * 4].reshape(-1, 4))
    size = row_bytes(width, bits // 8)
    end = offset + abs(rows) * size
    first, stride = (offset, size) if rows < 0 else (end - size, -size)
    return BmpHeader((abs(rows), width), bits // 8, first, stride, end, palette)


def _palette(entries: np.ndarray) -> np.ndarray | None:
    """Look-up table of a stored palette [n, 4] (blue, green, red, 0); None for the grey ramp, which needs none."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(entries)] = entries[:256, 2::-1]
    if not (np.ptp(table, axis=1) == 0).all():
        return table
    grey = table[:, 0]
    return None if (grey[: len(entries)] == np.arange(len(entries))).all() else grey
