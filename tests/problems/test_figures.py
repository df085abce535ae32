"""Figures of merit at their limits."""

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from cpikan_hr.data.source import open_source
from cpikan_hr.evaluate import similarity
from cpikan_hr.fields import Field
from cpikan_hr.recipe import FieldOptions


def field_of(value: float, shape: tuple[int, int]) -> Field:
    """A constant."""
    field = Field.build(FieldOptions(levels=[{"grid": [1, 1], "network": {"kind": "siren", "hidden": [2]}}]), shape, 1)
    field.levels[0].mean.fill_(value)
    return field


@pytest.mark.parametrize("value", [0.0, 1.0, 37.25, 1e4 + 1 / 3, -3e6])
def test_a_perfect_map_has_a_similarity_of_one_and_never_more(value, tmp_path):
    value = float(np.float32(value))
    np.save(tmp_path / "map.npy", np.full((40, 50), value, np.float32))
    for full in (1e-30, 1e-3, 1.0, 255.0):
        ssim = similarity(field_of(value, (40, 50)), open_source(tmp_path / "map.npy"), (40, 50), 0.0, full)
        assert ssim <= 1 + 1e-9
        if full >= 1:
            assert ssim > 0.99


def test_the_similarity_is_the_one_of_float64(tmp_path):
    rng = np.random.default_rng(0)
    truth = (5000 + rng.normal(0, 1, (60, 50))).astype(np.float32)
    truth[20:30, 10:20] = np.nan
    np.save(tmp_path / "map.npy", truth)
    known = np.isfinite(truth)
    value = np.where(known, 5000.5, 0)
    _, each = structural_similarity(np.where(known, truth, 0).astype(float), value, data_range=6.0, full=True)
    found = similarity(field_of(5000.5, (60, 50)), open_source(tmp_path / "map.npy"), (60, 50), 0.0, 6.0)
    assert found == pytest.approx(each[known].mean(), abs=1e-9)
