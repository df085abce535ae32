"""Glints: small spots that send the camera more light than a perfect mirror would, so that some of their frames clip.

Invariants
* A pure function of (seed, pixel window): spots are drawn per cell of the pixel grid, and none reaches further than one
  cell from its centre.
* Where spots overlap the brighter one is seen.
"""

from dataclasses import dataclass

import numpy as np

from cpikan_hr.data.scene import CELL

DIAMETER = (2.0, 12.0)  # px
BRIGHTNESS = (1.3, 2.5)  # of a perfect mirror
MOST = 0.5  # largest part of the pixels that may be glints
_GLINT = 300  # kind number of glints in the seeds
_MEAN_AREA = np.pi / 12 * (DIAMETER[1] ** 3 - DIAMETER[0] ** 3) / (DIAMETER[1] - DIAMETER[0])  # px^2, diameters uniform


@dataclass(frozen=True)
class Glints:
    """Spots that cover `fraction` of the pixels on average."""

    fraction: float
    seed: int

    def add(self, brightness: np.ndarray, y0: int, x0: int) -> None:
        """Raises `brightness` [h, w] of the window that begins at (y0, x0), in place, to that of the spots in it."""
        h, w = brightness.shape
        reach = DIAMETER[1] / 2
        for cell_y in range(int(y0 - reach) // CELL, int(y0 + h + reach) // CELL + 1):
            for cell_x in range(int(x0 - reach) // CELL, int(x0 + w + reach) // CELL + 1):
                for cy, cx, radius, bright in self._spots(cell_y, cell_x) if min(cell_y, cell_x) >= -1 else ():
                    top, bottom = max(y0, int(cy - radius)), min(y0 + h, int(cy + radius) + 1)
                    left, right = max(x0, int(cx - radius)), min(x0 + w, int(cx + radius) + 1)
                    if top < bottom and left < right:
                        dy, dx = np.arange(top, bottom)[:, None] + 0.5 - cy, np.arange(left, right) + 0.5 - cx
                        part = brightness[top - y0 : bottom - y0, left - x0 : right - x0]
                        np.maximum(part, np.float32(bright), out=part, where=dy * dy + dx * dx < radius * radius)

    def _spots(self, cell_y: int, cell_x: int) -> np.ndarray:
        """Centre row, centre column, radius and brightness of the spots of one cell, [n, 4]."""
        rng = np.random.default_rng([self.seed, _GLINT, cell_y + 1, cell_x + 1])  # cells are numbered from -1
        # Spots that fall independently leave exp(-number * area) of the surface free.
        mean = -np.log1p(-self.fraction) * CELL**2 / _MEAN_AREA
        n = int(mean + rng.random())
        centre = (rng.random((n, 2)) + [cell_y, cell_x]) * CELL
        return np.column_stack([centre, rng.uniform(*DIAMETER, n) / 2, rng.uniform(*BRIGHTNESS, n)])
