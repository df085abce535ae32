"""A second harmonic of the fringes: exact where it is known or can be found, and measured on real fringe projection."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from interferograms import RANGE, WAVELENGTHS, expose, full_turn, write_stack, wrong_steps
from PIL import Image

from cpikan_hr.data.stack import open_stack
from cpikan_hr.problems.calibration import calibrate
from cpikan_hr.problems.decode import decode_window
from cpikan_hr.problems.phases import Demodulator
from cpikan_hr.problems.sample import Sample
from cpikan_hr.problems.steps import Shared, refine

DATA = Path(os.environ.get("CPIKAN_HR_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
HARMONIC = np.array([0.15 * np.exp(0.3j), 0.12 * np.exp(-1j), 0.17, 0.1 * np.exp(2j)])


def make(K, steps, harmonic=HARMONIC, n=20000):
    rng = np.random.default_rng(K)
    height = 1000 * rng.uniform(-13, 13, (1, n))
    bright = rng.uniform(0.5, 1, (1, n))
    return height, expose(height, WAVELENGTHS, steps, 120 * bright, 80 * bright, harmonic), bright


@pytest.mark.parametrize("K", [3, 4, 6])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_known_harmonic_is_corrected_exactly(K, weighted):
    steps = full_turn(4, K) + np.random.default_rng(0).uniform(-0.2, 0.2, (4, K))
    height, frames, bright = make(K, steps, n=500)
    frames = torch.from_numpy(frames[:, :, 0])
    weights = torch.from_numpy(np.random.default_rng(1).uniform(0.5, 2, (4, K, 500))) if weighted else None
    demodulator = Demodulator(WAVELENGTHS, steps, HARMONIC)
    background, modulation, fraction, _ = demodulator.demodulate(frames, weights)
    phase = 4e-3 * np.pi * height / np.array(WAVELENGTHS)[:, None]
    np.testing.assert_allclose(np.exp(2j * np.pi * fraction.numpy()), np.exp(1j * phase), atol=1e-9)
    np.testing.assert_allclose(background, np.tile(120 * bright, (4, 1)), rtol=1e-9)
    np.testing.assert_allclose(modulation, np.tile(80 * bright, (4, 1)), rtol=1e-9)
    np.testing.assert_allclose(demodulator.levels(background, modulation, fraction), frames, rtol=1e-9)


@pytest.mark.parametrize(("K", "wrong"), [(3, False), (4, False), (4, True), (5, True)])
def test_harmonics_are_found_together_with_the_steps(K, wrong):
    true = wrong_steps(4, K, seed=K) if wrong else full_turn(4, K)
    height, frames, _ = make(K, true)
    found = refine(Sample(frames[:, :, 0]), WAVELENGTHS, RANGE, Shared(full_turn(4, K)), steps=wrong, harmonic=True)
    np.testing.assert_allclose(found.harmonic, HARMONIC, atol=1e-6)
    np.testing.assert_allclose(found.steps, true, atol=1e-6)
    decoded = decode_window(frames, WAVELENGTHS, found.steps, RANGE, harmonic=found.harmonic)
    np.testing.assert_allclose(decoded.height_nm, height, atol=1e-3)


def fringes(case, folder, kept):
    """Three periods of projected fringes, 12 steps each, its height in nm ten times the projector's column."""
    names = [f"{case}{i:02d}h.png" for i in range(36)]
    if not (DATA / "cfpe_multifreq_psp" / names[0]).is_file():
        pytest.skip("the fringe projection recordings are not here")
    pixels = np.stack([np.asarray(Image.open(DATA / "cfpe_multifreq_psp" / name)) for name in names])
    frames = pixels.reshape(3, 12, *pixels.shape[1:])[:, kept]
    steps = (2 * np.pi * np.arange(12) / 12)[kept]
    folder.mkdir()
    write_stack(folder, frames, [0.84, 0.90, 0.96], [steps] * 3, height_range_um=[-1, 11])
    return open_stack(folder)


@pytest.mark.parametrize("case", ["01", "04"])
def test_three_real_steps_come_close_to_twelve_once_the_harmonic_is_known(case, tmp_path):
    """Projector columns (px). Wrong orders, more than 20 px off, are counted apart."""

    def decode(stack, shared):
        known = dict(harmonic=shared.harmonic, bit_depth=8)
        return decode_window(
            stack.read(0, 480, 0, 640), stack.wavelengths_um, shared.steps, stack.height_range_um, **known
        )

    twelve = fringes(case, tmp_path / "12", list(range(12)))
    reference = decode(twelve, calibrate(twelve))
    lit = (reference.modulation.min(axis=0) > 10) & (reference.quality > 0.2)
    three = fringes(case, tmp_path / "3", [0, 4, 8])
    rms, gross = {}, {}
    for harmonic in (False, True):
        error = (decode(three, calibrate(three, harmonic=harmonic)).height_nm - reference.height_nm)[lit] / 10
        right = np.abs(error) <= 20
        rms[harmonic], gross[harmonic] = np.sqrt(np.mean(error[right] ** 2)), 1 - right.mean()
    assert rms[False] > 0.45 and rms[True] < 0.15
    assert gross[False] > 0.04 and gross[True] < 0.003
