"""Which pixels of a file a picture's recipe means: one of several, turned as its tag asks, exact in single precision.
"""

import numpy as np
import pytest
import tifffile
from PIL import Image as Pillow
from PIL import ImageOps

from cpikan_hr.errors import UserError
from cpikan_hr.problems import Image, keep_data, reference_of
from cpikan_hr.recipe import ImageProblem, Recipe

PIXELS = np.random.default_rng(5).integers(0, 256, (12, 17, 3), dtype=np.uint8)


@pytest.mark.parametrize("tag", range(1, 9))
@pytest.mark.parametrize("rotate", [0, 90])
def test_the_orientation_tag_is_followed_before_rotate(tmp_path, caplog, tag, rotate):
    exif = Pillow.Exif()
    exif[0x0112] = tag
    Pillow.fromarray(PIXELS).save(tmp_path / "p.png", exif=exif)
    problem = Image(ImageProblem(path=str(tmp_path / "p.png"), orientation="file", rotate=rotate))
    upright = np.rot90(np.asarray(ImageOps.exif_transpose(Pillow.open(tmp_path / "p.png"))), rotate // 90)
    assert problem.shape == upright.shape[:2] and not caplog.records
    np.testing.assert_array_equal(problem.target(0, problem.shape[0], 0, problem.shape[1]).values, upright)
    stored = Image(ImageProblem(path=str(tmp_path / "p.png")))
    np.testing.assert_array_equal(stored.target(0, 12, 0, 17).values, PIXELS)
    assert ("orientation tag" in caplog.text) == (tag > 1)


def test_one_of_several_pictures_is_meant_and_its_file_is_kept(tmp_path):
    tifffile.imwrite(tmp_path / "p.tif", np.stack([PIXELS, 255 - PIXELS]), photometric="rgb")
    with pytest.raises(UserError, match="p.tif: holds 2 pictures .12 x 17 x 3."):
        Image(ImageProblem(path=str(tmp_path / "p.tif")))
    chosen = f"{tmp_path}/p.tif[1]"
    np.testing.assert_array_equal(Image(ImageProblem(path=chosen)).target(0, 12, 0, 17).values, 255 - PIXELS)
    recipe = Recipe.model_construct(problem=ImageProblem(path=chosen))
    np.testing.assert_array_equal(reference_of(recipe, f"{tmp_path}/p.tif[0]").read(0, 12, 0, 17), PIXELS)
    with pytest.raises(UserError, match="is the picture"):
        keep_data(recipe, tmp_path / "p.tif")


def test_integers_that_single_precision_would_round_are_refused_with_their_pixel(tmp_path):
    values = np.full((5, 7), 2**24, np.int32)
    np.save(tmp_path / "p.npy", values)
    problem = Image(ImageProblem(path=str(tmp_path / "p.npy")))
    np.testing.assert_array_equal(problem.target(0, 5, 0, 7).values[..., 0], values)
    values[3, 4] = 2**24 + 1
    np.save(tmp_path / "p.npy", values)
    problem = Image(ImageProblem(path=str(tmp_path / "p.npy")))
    with pytest.raises(UserError, match=r"pixel \(3, 4\) is 16777217, which single precision rounds"):
        problem.target(2, 5, 1, 7)
