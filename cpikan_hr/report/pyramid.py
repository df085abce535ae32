"""A layer of any size as tiles on several levels, each half as fine as the one before, emitted while rows come in.

Invariants
* Memory depends on the width: one row of tiles per level.
* A level's pixel is the mean of the finite pixels of the level before that it covers; NaN where there is none.
* Tiles are text that means nothing to HTML: base64 in inert script elements `LAYER-LEVEL-ROW-COLUMN`.
"""

import base64
import io
import zlib
from collections.abc import Callable

import numpy as np
from PIL import Image

TILE = 256
LEVELS = 65533  # steps of a map's tile; code 0 says that there is no value
QUALITY = 90  # of WebP


def shrink(rows: np.ndarray, step: int) -> np.ndarray:
    """Means over step x step pixels of [h, w, C], NaN left out: float32 [ceil(h / step), ceil(w / step), C]."""
    h, w, channels = rows.shape
    down, across = -(-h // step), -(-w // step)
    padded = np.full((down * step, across * step, channels), np.nan, np.float32)
    padded[:h, :w] = rows
    blocks = padded.reshape(down, step, across, step, channels)
    known = np.isfinite(blocks)
    count = known.sum(axis=(1, 3))
    total = np.where(known, blocks, 0).sum(axis=(1, 3), dtype=np.float64)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)


class MapTiles:
    """Codes of 16 bits: value = low + (code - 1) * step, code 0 without a value; off by at most step / 2.

    Second differences, so that smooth surfaces are nearly zero; low bytes, then high bytes; deflate.
    `step`: the coarsest that may be used, in the layer's unit; a tile with a range of more than 65533 takes its own.
    """

    def __init__(self, step: float):
        self.step = step

    def __call__(self, tile: np.ndarray) -> tuple[dict, bytes]:
        values = tile[..., 0].astype(np.float64)
        known = np.isfinite(values)
        low, high = (values[known].min(), values[known].max()) if known.any() else (0.0, 0.0)
        step = max(self.step, (high - low) / LEVELS, 1e-30)
        codes = np.where(known, 1 + np.rint((np.where(known, values, low) - low) / step), 0).astype(np.uint16)
        difference = np.diff(np.diff(codes, axis=0, prepend=np.uint16(0)), axis=1, prepend=np.uint16(0))
        signed = difference.view(np.int16)
        folded = ((signed << 1) ^ (signed >> 15)).view(np.uint16)  # 0, -1, 1, -2 ... to 0, 1, 2, 3 ...
        planes = (folded & 255).astype(np.uint8).tobytes() + (folded >> 8).astype(np.uint8).tobytes()
        return {"low": float(low), "step": float(step)}, zlib.compress(planes, 6)


class PictureTiles:
    """WebP of 8 bits per colour, for pictures of the range 0 to `full`."""

    def __init__(self, full: float):
        self.full = full

    def __call__(self, tile: np.ndarray) -> tuple[dict, bytes]:
        grey = np.clip(np.rint(np.nan_to_num(tile) * (255 / self.full)), 0, 255).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(np.broadcast_to(grey, (*grey.shape[:2], 3))).save(file, "WEBP", quality=QUALITY, method=2)
        return {}, file.getvalue()


class Pyramid:
    """Takes rows [h, W, C] from top to bottom and gives every finished tile to `emit(text)`."""

    def __init__(self, name: str, shape: tuple[int, int], encode: Callable, emit: Callable[[str], object]):
        self.name, self.encode, self.emit = name, encode, emit
        self.sizes = [tuple(shape)]
        while max(self.sizes[-1]) > TILE:
            self.sizes.append(tuple(-(-n // 2) for n in self.sizes[-1]))
        self._waiting: list[list[np.ndarray]] = [[] for _ in self.sizes]
        self._row = [0] * len(self.sizes)

    def add(self, rows: np.ndarray, level: int = 0) -> None:
        """The next rows of a level."""
        waiting = self._waiting[level]
        waiting.append(rows)
        while sum(map(len, waiting)) >= TILE:
            whole = np.concatenate(waiting)
            waiting[:] = [whole[TILE:]]
            self._tile_row(level, whole[:TILE])

    def finish(self) -> list[tuple[int, int]]:
        """Emits what is left; the sizes [h, w] of the levels."""
        for level, waiting in enumerate(self._waiting):
            rest = np.concatenate(waiting) if waiting else []
            waiting.clear()
            if len(rest):
                self._tile_row(level, rest)
        return self.sizes

    def _tile_row(self, level: int, rows: np.ndarray) -> None:
        row = self._row[level]
        self._row[level] += 1
        for column, x in enumerate(range(0, rows.shape[1], TILE)):
            about, data = self.encode(rows[:, x : x + TILE])
            attributes = "".join(f' data-{key}="{value!r}"' for key, value in about.items())
            place = f"{self.name}-{level}-{row}-{column}"
            text = base64.b64encode(data).decode()
            self.emit(f'<script type="text/plain" id="{place}"{attributes}>{text}</script>\n')
        if level + 1 < len(self.sizes):
            self.add(shrink(rows, 2), level + 1)
