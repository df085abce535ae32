"""The classical decode against heights that are known exactly, and on a real interferogram."""

import os

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from interferograms import WAVELENGTHS, expose, full_turn

from cpikan_hr.data.source import open_source
from cpikan_hr.data.stack import open_stack
from cpikan_hr.data.synth import synth
from cpikan_hr.errors import UserError
from cpikan_hr.problems.decode import StackDecoder, decode_stack, decode_window
from cpikan_hr.problems.orders import unambiguous_range_um


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), K=st.integers(3, 7), wavelengths=st.sampled_from([(5.0, 5.5), WAVELENGTHS]))
def test_exact_frames_with_any_steps_give_the_exact_height(seed, K, wavelengths):
    rng = np.random.default_rng(seed)
    J, limits = len(wavelengths), (-13.0, 13.0)
    height = 1000 * rng.uniform(*limits, (5, 40))
    steps = np.sort(full_turn(J, K) + rng.uniform(-0.3, 0.3, (J, K)), axis=1)
    background, modulation = rng.uniform(100, 150, (J, 1, 5, 40)), rng.uniform(50, 75, (J, 1, 5, 40))
    decoded = decode_window(expose(height, wavelengths, steps, background, modulation), wavelengths, steps, limits)
    np.testing.assert_allclose(decoded.height_nm, height, atol=1e-6)
    np.testing.assert_allclose(decoded.background, background[:, 0], rtol=1e-9)
    np.testing.assert_allclose(decoded.modulation, modulation[:, 0], rtol=1e-9)
    assert decoded.quality.min() > 0.3 and decoded.quality.max() <= 1


def test_without_a_range_the_unambiguous_one_is_used():
    low, high = unambiguous_range_um((5.0, 5.5))
    assert high == -low == pytest.approx(55 / 4)
    height = np.linspace(1000 * low + 1, 1000 * high - 1, 500)[None]
    decoded = decode_window(expose(height, (5.0, 5.5), full_turn(2, 4)), (5.0, 5.5), full_turn(2, 4))
    np.testing.assert_allclose(decoded.height_nm, height, atol=1e-6)


@pytest.mark.parametrize("dark", range(4))
def test_a_wavelength_without_fringes_misleads_nobody(dark):
    """Its phase is noise, from which the orders of the others must not be counted."""
    rng = np.random.default_rng(2)
    height = 1000 * rng.uniform(-13, 13, (1, 400))
    modulation = np.full((4, 1, 1, 1), 70.0)
    modulation[dark] = 1e-3
    frames = expose(height, WAVELENGTHS, full_turn(4, 4), 120, modulation)
    frames[dark] += rng.normal(0, 1e-2, frames[dark].shape)
    decoded = decode_window(frames, WAVELENGTHS, full_turn(4, 4), (-13.5, 13.5))
    np.testing.assert_allclose(decoded.height_nm, height, atol=0.01)


def test_the_search_is_as_good_as_an_exhaustive_fit_on_a_fine_grid():
    """Independent reference: the height on a 1 nm grid that minimises the weighted wrapped phase residuals."""
    rng = np.random.default_rng(0)
    steps, limits = full_turn(4, 4), (-13.5, 13.5)
    height = 1000 * rng.uniform(-13, 13, (1, 60))
    frames = expose(height, WAVELENGTHS, steps, 60, 12.0) + rng.normal(0, 2.5, (4, 4, 1, 60))
    grid = np.arange(1000 * limits[0], 1000 * limits[1])
    best = np.empty(60)
    for i in range(60):
        cost = 0
        for j, wavelength in enumerate(WAVELENGTHS):
            f = frames[j, :, 0, i]
            s, c = f[3] - f[1], f[0] - f[2]  # B sin and B cos, twice
            k = 4 * np.pi / (1000 * wavelength)
            residual = np.angle(np.exp(1j * (k * grid - np.arctan2(s, c))))
            cost = cost + (s * s + c * c) * residual**2
        best[i] = grid[np.argmin(cost)]
    decoded = decode_window(frames, WAVELENGTHS, steps, limits)
    np.testing.assert_allclose(decoded.height_nm[0], best, atol=0.51)


def test_sigma_predicts_the_scatter_and_quality_falls_with_noise():
    rng = np.random.default_rng(1)
    steps = full_turn(4, 5) + np.array([[0], [0.1], [0.2], [0.3]])
    modulation = np.array([80, 60, 40, 70])[:, None, None, None]
    frames = expose(np.full((200, 200), 3210.0), WAVELENGTHS, steps, 120, modulation)
    noisy = frames + rng.normal(0, 1.5, frames.shape)
    decoded = decode_window(noisy, WAVELENGTHS, steps, (-13.5, 13.5))
    assert decoded.height_nm.std() == pytest.approx(1.5 * decoded.sigma_nm.mean(), rel=0.03)
    assert decoded.quality.mean() < decode_window(frames, WAVELENGTHS, steps, (-13.5, 13.5)).quality.mean()


def test_integer_frames_are_decoded_in_float32_and_flat_ones_are_not_trusted():
    frames = np.rint(expose(np.full((3, 4), 1000.0), WAVELENGTHS, full_turn(4, 4))).astype(np.uint8)
    frames[..., 0] = 77
    decoded = decode_window(frames, WAVELENGTHS, full_turn(4, 4), (-13.5, 13.5))
    assert decoded.height_nm.dtype == np.float32 and np.isfinite(decoded.height_nm).all()
    np.testing.assert_allclose(decoded.height_nm[:, 1:], 1000, atol=3)
    assert (decoded.quality[:, 0] < 1e-3).all() and (decoded.sigma_nm[:, 0] > 1e3).all()


def test_steps_that_do_not_determine_a_phase_are_refused():
    steps = np.tile([0.0, np.pi, 2 * np.pi, 3 * np.pi], (4, 1))
    with pytest.raises(UserError, match="wavelength 0 do not determine a phase"):
        decode_window(np.zeros((4, 4, 2, 2)), WAVELENGTHS, steps, None)


@pytest.fixture(scope="module")
def wafer(tmp_path_factory):
    return synth(tmp_path_factory.mktemp("wafer") / "stack", size=(700, 1200), noise=2, seed=3)


@pytest.mark.parametrize("suffix", ["tif", "npy"])
def test_a_noisy_wafer_decodes_to_a_few_nanometres_without_order_errors(wafer, tmp_path, suffix):
    stack, windows = open_stack(wafer), []
    out, quality = decode_stack(
        stack, tmp_path / f"h.{suffix}", quality=tmp_path / "q.npy", progress=lambda i, n: windows.append((i, n))
    )
    truth = open_source(stack.reference).read(0, 700, 0, 1200)
    error = (open_source(out).read(0, 700, 0, 1200) - truth).astype(np.float64)
    assert np.sqrt(np.mean(error**2)) < 9
    assert (np.abs(error) > 500).mean() < 1e-5
    assert 0 <= np.load(quality).min() and np.load(quality).max() <= 1
    assert windows[-1] == (6, 6) and sorted(os.listdir(tmp_path)) == sorted([out.name, "q.npy"])


def test_pixels_outside_the_mask_become_nan(wafer, tmp_path):
    content = yaml.safe_load((wafer / "stack.yaml").read_text())
    content |= {"mask": {"circle": [350, 600, 100]}, "frames": str(wafer / "bucket_*.bmp"), "reference": None}
    (tmp_path / "stack.yaml").write_text(yaml.safe_dump(content))
    stack = open_stack(tmp_path)
    height = np.load(decode_stack(stack, tmp_path / "h.npy")[0])
    np.testing.assert_array_equal(np.isfinite(height), stack.mask(0, 700, 0, 1200))


def test_a_failure_leaves_no_map(wafer, tmp_path):
    content = yaml.safe_load((wafer / "stack.yaml").read_text())
    content |= {"bit_depth": 7, "frames": str(wafer / "bucket_*.bmp"), "reference": None}
    (tmp_path / "stack.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match=r"above 2\*\*7 - 1"):
        decode_stack(open_stack(tmp_path), tmp_path / "h.tif", quality=tmp_path / "q.tif")
    assert os.listdir(tmp_path) == ["stack.yaml"]
    content |= {"bit_depth": 8, "phase_steps_rad": None}
    (tmp_path / "stack.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="phase_steps_rad: unknown"):
        decode_stack(open_stack(tmp_path), tmp_path / "h.tif")


def test_one_wavelength_is_unwrapped_to_the_height_up_to_whole_orders(tmp_path):
    y, x = np.mgrid[:90, :110] + 0.5
    height = 0.15 * (y - 40) ** 2 - 0.08 * (x - 50) ** 2 + 3 * x
    np.save(tmp_path / "f.npy", expose(height, (0.654,), full_turn(1, 6))[0])
    keys = {"frames": "f.npy", "wavelengths_um": [0.654], "phase_steps_rad": full_turn(1, 6)[0].tolist()}
    keys |= {"pixel_pitch_um": 270.0, "mask": {"circle": [45, 55, 40]}}
    (tmp_path / "stack.yaml").write_text(yaml.safe_dump(keys))
    decoded = StackDecoder(open_stack(tmp_path)).decode(0, 90, 0, 110)
    valid = np.hypot(y - 45, x - 55) <= 40
    expected = height[valid] - 327 * np.round(height[valid].mean() / 327)  # whole orders only: the frames still fit
    np.testing.assert_allclose(decoded.height_nm[valid], expected, atol=1e-6)
    assert np.isnan(decoded.height_nm[~valid]).all() and (decoded.quality[~valid] == 0).all()
    np.testing.assert_array_equal(
        np.load(decode_stack(open_stack(tmp_path), tmp_path / "h.npy")[0]), decoded.height_nm.astype(np.float32)
    )


def test_the_real_mirror_is_a_smooth_surface_that_explains_its_frames(mirror):
    assert (mirror.J, mirror.K, mirror.shape) == (1, 12, (600, 800))
    decoded = StackDecoder(mirror).decode(0, 600, 0, 800)
    valid = mirror.mask(0, 600, 0, 800)
    inside = valid[1:, :] & valid[:-1, :]
    jumps = np.abs(np.diff(decoded.height_nm, axis=0))[inside]
    assert np.percentile(jumps, 99.9) < 654 / 4  # less than half a fringe from pixel to pixel: no tears
    assert np.ptp(decoded.height_nm[valid]) > 654  # several fringes were unwrapped
    phase = 4 * np.pi * decoded.height_nm / 654
    frames = mirror.read(0, 600, 0, 800)[0].astype(np.float64)
    k = -2 * np.pi * np.arange(12) / 6
    piston = np.angle(np.exp(1j * (_phase_of(frames, k) - phase))[valid])
    model = decoded.background + decoded.modulation * np.cos(phase + piston.mean() + k[:, None, None])
    residual, signal = (frames - model)[:, valid], frames[:, valid] - decoded.background[:, valid]
    assert residual.std() < 0.35 * signal.std()


def _phase_of(frames, steps):
    """Fourier estimate for equally spaced steps."""
    return np.angle(np.tensordot(np.exp(-1j * steps), frames, axes=(0, 0)))
