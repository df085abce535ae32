"""A first guess of phase steps that nobody knows, each wavelength by itself.

Principal components of the frames' fluctuation (J. Vargas, J. A. Quiroga, T. Belenguer, Opt. Lett. 36 (2011) 1326)
give phases; the advanced iterative algorithm (Z. Wang, B. Han, Opt. Lett. 29 (2004) 1671) then fits steps and phases in
turn, here with each pixel's own background and modulation.

The frames look the same if all steps and phases change their sign. By convention steps ascend, the shorter way round
from frame to frame; several wavelengths must agree on one height, which may turn single ones round.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch

from cpikan_hr.errors import UserError
from cpikan_hr.problems.phases import Demodulator
from cpikan_hr.problems.sample import Sample
from cpikan_hr.problems.steps import Shared, misfit

ITERATIONS = 50
CONVERGED = 1e-4  # rad
TRIED = 4000  # pixels on which the signs are tried
CLEARLY = 0.5  # of the misfit of ascending steps: what other signs must reach


def guess_steps(
    sample: Sample, present: np.ndarray, wavelengths_um: Sequence[float], height_range_um: tuple[float, float]
) -> np.ndarray:
    """Phase steps [J, K] of the sample; the first of every wavelength is 0.

    UserError: frames without fringes.
    """
    steps = np.full(present.shape, np.nan)
    for j, there in enumerate(present):
        steps[j, there] = _ascending(_iterate(sample.frames[j][there], j))
    if 1 < len(steps) <= 6:
        few = sample.fewer(TRIED)
        signs = [np.array([1, *rest])[:, None] for rest in product((1, -1), repeat=len(steps) - 1)]
        misfits = [misfit(few, wavelengths_um, height_range_um, Shared(sign * steps)).ratio for sign in signs]
        best = int(np.argmin(misfits))
        if misfits[best] < CLEARLY * misfits[0]:
            steps *= signs[best]
    return steps


def _iterate(frames: np.ndarray, j: int) -> np.ndarray:
    """Steps [K] of one wavelength's frames [K, n], of either sign, the first one 0."""
    fluctuation = frames - frames.mean(axis=0)
    values, vectors = np.linalg.eigh(fluctuation @ fluctuation.T / max(frames.shape[-1], 1))
    refusal = UserError(f"steps: the frames of wavelength {j} do not differ like shifted fringes; give their steps")
    if values[-2] <= 1e-9 * values[-1] or values[-1] <= 0:
        raise refusal
    scores = vectors[:, -2:].T @ fluctuation / np.sqrt(values[-2:, None])
    steps = _frame_steps(fluctuation, np.arctan2(scores[1], scores[0]))
    for _ in range(ITERATIONS):
        try:
            fitted = Demodulator([1.0], steps[None]).demodulate(torch.from_numpy(frames[None]))
        except UserError:
            raise refusal from None
        background, modulation, fraction, _ = (each[0].numpy() for each in fitted)
        bright = modulation > 0.25 * np.median(modulation)
        normalised = (frames[:, bright] - background[bright]) / modulation[bright]
        before, steps = steps, _frame_steps(normalised, 2 * np.pi * fraction[bright])
        if np.abs(_wrapped(steps - before)).max() < CONVERGED:
            break
    return steps


def _frame_steps(frames: np.ndarray, phase: np.ndarray) -> np.ndarray:
    """Steps [K] of frames [K, n] whose pixels have these phases, by least squares; relative to the first."""
    basis = np.stack([np.ones_like(phase), np.cos(phase), -np.sin(phase)])
    _, cos, sin = np.linalg.lstsq(basis @ basis.T, basis @ frames.T, rcond=None)[0]
    angle = np.arctan2(sin, cos)
    return angle - angle[0]


def _ascending(steps: np.ndarray) -> np.ndarray:
    change = _wrapped(np.diff(steps))
    climbed = np.concatenate([[0.0], np.cumsum(change)])
    return climbed if climbed[-1] >= 0 else -climbed


def _wrapped(angle: np.ndarray) -> np.ndarray:
    return np.angle(np.exp(1j * angle))
