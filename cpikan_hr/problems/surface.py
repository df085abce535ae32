"""Form and texture of a height map: pv, sq, sa, bow and warp, strip by strip. numpy only.

Definitions
* sa, sq: arithmetical mean and root mean square of the heights that are left by the removal (ISO 25178-2, there over
  the scale-limited surface; here nothing is filtered, so noise and form beyond the removal count). pv: highest minus
  lowest of them.
* removal: `none` takes the mean only, `plane` the least-squares plane (piston and tilt), `bow` the least-squares
  surface of second order (all six terms up to squares).
* warp: range (highest minus lowest) of the deviations from the least-squares plane, as in SEMI MF1390.
* bow: deviation of the centre from the same plane, positive where the centre is above it. SEMI MF1390 takes it from the
  least-squares plane too; SEMI MF534 (ASTM F534) from a plane through three points near the wafer's edge, which a frame
  need not show. The centre is that of the bounding box of the valid pixels.

Both standards speak of the median surface of a free wafer, midway between its two sides. A height map is one side, as
the wafer was held: half the thickness variation and the chuck's or gravity's part are in these numbers.
"""

from collections.abc import Callable, Iterable

import numpy as np

REMOVALS = {"none": 1, "plane": 3, "bow": 6}  # how many of the terms below
TERMS = ((0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2))  # powers of y and x

Strips = Callable[[], Iterable[tuple[int, np.ndarray]]]


def surface_figures(strips: Strips, shape: tuple[int, int], remove: str = "plane") -> dict[str, float | None]:
    """pv, sq, sa, bow and warp in the unit of the heights.

    `strips()` gives (first row, heights [h, W], NaN where not valid) over the map of `shape` and is gone through twice.
    bow is None where the centre is not valid, every figure where no pixel is.
    """
    moments = Moments(shape)
    for y0, heights in strips():
        moments.add(y0, heights)
    if not moments.count:
        return dict.fromkeys(("pv", "sq", "sa", "bow", "warp"))
    plane, form = moments.fit(REMOVALS["plane"]), moments.fit(REMOVALS[remove])
    rows, columns = moments.centre()
    tilted, left, sums, middle = Range(), Range(), np.zeros(2), []
    for y0, heights in strips():
        flat = heights - moments.surface(plane, y0, len(heights))
        rest = flat if remove == "plane" else heights - moments.surface(form, y0, len(heights))
        tilted.add(flat)
        left.add(rest)
        sums += np.nansum(np.abs(rest)), np.nansum(np.square(rest))
        middle += [flat[y - y0, columns] for y in rows if y0 <= y < y0 + len(heights)]
    bow = float(np.mean(middle))
    return {
        "pv": left.width,
        "sq": float(np.sqrt(sums[1] / moments.count)),
        "sa": float(sums[0] / moments.count),
        "bow": bow if np.isfinite(bow) else None,
        "warp": tilted.width,
    }


class Range:
    """Lowest and highest of the finite values seen."""

    def __init__(self):
        self.low, self.high = np.inf, -np.inf

    def add(self, values: np.ndarray) -> None:
        self.low = min(self.low, float(np.fmin.reduce(values, axis=None, initial=np.inf)))
        self.high = max(self.high, float(np.fmax.reduce(values, axis=None, initial=-np.inf)))

    @property
    def width(self) -> float:
        return self.high - self.low


class Moments:
    """Normal equations of the second-order surface over the valid pixels, in float64.

    The terms are products of powers, so a row's part of them needs five sums over x and three with the heights.
    """

    def __init__(self, shape: tuple[int, int]):
        self.half = max(shape) / 2  # coordinates in [-1, 1], which keeps the equations well conditioned
        self.shape = shape
        self.x = self._powers(np.arange(shape[1]), shape[1], 5)
        self.gram, self.right = np.zeros((6, 6)), np.zeros(6)
        self.count = 0
        self.rows_seen, self.columns_seen = np.zeros(shape[0], bool), np.zeros(shape[1], bool)

    def _powers(self, index: np.ndarray, length: int, count: int) -> np.ndarray:
        """[n, count]: 1, t, t^2, ... at the centres of pixels."""
        return ((index + 0.5 - length / 2) / self.half)[:, None] ** np.arange(count)

    def add(self, y0: int, heights: np.ndarray) -> None:
        """Heights [h, W] of the rows from y0 on, NaN where not valid."""
        valid = np.isfinite(heights)
        y = self._powers(np.arange(y0, y0 + len(heights)), self.shape[0], 5)
        weights = y.T @ (valid.astype(np.float64) @ self.x)  # [5, 5]: sum of y^a x^b
        heights = np.where(valid, heights, 0.0).astype(np.float64)
        moments = y[:, :3].T @ (heights @ self.x[:, :3])  # [3, 3]: sum of y^a x^b z
        for i, (a, b) in enumerate(TERMS):
            self.right[i] += moments[a, b]
            self.gram[i] += [weights[a + c, b + d] for c, d in TERMS]
        self.count += int(valid.sum())
        self.rows_seen[y0 : y0 + len(heights)] |= valid.any(axis=1)
        self.columns_seen |= valid.any(axis=0)

    def fit(self, terms: int) -> np.ndarray:
        """Coefficients [3, 3] of y^a x^b; of several least-squares solutions the smallest."""
        solution = np.linalg.lstsq(self.gram[:terms, :terms], self.right[:terms], rcond=1e-13)[0]
        coefficients = np.zeros((3, 3))
        for (a, b), value in zip(TERMS, solution, strict=False):
            coefficients[a, b] = value
        return coefficients

    def surface(self, coefficients: np.ndarray, y0: int, rows: int) -> np.ndarray:
        """The fitted surface [rows, W]."""
        return self._powers(np.arange(y0, y0 + rows), self.shape[0], 3) @ coefficients @ self.x[:, :3].T

    def centre(self) -> tuple[list[int], list[int]]:
        """Rows and columns of the pixels that touch the centre: one, or two where it lies between pixels."""
        return tuple(
            sorted({(seen[0] + seen[-1]) // 2, (seen[0] + seen[-1] + 1) // 2})
            for seen in (np.flatnonzero(self.rows_seen).tolist(), np.flatnonzero(self.columns_seen).tolist())
        )
