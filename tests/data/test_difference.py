"""The difference of two maps against the same in one line of numpy."""

import math

import numpy as np
import pytest

from cpikan_hr.data.difference import difference
from cpikan_hr.data.source import open_source


def written(folder, name: str, array: np.ndarray):
    np.save(folder / name, array.astype(np.float32))
    return open_source(folder / name)


def test_mean_and_rms_over_the_pixels_that_both_maps_have(tmp_path):
    rng = np.random.default_rng(0)
    first, second = 1e4 + rng.normal(size=(2, 600, 37)).astype(np.float32)
    first[5, 3] = second[599, 36] = np.nan
    error = first.astype(np.float64) - second
    found = difference(written(tmp_path, "first.npy", first), written(tmp_path, "second.npy", second))
    assert found.mean == pytest.approx(np.nanmean(error), rel=1e-12)
    assert found.rms == pytest.approx(np.sqrt(np.nanmean(error**2)), rel=1e-12)
    assert found.deviation == pytest.approx(np.nanstd(error), rel=1e-9)


def test_maps_without_a_common_pixel_have_no_difference(tmp_path):
    first, second = np.full((2, 2), np.nan), np.ones((2, 2))
    found = difference(written(tmp_path, "first.npy", first), written(tmp_path, "second.npy", second))
    assert math.isnan(found.rms) and math.isnan(found.mean)
