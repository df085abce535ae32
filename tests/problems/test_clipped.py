"""Where too few samples are left to tell a height the map says nothing, and a line says how much of it that is."""

import re

import numpy as np
import pytest
import yaml

from cpikan_hr.cli import main
from cpikan_hr.data.camera import Imperfections
from cpikan_hr.data.stack import open_stack
from cpikan_hr.data.synth import synth
from cpikan_hr.problems.calibration import calibrate, doubts
from cpikan_hr.problems.decode import decode_stack

SIZE = (160, 240)


@pytest.fixture(scope="module")
def glints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("glints") / "stack"
    return synth(folder, size=SIZE, noise=2, seed=1, bit_depth=12, format="npy", flaws=Imperfections(saturated=0.19))


def parts(line):
    return [float(part) for part in re.findall(r"([\d.e-]+) of the pixels", line)]


def test_no_wrong_height_is_left_uncounted(glints, tmp_path, caplog):
    stack = open_stack(glints)
    calibrated = calibrate(stack)
    height, quality = map(np.load, decode_stack(stack, tmp_path / "h.npy", quality=tmp_path / "q.npy"))
    wrong = np.abs(height - np.load(glints / "height_true.npy")) > 100  # never of a NaN
    lost, *doubtful = parts(caplog.text)
    assert calibrated.piled is None and 0.02 < lost < 0.3
    np.testing.assert_allclose(np.isnan(height).mean(), lost, rtol=0.06)
    np.testing.assert_array_equal(np.isnan(height), quality == 0)
    assert wrong.mean() <= sum(doubtful) < 0.01


def test_decode_without_clipped_samples_is_whole_and_says_nothing(tmp_path, capfd):
    folder = synth(tmp_path / "stack", size=(64, 96), noise=2, seed=1)
    assert main(["decode", str(folder), "--out", str(tmp_path / "h.npy")]) == 0
    assert np.isfinite(np.load(tmp_path / "h.npy")).all()
    assert "pixels" not in capfd.readouterr().err


def test_samples_that_pile_up_below_the_top_of_the_bit_depth_are_said(glints, tmp_path):
    keys = yaml.safe_load((glints / "stack.yaml").read_text())
    keys |= {"frames": str(glints / "bucket_*.npy"), "bit_depth": 16, "reference": None}
    (tmp_path / "stack.yaml").write_text(yaml.safe_dump(keys))
    shared = calibrate(open_stack(tmp_path))
    assert shared.piled[0] == 4095
    assert "are at 4095, the largest value" in doubts(shared)[0]


@pytest.mark.parametrize("noise", [0, 2])
def test_crests_of_fringes_are_no_pile(noise, tmp_path):
    folder = synth(tmp_path / "stack", size=(64, 96), noise=noise, seed=1, bit_depth=12, format="npy")
    assert calibrate(open_stack(folder)).piled is None
