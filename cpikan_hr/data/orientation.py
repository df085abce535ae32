"""Turned and mirrored views of a source or a stack: windows are mapped, pixels are moved only once they are read."""

from dataclasses import dataclass

import numpy as np

UPRIGHT = {  # orientation tag (EXIF and TIFF) -> the turn and the mirror image that it asks for
    1: (0, "none"), 2: (0, "columns"), 3: (180, "none"), 4: (0, "rows"),
    5: (90, "rows"), 6: (270, "none"), 7: (90, "columns"), 8: (90, "none"),
}  # fmt: skip


@dataclass(frozen=True)
class Orientation:
    """A counter-clockwise turn by `rotate` degrees, then a mirror image: `flip` is none, rows or columns."""

    shape: tuple[int, int]  # of the pixels as they are stored
    rotate: int = 0
    flip: str = "none"

    @property
    def turned(self) -> tuple[int, int]:
        """Height and width as seen."""
        return self.shape[::-1] if self.rotate in (90, 270) else self.shape

    def stored_window(self, y0: int, y1: int, x0: int, x1: int) -> tuple[int, int, int, int]:
        """The window of stored pixels that holds a window as seen."""
        height, width = self.turned
        if self.flip == "rows":
            y0, y1 = height - y1, height - y0
        elif self.flip == "columns":
            x0, x1 = width - x1, width - x0
        stored_height, stored_width = self.shape
        if self.rotate == 90:  # seen (y, x) = stored (x, W - 1 - y)
            return x0, x1, stored_width - y1, stored_width - y0
        if self.rotate == 180:
            return stored_height - y1, stored_height - y0, stored_width - x1, stored_width - x0
        if self.rotate == 270:  # seen (y, x) = stored (H - 1 - x, y)
            return stored_height - x1, stored_height - x0, y0, y1
        return y0, y1, x0, x1

    def apply(self, pixels: np.ndarray, axes: tuple[int, int]) -> np.ndarray:
        """Turns and mirrors an array whose rows and columns are `axes`."""
        pixels = np.rot90(pixels, self.rotate // 90, axes=axes)
        if self.flip != "none":
            pixels = np.flip(pixels, axes[0] if self.flip == "rows" else axes[1])
        return pixels


class Oriented:
    """A `Source` seen turned and mirrored."""

    def __init__(self, source, rotate: int = 0, flip: str = "none"):
        self.source = source
        self.orientation = Orientation(tuple(source.shape[:2]), rotate, flip)
        self.shape = (*self.orientation.turned, source.shape[2])
        self.dtype = np.dtype(source.dtype)
        self.name = source.name

    def __getattr__(self, name: str):
        """What the file says of its values: `stored`, `nodata`, `range`."""
        return getattr(self.source, name)

    def read(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        stored = self.source.read(*self.orientation.stored_window(y0, y1, x0, x1))
        return self.orientation.apply(stored, (0, 1))


class OrientedStack:
    """A `Stack` seen turned and mirrored; everything but the pixels is the stack's own."""

    def __init__(self, stack, rotate: int = 0, flip: str = "none"):
        self.stack = stack
        self.orientation = Orientation(tuple(stack.shape), rotate, flip)
        self.shape = self.orientation.turned

    def __getattr__(self, name: str):
        return getattr(self.stack, name)

    def read(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        stored = self.stack.read(*self.orientation.stored_window(y0, y1, x0, x1))
        return self.orientation.apply(stored, (2, 3))

    def mask(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        stored = self.stack.mask(*self.orientation.stored_window(y0, y1, x0, x1))
        return self.orientation.apply(stored, (0, 1))

    def carrier(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray | None:
        stored = self.stack.carrier(*self.orientation.stored_window(y0, y1, x0, x1))
        return None if stored is None else self.orientation.apply(stored, (0, 1))
