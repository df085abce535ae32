"""What a stack must satisfy before it is decoded: frames that fit the model, in the order it says, and a height range
that its wavelengths can tell apart.
"""

from collections.abc import Iterator, Sequence
from itertools import combinations, permutations

import numpy as np
import torch

from cpikan_hr.data.stack import MIN_STEPS, Stack
from cpikan_hr.errors import UserError
from cpikan_hr.problems.noise import usable
from cpikan_hr.problems.sample import Sample
from cpikan_hr.problems.steps import Misfit, Shared, misfit

TRIED = 2000  # pixels on which other orders are tried
STRIP = 2**18  # pixels looked at together where few tell anything
SUSPICIOUS = 0.1  # misfit over the modulation from which on other orders are tried
EXPLAINED, PLAUSIBLE = 0.6, 0.4  # of that misfit, and misfit: what another order must reach to be named
AS_GOOD, NAMED = 1.1, 3  # times the best misfit: orders up to there are named too, so many in all
SAME_PHASE = 0.005  # cycles: phases closer than this are not told apart
ALL_PERMUTATIONS = 5  # steps per wavelength, and wavelengths, up to which all their orders are tried
EXCHANGED = 16  # frames up to which any two are exchanged
FEWEST = 100  # pixels that say whether frames fit
LIT = 0.5  # pixels whose frames differ by less than this part of what the brightest 5 % do are not asked
ALONE, TOGETHER = 0.6, 0.5  # of the misfit of random phases: where one wavelength's frames, or all, do not fit
NOISY = 1.5, 0.7  # unless nothing to compare with scatters so many times less: then it is noise, up to this part
THREE_STEPS = 0.65, 0.9  # the same part where three steps tell nothing of noise; of several and of two wavelengths
TURNS = 2  # whole turns: larger steps may be degrees


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
            "phase_steps_rad" + (" (which of these, only the sign of the heights can tell)" if len(names) > 1 else "")
        )


def check_fit(stack: Stack, sample: Sample, height_range_um: tuple[float, float], shared: Shared) -> Misfit:
    """How well the sample fits. UserError where hardly better than random phases would, and where there are no fringes.

    Each wavelength is asked by itself, as far as it has more than three frames, then whether their heights agree.
    """
    lit = _lit(stack, sample).fewer(TRIED)
    if lit.frames.shape[-1] < FEWEST:
        return misfit(lit, stack.wavelengths_um, height_range_um, shared)
    rng = np.random.default_rng(0)

    def chance(there: Shared, lengths: Sequence[float], phases: np.ndarray) -> float:
        return misfit(Sample(np.cos(phases)), lengths, height_range_um, there).ratio

    alone = {}
    for j in np.flatnonzero(stack.present.sum(1) > MIN_STEPS):
        this, length = _only(shared, j), stack.wavelengths_um[j : j + 1]
        found = misfit(Sample(lit.frames[j : j + 1]), length, height_range_um, this)
        alone[j] = found, chance(this, length, rng.uniform(0, 2 * np.pi, (1, stack.K, TRIED)))
    least = min((found.scatter for found, _ in alone.values()), default=0.0)
    for j, (found, by_chance) in alone.items():
        if found.ratio > (ALONE if found.scatter > NOISY[0] * least else NOISY[1]) * by_chance:
            raise UserError(
                f"{stack.path}: frames: those of wavelength {j} ({stack.wavelengths_um[j]:g} um) do not fit fringes of "
                f"these phase steps (residual {found.ratio:.0%} of the modulation, {by_chance:.0%} by chance); check "
                f"their order and phase_steps_rad{_degrees(shared)}"
            )
    found = misfit(lit, stack.wavelengths_um, height_range_um, shared)
    if stack.J == 1:
        return found
    phases = rng.uniform(0, 2 * np.pi, (stack.J, 1, TRIED)) + np.nan_to_num(shared.steps)[..., None]
    by_chance = chance(shared, stack.wavelengths_um, phases)
    if alone:
        noise = np.sqrt(np.mean([each.scatter**2 for each, _ in alone.values()]))
        limit = TOGETHER if found.scatter > NOISY[0] * noise else np.inf
    else:
        limit = THREE_STEPS[stack.J == 2]
    if found.ratio > limit * by_chance:
        raise UserError(
            f"{stack.path}: frames: the heights that the wavelengths show do not agree (residual {found.ratio:.0%} of "
            f"the modulation, {by_chance:.0%} by chance); check the order of the frames, wavelengths_um, "
            f"height_range_um and phase_steps_rad{_degrees(shared)}"
        )
    return found


def _lit(stack: Stack, sample: Sample) -> Sample:
    """Its brighter pixels. UserError where frames do not differ at all."""
    if not sample.frames.shape[-1]:
        return sample
    there = stack.present[..., None]
    highest, lowest = (np.where(there, sample.frames, blank) for blank in (-np.inf, np.inf))
    span = (highest.max(1) - lowest.min(1)).sum(0)
    most = np.quantile(span, 0.95)
    if not most > 0:
        raise UserError(f"{stack.path}: frames: those of one wavelength are all the same; there are no fringes in them")
    return sample.where(span >= LIT * most)


def _only(shared: Shared, j: int) -> Shared:
    """What one wavelength's frames have in common."""
    return Shared(shared.steps[j : j + 1], None if shared.harmonic is None else shared.harmonic[j : j + 1])


def _degrees(shared: Shared) -> str:
    large = np.nanmax(np.abs(shared.steps)) > TURNS * 2 * np.pi
    return " (are they in degrees?)" if large else ""


def check_data(stack: Stack, sample: Sample) -> None:
    """UserError where no pixel at all has enough samples inside the mask; looks further if the sample is empty."""
    if sample.frames.shape[-1]:
        return
    masked = True
    present = torch.from_numpy(stack.present)
    rows = max(1, STRIP // stack.shape[1])
    for y0 in range(0, stack.shape[0], rows):
        window = y0, min(y0 + rows, stack.shape[0]), 0, stack.shape[1]
        valid = stack.mask(*window)
        if not valid.any():
            continue
        masked = False
        frames = torch.from_numpy(stack.read(*window)[:, :, valid].astype(np.int32))
        good = usable(frames, stack.clips, present) if stack.clips is not None else None
        if good is None:
            return
        enough = ((good & present[..., None]).sum(1) >= MIN_STEPS).sum(0)
        if (enough >= min(stack.J, 2)).any():
            return
    if masked:
        raise UserError(f"{stack.path}: mask: no pixel is valid; check the mask")
    raise UserError(
        f"{stack.path}: frames: no pixel has {MIN_STEPS} samples of {min(stack.J, 2)} wavelengths that are not clipped "
        f"at 0 or {2**stack.clips - 1}; expose them anew, or check bit_depth"
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
