"""Whether frames fit the model better than chance would, and whether there is anything in them."""

import numpy as np
import torch

from cpikan_hr.data.stack import MIN_STEPS, Stack
from cpikan_hr.errors import UserError
from cpikan_hr.problems.noise import usable
from cpikan_hr.problems.sample import Sample
from cpikan_hr.problems.steps import Misfit, Shared, misfit

TRIED = 2000  # pixels that are asked
FEWEST = 100  # at least
BRIGHTEST, LIT = 0.995, 0.5  # pixels whose frames differ by half of what this quantile does, or more, are asked
ALONE, TOGETHER = 0.6, 0.5  # of the misfit of random phases: where one wavelength's frames, or all, do not fit
NOISE = 0.85  # the same part where no wavelength fits and all may be noise
UNEXPLAINED = 0.8  # misfit from which on no noise is thought of: of many frames chance explains still less
NOISY = 1.5  # times the scatter of frames that fit by themselves: what noise alone may come to
THREE_STEPS = 0.8, 0.9  # of chance, where three steps tell nothing of noise: of several and of two wavelengths
LEVELS, PILED, LEAST = 8, 20, 5e-4  # levels below the largest; times their samples, and part of all, that pile up
TURNS = 2  # whole turns: larger steps may be degrees
STRIP = 2**18  # pixels looked at together where few tell anything


def check_fit(stack: Stack, sample: Sample, height_range_um: tuple[float, float], shared: Shared) -> Misfit | None:
    """How well the sample fits; None where too few of its pixels can be used.

    UserError where hardly better than random phases would, and where there are no fringes. Each wavelength is asked by
    itself, as far as it has more than three frames, then whether their heights agree.
    """
    lit = _lit(stack, sample).fewer(TRIED)
    if lit.frames.shape[-1] < FEWEST:
        return None
    known = stack.wavelengths_um, height_range_um, shared
    rng = np.random.default_rng(0)
    scatter = _check_each(stack, lit, shared, rng)
    found = misfit(lit, *known)
    if stack.J == 1:
        return found
    phases = rng.uniform(0, 2 * np.pi, (stack.J, 1, TRIED)) + np.nan_to_num(shared.steps)[..., None]
    chance = misfit(Sample(np.cos(phases)), *known).ratio
    limit = THREE_STEPS[stack.J == 2] if scatter is None else TOGETHER if found.scatter > NOISY * scatter else np.inf
    if found.ratio > limit * chance:
        raise UserError(
            f"{stack.path}: frames: the heights that the wavelengths show do not agree (residual {found.ratio:.0%} of "
            f"the modulation, {chance:.0%} by chance); check the order of the frames, wavelengths_um, "
            f"height_range_um and phase_steps_rad{degrees(shared)}"
        )
    return found


def _check_each(stack: Stack, lit: Sample, shared: Shared, rng: np.random.Generator) -> float | None:
    """The rms scatter of single wavelengths, in grey levels; None where none has frames enough to tell it.

    UserError where one fits its frames hardly better than chance, unless it scatters no more than those that fit well:
    then it has no fringes. Where none fits well it may be noise.
    """
    each = {}
    for j in np.flatnonzero(stack.present.sum(1) > MIN_STEPS):
        one = slice(j, j + 1)
        harmonic = None if shared.harmonic is None else shared.harmonic[one]
        known = stack.wavelengths_um[one], (-1.0, 1.0), Shared(shared.steps[one], harmonic)
        chance = misfit(Sample(np.cos(rng.uniform(0, 2 * np.pi, (1, stack.K, TRIED)))), *known).ratio
        found = misfit(Sample(lit.frames[one]), *known)
        each[j] = found, chance
    if not each:
        return None
    well = [found.scatter for found, chance in each.values() if found.ratio <= min(ALONE * chance, UNEXPLAINED)]
    noisy = not well and stack.J > 1 and not degrees(shared)
    for j, (found, chance) in each.items():
        limit = min((NOISE if noisy else ALONE) * chance, UNEXPLAINED)
        if found.ratio > limit and not (well and found.scatter <= NOISY * min(well)):
            raise UserError(
                f"{stack.path}: frames: those of wavelength {j} ({stack.wavelengths_um[j]:g} um) do not fit fringes of "
                f"these phase steps (residual {found.ratio:.0%} of the modulation, {chance:.0%} by chance); check "
                f"their order and phase_steps_rad{degrees(shared)}"
            )
    return float(np.sqrt(np.mean([found.scatter**2 for found, _ in each.values()])))


def _lit(stack: Stack, sample: Sample) -> Sample:
    """Its brighter pixels. UserError where frames do not differ at all."""
    if not sample.frames.shape[-1]:
        return sample
    there = stack.present[..., None]
    highest, lowest = (np.where(there, sample.frames, blank) for blank in (-np.inf, np.inf))
    span = (highest.max(1) - lowest.min(1)).sum(0)
    most = np.quantile(span, BRIGHTEST)
    if not most > 0:
        raise UserError(f"{stack.path}: frames: those of one wavelength are all the same; there are no fringes in them")
    return sample.where(span >= LIT * most)


def piled_up(stack: Stack, sample: Sample) -> tuple[float, float] | None:
    """The largest level and the part of the samples there, where so many are that they seem to be clipped at it.

    Those clipped at the top of `bit_depth` are not in the sample. Fringes without noise have two or three times more
    samples at their crests than at a level below.
    """
    if stack.clips is None or not sample.frames.shape[-1]:
        return None
    levels, counts = np.unique(sample.frames[stack.present], return_counts=True)
    below = counts[-1 - LEVELS : -1]
    if len(below) < LEVELS or counts[-1] < max(PILED * below.mean(), LEAST * counts.sum()):
        return None
    return float(levels[-1]), float(counts[-1] / counts.sum())


def degrees(shared: Shared) -> str:
    """A hint, where the steps may be in degrees."""
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
