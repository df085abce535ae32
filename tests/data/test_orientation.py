"""Turned and mirrored views against numpy's own turns, and a run on them against a run on the turned file."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpikan_hr.data.orientation import Oriented, OrientedStack
from cpikan_hr.data.source import open_source
from cpikan_hr.data.stack import open_stack
from cpikan_hr.data.synth import synth
from cpikan_hr.train import main as train
from cpikan_hr.training.weights import load_field

ALL = [(rotate, flip) for rotate in (0, 90, 180, 270) for flip in ("none", "rows", "columns")]


def seen(pixels: np.ndarray, rotate: int, flip: str) -> np.ndarray:
    """[H, W, ...] turned counter-clockwise, then mirrored, by numpy."""
    turned = np.rot90(pixels, rotate // 90)
    return {"none": turned, "rows": turned[::-1], "columns": turned[:, ::-1]}[flip]


class InMemory:
    """A picture, or with `channel_first` a stack [J, K, H, W], as the views read it."""

    name, dtype = "memory", np.dtype(np.float32)

    def __init__(self, pixels: np.ndarray, mask: np.ndarray | None = None):
        self.pixels, self.valid = pixels, mask
        self.shape = pixels.shape if mask is None else pixels.shape[2:]

    def read(self, y0, y1, x0, x1):
        assert 0 <= y0 < y1 and 0 <= x0 < x1
        return self.pixels[y0:y1, x0:x1] if self.valid is None else self.pixels[:, :, y0:y1, x0:x1]

    def mask(self, y0, y1, x0, x1):
        return self.valid[y0:y1, x0:x1]


@settings(max_examples=200, deadline=None)
@given(data=st.data(), orientation=st.sampled_from(ALL))
def test_every_window_of_a_view_is_the_one_of_the_turned_picture(data, orientation):
    height, width = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    picture = np.arange(height * width * 3, dtype=np.float32).reshape(height, width, 3)
    frames = np.arange(6 * height * width, dtype=np.float32).reshape(2, 3, height, width)
    mask = np.random.default_rng(0).random((height, width)) < 0.5
    expected = seen(picture, *orientation)
    view, stack = Oriented(InMemory(picture), *orientation), OrientedStack(InMemory(frames, mask), *orientation)
    assert view.shape == expected.shape and tuple(stack.shape) == expected.shape[:2]
    (y0, y1), (x0, x1) = (
        sorted(data.draw(st.lists(st.integers(0, size), min_size=2, max_size=2, unique=True)))
        for size in expected.shape[:2]
    )
    assert np.array_equal(view.read(y0, y1, x0, x1), expected[y0:y1, x0:x1])
    turned = np.moveaxis(seen(frames.transpose(2, 3, 0, 1), *orientation), (0, 1), (2, 3))
    assert np.array_equal(stack.read(y0, y1, x0, x1), turned[:, :, y0:y1, x0:x1])
    assert np.array_equal(stack.mask(y0, y1, x0, x1), seen(mask, *orientation)[y0:y1, x0:x1])


@pytest.mark.parametrize("orientation", ALL, ids=str)
def test_files_on_disk_and_a_stack_with_a_round_aperture(orientation, tmp_path):
    pixels = np.random.default_rng(1).integers(0, 255, (13, 21), np.uint8)
    np.save(tmp_path / "picture.npy", pixels)
    view = Oriented(open_source(tmp_path / "picture.npy"), *orientation)
    height, width = view.shape[:2]
    assert np.array_equal(view.read(0, height, 0, width)[..., 0], seen(pixels, *orientation))
    assert np.array_equal(view.read(2, 9, 3, 8)[..., 0], seen(pixels, *orientation)[2:9, 3:8])

    folder = synth(tmp_path / "stack", size=(16, 24), seed=1)
    with open(folder / "stack.yaml", "a") as file:
        file.write("\nmask: {circle: [6.0, 9.0, 5.0]}\n")
    plain = open_stack(folder)
    stack = OrientedStack(plain, *orientation)
    whole = (0, stack.shape[0], 0, stack.shape[1])
    stored = np.moveaxis(plain.read(0, 16, 0, 24), (2, 3), (0, 1))
    assert np.array_equal(np.moveaxis(stack.read(*whole), (2, 3), (0, 1)), seen(stored, *orientation))
    mask = seen(plain.mask(0, 16, 0, 24), *orientation)
    assert np.array_equal(stack.mask(*whole), mask) and 0 < mask.sum() < mask.size
    assert np.array_equal(stack.mask(1, 9, 2, 11), mask[1:9, 2:11])
    assert (stack.J, stack.K, stack.wavelengths_um) == (plain.J, plain.K, plain.wavelengths_um)


@pytest.mark.parametrize(("rotate", "flip"), [(90, "none"), (180, "columns"), (270, "rows")])
def test_a_run_on_a_view_is_the_run_on_the_turned_file(rotate, flip, tmp_path, request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)
    y, x = np.mgrid[0:24, 0:40]
    pixels = np.stack([120 + 90 * np.sin(x / 5), 120 + 90 * np.cos(y / 4), (7 * x + 3 * y) % 200], -1).astype(np.uint8)
    np.save(tmp_path / "stored.npy", pixels)
    np.save(tmp_path / "turned.npy", seen(pixels, rotate, flip))
    common = ["--config", "recipes/image.yaml", "--training.steps", "2", "--batch.blocks", "2", "--batch.size", "16"]
    view = ["--problem.path", str(tmp_path / "stored.npy"), "--problem.rotate", str(rotate), "--problem.flip", flip]
    assert train([*common, *view, "--output", str(tmp_path / "view")]) == 0
    assert train([*common, "--problem.path", str(tmp_path / "turned.npy"), "--output", str(tmp_path / "file")]) == 0
    one, other = (load_field(tmp_path / name) for name in ("view", "file"))
    assert one.about["shape"] == other.about["shape"] == list(seen(pixels, rotate, flip).shape[:2])
    assert one.field.state_dict().keys() == other.field.state_dict().keys()
    assert all(torch.equal(value, other.field.state_dict()[name]) for name, value in one.field.state_dict().items())
