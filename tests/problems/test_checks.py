"""Stacks that cannot be what they say are refused with one line that names the way out."""

import numpy as np
import pytest
from interferograms import RANGE, WAVELENGTHS, camera, expose, full_turn, wafer, write_stack, wrong_steps

from cpikan_hr.cli import main as cli
from cpikan_hr.data.stack import open_stack
from cpikan_hr.errors import UserError
from cpikan_hr.problems import Interferometry
from cpikan_hr.problems.calibration import calibrate, doubts
from cpikan_hr.problems.checks import repeats_after_um
from cpikan_hr.problems.noise import Noise
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


def calibrated(tmp_path, frames, steps, wavelengths=WAVELENGTHS, **keys):
    return calibrate(open_stack(write_stack(tmp_path, frames, wavelengths, steps, **(KEYS | keys))))


def exchanged(frames, *pairs):
    """With these frames, counted through all wavelengths, in each other's place."""
    flat = frames.reshape(-1, *frames.shape[2:]).copy()
    for one, other in pairs:
        flat[[one, other]] = flat[[other, one]]
    return flat.reshape(frames.shape)


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([[1, 3]], "with frames 1 and 3 exchanged"),
        ([[3, 4]], "with frames 3 and 4 exchanged"),
        ([[2, 5]], "with frames 2 and 5 exchanged"),
        ([[0, 4], [1, 5], [2, 6], [3, 7]], r"with the wavelengths in the order \[1, 0, 2, 3\]"),
    ],
)
def test_frames_in_each_other_s_place_are_named(order, message, tmp_path):
    frames = exchanged(wafer((200, 240), full_turn(4, 4), noise=2)[1], *order)
    with pytest.raises(UserError, match=message):
        calibrated(tmp_path, frames, full_turn(4, 4))


@pytest.mark.parametrize("seed", range(5))
def test_frames_in_no_order_are_refused(seed, tmp_path):
    frames = wafer((200, 240), full_turn(4, 4), noise=2)[1]
    flat = frames.reshape(16, *frames.shape[2:])[np.random.default_rng(seed).permutation(16)]
    with pytest.raises(UserError, match="do not fit fringes of these phase steps|do not agree|does not fit the model"):
        calibrated(tmp_path, flat.reshape(frames.shape), full_turn(4, 4))


@pytest.mark.parametrize("layout", [(1, 8), (1, 12), (2, 8)])
def test_many_frames_in_no_order_are_refused(layout, tmp_path):
    """The same wrong order for every wavelength, of which chance explains little more."""
    wavelengths, steps = WAVELENGTHS[: layout[0]], full_turn(*layout)
    frames = wafer((200, 240), steps, wavelengths, noise=2)[1]
    for seed in range(6):
        order = np.random.default_rng(seed).permutation(layout[1])
        with pytest.raises(UserError, match="do not fit fringes of these phase steps|does not fit the model"):
            calibrated(tmp_path, frames[:, order], steps, wavelengths)


def test_frames_in_no_order_are_refused_where_some_are_missing(tmp_path):
    steps, frames = full_turn(4, 4), wafer((200, 240), full_turn(4, 4), noise=2)[1]
    kept = [[0, 1, 2], [1, 2, 3], [0, 1, 2, 3], [0, 2, 3]]
    few, there = [frames[j][k] for j, k in enumerate(kept)], [steps[j][k] for j, k in enumerate(kept)]
    calibrated(tmp_path, few, there)
    few[2] = few[2][[0, 2, 1, 3]]
    with pytest.raises(UserError, match=r"those of wavelength 2 \(6.05 um\) do not fit fringes"):
        calibrated(tmp_path, few, there)


def test_steps_in_degrees_and_other_wavelengths_are_refused(tmp_path):
    frames = wafer((200, 240), full_turn(4, 4), noise=2)[1]
    with pytest.raises(UserError, match=r"\(are they in degrees\?\)"):
        calibrated(tmp_path, frames, np.degrees(full_turn(4, 4)))
    with pytest.raises(UserError, match="the heights that the wavelengths show do not agree"):
        calibrated(tmp_path, frames, full_turn(4, 4), [5.0, 5.01, 5.02, 5.03])


def test_random_pixels_are_refused(tmp_path):
    frames = np.random.default_rng(0).integers(1, 255, (4, 4, 50, 60), dtype=np.uint8)
    with pytest.raises(UserError, match="do not fit fringes of these phase steps"):
        calibrated(tmp_path, frames, full_turn(4, 4))


def test_a_flat_mirror_is_not_refused(tmp_path):
    """All its pixels have one phase, so every frame is the same all over."""
    frames = camera(expose(np.full((50, 60), 123.0), WAVELENGTHS, full_turn(4, 4)), noise=2)
    assert calibrated(tmp_path, frames, full_turn(4, 4)).misfit.scatter == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("noise", [0.5, 2, 10, 20])
def test_the_scatter_is_the_noise(noise, tmp_path):
    frames = wafer((200, 240), full_turn(4, 4), noise=noise)[1]
    found = calibrated(tmp_path, frames, full_turn(4, 4)).misfit.scatter
    assert found == pytest.approx(np.sqrt(noise**2 + 1 / 12), rel=0.05)


def test_another_noise_than_the_frames_have_is_said(tmp_path):
    shared = calibrated(tmp_path, wafer((200, 240), full_turn(4, 4), noise=5)[1], full_turn(4, 4))
    assert not doubts(shared) and not doubts(shared, Noise(5.0)) and not doubts(shared, Noise(4.0))
    for wrong in (2.0, 20.0):
        (line,) = doubts(shared, Noise(wrong))
        assert line.startswith("the frames scatter by 5 grey levels") and "give the noise they have" in line
    problem = Interferometry(InterferometryProblem(stack=str(tmp_path), noise=2.0))
    assert problem.note().startswith(f"warning: {tmp_path}") and "scatter by 5 grey levels" in problem.note()
    assert Interferometry(InterferometryProblem(stack=str(tmp_path), noise=5.0)).note() is None


def test_wavelengths_too_close_for_the_noise_are_said(tmp_path, capfd):
    """A wavelength pair that tells all orders apart without noise, and hardly any with it."""
    steps, near = full_turn(2, 4), (5.0, 5.05)
    height, frames = wafer((200, 240), steps, near, noise=2)
    shared = calibrated(tmp_path, frames, steps, near)
    out = tmp_path / "h.npy"
    assert cli(["decode", str(tmp_path), "--out", str(out)]) == 0
    wrong = (np.abs(np.load(out).squeeze() - height) > 1000).mean()
    assert shared.misfit.wrong == pytest.approx(wrong, rel=0.4) and wrong > 0.2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and said.startswith("warning: ") and "in a wrong fringe order" in said
    clean = wafer((200, 240), steps, near)[1]
    assert not doubts(calibrated(tmp_path, clean, steps, near))


BLIND = {  # frames that show nothing, and what the message says
    "all the same": (lambda f: np.full_like(f, 100), "there are no fringes"),
    "one frame": (lambda f: np.repeat(f[:1, :1], 4, 0).repeat(4, 1), "there are no fringes"),
    "white": (lambda f: np.full_like(f, 255), r"no pixel has 3 samples of 2 wavelengths .* clipped at 0 or 255"),
    "half clipped": (lambda f: np.concatenate([np.full_like(f[:, :2], 255), f[:, 2:]], 1), "no pixel has 3 samples"),
}


@pytest.mark.parametrize("case", BLIND)
def test_frames_that_show_nothing_are_refused(case, tmp_path):
    spoil, message = BLIND[case]
    with pytest.raises(UserError, match=message):
        calibrated(tmp_path, spoil(wafer((50, 60), full_turn(4, 4))[1]), full_turn(4, 4))


def test_a_mask_without_a_valid_pixel_is_refused(tmp_path):
    np.save(tmp_path / "mask.npy", np.zeros((50, 60), np.uint8))
    with pytest.raises(UserError, match="mask: no pixel is valid"):
        calibrated(tmp_path, wafer((50, 60), full_turn(4, 4))[1], full_turn(4, 4), mask="mask.npy")


def test_one_good_corner_is_enough(tmp_path):
    """All other pixels are clipped in two frames of each wavelength; only those nine have heights."""
    height, frames = wafer((50, 60), full_turn(4, 4))
    corner = frames[:, :2, :3, :3].copy()
    frames[:, :2] = 255
    frames[:, :2, :3, :3] = corner
    assert calibrated(tmp_path, frames, full_turn(4, 4)).misfit is None
    assert cli(["decode", str(tmp_path), "--out", str(tmp_path / "h.npy")]) == 0
    found = np.load(tmp_path / "h.npy").reshape(50, 60)
    assert np.abs(found - height)[:3, :3].max() < 20 and np.isfinite(found).sum() == 9


def test_few_lit_pixels_are_enough(tmp_path):
    """4 % of the frame has fringes, the rest is dark; the mask does not say so."""
    frames = np.full((4, 4, 200, 240), 8.0)
    frames[:, :, 80:125, 90:135] = wafer((200, 240), full_turn(4, 4))[1][:, :, 80:125, 90:135]
    found = calibrated(tmp_path, camera(frames, noise=2), full_turn(4, 4)).misfit
    assert found.scatter == pytest.approx(2, rel=0.1) and found.wrong < 0.01


def test_a_wavelength_without_fringes_is_no_other_order(tmp_path):
    frames = wafer((200, 240), full_turn(4, 4))[1].astype(float)
    frames[0] = frames[0].mean(0)
    found = calibrated(tmp_path, camera(frames, noise=2), full_turn(4, 4)).misfit
    assert found.scatter == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("seed", range(4))
def test_much_noise_is_no_other_order(seed, tmp_path):
    """Repair finds most orders again, even then."""
    steps, frames = full_turn(4, 4), wafer((120, 140), full_turn(4, 4), noise=40, seed=seed)[1]
    (line,) = doubts(calibrated(tmp_path, frames, steps))
    assert "in a wrong fringe order" in line


def test_steps_that_are_refined_may_be_far_off_before(tmp_path):
    true = wrong_steps(2, 3, seed=0, rms=0.2)
    frames = wafer((200, 240), true, WAVELENGTHS[:2])[1]
    found = calibrate(open_stack(write_stack(tmp_path, frames, WAVELENGTHS[:2], full_turn(2, 3), **KEYS)), "refine")
    assert np.abs(found.steps - true).max() < 0.02
    turned = wafer((200, 240), full_turn(4, 4))[1].swapaxes(0, 1)
    with pytest.raises(UserError, match="step-major"):
        calibrate(open_stack(write_stack(tmp_path, turned, WAVELENGTHS, full_turn(4, 4), **KEYS)), "refine")


def test_heights_beyond_the_range_are_said(tmp_path):
    height, frames = wafer((200, 240), full_turn(4, 4), noise=2)
    beyond = (np.abs(height) > 5000).mean()
    assert 0.2 < beyond < 0.5
    shared = calibrated(tmp_path, frames, full_turn(4, 4), height_range_um=[-5, 5])
    assert shared.misfit.stray == pytest.approx(beyond, abs=0.15)
    assert any("check height_range_um" in line for line in doubts(shared))


def test_what_could_not_be_looked_at_is_said(tmp_path):
    """One frame that is black everywhere leaves no pixel whose samples can all be used."""
    frames = wafer((200, 240), full_turn(4, 4), noise=2)[1]
    frames[0, 1] = 0
    shared = calibrated(tmp_path, frames, full_turn(4, 4))
    assert shared.misfit is None and "was looked at" in doubts(shared)[0]
