"""The Netpbm formats as a `Source`: PBM, PGM and PPM (binary and text) and PFM, with the values that stand in the file.

Invariant: levels up to a `maxval` below 255 are scaled to 0..255, as PNG scales fewer than 8 bits; a higher `maxval`
scales nothing, so that 12 bits stay 12 bits. Text is read once, piece by piece, into a temporary file.
"""

import os
import re
from pathlib import Path

import numpy as np

from cpikan_hr.data.windows import Converted, PackedRows, RawRows, Source
from cpikan_hr.errors import UserError
from cpikan_hr.files import temporary_file, writing_temporary

MAGIC = re.compile(rb"(P[1-6]|P[fF])[\s#]")
_FIELD = re.compile(rb"(?:\s|#[^\r\n]*[\r\n])*([^\s#]+)")
_PIECE = 2**22  # bytes of text read at a time


def open_pnm(path: Path) -> Source:
    """UserError: broken header, truncated, text that holds no numbers."""
    with open(path, "rb") as file:
        head = file.read(4096)
    magic, position, fields = head[:2], 2, []
    for _ in range(2 if magic in (b"P1", b"P4") else 3):
        found = _FIELD.match(head, position)
        try:
            fields.append(float(found[1]) if magic in (b"Pf", b"PF") else int(found[1]))
        except (TypeError, ValueError):
            raise UserError(f"{path}: broken {magic.decode()} header; save the picture again") from None
        position = found.end()
    width, height, top = (*fields, 1)[:3]
    shape, start, name = (int(height), int(width), 3 if magic in (b"P3", b"P6", b"PF") else 1), position + 1, str(path)
    if min(shape) < 1 or not top or (magic not in (b"Pf", b"PF") and not 0 < top < 65536):
        raise UserError(f"{path}: broken {magic.decode()} header; save the picture again")
    if magic == b"P4":
        return _black_is_one(PackedRows(os.open(path, os.O_RDONLY), name, shape[:2], 1, start, -(-shape[1] // 8)))
    if magic in (b"Pf", b"PF"):  # from the bottom up
        row = shape[1] * shape[2] * 4
        dtype = np.dtype("<f4" if top < 0 else ">f4")
        return RawRows(os.open(path, os.O_RDONLY), name, shape, dtype, start + (shape[0] - 1) * row, -row)
    dtype = np.dtype(np.uint8 if top < 256 else ">u2")
    if magic in (b"P5", b"P6"):
        row = shape[1] * shape[2] * dtype.itemsize
        stored: Source = RawRows(os.open(path, os.O_RDONLY), name, shape, dtype, start, row)
    else:
        stored = _read_text(name, shape, dtype, path, start, int(top), packed=magic == b"P1")
    if magic == b"P1":
        return _black_is_one(stored)
    if top >= 255:
        return stored
    scale = ((np.arange(256) * 510 + top) // (2 * top)).clip(0, 255).astype(np.uint8)
    return Converted(stored, shape[2], np.uint8, lambda values: scale[values])


def _black_is_one(bits: Source) -> Source:
    source = Converted(bits, 1, np.uint8, lambda stored: (1 - stored) * np.uint8(255))
    source.stored = np.dtype(bool)
    return source


def _read_text(name: str, shape: tuple[int, int, int], dtype, path: Path, start: int, top: int, packed: bool) -> Source:
    """The numbers up to `top` that a text file holds from byte `start` on; `packed`: digits need no space between."""
    left, row = shape[0] * shape[1] * shape[2], shape[1] * shape[2] * dtype.itemsize
    with open(path, "rb") as text, temporary_file(shape[0] * row, name) as file:
        text.seek(start)
        rest = b""
        while left and (piece := text.read(_PIECE)):
            words = (rest + piece).split()
            rest = words.pop() if words and len(piece) == _PIECE and not piece[-1:].isspace() else b""
            try:
                values = np.array([int(word) for word in (b"".join(words).decode() if packed else words)][:left])
            except ValueError:
                raise UserError(f"{path}: holds text that is no number; save the picture again") from None
            if values.size and not 0 <= values.min() <= values.max() <= top:
                raise UserError(f"{path}: holds a value that is not between 0 and {top}; save the picture again")
            with writing_temporary():
                file.write(values.astype(dtype).tobytes())
            left -= values.size
        if left:
            raise UserError(f"{path}: truncated: {left} values are missing; copy the file again")
        with writing_temporary():
            file.flush()
        return RawRows(os.dup(file.fileno()), name, shape, dtype, 0, row)
