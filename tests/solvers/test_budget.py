"""Prices that meet targets, on the sample and on the whole picture; and what a target buys against a zonal DCT."""

import math

import numpy as np
import pytest
from cases import SPARSE, field_of, mean_square, natural, psnr, reader, recipe_of, rendered
from scipy.fft import dctn, idctn

from cpikan_hr.processes import ALONE
from cpikan_hr.recipe import StartOptions, TargetOptions
from cpikan_hr.solvers import budget, start
from cpikan_hr.solvers.budget import Sample, wanted_of
from cpikan_hr.solvers.spectral import fit_spectral, set_terms
from cpikan_hr.solvers.start import fit_field

IMAGE = [{"tile": [64, 32, 16, 8], "overlap": 0.25, "network": SPARSE}]  # as recipes/image.yaml
PRICES = np.geomspace(0.01, 1e4, 25)


@pytest.fixture(scope="module", params=["camera", "astronaut"])
def picture(request):
    return natural(request.param)


def sample_of(picture, levels=IMAGE) -> Sample:
    return Sample(field_of(levels, picture), 0, reader(picture), picture.shape[:2], StartOptions(threshold=0))


def test_errors_rise_and_terms_fall_with_the_price(picture):
    errors, terms = zip(*(sample_of(picture).at(price) for price in PRICES), strict=True)
    assert (np.diff(errors) >= 0).all() and (np.diff(terms) <= 0).all()
    assert errors[0] < 1e-4 and terms[0] > 0.9 and terms[-1] < 1e-2


def test_a_sample_of_everything_without_blend_is_the_fit_itself(picture):
    levels = [{"tile": [32, 16, 8], "overlap": 0.0, "network": SPARSE}]
    sample = sample_of(picture, levels)
    assert sample.pixels == picture.shape[0] * picture.shape[1]
    for price in (3.0, 30.0):
        field = field_of(levels, picture)
        terms = fit_spectral(field, 0, reader(picture), picture.shape[:2], price, StartOptions(threshold=0))
        set_terms(field, terms)
        error, number = sample.at(price)
        assert error == pytest.approx(mean_square(rendered(field, picture.shape[:2]), picture), rel=1e-3)
        assert number * picture.size == pytest.approx(field.count_parameters())


@pytest.mark.parametrize("wanted", [0.5, 10.0, 200.0])
def test_the_price_of_an_error_meets_it_from_below(picture, wanted):
    sample = sample_of(picture)
    price = sample.price_for(wanted, 0)
    assert sample.at(price)[0] <= wanted < sample.at(price * 1.01)[0]


@pytest.mark.parametrize("wanted", [0.02, 0.1, 0.5])
def test_the_price_of_terms_meets_them_from_below(picture, wanted):
    sample = sample_of(picture)
    price = sample.price_for(wanted, 1)
    assert sample.at(price / 1.01)[1] > wanted >= sample.at(price)[1]


def test_the_stricter_of_two_errors_is_wanted():
    assert wanted_of(TargetOptions(), 255) == (None, None)
    assert wanted_of(TargetOptions(psnr=20, params_per_px=0.5), 255)[0] == pytest.approx(25.5**2)
    assert wanted_of(TargetOptions(psnr=20, rmse=2.0), 255) == (4.0, None)
    assert wanted_of(TargetOptions(psnr=60, rmse=2.0), 255)[0] == pytest.approx(0.255**2)


def solved(picture, target: dict, levels=IMAGE):
    field = field_of(levels, picture)
    contributions = fit_field(field, reader(picture), picture.shape[:2], recipe_of(levels, target=target), 255.0, ALONE)
    return field, contributions


@pytest.mark.parametrize("wanted", [25, 32, 42, 50])
def test_a_wanted_psnr_is_met_within_a_third_of_a_decibel(picture, wanted):
    field, contributions = solved(picture, {"psnr": wanted})
    reached = psnr(rendered(field, picture.shape[:2]), picture)
    assert wanted <= reached + 1e-3 and reached < wanted + 0.3
    assert 20 * math.log10(255 / contributions[-1]["rmse"]) == pytest.approx(reached, abs=1e-3)
    assert contributions[-1]["params"] == field.count_parameters()


@pytest.mark.parametrize("wanted", [0.05, 0.25, 1.0])
def test_wanted_parameters_are_used_and_not_exceeded(picture, wanted):
    field, _ = solved(picture, {"params_per_px": wanted})
    assert 0.9 * wanted <= field.count_parameters() / picture.size <= wanted


def test_of_an_error_and_parameters_the_scarcer_decides(picture):
    by_error, _ = solved(picture, {"psnr": 30})
    assert solved(picture, {"psnr": 30, "params_per_px": 2.0})[0].count_parameters() == by_error.count_parameters()
    both, _ = solved(picture, {"psnr": 60, "params_per_px": 0.1})
    assert 0.09 <= both.count_parameters() / picture.size <= 0.1


def test_parameters_of_the_levels_above_count(picture):
    levels = [{"tile": 32, "network": {"kind": "chebyshev2d", "degree": 4}}, *IMAGE]
    field, contributions = solved(picture, {"params_per_px": 0.2}, levels)
    assert 0.9 * 0.2 <= field.count_parameters() / picture.size <= 0.2 and contributions[0]["params"] > 0


@pytest.mark.parametrize(
    "target", [{"psnr": 28}, {"psnr": 42}, {"params_per_px": 0.05}, {"params_per_px": 0.2}], ids=str
)
@pytest.mark.parametrize("name", ["camera", "coffee"])
def test_a_sample_that_misjudges_the_picture_is_mended(name, target, monkeypatch):
    """As in a picture much larger than the sample: passes over it correct the price, to either side."""
    monkeypatch.setattr(budget, "SAMPLED", 64 * 64)
    picture = natural(name)
    field, _ = solved(picture, target)
    if "psnr" in target:
        reached = psnr(rendered(field, picture.shape[:2]), picture)
        assert target["psnr"] <= reached + 1e-3 and reached < target["psnr"] + 0.3
    else:
        wanted = target["params_per_px"]
        assert 0.9 * wanted <= field.count_parameters() / picture.size <= wanted


def test_noise_that_allows_fewer_terms_than_wanted_ends_the_passes(monkeypatch):
    picture, passes = np.random.default_rng(0).normal(size=(64, 64, 1)).astype(np.float32), []
    monkeypatch.setattr(start, "fit_spectral", lambda *a: passes.append(a) or fit_spectral(*a))
    field, read = field_of(IMAGE, picture), reader(picture, noise=np.ones((64, 64), np.float32))
    fit_field(field, read, (64, 64), recipe_of(IMAGE, target={"params_per_px": 0.5}), 255.0, ALONE)
    assert field.count_parameters() < 0.02 * picture.size and len(passes) == 2


def zonal(picture: np.ndarray, terms: int, side: int = 16) -> np.ndarray:
    """The lowest `terms` of each tile's DCT, by rising m + n."""
    ny, nx = picture.shape[0] // side, picture.shape[1] // side
    tiles = picture.astype(np.float64).reshape(ny, side, nx, side, -1)
    coefficients = dctn(tiles, axes=(1, 3), norm="ortho")
    m, n = np.mgrid[:side, :side]
    rank = np.lexsort((m.ravel(), (m + n).ravel())).argsort().reshape(side, side)
    kept = coefficients * (rank < terms)[None, :, None, :, None]
    return idctn(kept, axes=(1, 3), norm="ortho").reshape(picture.shape)


@pytest.mark.parametrize("per_px", [0.1, 0.25, 0.5])
@pytest.mark.parametrize("name", ["camera", "astronaut", "coffee", "grass"])
def test_never_below_a_zonal_dct_of_as_many_coefficients(name, per_px):
    picture = natural(name)
    field, _ = solved(picture, {"params_per_px": per_px})
    reference = zonal(picture, math.ceil(per_px * 256))
    assert field.count_parameters() <= math.ceil(per_px * 256) / 256 * picture.size
    assert psnr(rendered(field, picture.shape[:2]), picture) >= psnr(reference, picture)
