"""Sparse Chebyshev tiles against scipy's cosine transform: basis, exactness, thresholds, leaves, shares."""

import numpy as np
import pytest
import torch
from cases import SPARSE, field_of, mean_square, natural, on_ranks, reader, rendered
from scipy.fft import dct, dctn, idctn

from cpikan_hr.recipe import StartOptions
from cpikan_hr.solvers import spectral
from cpikan_hr.solvers.leaves import Size, sizes_of
from cpikan_hr.solvers.spectral import fit_spectral, set_terms
from cpikan_hr.solvers.terms import shared

QUADTREE = [{"tile": [32, 16, 8], "overlap": 0.25, "network": SPARSE}]


def fit(picture: np.ndarray, levels: list[dict], price: float = 0.0, noise=None, sigmas: float = 0.0, weight=None):
    field = field_of(levels, picture)
    read, start = reader(picture, weight, noise), StartOptions(threshold=sigmas)
    terms = fit_spectral(field, 0, read, picture.shape[:2], price, start)
    set_terms(field, terms)
    return field


def count(field) -> int:
    return sum(level.count_parameters() for level in field.levels)


def tiles_of(picture: np.ndarray, side: int) -> np.ndarray:
    """Orthonormal DCT-II of side x side tiles, mirrored beyond the frame: [ny, nx, C, side, side] float64."""
    height, width, _ = picture.shape
    padded = np.pad(picture.astype(np.float64), ((0, -height % side), (0, -width % side), (0, 0)), "symmetric")
    ny, nx = padded.shape[0] // side, padded.shape[1] // side
    return dctn(padded.reshape(ny, side, nx, side, -1).transpose(0, 2, 4, 1, 3), axes=(3, 4), norm="ortho")


def untiled(coefficients: np.ndarray, shape) -> np.ndarray:
    ny, nx, channels, side, _ = coefficients.shape
    values = idctn(coefficients, axes=(3, 4), norm="ortho").transpose(0, 3, 1, 4, 2)
    return values.reshape(ny * side, nx * side, channels)[: shape[0], : shape[1]]


@pytest.mark.parametrize("pixels", [1, 2, 7, 16, 66])
def test_the_basis_is_orthonormal_and_scipy_s_up_to_signs(pixels):
    basis = Size(0, pixels, pixels, (1, 1)).basis(torch.zeros(1, dtype=torch.float64)).numpy()
    assert np.abs(basis @ basis.T - np.eye(pixels)).max() < 1e-12
    theirs = dct(np.eye(pixels), axis=0, norm="ortho")
    signs = np.sign(np.sum(basis * theirs, 1))
    assert np.abs(basis - signs[:, None] * theirs).max() < 1e-12


def test_sizes_share_one_halo_and_cover_the_frame():
    sizes, halo = sizes_of(field_of(QUADTREE, np.zeros((50, 70, 1))), 0)
    assert halo == 1 and [(s.stride, s.pixels, s.counts) for s in sizes] == [
        (32, 34, (2, 3)), (16, 18, (4, 5)), (8, 10, (7, 9)),
    ]  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(64, 96), (45, 70), (33, 8), (5, 7), (1, 1)])
@pytest.mark.parametrize(
    "levels",
    [
        [{"tile": 16, "overlap": 0.0, "network": SPARSE}],
        [{"tile": 12, "overlap": 0.5, "network": SPARSE}],
        QUADTREE,
        [{"tile": [32, 16], "overlap": 0.0, "network": SPARSE}],
    ],
    ids=["16", "12+6", "quadtree+2", "quadtree"],
)
def test_without_price_and_noise_any_picture_is_reproduced(levels, shape, channels):
    picture = np.random.default_rng(0).uniform(0, 255, size=(*shape, channels)).astype(np.float32)
    field = fit(picture, levels)
    assert np.abs(rendered(field, shape) - picture).max() < 255 * 2e-5


@pytest.mark.parametrize("shape", [(64, 48), (50, 70)])
@pytest.mark.parametrize("price", [1.0, 20.0, 300.0])
def test_one_size_without_blend_is_hard_thresholding_of_scipy_s_tiles(price, shape):
    picture = natural("astronaut", 60, 180)[: shape[0], : shape[1]]
    field = fit(picture, [{"tile": 16, "overlap": 0.0, "network": SPARSE}], price)
    coefficients = tiles_of(picture, 16)
    kept = np.where(np.abs(coefficients) > price, coefficients, 0)
    assert count(field) == np.count_nonzero(kept)
    expected = untiled(kept, shape)
    assert np.abs(rendered(field, shape) - expected).max() < 2e-2
    assert mean_square(rendered(field, shape), picture) == pytest.approx(mean_square(expected, picture), rel=1e-5)


def test_every_kept_term_exceeds_the_price_and_is_listed_once():
    picture, price = natural("camera")[:50, :70], 15.0
    field = field_of(QUADTREE, picture)
    terms = fit_spectral(field, 0, reader(picture), (50, 70), price, StartOptions(threshold=0))
    sizes, _ = sizes_of(field, 0)
    for size in sizes:
        tiles, offset, index, values = (part.numpy() for part in terms[size.level].tensors())
        counts = np.diff(offset)
        assert (np.diff(tiles) > 0).all() and counts.sum() == len(index) == len(values) and (counts > 0).all()
        m, n = index // size.pixels, index % size.pixels
        energy = [np.where(k == 0, size.pixels, size.pixels / 2) for k in (m, n)]  # of T_k over the pixels of a support
        orthonormal = values * np.sqrt(energy[0] * energy[1])
        assert (np.abs(orthonormal) * size.stride / size.pixels > price * (1 - 1e-6)).all()
        for end, tile_terms in zip(np.cumsum(counts), counts, strict=True):
            assert (np.diff(index[end - tile_terms : end]) > 0).all()


@pytest.mark.parametrize("price", [3.1, 10.3, 50.7])
def test_the_quadtree_without_blend_is_the_cheapest_of_scipy_s(price):
    """A recursive reference: a tile, or the sum of its four quarters, whichever costs less."""
    picture = natural("camera", 100, 200, 64)
    field = fit(picture, [{"tile": [32, 16, 8], "overlap": 0.0, "network": SPARSE}], price)
    costs = [np.minimum(tiles_of(picture, side) ** 2, price**2).sum((2, 3, 4)) for side in (32, 16, 8)]
    error = [np.where(np.abs(c) > price, 0, c**2).sum((2, 3, 4)) for c in (tiles_of(picture, s) for s in (32, 16, 8))]
    terms = [(np.abs(tiles_of(picture, side)) > price).sum((2, 3, 4)) for side in (32, 16, 8)]

    def best(k: int, y: int, x: int) -> np.ndarray:
        """Cost, squared error and terms below a tile."""
        whole = np.array([costs[k][y, x], error[k][y, x], terms[k][y, x]])
        if k == 2:
            return whole
        quarters = sum(best(k + 1, 2 * y + a, 2 * x + b) for a in (0, 1) for b in (0, 1))
        return quarters if quarters[0] < whole[0] else whole

    _, squares, number = sum(best(0, y, x) for y in (0, 1) for x in (0, 1))
    assert count(field) == number
    assert mean_square(rendered(field, (64, 64)), picture) == pytest.approx(squares / 64**2, rel=1e-4)


@pytest.mark.parametrize("levels", [[{"tile": 16, "overlap": 0.0, "network": SPARSE}], QUADTREE], ids=["16", "quad"])
def test_of_pure_noise_few_terms_survive(levels):
    """Three standard errors leave 0.27 % of Gaussian coefficients; the wrong unit of noise would leave most or none."""
    noise = np.random.default_rng(5).uniform(1, 3, size=(192, 192)).round().astype(np.float32)
    noise[:, :96], noise[:, 96:] = 4.0, 0.5
    picture = (np.random.default_rng(6).normal(size=(192, 192)) * noise).astype(np.float32)[..., None]
    fraction = count(fit(picture, levels, noise=noise, sigmas=3.0)) / picture.size
    assert 0.0027 / 2 < fraction < 0.0027 * 2
    assert count(fit(picture, levels, noise=noise, sigmas=0.0)) >= picture.size


def test_of_price_and_noise_the_larger_decides():
    picture, noise = natural("camera", side=64), np.full((64, 64), 4.0, np.float32)
    by_price = [count(fit(picture, QUADTREE, price)) for price in (40.0, 4.0)]
    assert count(fit(picture, QUADTREE, 40.0, noise, sigmas=1.0)) == by_price[0]
    # The threshold of a scaled coefficient is 4 times the core's share of the support's energy.
    assert by_price[0] < count(fit(picture, QUADTREE, 0.5, noise, sigmas=3.0)) < by_price[1]


def test_a_signal_above_the_noise_is_kept_and_denoised():
    y, x = np.mgrid[0:96, 0:96]
    truth = (40 * np.cos(np.pi * (x + 0.5) / 32) * np.cos(np.pi * (y + 0.5) / 48)).astype(np.float32)[..., None]
    noise = np.full((96, 96), 5.0, np.float32)
    picture = truth + np.random.default_rng(1).normal(size=truth.shape).astype(np.float32) * 5
    field = fit(picture, [{"tile": [32, 16], "overlap": 0.25, "network": SPARSE}], noise=noise, sigmas=3.0)
    assert mean_square(rendered(field, (96, 96)), truth) < 0.05 * mean_square(picture, truth)


def test_unknown_pixels_do_not_disturb_the_known_of_a_smooth_picture():
    y, x = np.mgrid[0:48, 0:48]
    picture = (100 + y + 2 * x).astype(np.float32)[..., None]
    weight = np.ones((48, 48), np.float32)
    weight[10:14, 20:30] = 0
    spoilt = np.where(weight[..., None] > 0, picture, 1e6).astype(np.float32)
    field = fit(spoilt, QUADTREE, weight=weight)
    error = np.abs(rendered(field, (48, 48)) - picture)[..., 0]
    assert error[weight > 0].max() < 1e-2 and error.max() < 20


@pytest.mark.parametrize("shifts", [0, 2])
@pytest.mark.parametrize("levels", [[{"tile": 8, "overlap": 0.25, "network": SPARSE}], QUADTREE], ids=["8", "quadtree"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_terms_of_all_processes_are_those_of_one(levels, ranks, shifts, monkeypatch):
    monkeypatch.setattr(spectral, "AVERAGED" if shifts else "BLOCK", 32 * 64)
    picture = natural("coffee")[:100, :75]
    read, start = reader(picture, noise=np.full((100, 75), 3.0, np.float32)), StartOptions(threshold=3, shifts=shifts)

    def fit_share(processes) -> dict:
        field = field_of(levels, picture)
        mine = fit_spectral(field, 0, read, (100, 75), 10.0, start, processes.rank, processes.ranks)
        assert any(len(terms.tensors()[0]) for terms in mine.values())
        set_terms(field, shared(mine, processes))
        return field.state_dict()

    field = field_of(levels, picture)
    set_terms(field, fit_spectral(field, 0, read, (100, 75), 10.0, start))
    one = field.state_dict()
    for state in on_ranks(fit_share, ranks):
        assert all(torch.equal(state[name], value) for name, value in one.items())


def test_the_blocks_do_not_matter(monkeypatch):
    picture = natural("coffee")[:100, :75]
    whole = rendered(fit(picture, QUADTREE, 10.0), (100, 75))
    monkeypatch.setattr(spectral, "BLOCK", 32 * 32)
    assert np.abs(rendered(fit(picture, QUADTREE, 10.0), (100, 75)) - whole).max() < 1e-3


def test_a_price_above_everything_leaves_an_empty_field():
    picture = natural("camera", side=40)
    field = fit(picture, QUADTREE, 1e9)
    assert count(field) == 0 and not rendered(field, (40, 40)).any()
