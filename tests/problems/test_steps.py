"""Phase steps from the frames alone: against those the frames were made with, and a real mirror's by another fit."""

import os
from pathlib import Path

import numpy as np
import pytest
from interferograms import RANGE, WAVELENGTHS, camera, expose, full_turn, wafer, write_stack, wrong_steps
from scipy.optimize import least_squares
from scipy.sparse import lil_matrix

from cpikan_hr.cli import main as cli
from cpikan_hr.data.stack import open_stack
from cpikan_hr.errors import UserError
from cpikan_hr.problems.blind import guess_steps
from cpikan_hr.problems.calibration import calibrate
from cpikan_hr.problems.decode import decode_window
from cpikan_hr.problems.sample import Sample
from cpikan_hr.problems.steps import Shared, refine
from cpikan_hr.train import main as train
from cpikan_hr.training.weights import load_field

DATA = Path(os.environ.get("CPIKAN_HR_DATA", Path(__file__).parents[2] / ".." / "shared" / "data"))
MRAD = 1e-3


def wrapped(angle):
    return np.angle(np.exp(1j * angle))


def rmse(frames, steps, height, wavelengths=WAVELENGTHS):
    return np.sqrt(np.mean((decode_window(frames, wavelengths, steps, RANGE).height_nm - height) ** 2))


@pytest.mark.parametrize(("J", "K"), [(4, 4), (4, 3), (2, 4)])
def test_exact_frames_give_the_exact_steps(J, K):
    rng = np.random.default_rng(K)
    height, true = 1000 * rng.uniform(-13, 13, (20, 200)), wrong_steps(J, K, seed=K)
    frames = expose(height, WAVELENGTHS[:J], true, rng.uniform(90, 150, (20, 200)), rng.uniform(40, 80, (20, 200)))
    found = refine(Sample(frames.reshape(J, K, -1)), WAVELENGTHS[:J], RANGE, Shared(full_turn(J, K)))
    np.testing.assert_allclose(found.steps, true, atol=1e-9)


@pytest.mark.parametrize("noise", [0.0, 2.0])
@pytest.mark.parametrize("K", [3, 4])
def test_a_wafer_with_wrong_steps_decodes_as_if_they_were_known(K, noise, tmp_path):
    true = wrong_steps(4, K, seed=6)
    height, frames = wafer((450, 500), true, noise=noise)
    folder = write_stack(tmp_path, frames, WAVELENGTHS, full_turn(4, K), height_range_um=list(RANGE))
    found = calibrate(open_stack(folder), "refine").steps
    assert np.sqrt(np.mean((found - true)[:, 1:] ** 2)) < 0.5 * MRAD
    nominal, refined, exact = (rmse(frames, steps, height) for steps in (full_turn(4, K), found, true))
    assert refined < 1.005 * exact
    if not noise:
        assert nominal > 10 and refined < 0.1 * nominal


def test_dark_pixels_and_pixels_of_another_height_do_not_pull_the_steps():
    """A tenth of the pixels sees something else entirely, another tenth next to nothing."""
    true, rng = wrong_steps(4, 4, seed=1), np.random.default_rng(1)
    frames = expose(1000 * rng.uniform(-13, 13, (1, 20000)), WAVELENGTHS, true) + rng.normal(0, 1, (4, 4, 1, 20000))
    frames[..., ::10] = rng.uniform(0, 255, (4, 4, 1, 2000))
    frames[..., 1::10] = 20 + rng.normal(0, 1, (4, 4, 1, 2000))
    found = refine(Sample(frames.reshape(4, 4, -1)), WAVELENGTHS, RANGE, Shared(full_turn(4, 4)))
    assert np.abs(found.steps - true).max() < 1 * MRAD


@pytest.mark.parametrize(("J", "K"), [(4, 4), (4, 3), (1, 5), (1, 7)])
def test_unknown_steps_are_found_from_nothing(J, K, tmp_path):
    true = wrong_steps(J, K, seed=2)
    frames = wafer((300, 400), true, WAVELENGTHS[:J], noise=1)[1]
    stack = open_stack(write_stack(tmp_path, frames, WAVELENGTHS[:J], None, height_range_um=list(RANGE)))
    assert np.abs(calibrate(stack, "unknown").steps - true).max() < 2 * MRAD


def test_blind_steps_ascend_unless_the_wavelengths_disagree():
    rng = np.random.default_rng(0)
    height, there = 1000 * rng.uniform(-13, 13, (1, 20000)), np.ones((4, 4), bool)
    turned = full_turn(4, 4) * np.array([1, -1, 1, -1])[:, None]
    for true, expected in ((-full_turn(4, 4), full_turn(4, 4)), (turned, turned)):
        frames = expose(height, WAVELENGTHS, true).reshape(4, 4, -1)
        np.testing.assert_allclose(guess_steps(Sample(frames), there, WAVELENGTHS, RANGE), expected, atol=0.05)


def test_frames_that_do_not_determine_their_steps_are_refused(tmp_path):
    frames = wafer((100, 120), full_turn(1, 4), WAVELENGTHS[:1], noise=1)[1]
    stack = open_stack(write_stack(tmp_path, frames, WAVELENGTHS[:1], full_turn(1, 4)))
    with pytest.raises(UserError, match="do not determine their phase steps"):
        calibrate(stack, "refine")
    flat = camera(np.full((1, 6, 50, 60), 100.0), 0)
    stack = open_stack(write_stack(tmp_path, flat, WAVELENGTHS[:1], None))
    with pytest.raises(UserError, match="wavelength 0 do not differ like shifted fringes"):
        calibrate(stack, "unknown")


def test_the_command_decodes_with_the_steps_it_found_and_says_them(tmp_path, capfd):
    true = wrong_steps(4, 3, seed=3)
    height, frames = wafer((200, 300), true)
    keys = dict(height_range_um=list(RANGE))
    for steps, mode in ((full_turn(4, 3), "refine"), (None, "unknown")):
        folder = write_stack(tmp_path, frames, WAVELENGTHS, steps, **keys)
        assert cli(["decode", str(folder), "--out", str(tmp_path / "h.npy"), "--steps", mode]) == 0
        said = capfd.readouterr().out.splitlines()[-1]
        assert said.startswith("phase steps (rad), wavelength 3: ")
        np.testing.assert_allclose([float(word) for word in said.split(": ")[1].split()], true[3], atol=1e-3)
        assert np.sqrt(np.mean((np.load(tmp_path / "h.npy") - height) ** 2)) < 1.3
    assert cli(["decode", str(folder), "--out", str(tmp_path / "h.npy")]) == 2
    assert "phase_steps_rad: unknown" in capfd.readouterr().err


def test_a_run_keeps_the_steps_it_found_and_says_them_once(tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    true = wrong_steps(4, 4, seed=3)
    frames = wafer((96, 128), true)[1]
    folder = write_stack(tmp_path, frames, WAVELENGTHS, full_turn(4, 4), height_range_um=list(RANGE))
    words = ["--config", "recipes/wafer.yaml", "--problem.stack", str(folder), "--output", str(tmp_path / "run")]
    assert train([*words, "--problem.steps", "refine"]) == 0
    assert capfd.readouterr().out.count("phase steps (rad), wavelength 3") == 1
    about = load_field(tmp_path / "run").about
    np.testing.assert_allclose(about["phase_steps_rad"], true, atol=5 * MRAD)
    assert "harmonic" not in about


@pytest.fixture(scope="module")
def mirror():
    if not (DATA / "zernike_psi_12frame").is_dir():
        pytest.skip("the mirror interferograms are not here")
    return open_stack(Path(__file__).parents[2] / "recipes" / "mirror")


def test_the_steps_of_the_real_mirror_are_those_of_an_independent_fit(mirror):
    """Reference: general least squares in all unknowns at once, A, B and phase of each pixel and the steps."""
    y, x = np.mgrid[:600, :800]
    pixels = np.flatnonzero(mirror.mask(0, 600, 0, 800) & (y % 8 == 3) & (x % 8 == 3))
    frames = mirror.read(0, 600, 0, 800)[0].reshape(12, -1)[:, pixels].astype(np.float64)
    frames = frames[:, ((frames > 0) & (frames < 255)).all(axis=0)]
    n = frames.shape[1]
    steps = -np.arange(12) * np.pi / 3

    def split(v):
        return np.concatenate([[0], v[3 * n :]]), *v[: 3 * n].reshape(3, n)

    def residual(v):
        delta, background, modulation, phase = split(v)
        return (background + modulation * np.cos(phase + delta[:, None]) - frames).ravel()

    pattern, pixel = lil_matrix((12 * n, 3 * n + 11), dtype=int), np.arange(n)
    for k in range(12):
        for part in range(3):
            pattern[k * n + pixel, part * n + pixel] = 1
        if k:
            pattern[k * n + pixel, 3 * n + k - 1] = 1
    wave = np.exp(-1j * steps) @ frames / 6
    start = np.concatenate([frames.mean(axis=0), np.abs(wave), np.angle(wave), steps[1:]])
    reference = split(least_squares(residual, start, jac_sparsity=pattern).x)[0]
    assert np.abs(reference - steps).max() > np.radians(5)  # so far are the real steps from the nominal ones
    refined, blind = (calibrate(mirror, mode).steps[0] for mode in ("refine", "unknown"))
    assert np.degrees(np.abs(wrapped(refined - reference)).max()) < 0.5
    assert np.degrees(np.abs(wrapped(blind + reference)).max()) < 0.5  # blind steps ascend, these descend


def test_two_halves_of_the_real_mirrors_frames_agree_once_the_steps_are_refined(mirror):
    """A wrong step is a ripple of twice the fringes' frequency, another one in frames 0-5 than in frames 6-11."""
    valid = mirror.mask(0, 600, 0, 800)
    frames = mirror.read(0, 600, 0, 800).astype(np.float64)
    ripple = {}
    for mode in ("nominal", "refine"):
        steps = calibrate(mirror, mode).steps
        phase, first, second = (
            2 * np.pi * decode_window(frames[:, part], [0.654], steps[:, part]).height_nm[valid] / 327
            for part in (slice(0, 12), slice(0, 6), slice(6, 12))
        )
        difference = wrapped(first - second)
        basis = np.stack([np.ones_like(phase), *(f(n * phase) for n in (1, 2) for f in (np.cos, np.sin))], axis=-1)
        fitted = np.linalg.lstsq(basis, difference, rcond=None)[0]
        ripple[mode] = np.hypot(*fitted[3:]) * 327 / (2 * np.pi)
    assert ripple["nominal"] > 0.8 and ripple["refine"] < ripple["nominal"] / 4
