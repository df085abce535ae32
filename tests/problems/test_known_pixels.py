"""Which pixels of a picture hold data, and what a PSNR refers to: by what the file and its values say."""

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image as Pillow

from cpikan_hr.errors import UserError
from cpikan_hr.jets import Jet
from cpikan_hr.problems import Image
from cpikan_hr.recipe import ImageProblem, parse_recipe

SHAPE = 40, 50


def grey(dtype, low=10, high=200, channels=()) -> np.ndarray:
    return np.random.default_rng(0).integers(low, high, (*SHAPE, *channels)).astype(dtype)


def tiff(path, pixels, nodata=None, *tags):
    gdal = [] if nodata is None else [(42113, "s", 0, nodata, True)]
    tifffile.imwrite(path, pixels, extratags=[*gdal, *tags])
    return str(path)


def image(path, range=None, **options) -> Image:
    return Image(ImageProblem(path=str(path), **options), range)


CASES = {  # pixels, the TIFF's no-data value, what `spoil` writes there
    "NaN": ("float32", None, np.nan),
    "infinite": ("float32", None, -np.inf),
    "float": ("float32", "-9999", -9999),
    "a comma": ("float32", "-9999,0", -9999),
    "the least float, written short": ("float32", "-3.40282e+38", np.finfo(np.float32).min),
    "the least double, in doubles": ("float64", "-1.7976931348623157e+308", np.finfo(np.float64).min),
    "black": ("uint8", "0", 0),
    "white": ("uint8", "255", 255),
    "16 bits": ("uint16", "65535", 65535),
}


@pytest.mark.parametrize("orientation", [(0, "none"), (90, "rows"), (270, "columns")], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_pixels_of_no_value_weigh_nothing(case, orientation, tmp_path):
    dtype, nodata, value = CASES[case]
    spoilt = np.random.default_rng(1).random(SHAPE) < 0.3
    pixels = np.where(spoilt, value, grey(dtype)).astype(dtype)
    problem = image(tiff(tmp_path / "p.tif", pixels, nodata), rotate=orientation[0], flip=orientation[1])
    seen = [np.rot90(each, orientation[0] // 90) for each in (spoilt, pixels)]
    if orientation[1] != "none":
        seen = [np.flip(each, 0 if orientation[1] == "rows" else 1) for each in seen]
    spoilt, pixels = seen
    y0, y1, x0, x1 = window = (3, 37, 5, 38)
    values, weight, _ = problem.target(*window)
    part = slice(y0, y1), slice(x0, x1)
    np.testing.assert_array_equal(weight, ~spoilt[part])
    np.testing.assert_array_equal(values[..., 0], np.where(spoilt[part], 0, pixels[part]))
    np.testing.assert_array_equal(problem.mask(*window), ~spoilt[part])
    iy, ix = (a.ravel() for a in np.mgrid[y0:y1, x0:x1])
    batch = problem.samples(*window, iy, ix)
    np.testing.assert_array_equal(batch["known"], weight.ravel())
    np.testing.assert_array_equal(batch["values"], values.reshape(-1, 1))
    known = pixels[~spoilt].astype(np.float64)
    assert problem.limits == (known.min(), known.max(), known.size) and problem.masked


def test_a_colour_lacks_data_where_all_its_channels_say_so_a_float_where_one_does(tmp_path):
    colours = grey("uint8", channels=(3,))
    colours[0, 0], colours[0, 1] = 0, (200, 0, 0)
    assert image(tiff(tmp_path / "c.tif", colours, "0")).mask(0, 1, 0, 3).tolist() == [[False, True, True]]
    floats = grey("float32", channels=(3,))
    floats[0, 0, 1], floats[0, 2, 2] = -9999, np.nan
    assert image(tiff(tmp_path / "f.tif", floats, "-9999")).mask(0, 1, 0, 3).tolist() == [[False, True, False]]


def test_a_value_or_a_mask_that_the_recipe_names(tmp_path):
    pixels = grey("uint8")
    pixels[:5] = 7
    Pillow.fromarray(pixels).save(tmp_path / "p.png")
    valid = np.zeros(SHAPE, np.uint8)
    valid[:, 10:] = 1
    Pillow.fromarray(valid).save(tmp_path / "m.png")
    plain, named = image(tmp_path / "p.png"), image(tmp_path / "p.png", nodata=7, mask=str(tmp_path / "m.png"))
    assert not plain.masked and plain.mask(0, 40, 0, 50).all()
    np.testing.assert_array_equal(named.mask(0, 40, 0, 50), (pixels != 7) & (valid > 0))
    assert named.about() == {"range": 255.0, "masked": True, "nodata": 7}
    tiffed = tiff(tmp_path / "p.tif", pixels, "9")
    assert (image(tiffed, nodata=7).mask(0, 40, 0, 50) == (pixels != 7)).all()  # what the recipe says counts
    Pillow.fromarray(valid[1:]).save(tmp_path / "m.png")
    with pytest.raises(UserError, match="a mask of 39 x 50 px for 40 x 50 px"):
        image(tmp_path / "p.png", mask=str(tmp_path / "m.png"))


def test_a_no_data_value_that_is_no_number_and_a_picture_without_any(tmp_path):
    with pytest.raises(UserError, match="no-data value .* is 'none', no number"):
        image(tiff(tmp_path / "p.tif", grey("uint8"), "none"))
    nothing = image(tiff(tmp_path / "q.tif", np.full(SHAPE, 3, np.uint8), "3"))
    with pytest.raises(UserError, match="no pixel holds data"):
        nothing.full_range  # noqa: B018


def test_the_loss_of_a_pixel_without_data_is_nothing(tmp_path):
    problem = image(tiff(tmp_path / "p.tif", grey("float32")), range=2.0, laplacian=0.5)
    rows = torch.tensor([3.0, 0.0, 0.0, 4.0], dtype=torch.float64)[:, None, None].expand(4, 2, 1)  # value, Laplacian
    known = torch.tensor([1.0, 0.0])
    loss, error = problem.loss(Jet(rows, "laplacian", 2), {"values": torch.ones(2, 1), "known": known})
    assert error.tolist() == [1.0, 0.0] and loss.tolist() == [1.0 + 0.5 * (4 / 2) ** 2, 0.0]


MAXSAMPLE, SMIN, SMAX = 0x119, 0x154, 0x155
RANGES = {
    "8 bits": (grey("uint8", 0, 3), (), 255.0),
    "8 bits, whatever their largest is said to be": (grey("uint8"), ((MAXSAMPLE, "H", 1, 199, True),), 255.0),
    "8 bits in 16": (grey("uint16", 0, 256), (), 255.0),
    "10 bits": (grey("uint16", 0, 1000), (), 1023.0),
    "12 bits": (grey("uint16", 0, 4000), (), 4095.0),
    "12 bits, the largest there": (np.full(SHAPE, 4095, np.uint16), (), 4095.0),
    "14 bits": (np.full(SHAPE, 4096, np.uint16), (), 16383.0),
    "16 bits": (grey("uint16", 0, 40000), (), 65535.0),
    "16 bits of which 12 are said": (grey("uint16", 0, 900), ((MAXSAMPLE, "H", 1, 4095, True),), 4095.0),
    "16 bits that are more than is said": (grey("uint16", 5000, 9000), ((MAXSAMPLE, "H", 1, 5, True),), 16383.0),
    "floats": (np.linspace(-0.25, 0.5, 2000, dtype=np.float32).reshape(SHAPE), (), 0.75),
    "floats of a range that is said": (
        np.linspace(0, 0.5, 2000, dtype=np.float32).reshape(SHAPE),
        ((SMIN, "f", 1, 0.0, True), (SMAX, "f", 1, 1.0, True)),
        1.0,
    ),
    "a constant": (np.full(SHAPE, -40.0, np.float32), (), 40.0),
    "zero": (np.zeros(SHAPE, np.float32), (), 1.0),
}


@pytest.mark.parametrize("case", RANGES)
def test_what_a_psnr_refers_to(case, tmp_path):
    pixels, tags, expected = RANGES[case]
    path = tiff(tmp_path / "p.tif", pixels, None, *tags)
    problem = image(path)
    assert problem.full_range == expected and problem.about()["range"] == expected
    assert f"range of {expected:g}" in problem.note()
    assert image(path, range=1234.5).full_range == 1234.5


def test_pixels_without_data_have_no_part_in_the_range(tmp_path):
    pixels = grey("uint16", 0, 4000)
    pixels[3] = 65535
    assert image(tiff(tmp_path / "p.tif", pixels, "65535")).full_range == 4095
    floats = np.linspace(0, 1, 2000, dtype=np.float32).reshape(SHAPE)
    floats[0] = -9999
    assert image(tiff(tmp_path / "f.tif", floats, "-9999")).full_range == pytest.approx(1 - floats[1, 0])


def test_a_picture_of_two_values_is_of_range_one(tmp_path):
    np.save(tmp_path / "p.npy", grey("uint8", 0, 2).astype(bool))
    assert image(tmp_path / "p.npy").full_range == 1.0


@pytest.mark.parametrize("problem", [{"kind": "interferometry", "stack": "s"}, {"kind": "pde", "equation": "burgers"}])
def test_a_range_is_for_pictures(problem):
    level = {"grid": [1, 1], "network": {"kind": "siren", "hidden": [2]}}
    with pytest.raises(UserError, match=r"target\.range"):
        parse_recipe({"output": "o", "problem": problem, "field": {"levels": [level]}, "target": {"range": 3}}, "test")
