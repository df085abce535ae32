"""Textures: spectra and scales against what made them, gains against their formula, and what they are for."""

import numpy as np
import pytest
import torch
from cases import SPARSE, field_of, reader
from scipy.fft import dctn
from scipy.ndimage import gaussian_filter

from cpikan_hr.errors import UserError
from cpikan_hr.recipe import StartOptions
from cpikan_hr.solvers.averaging import read_averaged
from cpikan_hr.solvers.blocks import Block, Pixels
from cpikan_hr.solvers.leaves import coefficients, sizes_of
from cpikan_hr.solvers.spectral import fit_spectral, set_terms
from cpikan_hr.solvers.texture import LEFT, OWN, Texture, learn, scales, spectrum_of
from cpikan_hr.solvers.uncertainty import calibrate, standard_deviation

LEVELS = [{"tile": [16, 8, 4, 2], "overlap": 1.0, "network": SPARSE}]
SHAPE = (200, 256)
PLAIN = StartOptions(shifts=4, wiener=8, threshold=0.2)
START = PLAIN.model_copy(update={"texture": True})


def textured(rms: float = 1.2, noise: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A surface whose texture is below its noise term by term; the same with noise; the noise's deviation [H, W]."""
    rng = np.random.default_rng(3)
    truth = gaussian_filter(rng.standard_normal(SHAPE), 2.0, mode="reflect")
    truth = (truth * (rms / truth.std()))[..., None].astype(np.float32)
    values = truth + noise * rng.standard_normal(truth.shape, np.float32)
    return truth, values, np.full(SHAPE, noise, np.float32)


def made(tiles: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Squares of tiles' terms, their noise's variance, and the spectrum and the scales that they were drawn from."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.mgrid[:8, :8])
    spectrum = np.where(frequency > 0, 4 / (1 + frequency**2), 0)[None]
    scale = rng.choice([0.2, 1.0, 4.0], (tiles, 1, 1, 1))
    variance = rng.uniform(0.5, 1.5, (tiles, 1, 1, 1))
    squares = (scale * spectrum + variance) * rng.standard_normal((tiles, 1, 8, 8)) ** 2
    squares[..., 0, 0] = 0
    return tuple(map(torch.from_numpy, (squares, variance, spectrum, scale.ravel())))


def test_the_scale_is_the_most_likely_one():
    squares, variance, spectrum, true = made(300, 0)
    found = scales(squares, variance, spectrum)
    terms = spectrum.flatten() > 0

    def log_likelihood(scale: torch.Tensor) -> torch.Tensor:
        model = scale[..., None] * spectrum.flatten()[terms] + variance.flatten(1)
        return -0.5 * (model.log() + squares.flatten(1)[:, terms] / model).sum(-1)

    best = log_likelihood(torch.logspace(-6, 2, 2000, dtype=torch.float64)[:, None]).amax(0)
    lost = best - log_likelihood(found)  # one standard deviation of a scale costs 0.5
    assert lost.median() < 1e-3 and lost.quantile(0.97) < 0.1
    assert 0.8 < float(found[true == 4].mean() / found[true == 1].mean()) / 4 < 1.25


def test_the_spectrum_is_found_below_the_noise():
    squares, variance, spectrum, _ = made(20000, 1)
    found = spectrum_of(squares, variance)
    ratio = (found / spectrum)[spectrum > 0]
    assert found[0, 0, 0] == 0 and float(ratio.std() / ratio.mean()) < 0.1


def test_nothing_but_noise_has_a_spectrum_that_shrinks_all_away():
    squares = torch.from_numpy(np.random.default_rng(2).standard_normal((500, 1, 8, 8)) ** 2)
    squares[..., 0, 0] = 0
    found = spectrum_of(squares, torch.ones(500, 1, 1, 1, dtype=torch.float64))
    assert found.isfinite().all() and found.max() < 0.3 and found.mean() < 0.1


def test_gains_and_risk_are_what_the_terms_are_expected_to_hold():
    rng = np.random.default_rng(4)
    values, pilot = rng.standard_normal((2, 16, 16))
    (size, *_), _ = sizes_of(field_of([{"tile": 16, "overlap": 0.0, "network": SPARSE}], np.zeros((16, 16, 1))), 0)
    spectrum = torch.from_numpy(rng.uniform(0.1, 2, (1, 16, 16)))
    spectrum[0, 0, 0] = 0
    scaled, known = (coefficients(Pixels(torch.from_numpy(a)[None], None, None), size) for a in (values, pilot))
    variance = torch.full((1, 1, 1, 1, 1), 0.49, dtype=torch.float64)
    gains, risk = Texture({size.level: spectrum}).shrunk(size.level, scaled, variance, known)
    noise, held = 0.49, dctn(pilot, norm="ortho") ** 2
    squares = torch.from_numpy(dctn(values, norm="ortho") ** 2)[None, None]
    squares[..., 0, 0] = 0
    scale = scales(squares, torch.full((1, 1, 1, 1), noise, dtype=torch.float64), spectrum).item()
    expected = OWN * np.maximum(held - LEFT * noise, 0) + (1 - OWN) * scale * spectrum[0].numpy()
    gain = expected / (expected + noise)
    gain[0, 0] = 1
    assert np.abs(gains[0, 0, 0].numpy() - gain).max() < 1e-12
    assert abs(risk.item() / (gain**2 * noise + (1 - gain) ** 2 * held).sum() - 1) < 1e-12


def test_a_texture_below_the_noise_comes_nearer_the_truth():
    truth, values, sigma = textured()
    field, read = field_of(LEVELS, values), reader(values, None, sigma)
    sizes, halo = sizes_of(field, 0)

    def error(start: StartOptions) -> float:
        texture = learn(field, 0, read, SHAPE, start)
        solved = read_averaged(field, 0, read, SHAPE, Block(0, 0, 12, 16), sizes, halo, start, texture)
        found = solved.pixels.values[0].numpy()[halo:-halo, halo:-halo]
        return float(np.sqrt(np.square(found - truth[:192, :, 0]).mean()))

    assert error(START) < 0.95 * error(PLAIN)


def test_a_block_does_not_depend_on_where_the_frame_was_cut():
    _, values, sigma = textured()
    field, read = field_of(LEVELS, values), reader(values, None, sigma)
    sizes, halo = sizes_of(field, 0)
    texture = learn(field, 0, read, SHAPE, START)
    whole, part = (
        read_averaged(field, 0, read, SHAPE, Block(*tiles), sizes, halo, START, texture)
        for tiles in ((0, 0, 12, 16), (2, 3, 4, 5))
    )
    window = slice(32, 32 + 64 + 2 * halo), slice(48, 48 + 80 + 2 * halo)
    assert (whole.pixels.values[0][window] - part.pixels.values[0]).abs().max() < 1e-4


def test_two_thirds_of_the_errors_are_within_one_standard_deviation():
    truth, values, sigma = textured()
    field, read = field_of(LEVELS, values), reader(values, None, sigma)
    texture = learn(field, 0, read, SHAPE, START)
    set_terms(field, fit_spectral(field, 0, read, SHAPE, 0.0, START, texture=texture))
    factor = calibrate(field, 0, read, SHAPE, START, texture)
    deviation = standard_deviation(field, 0, read, SHAPE, (0, SHAPE[0], 0, SHAPE[1]), START, factor, texture)
    error = np.abs(field.pixels(0, SHAPE[0], 0, SHAPE[1])[0].numpy() - truth[..., 0])
    assert 0.63 < (error < deviation).mean() < 0.73


def test_it_is_learnt_only_where_asked_for_and_needs_the_noise():
    _, values, sigma = textured()
    field = field_of(LEVELS, values)
    assert learn(field, 0, reader(values, None, sigma), SHAPE, PLAIN) is None
    with pytest.raises(UserError, match=r"start\.texture: the noise"):
        learn(field, 0, reader(values), SHAPE, START)


def disc(radius: float) -> np.ndarray:
    """1 inside a disc in the middle of the frame, 0 outside, [H, W]."""
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    return (np.hypot(y - SHAPE[0] / 2, x - SHAPE[1] / 2) < radius).astype(np.float32)


def test_pixels_that_are_not_known_change_neither_spectrum_nor_estimate():
    truth, values, sigma = textured()
    weight, field = disc(90), field_of(LEVELS, values)
    masked = np.where(weight[..., None] > 0, values, 0)
    whole = learn(field, 0, reader(values, None, sigma), SHAPE, START)
    read = reader(masked, weight, np.where(weight > 0, sigma, 0))
    part = learn(field, 0, read, SHAPE, START)
    for level, spectrum in whole.spectra.items():
        assert 0.8 < float(part.spectra[level].sum() / spectrum.sum()) < 1.25
    set_terms(field, fit_spectral(field, 0, read, SHAPE, 0.0, START, texture=part))
    found = field.pixels(0, SHAPE[0], 0, SHAPE[1])[0].numpy()
    error = (found - truth[..., 0])[disc(80) > 0]
    assert np.isfinite(found).all() and np.sqrt(np.square(error).mean()) < 0.35


@pytest.mark.parametrize("start", [PLAIN, START], ids=["wiener", "texture"])
def test_a_patch_without_noise_is_kept_and_spoils_nothing_around_it(start):
    truth, values, sigma = textured()
    values[40:100, 60:120], sigma[40:100, 60:120] = truth[40:100, 60:120], 0
    field, read = field_of(LEVELS, values), reader(values, None, sigma)
    texture = learn(field, 0, read, SHAPE, start)
    set_terms(field, fit_spectral(field, 0, read, SHAPE, 0.0, start, texture=texture))
    error = field.pixels(0, SHAPE[0], 0, SHAPE[1])[0].numpy() - truth[..., 0]
    assert np.sqrt(np.square(error).mean()) < 0.4 and np.abs(error[60:80, 80:100]).max() < 1e-3


def test_where_nothing_is_known_nothing_is_learnt():
    _, values, sigma = textured()
    read = reader(values, np.zeros(SHAPE, np.float32), np.zeros(SHAPE, np.float32))
    assert learn(field_of(LEVELS, values), 0, read, SHAPE, START) is None
