"""A synthetic wafer: its true height and its brightness, as pure functions of (seed, size, pixel window).

Invariants
* A window holds exactly what the whole would hold there. Features are drawn per cell of the pixel grid, from a
  generator seeded with (seed, kind, cell), and no feature reaches further than one cell from its centre.
* Heights lie inside `HEIGHT_RANGE_UM`. Edges are sharp: everything is sampled at the pixel's centre, never blurred.
* Sizes of features are in pixels, so a larger wafer has more of them; bow and tilt always span the whole frame.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

HEIGHT_RANGE_UM = (-13.5, 13.5)

CELL = 256  # side of a cell, px
BOW_NM = 20_000.0  # from the centre to the corners
TILT_NM = 2_000.0  # largest total difference from side to side
DIE_OFFSET_NM = 300.0  # largest, either sign
LOCAL_NM = (-1_100.0, 2_100.0)  # limits of the sum of all local features
VIGNETTING = 0.4  # brightness lost in the corners
STREET_REFLECTIVITY = 0.5
_DIE = 100  # kind number of dies in the seeds; local features are numbered from 0

Window = tuple[int, int, int, int]  # y0, y1, x0, x1
Draw = Callable[[np.random.Generator, int], np.ndarray]


@dataclass(frozen=True)
class Feature:
    """A kind of local feature: `density` per cell on average, parameters beside the centre, and how it is painted."""

    density: float
    draw: Draw  # (generator, n) -> parameters [n, p]
    reach: int  # largest distance of a painted pixel from the centre, px
    height: Callable[..., np.ndarray]  # (dy [h, 1], dx [1, w], parameters) -> height in nm [h, w]
    in_die: bool = False  # dies have them, streets do not


def _signed(rng: np.random.Generator, low: float, high: float, n: int, positive: float) -> np.ndarray:
    return rng.uniform(low, high, n) * np.where(rng.random(n) < positive, 1.0, -1.0)


def _step(dy, dx, half_height, half_width, height):
    return np.float32(height) * ((np.abs(dy) < half_height) & (np.abs(dx) < half_width))


def _bump(dy, dx, radius, height):
    """A smooth hill (1 - r^2)^3: close to a Gaussian, but zero outside its radius."""
    inside = np.maximum(1 - (dy * dy + dx * dx) / radius**2, 0)
    return height * inside * inside * inside


def _scratch(dy, dx, half_length, half_width, angle, depth):
    """A straight groove with a parabolic section."""
    c, s = float(np.cos(angle)), float(np.sin(angle))
    along, across = dx * c + dy * s, dy * c - dx * s
    return np.where(np.abs(along) < half_length, -depth * np.maximum(1 - (across / half_width) ** 2, 0), np.float32(0))


def _particle(dy, dx, radius, height):
    """A small steep cap."""
    return height * np.maximum(1 - (dy * dy + dx * dx) / radius**2, 0)


FEATURES = (  # densities per cell of 256 x 256 px: 24 steps a cell are 366 per megapixel
    Feature(
        24.0,
        lambda rng, n: np.stack([rng.uniform(4, 48, n), rng.uniform(4, 48, n), _signed(rng, 20, 400, n, 0.6)], 1),
        48,
        _step,
        in_die=True,
    ),
    Feature(0.4, lambda rng, n: np.stack([rng.uniform(60, 240, n), _signed(rng, 200, 2000, n, 0.8)], 1), 240, _bump),
    Feature(
        0.6,
        lambda rng, n: np.stack(
            [rng.uniform(20, 110, n), rng.uniform(1, 2.5, n), rng.uniform(0, np.pi, n), rng.uniform(50, 300, n)], 1
        ),
        113,
        _scratch,
    ),
    Feature(2.0, lambda rng, n: np.stack([rng.uniform(1.5, 7, n), rng.uniform(150, 1000, n)], 1), 7, _particle),
)


class Wafer:
    """The scene of one wafer on an image of `shape` (H, W) pixels."""

    def __init__(self, shape: tuple[int, int], seed: int):
        self.shape, self.seed = shape, seed
        rng = np.random.default_rng([seed, _DIE + 1])
        self._pitch = rng.uniform(420, 640, 2)  # die size (rows, columns), street included, px
        self._street = float(rng.uniform(16, 30))
        self._origin = rng.uniform(0, 1, 2) * self._pitch
        angle = rng.uniform(0, 2 * np.pi)
        # The tilt's total range over the frame is |a| + |b|, whatever the direction.
        direction = np.array([np.sin(angle), np.cos(angle)])
        self._tilt = 0.5 * TILT_NM * direction / np.abs(direction).sum()
        self._features = lru_cache(maxsize=2048)(self._draw_cell)

    def height_nm(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        """True height at the pixel centres, float32 [y1 - y0, x1 - x0]."""
        window = (y0, y1, x0, x1)
        local = np.zeros((y1 - y0, x1 - x0), np.float32)
        in_die = self._in_die(window)
        for feature in (f for f in FEATURES if f.in_die):
            self._paint(local, feature, window)
        local *= in_die
        for feature in (f for f in FEATURES if not f.in_die):
            self._paint(local, feature, window)
        np.clip(local, *LOCAL_NM, out=local)
        offset, _ = self._dies(window)
        # Sum of squares and planes: the shape of the whole frame is a row plus a column.
        (v, ry), (u, rx) = self._normalised(y0, y1, 0), self._normalised(x0, x1, 1)
        centre = 0.5 * (BOW_NM + sum(LOCAL_NM))
        column = BOW_NM * ry + self._tilt[0] * v - centre
        row = BOW_NM * rx + self._tilt[1] * u
        local += column.astype(np.float32)[:, None] + row.astype(np.float32)
        local += offset * in_die
        return local

    def brightness(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        """Reflectivity x vignetting, float32 [y1 - y0, x1 - x0], between 0.3 and 1."""
        window = (y0, y1, x0, x1)
        _, reflectivity = self._dies(window)
        out = np.where(self._in_die(window), reflectivity, np.float32(STREET_REFLECTIVITY))
        ry, rx = self._normalised(y0, y1, 0)[1], self._normalised(x0, x1, 1)[1]
        out *= (1 - VIGNETTING * ry).astype(np.float32)[:, None] - (VIGNETTING * rx).astype(np.float32)
        return out

    def _normalised(self, start: int, stop: int, axis: int) -> tuple[np.ndarray, np.ndarray]:
        """Coordinate in [-1, 1] along `axis`, and its share of r^2, which is 1 in the corners of the frame."""
        half = self.shape[axis] / 2
        v = (np.arange(start, stop) + 0.5 - half) / half
        return v, (v * half) ** 2 / ((self.shape[0] / 2) ** 2 + (self.shape[1] / 2) ** 2)

    def _die_axis(self, start: int, stop: int, axis: int) -> tuple[np.ndarray, np.ndarray]:
        """Number of the die and whether the pixel is inside it (not in the street), per coordinate."""
        position = np.arange(start, stop) + 0.5 - self._origin[axis]
        number = np.floor(position / self._pitch[axis]).astype(int)
        return number, position - number * self._pitch[axis] >= self._street

    def _in_die(self, window: Window) -> np.ndarray:
        return self._die_axis(*window[:2], 0)[1][:, None] & self._die_axis(*window[2:], 1)[1]

    def _dies(self, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """Height offset and reflectivity of the die of every pixel, float32 [h, w]."""
        iy, ix = self._die_axis(*window[:2], 0)[0], self._die_axis(*window[2:], 1)[0]
        table = np.empty((iy[-1] - iy[0] + 1, ix[-1] - ix[0] + 1, 2), np.float32)
        for j, k in np.ndindex(table.shape[:2]):
            rng = np.random.default_rng([self.seed, _DIE, iy[0] + j + 1, ix[0] + k + 1])  # dies are numbered from -1
            table[j, k] = rng.uniform(-DIE_OFFSET_NM, DIE_OFFSET_NM), rng.uniform(0.5, 1.0)
        at_pixel = table[iy - iy[0]][:, ix - ix[0]]
        return np.ascontiguousarray(at_pixel[..., 0]), np.ascontiguousarray(at_pixel[..., 1])

    def _draw_cell(self, kind: int, cell_y: int, cell_x: int) -> np.ndarray:
        """Features of one cell: centre row, centre column, parameters; [n, 2 + p]."""
        rng = np.random.default_rng([self.seed, kind, cell_y + 1, cell_x + 1])  # cells are numbered from -1
        n = rng.poisson(FEATURES[kind].density)
        centre = (rng.uniform(0, 1, (n, 2)) + [cell_y, cell_x]) * CELL
        return np.concatenate([centre, FEATURES[kind].draw(rng, n)], axis=1)

    def _near(self, feature: Feature, window: Window) -> Iterator[np.ndarray]:
        """Features whose reach touches the window, always in the order of the cells (so that sums round alike)."""
        y0, y1, x0, x1 = window
        reach = feature.reach
        kind = FEATURES.index(feature)
        for cell_y in range((y0 - reach) // CELL, (y1 + reach) // CELL + 1):
            for cell_x in range((x0 - reach) // CELL, (x1 + reach) // CELL + 1):
                if cell_y >= -1 and cell_x >= -1:
                    found = self._features(kind, cell_y, cell_x)
                    cy, cx = found[:, 0], found[:, 1]
                    near = (cy > y0 - reach) & (cy < y1 + reach) & (cx > x0 - reach) & (cx < x1 + reach)
                    yield from found[near]

    def _paint(self, canvas: np.ndarray, feature: Feature, window: Window) -> None:
        y0, y1, x0, x1 = window
        for cy, cx, *parameters in self._near(feature, window):
            # Extent of this one: its largest size parameter, which stands first (steps: the first two).
            extent = max(parameters[:2]) if feature.in_die else parameters[0] + 3
            top, bottom = max(y0, int(cy - extent)), min(y1, int(cy + extent) + 2)
            left, right = max(x0, int(cx - extent)), min(x1, int(cx + extent) + 2)
            if top < bottom and left < right:
                dy = (np.arange(top, bottom) + 0.5 - cy).astype(np.float32)[:, None]
                dx = (np.arange(left, right) + 0.5 - cx).astype(np.float32)
                values = [float(p) for p in parameters]
                canvas[top - y0 : bottom - y0, left - x0 : right - x0] += feature.height(dy, dx, *values)
