"""The synthetic wafer is a pure function of seed and window, and what is written is what was rendered."""

import os
import time

import numpy as np
import pytest
import tifffile
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.measure import label

from cpikan_hr.cli import main
from cpikan_hr.data import camera as module
from cpikan_hr.data import synth as writing
from cpikan_hr.data.camera import PERFECT, Camera, Imperfections
from cpikan_hr.data.measured import MeasuredSurface
from cpikan_hr.data.scene import HEIGHT_RANGE_UM, Wafer
from cpikan_hr.data.source import open_source
from cpikan_hr.data.stack import open_stack
from cpikan_hr.data.synth import synth
from cpikan_hr.data.threads import each_in_threads
from cpikan_hr.errors import UserError
from cpikan_hr.problems.decode import decode_window

SHAPE, WAVELENGTHS = (300, 1100), (5.0, 5.5, 6.05, 6.655)


def camera(seed=0, noise=2.0, bit_depth=8, flaws=PERFECT):
    return Camera(Wafer(SHAPE, seed), WAVELENGTHS, 4, noise, bit_depth, flaws)


WHOLE = camera()
HEIGHT, FRAMES = WHOLE.scene.height_nm(0, 300, 0, 1100), WHOLE.frames(0, 300, 0, 1100)


ALL_FLAWS = Imperfections(step_error=0.1, missing=1, saturated=0.05, gain=0.2)
FLAWED = camera(flaws=ALL_FLAWS).frames(0, 300, 0, 1100)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 299), st.integers(1, 300), st.integers(0, 1099), st.integers(1, 1100))
def test_a_window_agrees_with_the_whole(y0, height, x0, width):
    window = y0, min(y0 + height, 300), x0, min(x0 + width, 1100)
    part = slice(*window[:2]), slice(*window[2:])
    np.testing.assert_array_equal(camera().scene.height_nm(*window), HEIGHT[part])
    np.testing.assert_array_equal(camera().frames(*window), FRAMES[:, *part])
    np.testing.assert_array_equal(camera(flaws=ALL_FLAWS).frames(*window), FLAWED[:, *part])


def test_noise_free_frames_obey_the_frame_model():
    frames = camera(noise=0, bit_depth=16).frames(0, 100, 0, 200).reshape(4, 4, 100, 200)
    brightness = WHOLE.scene.brightness(0, 100, 0, 200).astype(np.float64) * 65535
    height = HEIGHT[:100, :200].astype(np.float64)
    for j, wavelength in enumerate(WAVELENGTHS):
        for k in range(4):
            phase = 4 * np.pi * height / (1000 * wavelength) + np.pi / 2 * k
            expected = brightness * (module.MEAN_LEVEL + module.MODULATION * np.cos(phase))
            np.testing.assert_allclose(frames[j, k], expected, atol=0.7)


def test_noise_has_the_size_asked_for_and_differs_between_frames():
    noise = FRAMES.astype(float) - camera(noise=0).frames(0, 300, 0, 1100)
    assert abs(noise.std() - 2.0) < 0.1  # 2 levels, and two roundings
    covariance = np.corrcoef(noise.reshape(16, -1))
    assert np.abs(covariance - np.eye(16)).max() < 0.01


@pytest.mark.parametrize("seed", range(4))
def test_heights_stay_in_their_range_and_frames_are_not_saturated(seed):
    wafer = Wafer((1024, 1024), seed)
    height = wafer.height_nm(0, 1024, 0, 1024)
    assert 1000 * HEIGHT_RANGE_UM[0] < height.min() < height.max() < 1000 * HEIGHT_RANGE_UM[1]
    assert np.ptp(height) > 15_000
    brightness = wafer.brightness(0, 1024, 0, 1024)
    assert 0.29 < brightness.min() < 0.5 < 0.8 < brightness.max() <= 1
    assert (FRAMES == 255).mean() == 0


def test_wrong_steps_are_normal_about_the_nominal_ones_but_the_first_is_exact():
    cameras = [Camera(Wafer(SHAPE, s), WAVELENGTHS, 12, 0, 8, Imperfections(step_error=0.1)) for s in range(20)]
    error = np.stack([c.true_steps_rad - c.phase_steps_rad for c in cameras])
    assert not error[:, :, 0].any()
    assert abs(error[:, :, 1:].std() / 0.1 - 1) < 0.1 and abs(error[:, :, 1:].mean()) < 0.02
    np.testing.assert_array_equal(cameras[0].phase_steps_rad, np.tile(2 * np.pi * np.arange(12) / 12, (4, 1)))


def test_wrong_steps_are_what_the_frames_were_taken_with(tmp_path):
    out = synth(tmp_path / "stack", size=SHAPE, noise=0, bit_depth=16, flaws=Imperfections(step_error=0.2, missing=1))
    stack, true = open_stack(out), np.array(yaml.safe_load((out / "steps_true.yaml").read_text())["phase_steps_rad"])
    assert true.shape == stack.phase_steps_rad.shape == (4, 3) and np.abs(true - stack.phase_steps_rad).max() > 0.1
    brightness, height = WHOLE.scene.brightness(0, 300, 0, 1100) * 65535.0, HEIGHT.astype(np.float64)
    phase = 4 * np.pi * height / (1000 * np.array(WAVELENGTHS)[:, None, None])
    expected = brightness * (module.MEAN_LEVEL + module.MODULATION * np.cos(phase[:, None] + true[..., None, None]))
    np.testing.assert_allclose(stack.read(0, 300, 0, 1100), expected, atol=1)


def test_what_is_not_missing_is_as_in_the_whole_stack(tmp_path):
    missing = camera(flaws=Imperfections(missing=1))
    assert missing.kept.shape == (4, 3) and len(np.unique(missing.kept, axis=0)) > 1
    expected = FRAMES.reshape(4, 4, *SHAPE)[np.arange(4)[:, None], missing.kept]
    for format in ("bmp", "zarr"):
        stack = open_stack(synth(tmp_path / format, size=SHAPE, format=format, flaws=missing.flaws))
        np.testing.assert_array_equal(stack.read(0, 300, 0, 1100), expected)
        np.testing.assert_allclose(stack.phase_steps_rad, missing.kept * np.pi / 2)


@pytest.mark.parametrize("fraction", [0.02, 0.2])
def test_glints_clip_as_many_pixels_as_asked_in_small_spots(fraction):
    size = (1024, 1024)
    frames = Camera(Wafer(size, 5), WAVELENGTHS, 4, 2.0, 8, Imperfections(saturated=fraction)).frames(0, 1024, 0, 1024)
    clipped = (frames == 255).any(0)
    assert abs(clipped.mean() / fraction - 1) < 0.2
    clean = Camera(Wafer(size, 5), WAVELENGTHS, 4, 2.0, 8).frames(0, 1024, 0, 1024)
    changed = (frames != clean).any(0)
    assert (changed | ~clipped).all() and abs(changed.mean() / fraction - 1) < 0.2  # nothing else is touched
    if fraction < 0.1:  # else spots touch
        areas = np.bincount(label(changed).ravel())[1:]
        assert np.median(areas) < np.pi * 6**2 and areas.max() < 4 * np.pi * 6**2


def test_shot_noise_has_the_variance_of_the_level_on_top_of_the_read_noise():
    clean = camera(noise=0, bit_depth=16).frames(0, 300, 0, 1100) / 257.0
    noise = camera(noise=1.5, bit_depth=16, flaws=Imperfections(gain=0.5)).frames(0, 300, 0, 1100) / 257.0 - clean
    for low, high in ((20, 40), (80, 100), (140, 160)):
        there = (clean >= low) & (clean < high)
        expected = 1.5**2 + 0.5 * clean[there].mean()
        assert abs(noise[there].var() / expected - 1) < 0.02


def test_a_measured_surface_is_laid_down_mirror_wise_about_zero(tmp_path):
    measured = np.random.default_rng(0).normal(0, 100, (40, 30))
    np.save(tmp_path / "map.npy", measured)
    tifffile.imwrite(tmp_path / "map.tif", measured.astype(np.float32))
    centred = 2 * (measured - (measured.min() + measured.max()) / 2)
    expected = np.pad(centred, ((0, 60), (0, 70)), "symmetric")
    for name in ("map.npy", "map.tif"):
        surface = MeasuredSurface((100, 100), 3, tmp_path / name, scale=2)
        np.testing.assert_allclose(surface.height_nm(0, 100, 0, 100), expected, atol=1e-3)
        np.testing.assert_allclose(surface.height_nm(35, 87, 11, 95), expected[35:87, 11:95], atol=1e-3)
    wafer = Wafer((100, 100), 3)
    np.testing.assert_array_equal(surface.brightness(5, 60, 0, 90), wafer.brightness(5, 60, 0, 90))


def test_what_was_not_measured_is_filled_smoothly(tmp_path):
    y, x = np.mgrid[0:60, 0:80]
    whole = 300 * np.sin(x / 15) * np.cos(y / 20)
    hole = (y - 30) ** 2 + (x - 40) ** 2 < 25
    np.save(tmp_path / "map.npy", np.where(hole, np.nan, whole))
    found = MeasuredSurface((60, 80), 0, tmp_path / "map.npy").height_nm(0, 60, 0, 80)
    error = (found - whole)[hole] - (found - whole)[~hole].mean()
    assert np.abs(error).max() < 3


def test_a_stack_of_a_measured_surface_is_written_with_its_truth(tmp_path, capsys):
    y, x = np.mgrid[0:50, 0:70]
    np.save(tmp_path / "map.npy", np.sin(x / 9) + np.cos(y / 7))
    words = ["synth", str(tmp_path / "stack"), "--size", "70x50", "--noise", "0", "--height", str(tmp_path / "map.npy")]
    assert not main([*words, "--scale", "1000"])
    stack = open_stack(tmp_path / "stack")
    truth = open_source(stack.reference).read(0, 50, 0, 70)[..., 0]
    assert abs(np.ptp(truth) - 1000 * np.ptp(np.load(tmp_path / "map.npy"))) < 1
    decoded = decode_window(stack.read(0, 50, 0, 70), WAVELENGTHS, stack.phase_steps_rad, stack.height_range_um)
    assert np.abs(decoded.height_nm - truth).max() < 10


def test_seeds_give_different_wafers():
    assert np.abs(Wafer(SHAPE, 1).height_nm(0, 300, 0, 1100) - HEIGHT).mean() > 10


@pytest.mark.parametrize(
    ("format", "bit_depth"), [("bmp", 8), ("png", 12), ("tiff", 10), ("npy", 16), ("zarr", 12), (None, 8), (None, 12)]
)
def test_every_format_holds_what_the_camera_saw(tmp_path, format, bit_depth):
    out = synth(tmp_path / "stack", size=SHAPE, format=format, bit_depth=bit_depth, threads=2)
    stack = open_stack(out)
    assert (stack.J, stack.K, stack.bit_depth, stack.shape) == (4, 4, bit_depth, SHAPE)
    expected = FRAMES if bit_depth == 8 else camera(bit_depth=bit_depth).frames(0, 300, 0, 1100)
    np.testing.assert_array_equal(stack.read(0, 300, 0, 1100).reshape(16, *SHAPE), expected)
    np.testing.assert_array_equal(open_source(stack.reference).read(0, 300, 0, 1100)[..., 0], HEIGHT)
    assert stack.height_range_um == HEIGHT_RANGE_UM and os.listdir(tmp_path) == ["stack"]


def test_progress_counts_to_the_end(tmp_path):
    seen = []
    synth(tmp_path / "stack", size=(200, 64), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 4) for i in range(1, 5)]


def test_an_older_synthetic_stack_is_replaced_but_nothing_else_is(tmp_path):
    synth(tmp_path / "a", size=(20, 30), seed=1)
    synth(tmp_path / "a", size=(40, 50), seed=2)
    assert open_stack(tmp_path / "a").shape == (40, 50)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "stack.yaml").write_text("frames: thesis_*.bmp\n")
    with pytest.raises(UserError, match="not a stack written by synth"):
        synth(tmp_path / "mine", size=(20, 30))
    assert (tmp_path / "mine" / "stack.yaml").exists()


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_write_yaml", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        synth(tmp_path / "stack", size=(20, 30))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 2}, "too few phase steps"),
        ({"bit_depth": 9}, "unsupported bit depth"),
        ({"format": "gif"}, "format: 'gif'"),
        ({"format": "bmp", "bit_depth": 12}, "bmp holds 8 bits"),
        ({"size": (0, 4)}, "size: "),
        ({"noise": -1}, "not negative"),
        ({"flaws": Imperfections(step_error=np.nan)}, "step_error: nan"),
        ({"flaws": Imperfections(missing=2)}, "at least 3 of each wavelength"),
        ({"flaws": Imperfections(saturated=0.7)}, "saturated: 0.7"),
        ({"flaws": Imperfections(gain=-1)}, "gain: -1"),
        ({"scale": 0}, "scale: 0"),
        ({"height": "no.npy"}, "no.npy: no such file"),
        ({"size": (2**16, 2**24)}, "bytes are needed"),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_line(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        synth(tmp_path / "stack", **{"size": (20, 30)} | changes)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("heights", "message"),
    [
        (np.full((4, 5), np.nan), "no finite height"),
        (np.zeros((4, 5, 3)), "3 channels"),
        (np.array([[0, 30_000.0]]), "heights span 30 um, more than 27; lower --scale"),
    ],
)
def test_a_map_that_is_no_surface_is_refused(tmp_path, heights, message):
    np.save(tmp_path / "map.npy", heights)
    with pytest.raises(UserError, match=message):
        synth(tmp_path / "stack", size=(20, 30), height=tmp_path / "map.npy")
    assert os.listdir(tmp_path) == ["map.npy"]


def test_the_first_error_in_a_thread_stops_the_rest():
    started = []

    def work(item):
        started.append(item)
        if item == 3:
            raise ValueError("three")
        time.sleep(1e-3)  # or this thread, on a busy machine, comes too late to stop anything

    with pytest.raises(ValueError, match="three"):
        each_in_threads(work, range(10_000), threads=2)
    assert len(started) < 10_000
