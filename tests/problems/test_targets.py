"""A decimated look at the data reads it in strips and gives what a look at all of it would."""

import numpy as np
import pytest
import yaml

from cpikan_hr.data.synth import synth
from cpikan_hr.problems import Image, Interferometry
from cpikan_hr.problems import image as image_module
from cpikan_hr.recipe import ImageProblem, InterferometryProblem

BOUND = 40 * 64  # pixels
WINDOWS = [(0, 150, 0, 100), (7, 149, 3, 98), (20, 21, 0, 100), (0, 150, 40, 41)]


class Spy:
    """Notes the pixels of every read; everything else is the source's own."""

    def __init__(self, source):
        self.source, self.reads = source, []

    def __getattr__(self, name):
        return getattr(self.source, name)

    def read(self, y0, y1, x0, x1):
        self.reads.append((y1 - y0) * (x1 - x0))
        return self.source.read(y0, y1, x0, x1)

    def mask(self, y0, y1, x0, x1):
        self.reads.append((y1 - y0) * (x1 - x0))
        return self.source.mask(y0, y1, x0, x1)


def agreeing(problem, spy: Spy, monkeypatch) -> int:
    """How many windows and strides were compared: each holds the whole's values there and reads what it may."""
    compared = 0
    for window in WINDOWS:
        height, width = window[1] - window[0], window[3] - window[2]
        for stride in (2, 3, 7, 200):
            monkeypatch.setattr(image_module, "STRIP", 2**40)
            whole = problem.target(*window, 1)
            spy.reads.clear()
            monkeypatch.setattr(image_module, "STRIP", BOUND)
            found = problem.target(*window, stride)
            assert max(spy.reads) <= max(BOUND, stride * width) and sum(spy.reads) <= 2 * height * width
            for part, every in zip(found, whole, strict=True):
                assert (part is None) == (every is None)
                assert part is None or np.array_equal(part, every[::stride, ::stride])
            compared += 1
    return compared


@pytest.mark.parametrize("orientation", [(0, "none"), (90, "rows")], ids=str)
def test_of_a_picture(orientation, tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).random((150, 100, 3)).astype(np.float32)
    np.save(tmp_path / "picture.npy", pixels if orientation[0] == 0 else pixels.transpose(1, 0, 2))
    problem = Image(ImageProblem(path=str(tmp_path / "picture.npy"), rotate=orientation[0], flip=orientation[1]))
    problem.source = spy = Spy(problem.source)
    assert agreeing(problem, spy, monkeypatch) == 4 * len(WINDOWS)


@pytest.mark.parametrize("wavelengths", [1, 4])
def test_of_a_stack_of_frames(wavelengths, tmp_path, monkeypatch):
    folder = synth(tmp_path / "stack", size=(150, 100), seed=2)
    keys = yaml.safe_load((folder / "stack.yaml").read_text()) | {"mask": {"circle": [70.0, 50.0, 60.0]}}
    if wavelengths == 1:
        frames = sorted(folder.glob("bucket_*.bmp"))
        keys["frames"] = [frame.name for frame in frames[: len(frames) // len(keys["wavelengths_um"])]]
        keys["wavelengths_um"] = keys["wavelengths_um"][:1]
        if isinstance(keys["phase_steps_rad"][0], list):
            keys["phase_steps_rad"] = keys["phase_steps_rad"][0]
    (folder / "stack.yaml").write_text(yaml.safe_dump(keys))
    problem = Interferometry(InterferometryProblem(stack=str(folder), quality=0.2, repair=False))
    problem.decoder.stack = spy = Spy(problem.stack)
    assert agreeing(problem, spy, monkeypatch) == 4 * len(WINDOWS)


def test_of_a_stack_of_noisy_frames_that_are_repaired(tmp_path, monkeypatch):
    folder = synth(tmp_path / "stack", size=(300, 400), noise=12, seed=2)
    plain, problem = (
        Interferometry(InterferometryProblem(stack=str(folder), noise=12.0, repair=repair)) for repair in (False, True)
    )
    whole = problem.target(0, 300, 0, 400)
    assert not np.array_equal(whole.values, plain.target(0, 300, 0, 400).values)
    monkeypatch.setattr(image_module, "STRIP", 30 * 400)
    for stride in (2, 7):
        for part, every in zip(problem.target(0, 300, 0, 400, stride), whole, strict=True):
            np.testing.assert_array_equal(part, every[::stride, ::stride])
