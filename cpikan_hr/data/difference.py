"""How far one map is from another, in bounded memory."""

import math
from typing import NamedTuple

import numpy as np

from cpikan_hr.data.windows import Source

ROWS = 256  # compared at a time


class Difference(NamedTuple):
    """Over the pixels where both maps are finite: mean and root mean square of first - second (NaN: no such pixel)."""

    mean: float
    rms: float

    @property
    def deviation(self) -> float:
        """Root mean square without the mean."""
        return math.sqrt(max(self.rms**2 - self.mean**2, 0.0))


def difference(first: Source, second: Source) -> Difference:
    """Of two maps of one shape, strip by strip, in float64."""
    height, width = first.shape[:2]
    total, squares, count = 0.0, 0.0, 0
    for y in range(0, height, ROWS):
        window = (y, min(y + ROWS, height), 0, width)
        error = first.read(*window).astype(np.float64) - second.read(*window)
        error = error[np.isfinite(error)]
        total, squares, count = total + error.sum(), squares + np.square(error).sum(), count + error.size
    if not count:
        return Difference(math.nan, math.nan)
    return Difference(float(total / count), math.sqrt(squares / count))
