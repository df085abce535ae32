"""Surface metrics against closed forms, in float64, whatever the strips."""

import numpy as np
import pytest

from cpikan_hr.problems.surface import surface_figures

SHAPE = (120, 161)


def strips_of(heights, rows=17):
    return lambda: ((y, heights[y : y + rows]) for y in range(0, len(heights), rows))


def axes(shape=SHAPE):
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]] + 0.5
    return y - shape[0] / 2, x - shape[1] / 2


def figures(heights, remove="plane", rows=17):
    return surface_figures(strips_of(heights, rows), heights.shape, remove)


@pytest.mark.parametrize("rows", [1, 17, 120])
def test_a_tilted_plane_has_no_form_and_no_texture(rows):
    y, x = axes()
    heights = 5000.0 + 3 * y - 7 * x
    for remove in ("plane", "bow"):
        assert all(abs(value) < 1e-8 for value in figures(heights, remove, rows).values())
    flat = figures(heights, "none", rows)
    assert flat["pv"] == pytest.approx(3 * 119 + 7 * 160) and abs(flat["bow"]) < 1e-8 and abs(flat["warp"]) < 1e-8
    assert flat["sq"] == pytest.approx(np.sqrt(9 * (120**2 - 1) / 12 + 49 * (161**2 - 1) / 12))


def test_a_bowl_is_what_bow_removes_and_its_centre_is_lowest():
    """z = c r^2 over n x m pixels has the mean c (n^2 + m^2 - 2) / 12, and no tilt."""
    y, x = axes()
    c = 0.02
    heights = c * (y**2 + x**2) + 2 * x + 1e4
    mean = c * (120**2 + 161**2 - 2) / 12
    found = figures(heights)
    assert found["bow"] == pytest.approx(c * 0.25 - mean)  # the centre lies between two rows
    assert found["warp"] == found["pv"] == pytest.approx(c * (59.5**2 + 80**2 - 0.25))
    assert figures(heights, "bow")["sq"] < 1e-8 and figures(heights, "bow")["warp"] == pytest.approx(found["warp"])
    assert figures(-heights)["bow"] == pytest.approx(-found["bow"])


def test_a_cosine_has_the_roughness_of_the_textbooks():
    """Whole periods: sq = a / sqrt 2, sa = 2 a / pi, pv = 2 a; even in x, so that no tilt and little bow is in it."""
    _, x = axes((120, 4000))
    heights = 8.0 * np.cos(2 * np.pi * x / 200) - 3 * x
    found = figures(heights)
    assert found["sq"] == pytest.approx(8 / np.sqrt(2), rel=1e-10)
    assert found["sa"] == pytest.approx(16 / np.pi, rel=1e-4)
    assert found["pv"] == pytest.approx(16, rel=1e-3) and found["bow"] == pytest.approx(8, rel=1e-3)


def test_pixels_that_are_not_valid_do_not_count():
    rng = np.random.default_rng(0)
    y, x = axes()
    heights = rng.normal(0, 3, SHAPE) + 2 * y - x + 0.01 * x * y
    inside = (y - 5) ** 2 + (x + 9) ** 2 < 50**2
    terms = {"none": [np.ones_like(x)], "plane": [np.ones_like(x), y, x]}
    terms["bow"] = [*terms["plane"], y * y, x * y, x * x]
    masked = np.where(inside, heights, np.nan)
    for remove, basis in terms.items():
        design = np.stack([term[inside] for term in basis], 1)
        left = heights[inside] - design @ np.linalg.lstsq(design, heights[inside])[0]
        found = figures(masked, remove)
        assert found["pv"] == pytest.approx(np.ptp(left), rel=1e-9)
        assert found["sq"] == pytest.approx(left.std(), rel=1e-9)
        assert found["sa"] == pytest.approx(np.abs(left).mean(), rel=1e-9)


def test_the_centre_is_that_of_the_valid_pixels():
    y, x = axes((41, 61))
    heights = np.zeros((41, 61))
    heights[12, 20] = 100.0
    heights[25:] = heights[:, 41:] = np.nan  # left: 25 x 41, with its middle at (12, 20)
    found = figures(heights)
    assert found["bow"] == pytest.approx(100 - 100 / (25 * 41)) and found["warp"] == pytest.approx(100)
    heights[12, 20] = np.nan
    assert figures(heights)["bow"] is None and figures(heights)["pv"] == 0


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (30, 1), (2, 2)])
def test_a_map_too_small_for_its_removal_has_nothing_left(shape):
    heights = np.arange(shape[0] * shape[1], dtype=float).reshape(shape)
    found = figures(heights)
    assert found["pv"] == pytest.approx(0, abs=1e-9) and found["sq"] == pytest.approx(0, abs=1e-9)


def test_a_map_without_a_valid_pixel_has_no_figures():
    assert set(figures(np.full((9, 9), np.nan)).values()) == {None}
