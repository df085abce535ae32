"""Frames in the order that the stack says, and a height range that its wavelengths can tell apart, or a refusal."""

from collections.abc import Iterator, Sequence
from itertools import combinations, permutations

import numpy as np

from cpikan_hr.data.stack import Stack
from cpikan_hr.errors import UserError
from cpikan_hr.problems.agreement import degrees
from cpikan_hr.problems.sample import Sample
from cpikan_hr.problems.steps import Shared, misfit

TRIED = 2000  # pixels on which other orders are tried
SUSPICIOUS = 0.1  # misfit over the modulation from which on other orders are tried
EXPLAINED, PLAUSIBLE = 0.6, 0.4  # of that misfit, and misfit: what another order must reach to be named
AS_GOOD, NAMED = 1.1, 3  # times the best misfit: orders up to there are named too, so many in all
SAME_PHASE = 0.005  # cycles: phases closer than this are not told apart
ALL_PERMUTATIONS = 5  # steps per wavelength, and wavelengths, up to which all their orders are tried
EXCHANGED = 16  # frames up to which any two are exchanged


def check_order(stack: Stack, sample: Sample, height_range_um: tuple[float, float], shared: Shared) -> None:
    """UserError where the sample fits badly as it stands, and clearly better in another order of its frames."""
    if not stack.present.all():
        return
    few = sample.fewer(TRIED)
    found = misfit(few, stack.wavelengths_um, height_range_um, shared).ratio
    if found < SUSPICIOUS:
        return
    flat, tried = few.frames.reshape(-1, few.frames.shape[-1]), []
    for name, order in _orders(*few.frames.shape[:2]):
        other = few._replace(frames=flat[order])
        tried.append((misfit(other, stack.wavelengths_um, height_range_um, shared).ratio, name))
    best = min(tried)[0]
    if best < min(EXPLAINED * found, PLAUSIBLE):
        names = list(dict.fromkeys(name for each, name in tried if each < AS_GOOD * best))[:NAMED]
        raise UserError(
            f"{stack.path}: frames: their order does not fit the model (residual {found:.0%} of the modulation); they "
            f"fit ({best:.0%}) if they are {', or '.join(names)}; list them wavelength by wavelength, in the order of "
            f"phase_steps_rad{degrees(shared)}"
            + (" (which of these, only the sign of the heights can tell)" if len(names) > 1 else "")
        )


def _orders(wavelengths: int, steps: int) -> Iterator[tuple[str, np.ndarray]]:
    """Names of orders in which frames may have been listed, and which frame then belongs to each [J, K]."""
    along = np.arange(wavelengths * steps)
    for shift, name in ((1, "with the last frame first"), (-1, "with the first frame last")):
        yield name, np.roll(along, -shift).reshape(wavelengths, steps)
    for major, layout in (
        ("", along.reshape(wavelengths, steps)),
        ("step-major (all wavelengths of a step one after the other)", along.reshape(steps, wavelengths).T),
    ):
        for turned, rows in (("", layout), ("with the wavelengths in reverse", layout[::-1])):
            for order in _step_orders(steps):
                names = [major, turned, f"with the steps in the order {order}" if order != sorted(order) else ""]
                if any(names):
                    yield ", ".join(filter(None, names)), rows[:, order]
        if wavelengths == 1:
            break
    if 2 < wavelengths <= ALL_PERMUTATIONS:
        for order in permutations(range(wavelengths)):
            yield f"with the wavelengths in the order {list(order)}", along.reshape(wavelengths, steps)[list(order)]
    if len(along) <= EXCHANGED:
        for one, other in combinations(along, 2):
            swapped = along.copy()
            swapped[[one, other]] = other, one
            yield f"with frames {one} and {other} exchanged", swapped.reshape(wavelengths, steps)


def _step_orders(steps: int) -> Iterator[list[int]]:
    """The likelier orders first: either way round, rotated, neighbours swapped; all others where steps are few."""
    every = list(range(steps))
    turns = [every[first:] + every[:first] for first in every]
    swaps = [[*every[:k], k + 1, k, *every[k + 2 :]] for k in range(steps - 1)]
    likely = [every, every[::-1], *turns[1:], *(turn[::-1] for turn in turns[1:]), *swaps]
    yield from likely
    if steps <= ALL_PERMUTATIONS:
        yield from (order for order in map(list, permutations(every)) if order not in likely)


def check_range(stack: Stack, height_range_um: tuple[float, float]) -> None:
    """UserError where two heights of the range have the same phases at all wavelengths. One wavelength is unwrapped."""
    if stack.J == 1:
        return
    width = height_range_um[1] - height_range_um[0]
    period = repeats_after_um(stack.wavelengths_um, width)
    if period is not None:
        raise UserError(
            f"{stack.path}: wavelengths_um: heights repeat after {period:.6g} um (an unambiguous range of "
            f"{-period / 2:.6g} to {period / 2:.6g} um), but the height range spans {width:.6g} um; narrow "
            "height_range_um, or measure with other wavelengths"
        )


def repeats_after_um(wavelengths_um: Sequence[float], within_um: float) -> float | None:
    """Smallest height difference below `within_um` after which all phases are the same again; None if there is none."""
    half = np.asarray(wavelengths_um, np.float64) / 2
    shifts = half.max() * np.arange(1, int(within_um * (1 - 1e-9) / half.max()) + 1)
    cycles = shifts[:, None] / half
    same = (np.abs(cycles - np.rint(cycles)) < SAME_PHASE).all(axis=1)
    return float(shifts[same][0]) if same.any() else None
