"""A mask's grey values decide which pixels count; what is no plain mask is said, or refused."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from cpikan_hr.data.masks import Mask
from cpikan_hr.errors import UserError

SHAPE = (24, 32)
VALID = np.zeros(SHAPE, bool)
VALID[:12, :16] = True  # 25 %
GREY = VALID.astype(np.uint8) * 255


def with_alpha(pixels):
    return np.dstack([pixels] * 3 + [np.full(SHAPE, np.iinfo(pixels.dtype).max, pixels.dtype)])


def palette(path):
    picture = Image.fromarray(VALID.astype(np.uint8), "P")
    picture.putpalette([0, 0, 0, 255, 255, 255])
    picture.save(path)


PLAIN = {
    "rgba.png": lambda p: Image.fromarray(with_alpha(GREY)).save(p),
    "rgba.npy": lambda p: np.save(p, with_alpha(GREY)),
    "grey_alpha.npy": lambda p: np.save(p, np.dstack([GREY, np.full(SHAPE, 255, np.uint8)])),
    "rgba.tif": lambda p: tifffile.imwrite(p, with_alpha(GREY), photometric="rgb", extrasamples=["unassalpha"]),
    "bool.npy": lambda p: np.save(p, VALID),
    "ones.npy": lambda p: np.save(p, VALID.astype(np.uint8)),
    "floats.npy": lambda p: np.save(p, VALID.astype(np.float32)),
    "deep.npy": lambda p: np.save(p, VALID.astype(np.uint16) * 65535),
    "one_bit.bmp": lambda p: Image.fromarray(GREY).save(p),
    "palette.png": palette,
}
SAID = {
    "grey.jpg": (lambda p: Image.fromarray(GREY).save(p, quality=30), "JPEG"),
    "rgb.jpg": (lambda p: Image.fromarray(with_alpha(GREY)[..., :3]).save(p, quality=30), "JPEG"),
    "soft.npy": (lambda p: np.save(p, np.where(VALID, 200, np.arange(32) * 3).astype(np.uint8)), "more than two"),
    "red.png": (lambda p: Image.fromarray(np.dstack([GREY, 0 * GREY, 0 * GREY])).save(p), "colours"),
    "nan.npy": (lambda p: np.save(p, np.where(VALID, 1.0, np.nan)), "NaN counts as invalid"),
}


def read(path):
    return Mask(path, SHAPE).read(0, *SHAPE[:1], 0, SHAPE[1])


@pytest.mark.parametrize("name", PLAIN)
def test_two_grey_values_decide_and_alpha_does_not(name, tmp_path, caplog):
    PLAIN[name](tmp_path / name)
    np.testing.assert_array_equal(read(tmp_path / name), VALID)
    np.testing.assert_array_equal(Mask(tmp_path / name, SHAPE).read(3, 20, 5, 30), VALID[3:20, 5:30])
    assert not caplog.records


@pytest.mark.parametrize("name", SAID)
def test_what_is_no_plain_mask_is_decided_and_said_once(name, tmp_path, caplog):
    write, line = SAID[name]
    write(tmp_path / name)
    for _ in range(2):
        np.testing.assert_array_equal(read(tmp_path / name), VALID)
    assert [line in record.getMessage() for record in caplog.records] == [True]


def test_a_mask_of_all_pixels_is_said(tmp_path, caplog):
    np.save(tmp_path / "m.npy", np.ones(SHAPE, bool))
    assert read(tmp_path / "m.npy").all() and "all pixels are valid" in caplog.text


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros(SHAPE, np.uint8), "no pixel is valid"),
        (np.full(SHAPE, np.nan), "no pixel is valid"),
        (np.where(VALID, -1.0, 1.0), r"pixel \(0, 0\) is -1"),
        (np.where(VALID, np.inf, 1.0), r"pixel \(0, 0\) is inf"),
        (np.ones((5, 5), np.uint8), "give one of their size"),
    ],
)
def test_what_cannot_be_a_mask_is_refused(pixels, message, tmp_path):
    np.save(tmp_path / "m.npy", pixels)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "m.npy")
