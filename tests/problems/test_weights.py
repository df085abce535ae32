"""What a sample is worth: clipped, missing and noisy ones, in the classical decode and in the loss."""

import numpy as np
import pytest
import torch
from interferograms import RANGE, WAVELENGTHS, camera, expose, full_turn, wafer, write_stack

from cpikan_hr.data.stack import open_stack
from cpikan_hr.jets import Jet
from cpikan_hr.problems import Interferometry
from cpikan_hr.problems.decode import decode_stack, decode_window
from cpikan_hr.problems.noise import Noise, Weighing
from cpikan_hr.problems.phases import Demodulator
from cpikan_hr.recipe import InterferometryProblem


def test_weighted_pixels_are_those_of_a_general_least_squares_fit():
    rng = np.random.default_rng(0)
    steps = full_turn(2, 5) + rng.uniform(-0.2, 0.2, (2, 5))
    frames = rng.uniform(0, 255, (2, 5, 60))
    weights = rng.uniform(0.1, 2, (2, 5, 60))
    weights[0, :, :10] = 0.7  # equal: the fast path
    weights[1, 1:3, ::4] = 0
    found = Demodulator([5.0, 5.5], steps).demodulate(torch.from_numpy(frames), torch.from_numpy(weights))
    for j, wavelength in enumerate([5.0, 5.5]):
        model = np.stack([np.ones(5), np.cos(steps[j]), -np.sin(steps[j])], axis=1)
        for i in range(60):
            root = np.sqrt(weights[j, :, i])
            a, c, s = np.linalg.lstsq(model * root[:, None], frames[j, :, i] * root, rcond=None)[0]
            phase, modulation = np.arctan2(s, c), np.hypot(c, s)
            covariance = np.linalg.inv(model.T @ (weights[j, :, i, None] * model))
            along = np.array([0, -np.sin(phase), np.cos(phase)]) / modulation
            variance = along @ covariance @ along
            if (weights[j, :, i] == weights[j, 0, i]).all():  # there the mean over all phases is used
                variance = (covariance[1, 1] + covariance[2, 2]) / (2 * modulation**2)
            height_variance = variance * (1000 * wavelength / (4 * np.pi)) ** 2
            expected = a, modulation, phase / (2 * np.pi), 1 / height_variance
            np.testing.assert_allclose([each[j, i] for each in found], expected, rtol=1e-8, atol=1e-10)


def test_saturated_samples_are_left_out():
    """Frames too bright for 8 bits: the tops of the fringes are cut, the other samples still give the heights."""
    height = 1000 * np.random.default_rng(0).uniform(-13, 13, (60, 100))
    steps = full_turn(4, 5)
    frames = camera(expose(height, WAVELENGTHS, steps, 150, 120))
    assert (frames == 255).any(axis=(0, 1)).mean() > 0.9
    cut, whole = (decode_window(frames, WAVELENGTHS, steps, RANGE, bit_depth=bits) for bits in (None, 8))
    assert np.abs(whole.height_nm - height).max() < 5 < np.abs(cut.height_nm - height).max()
    dark = camera(expose(height, WAVELENGTHS, steps, 100, 120))  # and cut at the black level
    assert np.abs(decode_window(dark, WAVELENGTHS, steps, RANGE, bit_depth=8).height_nm - height).max() < 5


@pytest.mark.parametrize("lost", [0, 3])
def test_a_wavelength_with_too_few_samples_drops_out_and_quality_says_so(lost):
    """The longest wavelength too, from which the candidate orders are counted otherwise."""
    height = 1000 * np.random.default_rng(1).uniform(-13, 13, (20, 50))
    steps = full_turn(4, 4)
    frames = camera(expose(height, WAVELENGTHS, steps))
    frames[lost, :2, :, :25] = 255
    decoded = decode_window(frames, WAVELENGTHS, steps, RANGE, bit_depth=8)
    np.testing.assert_allclose(decoded.height_nm, height, atol=5)
    assert decoded.sigma_nm[:, :25].min() > 1.07 * decoded.sigma_nm[:, 25:].max()
    assert decoded.quality[:, :25].mean() < 0.8 * decoded.quality[:, 25:].mean()
    frames[:, :2] = 0
    nothing = decode_window(frames, WAVELENGTHS, steps, RANGE, bit_depth=8)
    assert np.isinf(nothing.sigma_nm).all() and (nothing.quality == 0).all()


def shot_frames(rng, n, read=1.5, gain=0.5):
    clean = expose(np.full((1, n), 3210.0), WAVELENGTHS, full_turn(4, 5), 100, 85)
    return clean + rng.normal(0, 1, clean.shape) * np.sqrt(read**2 + gain * clean)


def test_sigma_predicts_the_scatter_of_shot_noise_and_weights_lower_it():
    frames, steps = shot_frames(np.random.default_rng(2), 40000), full_turn(4, 5)
    weighted = decode_window(frames, WAVELENGTHS, steps, RANGE, noise=Noise(1.5, 0.5, quantised=False))
    plain = decode_window(frames, WAVELENGTHS, steps, RANGE)
    assert weighted.height_nm.std() == pytest.approx(weighted.sigma_nm.mean(), rel=0.03)
    assert weighted.height_nm.std() < 0.97 * plain.height_nm.std()
    assert abs(weighted.height_nm.mean() - 3210) < 4 * weighted.height_nm.std() / 200


def test_the_weights_of_samples_are_their_inverse_variances():
    frames = camera(shot_frames(np.random.default_rng(3), 2000))
    frames[2, 3, 0, :7] = 255
    steps = full_turn(4, 5)
    steps[1, 4] = np.nan  # there is no such frame
    weighing = Weighing(Demodulator(WAVELENGTHS, steps), Noise(1.5, 0.5), 8)
    weights = weighing.weights(torch.from_numpy(frames[:, :, 0]).float()).numpy()
    expected = 1 / (1.5**2 + 1 / 12 + 0.5 * expose(np.full((1, 2000), 3210.0), WAVELENGTHS, full_turn(4, 5), 100, 85))
    assert (weights[2, 3, :7] == 0).all() and (weights[1, 4] == 0).all()
    weights[2, 3, :7], weights[1, 4] = weights[2, 3, 7:14], expected[1, 4, 0]
    np.testing.assert_allclose(weights.mean(axis=-1), expected[..., 0, 0], rtol=0.1)


def loss_at(problem, height, shape):
    rows, columns = (index.ravel() for index in np.indices(shape))
    samples = problem.samples(0, shape[0], 0, shape[1], rows, columns)
    batch = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in samples.items()}
    value = torch.as_tensor(height.ravel()[:, None], dtype=torch.float32)
    return problem.loss(Jet(value[None], "value", 2), batch)


@pytest.mark.parametrize("case", ["equal", "shot", "clipped", "missing", "masked"])
def test_the_loss_is_one_at_the_true_height(case, tmp_path):
    rng = np.random.default_rng(4)
    shape, steps, keys, options = (120, 150), full_turn(4, 5), {}, {"noise": 2.0}
    height, gain = 1000 * rng.uniform(-13, 13, shape), 0.0
    clean = expose(height, WAVELENGTHS, steps, 130, 125 if case == "clipped" else 90)
    if case == "shot":
        gain = options["gain"] = 0.4
    frames = list(camera(clean + np.sqrt(4 + gain * clean) * rng.normal(size=clean.shape)))
    if case == "missing":
        steps = [row[:4] if j % 2 else row for j, row in enumerate(steps)]
        frames = [each[:4] if j % 2 else each for j, each in enumerate(frames)]
    if case == "masked":
        keys["mask"] = {"circle": [60, 75, 40]}
    folder = write_stack(tmp_path, frames, WAVELENGTHS, steps, height_range_um=list(RANGE), **keys)
    problem = Interferometry(InterferometryProblem(stack=str(folder), **options))
    loss, error = loss_at(problem, height, shape)
    valid = problem.stack.mask(0, *shape[:1], 0, shape[1]).ravel()
    assert (loss[~valid] == 0).all() and (error[~valid] == 0).all()
    assert float(loss[valid].mean()) == pytest.approx(1, abs=0.025)
    assert float(loss_at(problem, height + 100, shape)[0][valid].mean()) > 5


def test_a_robust_loss_bounds_what_one_bad_sample_pulls(tmp_path):
    rng = np.random.default_rng(5)
    shape, steps = (60, 80), full_turn(4, 4)
    height = 1000 * rng.uniform(-13, 13, shape)
    frames = camera(expose(height, WAVELENGTHS, steps, 120, 80), noise=1)
    clean = frames.copy()
    frames[1, 2] = np.minimum(frames[1, 2] + 60, 254)  # a reflection in one frame
    folder = write_stack(tmp_path, frames, WAVELENGTHS, steps, height_range_um=list(RANGE))
    (tmp_path / "clean").mkdir()
    without = write_stack(tmp_path / "clean", clean, WAVELENGTHS, steps, height_range_um=list(RANGE))

    def minimum(path, robust):
        """The height offset at which the mean loss of these pixels is least."""
        options = InterferometryProblem(stack=str(path), noise=1.0, robust=robust)
        offsets = np.arange(-60, 61, 3.0)
        problem = Interferometry(options)
        losses = [loss_at(problem, height + offset, shape)[0] for offset in offsets]
        return offsets[torch.stack(losses).argmin(dim=0).numpy()], losses[20].mean()

    square, robust = (np.abs(minimum(folder, limit)[0]).mean() for limit in (None, 2.0))
    assert robust < 0.6 * square
    assert float(minimum(without, 3.0)[1]) == pytest.approx(1, abs=0.05)


def test_a_robust_start_leaves_out_pixels_with_outliers(tmp_path):
    height, frames = wafer((120, 160), full_turn(4, 4), noise=2)
    rng = np.random.default_rng(6)
    hit = rng.random(frames.shape) < 0.01
    bad = np.where(hit, np.clip(frames.astype(int) + rng.choice([-60, 60], frames.shape), 1, 254), frames)
    folder = write_stack(tmp_path, bad.astype(np.uint8), WAVELENGTHS, full_turn(4, 4), height_range_um=list(RANGE))

    def target(robust, stride):
        problem = Interferometry(InterferometryProblem(stack=str(folder), robust=robust))
        return problem.target(0, 120, 0, 160, stride)

    moved = (np.abs(bad.astype(int) - frames) > 40).any((0, 1))
    plain, robust, thin = target(None, 1), target(3.0, 1), target(3.0, 3)
    assert plain.weight[moved].mean() > 0.9 and np.abs(plain.values[..., 0] - height)[plain.weight > 0].max() > 1000
    assert robust.weight[moved].mean() < 0.01 and robust.weight[~hit.any((0, 1))].mean() > 0.999
    assert np.abs(robust.values[..., 0] - height)[robust.weight > 0].max() < 100
    assert np.array_equal(thin.weight, robust.weight[::3, ::3])


def test_wavelengths_with_different_steps_and_numbers_of_them_just_work(tmp_path):
    kept = [[0, 1, 2], [1, 2, 3], [0, 1, 2, 3], [0, 2, 3]]
    height, frames = wafer((150, 200), full_turn(4, 4))
    steps = [full_turn(4, 4)[j][k] for j, k in enumerate(kept)]
    few = [frames[j][k] for j, k in enumerate(kept)]
    stack = open_stack(write_stack(tmp_path, few, WAVELENGTHS, steps, height_range_um=list(RANGE)))
    assert (stack.J, stack.K, stack.present.sum()) == (4, 4, 13)
    out = np.load(decode_stack(stack, tmp_path / "h.npy")[0])
    assert np.sqrt(np.mean((out - height) ** 2)) < 1.3
