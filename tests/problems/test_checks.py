"""Stacks that cannot be what they say are refused with one line that names the way out."""

import numpy as np
import pytest
from interferograms import RANGE, WAVELENGTHS, full_turn, wafer, write_stack, wrong_steps

from cpikan_hr.cli import main as cli
from cpikan_hr.data.stack import open_stack
from cpikan_hr.errors import UserError
from cpikan_hr.problems import Interferometry
from cpikan_hr.problems.calibration import calibrate
from cpikan_hr.problems.checks import repeats_after_um
from cpikan_hr.recipe import InterferometryProblem

KEYS = {"height_range_um": list(RANGE)}
LAID_OUT = {  # how frames [J, K, h, w] were listed, and what the message says of it
    "reversed": (lambda f: f[:, ::-1], r"they fit \(\d+%\) if they are with the steps in the order \[3, 2, 1, 0\]"),
    "swapped": (lambda f: f[:, [0, 2, 1, 3]], r"with the steps in the order \[0, 2, 1, 3\]"),
    "rotated": (lambda f: f[:, [1, 2, 3, 0]], r"with the steps in the order \[3, 0, 1, 2\].*the sign of the heights"),
    "step-major": (lambda f: f.swapaxes(0, 1), "if they are step-major"),
    "wavelengths": (lambda f: f[::-1], "if they are with the wavelengths in reverse"),
}


@pytest.mark.parametrize("case", LAID_OUT)
@pytest.mark.parametrize("noise", [2, 5])
def test_frames_in_another_order_are_recognised_and_the_order_is_named(case, noise, tmp_path):
    lay_out, message = LAID_OUT[case]
    frames = wafer((200, 240), full_turn(4, 4), noise=noise)[1]
    folder = write_stack(tmp_path, lay_out(frames).reshape(4, 4, 200, 240), WAVELENGTHS, full_turn(4, 4), **KEYS)
    with pytest.raises(UserError, match=message) as error:
        calibrate(open_stack(folder))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("noise", "rms"), [(0, 0.0), (10, 0.0), (2, 0.2), (0, 0.3)])
def test_noise_and_wrong_steps_are_not_taken_for_another_order(noise, rms, tmp_path):
    frames = wafer((200, 240), wrong_steps(4, 4, seed=4, rms=rms), noise=noise)[1]
    found = calibrate(open_stack(write_stack(tmp_path, frames, WAVELENGTHS, full_turn(4, 4), **KEYS)))
    assert np.array_equal(found.steps, full_turn(4, 4)) and found.harmonic is None


def test_both_entry_points_refuse_with_one_line(tmp_path, capfd):
    frames = wafer((60, 80), full_turn(4, 4))[1].swapaxes(0, 1)
    folder = write_stack(tmp_path, frames, WAVELENGTHS, full_turn(4, 4), **KEYS)
    assert cli(["decode", str(folder), "--out", str(tmp_path / "h.npy")]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "step-major" in said and not (tmp_path / "h.npy").exists()
    with pytest.raises(UserError, match="step-major"):
        Interferometry(InterferometryProblem(stack=str(folder)))


def test_a_range_that_the_wavelengths_do_not_resolve_is_refused(tmp_path):
    frames = wafer((60, 80), full_turn(2, 4), WAVELENGTHS[:2])[1]
    say = dict(height_range_um=[-13.7, 13.7])
    calibrate(open_stack(write_stack(tmp_path, frames, WAVELENGTHS[:2], full_turn(2, 4), **say)))
    say["height_range_um"] = [-14, 14]
    folder = write_stack(tmp_path, frames, WAVELENGTHS[:2], full_turn(2, 4), **say)
    with pytest.raises(UserError, match=r"repeat after 27.5 um \(an unambiguous range of -13.75 to 13.75 um\).* 28 um"):
        calibrate(open_stack(folder))


def test_heights_repeat_where_all_wavelengths_fit_a_whole_number_of_times():
    assert repeats_after_um([5.0, 5.5], 100) == pytest.approx(27.5)
    assert repeats_after_um([5.0, 5.5], 27.5) is None
    assert repeats_after_um([5.0, 5.5, 6.05, 6.655], 100) is None  # together they reach further than any pair
    assert repeats_after_um([0.084, 0.090, 0.096], 10) == pytest.approx(5.04)
    assert repeats_after_um([5.0, 5.0], 10) == pytest.approx(2.5)


def test_random_pixels_are_not_explained_by_any_order(tmp_path):
    frames = np.random.default_rng(0).integers(1, 255, (4, 4, 50, 60), dtype=np.uint8)
    found = calibrate(open_stack(write_stack(tmp_path, frames, WAVELENGTHS, full_turn(4, 4), **KEYS)))
    assert np.array_equal(found.steps, full_turn(4, 4)) and found.harmonic is None
