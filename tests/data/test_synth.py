"""The synthetic wafer is a pure function of seed and window, and what is written is what was rendered."""

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cpikan_hr.data import synth as module
from cpikan_hr.data.scene import HEIGHT_RANGE_UM, Wafer
from cpikan_hr.data.source import open_source
from cpikan_hr.data.stack import open_stack
from cpikan_hr.data.synth import Camera, synth
from cpikan_hr.data.threads import each_in_threads
from cpikan_hr.errors import UserError

SHAPE, WAVELENGTHS = (300, 1100), (5.0, 5.5, 6.05, 6.655)


def camera(seed=0, noise=2.0, bit_depth=8):
    return Camera(Wafer(SHAPE, seed), WAVELENGTHS, 4, noise, bit_depth)


WHOLE = camera()
HEIGHT, FRAMES = WHOLE.wafer.height_nm(0, 300, 0, 1100), WHOLE.frames(0, 300, 0, 1100)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 299), st.integers(1, 300), st.integers(0, 1099), st.integers(1, 1100))
def test_a_window_agrees_with_the_whole(y0, height, x0, width):
    window = y0, min(y0 + height, 300), x0, min(x0 + width, 1100)
    part = slice(*window[:2]), slice(*window[2:])
    np.testing.assert_array_equal(camera().wafer.height_nm(*window), HEIGHT[part])
    np.testing.assert_array_equal(camera().frames(*window), FRAMES[:, *part])


def test_noise_free_frames_obey_the_frame_model():
    frames = camera(noise=0, bit_depth=16).frames(0, 100, 0, 200).reshape(4, 4, 100, 200)
    brightness = WHOLE.wafer.brightness(0, 100, 0, 200).astype(np.float64) * 65535
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
    monkeypatch.setattr(module, "_write_yaml", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
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
        ({"size": (2**16, 2**24)}, "bytes are needed"),
    ],
)
def test_what_cannot_be_made_is_refused_in_one_line(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        synth(tmp_path / "stack", **{"size": (20, 30)} | changes)
    assert os.listdir(tmp_path) == []


def test_the_first_error_in_a_thread_stops_the_rest():
    started = []

    def work(item):
        started.append(item)
        if item == 3:
            raise ValueError("three")

    with pytest.raises(ValueError, match="three"):
        each_in_threads(work, range(10_000), threads=2)
    assert len(started) < 10_000
