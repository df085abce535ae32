"""Unwrapping tile by tile against surfaces that are known, and against the whole of a real interferogram at once."""

import numpy as np
import pytest
import yaml
from scipy import ndimage
from skimage.restoration import unwrap_phase

from cpikan_hr.data.stack import open_stack
from cpikan_hr.data.synth import synth
from cpikan_hr.errors import UserError
from cpikan_hr.problems import unwrap
from cpikan_hr.problems.decode import StackDecoder, decode_window

SHAPE = (203, 311)


def surface(slope=0.05):
    """Turns [203, 311], some forty from end to end and less than a third from pixel to pixel."""
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]] + 0.5
    return 1e-3 * (y - 90) ** 2 - 8e-4 * (x - 150) ** 2 + slope * x


def unwrapped(turns, valid, **options):
    """The surface [H, W] from its wrapped self, and the number of regions."""
    phase = turns - np.rint(turns)

    def part(image):
        return lambda y0, y1, x0, x1: image[y0:y1, x0:x1]

    solver = unwrap.Unwrapping("surface", turns.shape, part(phase), part(valid), **options)
    added, regions = solver.solve(2)
    return phase + added.read(0, turns.shape[0], 0, turns.shape[1])[..., 0], regions


@pytest.mark.parametrize(("tile", "overlap"), [(512, 16), (100, 16), (32, 4), (17, 1), (5, 16)])
def test_a_smooth_surface_comes_back_exactly_however_it_is_cut(tile, overlap):
    found, regions = unwrapped(surface(), np.ones(SHAPE, bool), tile=tile, overlap=overlap)
    assert regions == 1 and abs(found.mean()) <= 0.5
    difference = found - surface()
    np.testing.assert_allclose(difference, np.rint(difference[0, 0]), atol=1e-12)


def regions_agree(valid, **options):
    """Every region of the mask is right up to whole turns, and near zero by its mean."""
    found, regions = unwrapped(surface(), valid, **options)
    part, parts = ndimage.label(valid)
    assert regions == parts
    np.testing.assert_array_equal(np.isnan(found), ~valid)
    for number in range(1, parts + 1):
        inside = part == number
        difference = (found - surface())[inside]
        np.testing.assert_allclose(difference, np.rint(difference[0]), atol=1e-12)
        assert abs(found[inside].mean()) <= 0.5 + 1e-9
    return parts


def test_a_strip_that_is_masked_out_leaves_two_regions_with_pistons_of_their_own():
    valid = np.ones(SHAPE, bool)
    valid[:, 150:160] = False
    assert regions_agree(valid, tile=40, overlap=8) == 2


def test_parts_of_a_tile_that_meet_only_in_far_tiles_are_joined_there():
    valid = np.ones(SHAPE, bool)
    valid[10::20, 5:] = False  # a meander: from row to row only by the outermost columns
    valid[10::40, :5], valid[10::40, -5:] = False, True
    assert regions_agree(valid, tile=32, overlap=4) == 1


def test_a_mask_full_of_holes_is_cut_into_the_regions_it_has():
    valid = np.random.default_rng(0).random(SHAPE) < 0.63  # near the threshold of percolation: large, ragged regions
    assert regions_agree(valid, tile=48, overlap=3) > 100


def test_where_nothing_is_valid_there_is_no_region():
    found, regions = unwrapped(surface(), np.zeros(SHAPE, bool), tile=64)
    assert regions == 0 and np.isnan(found).all()


def test_the_real_mirror_comes_out_as_if_unwrapped_whole(mirror):
    wrapped = decode_window(mirror.read(0, 600, 0, 800), mirror.wavelengths_um, mirror.phase_steps_rad).height_nm
    turns, valid = wrapped.astype(np.float64) / 327, mirror.mask(0, 600, 0, 800)
    whole = np.ma.getdata(unwrap_phase(np.ma.array(2 * np.pi * turns, mask=~valid), rng=0)) / (2 * np.pi)
    decoder = StackDecoder(mirror)  # four tiles
    assert decoder.regions == 1
    for found in (decoder.decode(0, 600, 0, 800).height_nm / 327, unwrapped(turns, valid, tile=128)[0]):
        orders = (found - whole)[valid]
        np.testing.assert_allclose(orders, np.rint(np.median(orders)), atol=1e-5)


def test_regions_that_do_not_touch_are_told_once(tmp_path, caplog):
    """A wafer's first wavelength under a mask of two squares, the second of which no path reaches."""
    folder = synth(tmp_path / "stack", size=(90, 120), seed=1, format="npy")
    keys = yaml.safe_load((folder / "stack.yaml").read_text())
    frames = sorted(folder.glob("bucket_*.npy"))[:4]
    mask = np.zeros((90, 120), np.uint8)
    mask[10:40, 10:40] = mask[50:80, 60:100] = 1
    np.save(folder / "mask.npy", mask)
    keys |= {"wavelengths_um": [5.0], "frames": [frame.name for frame in frames], "mask": "mask.npy"}
    (folder / "stack.yaml").write_text(yaml.safe_dump(keys))
    assert StackDecoder(open_stack(folder)).regions == 2
    assert [record.getMessage() for record in caplog.records] == [
        f"{folder / 'stack.yaml'}: the mask has 2 regions that do not touch, each with a piston of its own"
    ]
    np.save(folder / "mask.npy", 0 * mask)
    with pytest.raises(UserError, match="no pixel is valid"):
        StackDecoder(open_stack(folder))
