"""The baselines that fields are measured against are as good as theory and a search by hand say; cases are valid."""

import math
from pathlib import Path

import numpy as np
import pytest
from denoisers import STANDARD, TUNED_ON, best_tile_dct, rmse, smooth_part, standard, tile_dct, tuned
from height_cases import WAFER
from heights import figures, near_steps

from cpikan_hr.cli import parser
from cpikan_hr.recipe import load_recipe

ROOT = Path(__file__).parents[2]


def noise(shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def left_of_noise(size: int, threshold: float = 3.0) -> float:
    """RMSE over the noise, of a constant: the mean stays, and those of the other terms that exceed the threshold."""
    density, tail = math.exp(-(threshold**2) / 2) / math.sqrt(2 * math.pi), math.erfc(threshold / math.sqrt(2)) / 2
    return math.sqrt(1 + (size**2 - 1) * 2 * (threshold * density + tail)) / size


@pytest.mark.parametrize("size", [8, 16])
def test_one_tiling_leaves_of_the_noise_of_a_plane_what_theory_says(size):
    sigma = np.where(np.arange(1024) < 512, np.float32(1), np.float32(5)) * np.ones((1023, 1), np.float32)
    found = tile_dct(sigma * noise(sigma.shape) + 700, sigma, size, shifts=1) - 700
    for part, level in ((found[:, :500], 1), (found[:, 524:], 5)):
        assert abs(float(part.std()) / level / left_of_noise(size) - 1) < 0.04


def test_shifted_tilings_leave_less_and_what_stands_out_of_the_noise_stays():
    sigma = np.ones((256, 320), np.float32)
    one, many = (tile_dct(noise(sigma.shape), sigma, 8, shifts) for shifts in (1, 64))
    assert rmse(many, 0) < 0.8 * rmse(one, 0)
    step = np.where(np.arange(320) < 131, np.float32(0), np.float32(100)) * sigma
    assert rmse(tile_dct(step, sigma, 8), step) < 0.6
    assert rmse(best_tile_dct(step + noise(sigma.shape), sigma, step, 16), step) < 0.45


def test_pixels_without_fringes_leave_their_neighbours_alone():
    sigma = np.ones((64, 64), np.float32)
    sigma[20:24, 30:34] = np.inf
    assert np.isfinite(tile_dct(noise(sigma.shape), sigma, 8)).all()


@pytest.mark.parametrize("name", STANDARD)
def test_the_tuner_takes_the_strength_nearest_the_truth(name):
    truth = np.where(np.add.outer(np.arange(80), np.arange(90)) % 40 < 20, np.float32(0), np.float32(40))
    image = truth + 6 * noise(truth.shape)
    found, strength = tuned(name, image, truth, 6.0)
    by_hand = {s: rmse(standard(name, image, 6.0, s), truth) for s in STANDARD[name][1]}
    assert max(image.shape) <= TUNED_ON  # so the part is the whole
    assert strength == min(by_hand, key=by_hand.__getitem__) and len(set(by_hand.values())) > 1
    assert rmse(found, truth) == by_hand[strength] < rmse(image, truth)


def test_the_smooth_part_is_the_polynomial_that_outliers_do_not_move():
    y, x = np.meshgrid(np.linspace(-1, 1, 400), np.linspace(-1, 1, 500), indexing="ij")
    bow = 9000 * (x * x + y * y) + 700 * x * y - 300 * x**3
    outliers = np.random.default_rng(0).random(bow.shape) < 0.01
    found = smooth_part((bow + 2500 * outliers + noise(bow.shape)).astype(np.float32))
    assert rmse(found, bow) < 1


def test_steps_are_found_with_their_surroundings_and_steep_smooth_slopes_are_not():
    y, x = np.mgrid[0:60, 0:80].astype(np.float64)
    height = 2000 * np.exp(-((y - 20) ** 2 + (x - 20) ** 2) / 800)  # slopes up to 60 nm/px
    height[40:, 50:] += 20
    expected = np.zeros(height.shape, bool)
    expected[36:, 46:] = True  # the two pixels at the jump, and three more on either side
    expected[44:, 54:] = expected[36, 46] = False
    np.testing.assert_array_equal(near_steps(height), expected)


def test_figures_are_those_of_the_map():
    truth, near = np.zeros((10, 10)), np.zeros((10, 10), bool)
    near[:5] = True
    found = figures(truth + np.where(near, 2.0, 0.0) + 1500 * np.eye(10), truth, near, 1250)
    assert found["wrong_orders"] == 10
    assert found["near_steps"] == pytest.approx(math.sqrt((45 * 4 + 5 * 1502**2) / 50))
    assert found["rmse"] == pytest.approx(math.sqrt((45 * 4 + 5 * 1502**2 + 5 * 1500**2) / 100))


@pytest.mark.parametrize("case", WAFER, ids=lambda case: case.name)
def test_the_options_of_the_cases_exist(case):
    words = [word for key, value in case.synth.items() for word in (f"--{key}", str(value))]
    parser().parse_args(["synth", "out", "--noise", str(case.noise), *words])
    recipe = load_recipe(ROOT / "recipes" / "wafer.yaml", [f"--{key}={value}" for key, value in case.overrides.items()])
    assert recipe.problem.noise == max(case.noise, 0.1) and case.limits
