"""A target that is reckoned once, because a start passes over it many times.

Invariant: the numbers are those of the target itself, whatever is asked for.
"""

from collections.abc import Callable

import numpy as np
import torch

from cpikan_hr.data.once import Once
from cpikan_hr.parallel import at_once
from cpikan_hr.problems.base import Target

CELL = 512, 1024  # rows and columns that are reckoned together: rows are read one by one, and had better be long


class SpooledTarget:
    """Called like `target`, of a frame [H, W] with one value and its noise per pixel, known or not; 8 bytes a pixel.

    `device`: where the target computes.
    """

    def __init__(self, target: Callable[..., Target], shape: tuple[int, int], device: torch.device | str = "cpu"):
        self._target = target
        cell = CELL[0], min(shape[1], at_once(CELL[1], device))
        self._kept = Once("decoded heights", self._reckoned, (*shape, 2), cell)

    def __call__(self, y0: int, y1: int, x0: int, x1: int, stride: int = 1) -> Target:
        if stride > 1 and not self._kept.knows(y0, y1, x0, x1):  # a few pixels of a window are not worth all of them
            return self._target(y0, y1, x0, x1, stride)
        values, noise = np.moveaxis(self._kept.read(y0, y1, x0, x1)[::stride, ::stride], 2, 0)
        known = np.isfinite(noise)
        return Target(values[..., None].copy(), known.astype(np.float32), np.where(known, noise, np.float32(0)))

    def _reckoned(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        """Values, and noise that is NaN where a pixel does not count: [h, w, 2]."""
        found = self._target(y0, y1, x0, x1)
        return np.stack([found.values[..., 0], np.where(found.weight > 0, found.noise, np.float32(np.nan))], axis=2)
