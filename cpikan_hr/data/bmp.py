"""The header of a Windows bitmap, read and written, so that its pixels can be reached a window at a time.

Invariant: what `header_bytes` writes, `read_header` reads. Rows that lie plainly in the file are handled: 1, 4 and 8
bits with a palette, 16, 24 and 32 with the masks that the header names. Run lengths are left to Pillow, the rest is
refused.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cpikan_hr.errors import UserError

_FILE_AND_INFO = struct.Struct("<2sIHHI IiiHHIIiiII")  # BITMAPFILEHEADER followed by BITMAPINFOHEADER
_CORE = struct.Struct("<2sIHHI IHHHH")  # the same of OS/2
_PLAIN, _RLE8, _RLE4, _MASKS, _ALPHA_MASKS = 0, 1, 2, 3, 6  # compressions
_USUAL = {16: (0x7C00, 0x3E0, 0x1F), 32: (0xFF0000, 0xFF00, 0xFF)}  # masks of red, green and blue where none are named


@dataclass(frozen=True)
class BmpHeader:
    """Where the pixels stand: byte `offset` of row 0 (the top one), `stride` bytes from a row to the row below."""

    shape: tuple[int, int]  # rows, columns
    bits: int  # per pixel
    offset: int
    stride: int  # negative in the usual bottom-up file
    runs: bool  # run lengths: the rows do not lie plainly in the file
    palette: np.ndarray | None  # uint8 [256] or [256, 3]; None where the stored byte is the grey value
    masks: tuple[int, int, int] | None  # of red, green and blue, in words of 16 or 32 bits

    @property
    def channels(self) -> int:
        return 3 if self.bits > 8 or (self.palette is not None and self.palette.ndim == 2) else 1

    def pixels(self) -> Callable[[np.ndarray], np.ndarray] | None:
        """What makes stored words [h, w, 1] (bytes [h, w, 3] of 24 bits) pixels uint8 [h, w, C]; None: they are."""
        if self.bits == 24:
            return lambda stored: np.ascontiguousarray(stored[..., ::-1])  # blue, green, red
        if self.masks:
            return lambda stored: np.concatenate([_scaled(stored, mask) for mask in self.masks], axis=-1)
        palette = self.palette
        return None if palette is None else lambda stored: palette[stored[..., 0]].reshape(*stored.shape[:2], -1)


def _scaled(words: np.ndarray, mask: int) -> np.ndarray:
    """The bits under `mask`, scaled to 0..255."""
    low = mask & -mask
    top = mask // low
    values = (words & mask) // low
    return (values if top == 255 else (values.astype(np.uint32) * 510 + top) // (2 * top)).astype(np.uint8)


def row_bytes(width: int, bits: int) -> int:
    """A row is padded to a multiple of four bytes."""
    return (width * bits + 31) // 32 * 4


def header_bytes(shape: tuple[int, int, int]) -> bytes:
    """Header (and grey palette) of a bottom-up 8-bit grey ([H, W, 1]) or 24-bit colour ([H, W, 3]) bitmap."""
    height, width, channels = shape
    palette = b"".join(struct.pack("4B", g, g, g, 0) for g in range(256)) if channels == 1 else b""
    offset, pixels = _FILE_AND_INFO.size + len(palette), height * row_bytes(width, 8 * channels)
    colours = 256 if channels == 1 else 0
    fields = (b"BM", offset + pixels, 0, 0, offset, 40, width, height, 1, 8 * channels, 0, pixels, 0, 0, colours, 0)
    return _FILE_AND_INFO.pack(*fields) + palette


def read_header(path: Path) -> BmpHeader:
    """The layout of the bitmap `path`. UserError: broken header, compression or bit depth that cannot be read."""
    with open(path, "rb") as file:
        head = file.read(_FILE_AND_INFO.size)
        if len(head) < _FILE_AND_INFO.size:
            raise UserError(f"{path}: truncated: {len(head)} bytes are less than a BMP header; copy the file again")
        (_, _, _, _, offset, info, width, rows, _, bits, compression, _, _, _, colours, _) = _FILE_AND_INFO.unpack(head)
        if info == 12:
            (_, _, _, _, offset, _, width, rows, _, bits), compression, colours = _CORE.unpack(head[:26]), _PLAIN, 0
        elif info < 40:
            width = 0
        if width <= 0 or rows == 0:
            raise UserError(f"{path}: not an image: its BMP header makes no sense; save it again")
        if bits not in (1, 4, 8, 16, 24, 32):
            raise UserError(f"{path}: unsupported bit depth: {bits} bits per pixel BMP; save it with 8 or 24 bits")
        runs = (compression, bits) in ((_RLE8, 8), (_RLE4, 4))
        masked = compression in (_MASKS, _ALPHA_MASKS) and bits in (16, 32) and info != 64  # OS/2 2: a Huffman code
        if not (runs or masked or compression == _PLAIN):
            raise UserError(f"{path}: compressed BMP (type {compression}) cannot be read; save it uncompressed")
        masks = _masks(path, file.read(12), bits) if masked else _USUAL.get(bits)
        palette = None
        if bits <= 8:
            file.seek(14 + info)
            entry = 3 if info == 12 else 4
            entries = np.frombuffer(file.read(entry * min(colours or 256, 2**bits)), np.uint8)
            palette = _palette(entries[: entries.size // entry * entry].reshape(-1, entry))
    size = row_bytes(width, bits)
    first, stride = (offset, size) if rows < 0 else (offset + (rows - 1) * size, -size)
    return BmpHeader((abs(rows), width), bits, first, stride, runs, palette, masks)


def _masks(path: Path, stored: bytes, bits: int) -> tuple[int, int, int]:
    """The masks behind the header's first 40 bytes. UserError: absurd ones, or colours of more than 8 bits."""
    masks = np.frombuffer(stored.ljust(12, b"\0"), "<u4").tolist()
    if not any(masks):
        return _USUAL[bits]
    whole = all(m and m < 2**bits and not (m // (m & -m)) & (m // (m & -m) + 1) for m in masks)
    if not whole or masks[0] & masks[1] or masks[0] & masks[2] or masks[1] & masks[2]:
        raise UserError(f"{path}: the colour masks of its BMP header make no sense; save it with 24 bits")
    if any(m // (m & -m) > 255 for m in masks):
        raise UserError(f"{path}: BMP with colours of more than 8 bits would be cut; save it as TIFF or PNG")
    return tuple(masks)


def _palette(entries: np.ndarray) -> np.ndarray | None:
    """Look-up table of a stored palette [n, 4] (blue, green, red, 0); None for the grey ramp, which needs none."""
    table = np.zeros((256, 3), np.uint8)
    table[: len(entries)] = entries[:256, 2::-1]
    if not (np.ptp(table, axis=1) == 0).all():
        return table
    grey = table[:, 0]
    return None if (grey[: len(entries)] == np.arange(len(entries))).all() else grey
