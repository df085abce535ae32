"""Which pixels of a stack count, from a picture: grey 0 is invalid, anything else valid, where there are two values.

What is no plain mask is decided like this, and said in a line
* More than two grey values, and JPEG, whose values are approximate: those above half of the largest (of 255) are valid.
* Colours: any that is not black is valid. Alpha tells nothing: a fourth channel, or a second one, is not looked at.
* NaN is invalid. Infinite and negative numbers are refused, and a mask in which no pixel is valid.
"""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cpikan_hr.data.said import say_once
from cpikan_hr.data.source import Source, open_source
from cpikan_hr.errors import UserError

STRIP = 2**20  # pixels looked at together
_JPEG = b"\xff\xd8\xff"
_TINGE = 64  # levels by which the channels of a grey JPEG may differ


class _Seen(NamedTuple):
    """What a mask holds: its smallest and largest value above 0, whether there are zeros, NaN, colours."""

    low: float = np.inf
    high: float = 0.0
    zeros: bool = False
    nan: bool = False
    colours: bool = False


class Mask:
    """The mask in the file `path`, of frames or a picture of `shape`. It is looked at as a whole when it is first read.

    UserError: no picture of this size; later, values that are no mask, no pixel valid.
    """

    def __init__(self, path: Path, shape: tuple[int, int]):
        self._source = source = open_source(path)
        if source.shape[:2] != shape:
            raise UserError(
                f"{source.name}: a mask of {source.shape[0]} x {source.shape[1]} px for {shape[0]} x {shape[1]} px; "
                "give one of their size"
            )
        with path.open("rb") if path.is_file() else open("/dev/null", "rb") as file:
            self._lossy = file.read(3) == _JPEG
        self._limit: float | None = None
        self._lock = threading.Lock()

    def read(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        """Validity [y1 - y0, x1 - x0], bool."""
        with self._lock:
            if self._limit is None:
                self._limit = self._decided()
        return _levels(self._source, y0, y1, x0, x1)[0] > self._limit  # NaN is not

    def _decided(self) -> float:
        """The value above which a pixel is valid."""
        seen, name = self._look(), self._source.name
        if not seen.high:
            raise UserError(f"{name}: mask: no pixel is valid, all are 0; check the mask")
        top = float(np.iinfo(self._source.dtype).max) if self._source.dtype.kind == "u" else seen.high
        binary = seen.low == seen.high or (seen.colours and not self._lossy)
        limit = 0.0 if binary and not self._lossy else (top if self._lossy else seen.high) / 2
        if binary and not self._lossy and not (seen.zeros or seen.nan):
            self._say("all pixels are valid", "")
        if seen.nan:
            self._say("NaN counts as invalid", "; write 0 there")
        if seen.colours:
            self._say("it has colours", f"; {'what is not dark' if limit else 'any that is not black'} is valid")
        if limit:
            part = np.mean([(rows > limit).mean() for rows, _, _ in self._strips()])
            what = "JPEG, whose values are approximate" if self._lossy else "more than two values"
            self._say(what, f": those above {limit:g} are valid, {part:.3g} of the pixels; save it as PNG of 0 and 255")
            if not part:
                raise UserError(f"{name}: mask: no pixel is valid, none is above {limit:g}; check the mask")
        return limit

    def _look(self) -> _Seen:
        seen = _Seen()
        for rows, colour, y0 in self._strips():
            bad = np.isinf(rows) | (rows < 0)
            if bad.any():
                i, j = (int(v) for v in np.argwhere(bad)[0])
                raise UserError(
                    f"{self._source.name}: mask: pixel ({y0 + i}, {j}) is {rows[i, j]}; a mask is 0 where pixels do "
                    "not count, and 1 or 255 where they do"
                )
            positive = rows[rows > 0]
            seen = _Seen(
                min(seen.low, float(positive.min())) if positive.size else seen.low,
                max(seen.high, float(positive.max())) if positive.size else seen.high,
                seen.zeros or bool((rows == 0).any()),
                seen.nan or bool(np.isnan(rows).any()),
                seen.colours or colour > (_TINGE if self._lossy else 0),
            )
        return seen

    def _strips(self) -> Iterator[tuple[np.ndarray, float, int]]:
        """Values [h, W] and colour of strips, and the first row of each."""
        height, width = self._source.shape[:2]
        rows = max(1, STRIP // width)
        for y0 in range(0, height, rows):
            yield *_levels(self._source, y0, min(y0 + rows, height), 0, width), y0

    def _say(self, what: str, then: str) -> None:
        say_once(f"{self._source.name}: mask: {what}{then}")


def _levels(source: Source, *window: int) -> tuple[np.ndarray, float]:
    """The brightest colour channel [h, w] without alpha, and by how much the channels differ at most."""
    pixels = source.read(*window)
    if pixels.dtype.kind == "f":
        pixels = pixels.astype(np.float64, copy=False)
    colours = pixels[..., : {2: 1, 4: 3}.get(pixels.shape[2])]
    if colours.shape[2] == 1:
        return colours[..., 0], 0.0
    bright, dark = colours.max(axis=2), colours.min(axis=2)
    return bright, float(np.nan_to_num(bright - dark).max())
