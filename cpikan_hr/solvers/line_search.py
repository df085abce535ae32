"""A step length along a descent direction, for losses down to rounding error.

Accepted is what fulfils the strong Wolfe conditions (Nocedal and Wright 2006, eq. 3.7) or, since a difference of two
losses near a minimum is all rounding, the approximate Wolfe conditions, which look at slopes and need of the loss only
that it has not grown (Hager and Zhang 2005, "A new conjugate gradient method with guaranteed descent", eqs. 4.1-4.3).
The bracket follows their rules U1-U3, with the minimum of the cubic through both ends as the next trial.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from cpikan_hr.solvers.objective import Objective

DECREASE = 1e-4  # of the loss, over what the slope promises
CURVATURE = 0.9  # slope at the end over that at the start
APPROXIMATE = 0.1  # delta of the approximate Wolfe conditions
NOISE = 1e-6  # of the loss: growth that may be rounding
TRIALS = 40
GROWTH = 10.0  # of a step that is too short, at most


@dataclass(frozen=True)
class Point:
    """A point on the line."""

    length: float
    loss: float
    slope: float
    theta: Tensor
    gradient: Tensor

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.slope)


def search(
    objective: Objective,
    theta: Tensor,
    loss: float,
    gradient: Tensor,
    direction: Tensor,
    first: float = 1.0,
    curvature: float = CURVATURE,
) -> Point | None:
    """An acceptable point on theta + length direction; None where there is none within `TRIALS` evaluations.

    first: the length tried first. curvature: less than `CURVATURE` asks for a more exact minimum on the line. A loss
    or gradient that is not finite tells that the step is too long.
    """
    start = Point(0.0, loss, float(gradient @ direction), theta, gradient)
    if not start.slope < 0:
        return None
    low, high, length = start, None, first
    for _ in range(TRIALS):
        trial_theta = theta + length * direction
        value, slopes = objective.gradient(trial_theta)
        trial = Point(length, value, float(slopes @ direction), trial_theta, slopes)
        if trial.finite and _accepted(start, trial, curvature):
            return trial
        if not trial.finite or trial.slope >= 0 or trial.loss > start.loss + NOISE * abs(start.loss):
            high = trial
        else:
            low = trial
        length = _longer(start, low) if high is None else _between(low, high)
        if not low.length < length < (math.inf if high is None else high.length):
            return None  # the bracket is as small as numbers are
    return None


def _accepted(start: Point, trial: Point, curvature: float) -> bool:
    if abs(trial.slope) > curvature * abs(start.slope):
        return False
    if trial.loss <= start.loss + DECREASE * trial.length * start.slope:
        return True
    return trial.slope <= (2 * APPROXIMATE - 1) * start.slope and trial.loss <= start.loss + NOISE * abs(start.loss)


def _longer(start: Point, low: Point) -> float:
    """Where the slope would be zero if it went on as it does, at least a little further and `GROWTH` times at most."""
    if low.slope <= start.slope:
        return GROWTH * low.length
    return min(max(start.slope / (start.slope - low.slope), 1.1), GROWTH) * low.length


def _between(low: Point, high: Point) -> float:
    """The minimum of the cubic through both ends, kept off them; of the slopes alone where losses are all rounding."""
    width = high.length - low.length
    if not high.finite:
        return low.length + 0.1 * width
    share = 0.5
    if high.slope > 0 and abs(high.loss - low.loss) <= NOISE * abs(low.loss):
        share = low.slope / (low.slope - high.slope)
    else:
        d1 = low.slope + high.slope - 3 * (high.loss - low.loss) / width
        root = d1 * d1 - low.slope * high.slope
        if root >= 0:
            d2 = math.sqrt(root)
            below = high.slope - low.slope + 2 * d2
            share = 1 - (high.slope + d2 - d1) / below if below > 0 else share
    return low.length + min(max(share, 0.05), 0.95) * width
