"""Shifted quadtrees: what averaging leaves untouched, what it gains, and whether its errors are as large as it says."""

import numpy as np
import pytest
import torch
from cases import SPARSE, field_of, reader, rendered
from scipy.fft import dctn, idctn
from scipy.ndimage import gaussian_filter

from cpikan_hr.errors import UserError
from cpikan_hr.recipe import StartOptions
from cpikan_hr.solvers.averaging import LEFT, add_quadtree, average, read_averaged, shifts
from cpikan_hr.solvers.blocks import Block, Pixels
from cpikan_hr.solvers.leaves import sizes_of
from cpikan_hr.solvers.spectral import fit_spectral, set_terms
from cpikan_hr.solvers.uncertainty import calibrate, standard_deviation

LEVELS = [{"tile": [16, 8, 4, 2], "overlap": 1.0, "network": SPARSE}]
SHAPE = (150, 200)
START = StartOptions(shifts=8, threshold=0.8)
WIENER = StartOptions(shifts=4, wiener=6, threshold=0.6)
BOTH = pytest.mark.parametrize("start", [START, WIENER], ids=["thresholded", "wiener"])


def surface() -> np.ndarray:
    """Terraces on a slope, [H, W, 1]."""
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]].astype(np.float64)
    terraces = 20 * ((x > 60) ^ (y > 75)) + 35 * ((np.abs(x - 140) < 17) & (np.abs(y - 40) < 9))
    return (terraces + 0.02 * x - 5 * np.cos(y / 40))[..., None].astype(np.float32)


def noisy(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The surface with noise that varies over the frame, and its standard deviation [H, W]."""
    sigma = np.broadcast_to(np.linspace(1, 3, SHAPE[1]), SHAPE).astype(np.float32)
    return surface() + sigma[..., None] * np.random.default_rng(seed).standard_normal((*SHAPE, 1), np.float32), sigma


def rms(error) -> float:
    return float(np.sqrt(np.mean(np.square(error))))


def test_shifts_are_spread_and_inside_the_coarsest_tile():
    found = shifts(64, 32, 1)
    assert len(set(found)) == 64 and all(2 <= d <= 30 for shift in found for d in shift)
    quarters = np.histogram2d(*np.array(found).T, bins=[[1, 16, 32], [1, 16, 32]])[0]
    assert quarters.min() >= 14


@pytest.mark.parametrize("shrunk", [False, True])
@pytest.mark.parametrize("channels", [1, 2])
def test_what_stands_out_of_the_noise_everywhere_is_kept_exactly(channels, shrunk):
    values = np.random.default_rng(1).standard_normal((channels, 96, 112))
    tiny = torch.full((96, 112), 1e-9, dtype=torch.float64)
    sizes, halo = sizes_of(field_of(LEVELS, np.zeros((64, 80, channels), np.float32)), 0)
    order = shifts(5, 16, halo)
    pilot = torch.from_numpy(values) if shrunk else None
    solved = average(Pixels(torch.from_numpy(values), None, tiny), sizes, halo, 3.0, order, "quintic", pilot)
    inner = values[:, 16 - halo : -16 + halo, 16 - halo : -16 + halo]
    assert np.abs(solved.pixels.values.numpy() - inner).max() < 1e-12
    assert solved.risk.shape == inner.shape[1:] and (solved.risk <= 1.0001e-18).all()


def test_terms_are_shrunk_by_what_the_pilot_says_they_hold():
    rng = np.random.default_rng(2)
    values, pilot = rng.standard_normal((2, 16, 16))
    (size, *_), halo = sizes_of(field_of([{"tile": 16, "overlap": 0.0, "network": SPARSE}], np.zeros((16, 16, 1))), 0)
    pixels = Pixels(torch.from_numpy(values)[None], None, torch.full((16, 16), 0.7, dtype=torch.float64))
    sums = torch.zeros(3, 16, 16, dtype=torch.float64)
    add_quadtree(sums, (0, 0), pixels, [size], halo, 3.0, "quintic", torch.from_numpy(pilot)[None])
    energy = np.maximum(dctn(pilot, norm="ortho") ** 2 - LEFT * 0.49, 0)
    gain = energy / (energy + 0.49)
    gain[0, 0] = 1
    expected = idctn(gain * dctn(values, norm="ortho"), norm="ortho")
    assert np.abs((sums[0] / sums[2]).numpy() - expected).max() < 1e-12
    spectrum = dctn(values, norm="ortho")
    dropped = ((1 - gain) ** 2 * (spectrum**2 - 0.49)).sum()
    risk = ((gain**2 * 0.49).sum() + max(dropped, 0)) / 256
    assert np.abs((sums[1] / sums[2]).numpy() / risk - 1).max() < 1e-12


def test_a_second_average_keeps_texture_that_a_threshold_drops():
    rng = np.random.default_rng(3)
    texture = gaussian_filter(rng.standard_normal(SHAPE), 2.5, mode="reflect")
    truth = (texture * (1.2 / texture.std())).astype(np.float32)  # most of its terms are below the noise
    values = (truth + rng.standard_normal(SHAPE, np.float32))[..., None]
    field, read = field_of(LEVELS, values), reader(values, None, np.ones(SHAPE, np.float32))
    sizes, halo = sizes_of(field, 0)

    def error(start: StartOptions) -> float:
        solved = read_averaged(field, 0, read, SHAPE, Block(0, 0, 9, 12), sizes, halo, start).pixels.values[0].numpy()
        return rms(solved[halo:-halo, halo:-halo] - truth[:144, :192])

    thresholded, shrunk = error(StartOptions(shifts=16)), error(StartOptions(shifts=8, wiener=8))
    assert shrunk < 0.95 * thresholded and shrunk < 0.3


@BOTH
def test_a_block_does_not_depend_on_where_the_frame_was_cut(start):
    values, sigma = noisy()
    field = field_of(LEVELS, values)
    sizes, halo = sizes_of(field, 0)

    def read(*tiles: int):
        return read_averaged(field, 0, reader(values, None, sigma), SHAPE, Block(*tiles), sizes, halo, start)

    whole, part = read(0, 0, 10, 13), read(2, 3, 4, 5)
    window = slice(32, 32 + 64 + 2 * halo), slice(48, 48 + 80 + 2 * halo)
    assert (whole.pixels.values[0][window] - part.pixels.values[0]).abs().max() < 1e-4
    assert (whole.risk[window] / part.risk - 1).abs().max() < 1e-4


def test_the_risk_tells_where_the_errors_are():
    values, sigma = noisy()
    field = field_of(LEVELS, values)
    sizes, halo = sizes_of(field, 0)
    one = START.model_copy(update={"shifts": 1})
    errors, risks = [], []
    for seed in range(6):
        values, sigma = noisy(seed)
        solved = read_averaged(field, 0, reader(values, None, sigma), SHAPE, Block(0, 0, 9, 12), sizes, halo, one)
        inner = slice(halo, -halo)
        errors.append(solved.pixels.values[0].numpy()[inner, inner] - surface()[:144, :192, 0])
        risks.append(solved.risk.numpy()[inner, inner])
    error, risk = np.square(errors).mean(0), np.mean(risks, 0)
    edges = np.quantile(risk, [0, 0.25, 0.5, 0.75, 1])
    measured = [error[(low <= risk) & (risk <= high)].mean() for low, high in zip(edges, edges[1:], strict=False)]
    assert measured == sorted(measured) and measured[3] > 3 * measured[0]
    assert 0.5 < error.mean() / risk.mean() < 2  # what stands just above its threshold is noise more often than not


def test_averaging_beats_the_single_quadtree_with_fewer_terms():
    values, sigma = noisy()

    def fitted(start: StartOptions):
        field = field_of(LEVELS, values)
        set_terms(field, fit_spectral(field, 0, reader(values, None, sigma), SHAPE, 0.0, start))
        return rms(rendered(field, SHAPE) - surface()), field.count_parameters()

    (alone, terms), (averaged, fewer) = fitted(StartOptions()), fitted(START)
    assert averaged < 0.75 * alone and fewer < 1.3 * terms
    assert averaged < 0.4 * rms(values - surface())


@BOTH
def test_two_thirds_of_the_errors_lie_within_one_standard_deviation(start):
    values, sigma = noisy()
    weight = np.ones(SHAPE, np.float32)
    weight[20:30, 100:120] = 0
    field, read = field_of(LEVELS, values), reader(values, weight, sigma)
    set_terms(field, fit_spectral(field, 0, read, SHAPE, 0.0, start))
    factor = calibrate(field, 0, read, SHAPE, start)
    window = (3, 147, 10, 190)
    deviation = standard_deviation(field, 0, read, SHAPE, window, start, factor)
    rows, columns = slice(*window[:2]), slice(*window[2:])
    error = np.abs(rendered(field, SHAPE) - surface())[rows, columns, 0]
    known = weight[rows, columns] > 0
    assert np.isnan(deviation[~known]).all() and np.isfinite(deviation[known]).all()
    assert 0.63 < np.mean(error[known] < deviation[known]) < 0.78
    assert deviation[known].mean() < 0.6 * sigma.mean()
    assert calibrate(field, 0, read, SHAPE, start) == factor


def test_without_a_known_noise_there_is_nothing_to_average():
    values, _ = noisy()
    field = field_of(LEVELS, values)
    with pytest.raises(UserError, match="start.shifts"):
        fit_spectral(field, 0, reader(values), SHAPE, 0.0, START)


def test_a_hole_larger_than_tiles_does_not_disturb_what_is_known():
    values, sigma = noisy()
    weight = np.ones(SHAPE, np.float32)
    weight[30:90, 100:150] = 0
    values[weight == 0] = 1e4
    field, read = field_of(LEVELS, values), reader(values, weight, np.where(weight > 0, sigma, 0).astype(np.float32))
    set_terms(field, fit_spectral(field, 0, read, SHAPE, 0.0, START))
    error = (rendered(field, SHAPE) - surface())[weight > 0]
    assert rms(error) < 0.4 * rms(sigma) and np.abs(error).max() < 6 * sigma.max()
    assert np.abs(rendered(field, SHAPE)).max() < 100


def test_one_very_noisy_pixel_does_not_blur_its_tile():
    values, sigma = noisy()
    values[75, 101], sigma = 5000.0, sigma.copy()
    sigma[75, 101] = 5000.0
    field = field_of(LEVELS, values)
    set_terms(field, fit_spectral(field, 0, reader(values, None, sigma), SHAPE, 0.0, START))
    error = (rendered(field, SHAPE) - surface())[60:90, 85:117]
    assert rms(error) < 2.0
