"""A carrier: a known tilt of the reference, which the fringes show and the heights do not."""

import json

import numpy as np
import pytest
import torch
import yaml
from interferograms import RANGE, WAVELENGTHS, camera, expose, full_turn, write_stack, wrong_steps

from cpikan_hr.cli import main as cli
from cpikan_hr.data.source import open_source
from cpikan_hr.data.stack import open_stack
from cpikan_hr.errors import UserError
from cpikan_hr.jets import Jet
from cpikan_hr.problems import Interferometry
from cpikan_hr.problems.calibration import calibrate
from cpikan_hr.problems.decode import StackDecoder, decode_window
from cpikan_hr.problems.noise import Noise
from cpikan_hr.recipe import InterferometryProblem
from cpikan_hr.train import main as train

SHAPE, CARRIER = (180, 240), (310.0, -270.0)  # nm per px: hundreds of fringes, far beyond the height range


def carrier_of(shape, carrier=CARRIER):
    y, x = (np.arange(n) + 0.5 - n / 2 for n in shape)
    return carrier[0] * y[:, None] + carrier[1] * x


def heights(seed=0):
    return 1000 * np.random.default_rng(seed).uniform(-13, 13, SHAPE)


def stack_of(folder, frames, wavelengths=WAVELENGTHS, steps=None, **keys):
    steps = full_turn(*frames.shape[:2]) if steps is None else steps
    keys = {"height_range_um": list(RANGE), "carrier_nm_per_px": list(CARRIER)} | keys
    return open_stack(write_stack(folder, frames, wavelengths, steps, **keys))


@pytest.mark.parametrize("K", [3, 4])
def test_heights_are_those_without_a_carrier(K):
    height, steps = heights(), full_turn(4, K)
    frames = expose(height + carrier_of(SHAPE), WAVELENGTHS, steps)
    found = decode_window(frames, WAVELENGTHS, steps, RANGE, carrier_nm=carrier_of(SHAPE))
    np.testing.assert_allclose(found.height_nm, height, atol=1e-6)
    assert np.abs(decode_window(frames, WAVELENGTHS, steps, RANGE).height_nm - height).max() > 1000


@pytest.mark.parametrize("repair", [False, True])
def test_windows_of_a_stack_know_where_they_lie(repair, tmp_path):
    height = heights()
    stack = stack_of(tmp_path, camera(expose(height + carrier_of(SHAPE), WAVELENGTHS, full_turn(4, 4)), noise=2))
    decoder = StackDecoder(stack, noise=Noise(2.0), repair=repair)
    whole = decoder.decode(0, SHAPE[0], 0, SHAPE[1]).height_nm
    assert np.abs(whole - height).max() < 60
    for y0, y1, x0, x1, stride in [(0, 99, 0, 240, 1), (31, 140, 77, 239, 3)]:
        part = decoder.decode(y0, y1, x0, x1, stride).height_nm
        np.testing.assert_array_equal(part, whole[y0:y1:stride, x0:x1:stride])


def test_one_wavelength_is_unwrapped_without_it(tmp_path):
    y, x = np.mgrid[0 : SHAPE[0], 0 : SHAPE[1]]
    height = 2000 * np.sin(y / 40) * np.cos(x / 50)
    frames = expose(height + carrier_of(SHAPE), WAVELENGTHS[:1], full_turn(1, 4))
    found = StackDecoder(stack_of(tmp_path, frames, WAVELENGTHS[:1])).decode(0, SHAPE[0], 0, SHAPE[1]).height_nm
    turns = (found - height) / (500 * WAVELENGTHS[0])
    np.testing.assert_allclose(turns, np.rint(turns[0, 0]), atol=1e-6)


def test_wrong_steps_are_refined_and_frames_in_another_order_refused(tmp_path):
    true = wrong_steps(4, 4, seed=3)
    frames = camera(expose(heights() + carrier_of(SHAPE), WAVELENGTHS, true), noise=1)
    stack = stack_of(tmp_path, frames)
    assert np.abs(calibrate(stack, "refine").steps - true).max() < 2e-3
    assert np.abs(calibrate(stack, "unknown").steps - true).max() < 4e-3
    turned = frames.swapaxes(0, 1)  # step-major
    with pytest.raises(UserError, match="step-major"):
        calibrate(stack_of(tmp_path, turned))


@pytest.mark.parametrize("turn", [{}, {"rotate": 90}, {"rotate": 180, "flip": "rows"}])
def test_the_loss_is_one_at_the_true_height_seen_from_any_side(turn, tmp_path):
    height = heights()
    stack_of(tmp_path, camera(expose(height + carrier_of(SHAPE), WAVELENGTHS, full_turn(4, 5), 130, 90), noise=2))
    problem = Interferometry(InterferometryProblem(stack=str(tmp_path), noise=2.0, **turn))
    height = problem.stack.orientation.apply(height, (0, 1))
    rows, columns = (index.ravel() for index in np.indices(height.shape))
    samples = problem.samples(0, height.shape[0], 0, height.shape[1], rows, columns)
    batch = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in samples.items()}
    value = torch.from_numpy(height.ravel()[:, None]).float()
    assert float(problem.loss(Jet(value[None], "value", 2), batch)[0].mean()) == pytest.approx(1, abs=0.025)
    residual = problem.map("residual", (10, 60, 20, 90), height[10:60, 20:90, None])
    assert np.sqrt(np.mean(residual**2)) == pytest.approx(2.0, rel=0.05)


def test_a_wafer_behind_a_carrier_is_fitted_as_without_one(tmp_path, capsys):
    errors = []
    for name, words in (("plain", []), ("tilted", ["--carrier", "310", "-270.5"])):
        stack, run = tmp_path / name, str(tmp_path / f"run-{name}")
        assert not cli(["synth", str(stack), "--size", "240x180", "--noise", "2", "--seed", "1", *words])
        recipe = ["--config", "recipes/wafer.yaml", "--problem.stack", str(stack), "--output", run]
        assert train([*recipe, "--start.shifts", "2", "--start.wiener", "0", "--training.steps", "2"]) == 0
        capsys.readouterr()
        assert not cli(["evaluate", run])
        errors.append(json.loads(capsys.readouterr().out)["rmse"])
    assert yaml.safe_load((tmp_path / "tilted" / "stack.yaml").read_text())["carrier_nm_per_px"] == [310.0, -270.5]
    truths = [open_source(tmp_path / name / "height_true.npy").read(0, 180, 0, 240) for name in ("plain", "tilted")]
    np.testing.assert_array_equal(*truths)
    assert errors[1] == pytest.approx(errors[0], rel=0.1)
