"""Repaired orders: wrong ones are mended, true ones stay, and nobody takes over a neighbour's height."""

import numpy as np
import pytest
import torch

from cpikan_hr.cli import main as cli
from cpikan_hr.data.source import open_source
from cpikan_hr.data.stack import open_stack
from cpikan_hr.data.synth import synth
from cpikan_hr.errors import UserError
from cpikan_hr.problems.decode import StackDecoder, decode_stack
from cpikan_hr.problems.neighbours import PENALTY
from cpikan_hr.problems.noise import Noise, Weighing
from cpikan_hr.problems.phases import Demodulator
from cpikan_hr.problems.repair import HALO, repair_orders

SIZE = (700, 1200)
WHOLE = (0, SIZE[0], 0, SIZE[1])
FAR = 1000.0  # nm: between the largest noise of a height and the distance of two orders


def wafer(folder, noise):
    return open_stack(synth(folder / f"noise_{noise}", size=SIZE, noise=noise, seed=3))


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    return wafer(tmp_path_factory.mktemp("noisy"), 10)


def wrong(stack, height):
    """Where a height is known and lies on another order than the true one."""
    return np.abs(height - open_source(stack.reference).read(*WHOLE)[..., 0]) > FAR


def test_a_hundredth_of_the_wrong_orders_is_left_and_none_is_added(noisy):
    plain, repaired = (StackDecoder(noisy, noise=Noise(10.0), repair=repair).decode(*WHOLE) for repair in (False, True))
    before, after = wrong(noisy, plain.height_nm), wrong(noisy, repaired.height_nm)
    assert before.sum() > 300 and 100 * after.sum() <= before.sum()
    assert not (after & ~before).any()
    assert np.isnan(repaired.height_nm).sum() <= before.sum() / 100
    unknown = np.isnan(repaired.height_nm)
    assert (repaired.quality[unknown] == 0).all()
    kept = ~unknown & ~before
    # The same sums over windows of another width: they may round apart in the last digit of float32.
    np.testing.assert_allclose(repaired.height_nm[kept], plain.height_nm[kept], rtol=2.5e-7, atol=0)


def test_a_repaired_height_is_one_of_its_own_phases(noisy):
    """It is the weighted mean of the nearest heights of the pixel's wavelengths, and of nothing else."""
    plain, repaired = (StackDecoder(noisy, noise=Noise(10.0), repair=repair).decode(*WHOLE) for repair in (False, True))
    changed = np.isfinite(repaired.height_nm) & (plain.height_nm != repaired.height_nm)
    assert changed.sum() > 300
    frames = torch.from_numpy(noisy.read(*WHOLE)[:, :, changed]).double()
    demodulator = Demodulator(noisy.wavelengths_um, noisy.phase_steps_rad)
    _, _, fraction, weight = (each.numpy() for each in Weighing(demodulator, None, noisy.bit_depth).demodulate(frames))
    half = 500 * np.array(noisy.wavelengths_um)[:, None]
    height = repaired.height_nm[changed].astype(np.float64)
    nearest = half * (fraction + np.rint(height / half - fraction))
    np.testing.assert_allclose(height, (weight * nearest).sum(0) / weight.sum(0), atol=0.02)


@pytest.mark.parametrize("noise", [0, 2])
def test_where_orders_are_sure_nothing_changes(tmp_path, noise):
    stack = wafer(tmp_path, noise)
    plain, repaired = (StackDecoder(stack, noise=Noise(2.0), repair=repair).decode(*WHOLE) for repair in (False, True))
    for name, each in vars(plain).items():
        np.testing.assert_array_equal(each, getattr(repaired, name), err_msg=name)


def test_a_window_holds_what_the_whole_holds_there(noisy):
    decoder = StackDecoder(noisy, noise=Noise(10.0), repair=True)
    whole = decoder.decode(*WHOLE).height_nm
    for y0, y1, x0, x1, stride in [(0, 99, 0, 1200, 1), (99, 113, 340, 781, 1), (13, 700, 1150, 1200, 3)]:
        part = decoder.decode(y0, y1, x0, x1, stride).height_nm
        np.testing.assert_array_equal(part, whole[y0:y1:stride, x0:x1:stride])


@pytest.mark.parametrize(("words", "noise"), [([], None), (["--repair", "10"], Noise(10.0))], ids=["plain", "repaired"])
def test_maps_are_repaired_where_it_is_asked_for(words, noise, noisy, tmp_path):
    out, quality = tmp_path / "h.npy", tmp_path / "q.npy"
    assert not cli(["decode", str(noisy.path), "--out", str(out), "--quality", str(quality), *words])
    expected = StackDecoder(noisy, noise=noise, repair=noise is not None).decode(*WHOLE)
    np.testing.assert_array_equal(np.load(out), expected.height_nm)
    np.testing.assert_array_equal(np.load(quality), expected.quality)


ORDER = 2800.0


def decide(height, margin, chi_square, valid=None):
    """Repairs maps whose pixels could be an order higher or lower too, which costs them `chi_square` [3, h, w]."""
    height, margin, chi_square = (torch.tensor(each).double() for each in (height, margin, chi_square))
    own, valid = height.clone(), torch.from_numpy(np.ones(height.shape, bool) if valid is None else valid)

    def candidates(iy, ix):
        return own[iy, ix] + ORDER * torch.tensor([[-1], [0], [1]]), chi_square[:, iy, ix]

    undecided = repair_orders(height, margin, valid, candidates, ORDER)
    return height.numpy(), undecided.numpy()


def costs(shape, *values):
    return np.broadcast_to(np.reshape(values, (3, 1, 1)), (3, *shape)).astype(np.float64)


def test_a_doubtful_pixel_moves_to_the_order_of_its_surroundings_and_a_sure_one_does_not():
    height, margin = np.full((9, 9), 50.0), np.full((9, 9), 1e3)
    height[4, 4] += ORDER - 300
    for own, expected in [(10.0, -250.0), (PENALTY, 50 + ORDER - 300)]:
        margin[4, 4] = own
        found, undecided = decide(height, margin, costs((9, 9), own, 0, 90))
        assert found[4, 4] == expected and not undecided.any()
        found[4, 4] = 50
        assert (found == 50).all()


@pytest.mark.parametrize(("side", "own"), [(4, 12), (10, 8), (14, 6)])
def test_a_region_that_agrees_on_a_wrong_order_is_moved_as_a_whole(side, own):
    """Pixel by pixel its inside would confirm itself. A real step that crosses it stays."""
    height, margin = np.zeros((50, 50)), np.full((50, 50), 1e3)
    height[:, 25:] = 400
    truth, region = height.copy(), np.s_[15 : 15 + side, 20 : 20 + side]
    height[region] += ORDER
    margin[region] = own
    found, undecided = decide(height, margin, costs((50, 50), own, 0, 90))
    np.testing.assert_array_equal(found, truth)
    assert not undecided.any()


def test_a_region_whose_frames_say_that_it_is_an_order_high_stays():
    height, margin = np.zeros((50, 50)), np.full((50, 50), 1e3)
    particle = np.s_[20:30, 20:30]
    height[particle], margin[particle] = ORDER, 30
    found, _ = decide(height, margin, costs((50, 50), 30, 0, 90))
    np.testing.assert_array_equal(found, height)


def test_real_features_of_doubtful_pixels_stay():
    """Steps of 400 nm and a particle of 1 um, all of whose pixels find their neighbours' order nearly as good."""
    height = np.zeros((40, 40))
    height[:, 20:24] = 400
    y, x = np.mgrid[:40, :40]
    height += 1000 * np.maximum(1 - ((y - 12) ** 2 + (x - 9) ** 2) / 4, 0)
    found, undecided = decide(height, np.full((40, 40), 8.0), costs((40, 40), 8, 0, 8))
    np.testing.assert_array_equal(found, height)
    assert not undecided.any()


def test_what_neither_its_phases_nor_its_surroundings_tell_is_left_undecided():
    height, margin = np.zeros((60, 60)), np.full((60, 60), 1e3)
    dark = np.s_[20:40, 20:40]
    rng = np.random.default_rng(0)
    height[dark] = rng.uniform(-13000, 13000, (20, 20))
    margin[dark] = 0
    found, undecided = decide(height, margin, costs((60, 60), 0, 0, 0))
    inner = np.s_[20 + HALO : 40 - HALO, 20 + HALO : 40 - HALO]  # no confident pixel within reach
    assert undecided[inner].all()
    assert not undecided[:20].any() and (found[:20] == 0).all()


def test_pixels_outside_the_mask_are_neither_decided_nor_heard():
    height, margin, valid = np.zeros((9, 9)), np.full((9, 9), 1e3), np.ones((9, 9), bool)
    valid[:, 5:] = valid[:, :3] = False
    height[~valid] = ORDER  # most of the pixels around, and they are sure of it
    margin[4, 4] = margin[0, 0] = 0
    found, undecided = decide(height, margin, costs((9, 9), 5, 0, 0), valid)
    np.testing.assert_array_equal(found, height)
    assert not undecided.any()


def test_one_wavelength_has_nothing_to_repair(mirror, tmp_path):
    with pytest.raises(UserError, match="no other order"):
        decode_stack(mirror, tmp_path / "h.npy", repair=Noise(2.0))
    assert not list(tmp_path.iterdir())
