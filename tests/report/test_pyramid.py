"""Tiles hold the map to half a step, whatever the strips it came in."""

import base64
import io
import re
import zlib

import numpy as np
import pytest
from PIL import Image

from cpikan_hr.report.pyramid import TILE, MapTiles, PictureTiles, Pyramid, shrink

RNG = np.random.default_rng(0)
ELEMENT = re.compile(r'<script type="text/plain" id="([\w-]+)"((?: data-\w+="[^"]*")*)>([\w+/=]*)</script>\n')


def tiles_of(pixels, encode, rows=100):
    """The tiles by name, the levels' sizes and the text."""
    text: list[str] = []
    pyramid = Pyramid("m", pixels.shape[:2], encode, text.append)
    for y in range(0, len(pixels), rows):
        pyramid.add(pixels[y : y + rows])
    levels = pyramid.finish()
    found = [ELEMENT.fullmatch(part) for part in text]
    about = [dict(re.findall(r'data-(\w+)="([^"]*)"', match[2])) for match in found]
    tiles = {match[1]: (a, base64.b64decode(match[3])) for match, a in zip(found, about, strict=True)}
    assert len(tiles) == len(text)
    return tiles, levels, "".join(text)


def decoded(tile, height, width):
    """By sums of second differences, as the page does it, but in numpy."""
    about, data = tile
    planes = np.frombuffer(zlib.decompress(data), np.uint8).reshape(2, height, width).astype(np.int64)
    folded = planes[0] + 256 * planes[1]
    codes = np.cumsum(np.cumsum((folded >> 1) ^ -(folded & 1), axis=0), axis=1) % 65536
    return np.where(codes > 0, float(about["low"]) + (codes - 1) * float(about["step"]), np.nan)


def joined(tiles, levels, level):
    height, width = levels[level]
    out = np.empty((height, width))
    for row, y in enumerate(range(0, height, TILE)):
        for column, x in enumerate(range(0, width, TILE)):
            place = np.s_[y : y + TILE, x : x + TILE]
            out[place] = decoded(tiles[f"m-{level}-{row}-{column}"], *out[place].shape)
    return out


@pytest.mark.parametrize("shape", [(700, 901), (256, 512), (1, 1), (3, 1100)])
@pytest.mark.parametrize("rows", [1, 37, 10_000])
def test_every_level_is_the_mean_of_the_one_before_to_half_a_step(shape, rows):
    if rows == 1 and shape[0] > 300:
        rows = 5
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]]
    exact = (0.05 * y * y - 3 * x + RNG.normal(0, 2, shape)).astype(np.float32)
    exact[(y - 100) ** 2 + (x - 80) ** 2 < 50**2] = np.nan
    tiles, levels, text = tiles_of(exact[..., None], MapTiles(0.5), rows)
    assert text == tiles_of(exact[..., None], MapTiles(0.5), 64)[2]
    assert max(levels[-1]) <= TILE and sum(-(-h // TILE) * -(-w // TILE) for h, w in levels) == len(tiles)
    level = exact.astype(np.float64)
    for number in range(len(levels)):
        found = joined(tiles, levels, number)
        np.testing.assert_array_equal(np.isnan(found), np.isnan(level))
        assert np.nanmax(np.abs(found - level), initial=0) <= 0.25 + 1e-2  # float32 means of heights up to 25,000
        level = shrink(level[..., None], 2)[..., 0].astype(np.float64)


def test_a_range_too_large_for_the_step_takes_a_larger_one():
    exact = RNG.uniform(-1e6, 1e6, (50, 60, 1)).astype(np.float32)
    tiles, levels, _ = tiles_of(exact, MapTiles(1e-3))
    assert float(tiles["m-0-0-0"][0]["step"]) == pytest.approx(2e6 / 65533, rel=0.01)
    np.testing.assert_allclose(joined(tiles, levels, 0), exact[..., 0], atol=2e6 / 65533 / 2 + 0.1)


@pytest.mark.parametrize("value", [7.25, np.nan])
def test_a_constant_tile_is_exact(value):
    tiles, levels, _ = tiles_of(np.full((20, 30, 1), value, np.float32), MapTiles(0.0))
    np.testing.assert_array_equal(joined(tiles, levels, 0), value)


def test_shrunk_pixels_are_means_of_what_is_known():
    rows = np.array([[1, 2, np.nan], [3, np.nan, np.nan], [5, 6, 7]], np.float32)[..., None]
    np.testing.assert_array_equal(shrink(rows, 2)[..., 0], [[2, np.nan], [5.5, 7]])


@pytest.mark.parametrize(("channels", "full"), [(1, 255.0), (3, 65535.0), (3, 1.0)])
def test_pictures_are_webp_of_their_full_range(channels, full):
    y, x = np.mgrid[0:300, 0:200] / 300
    exact = np.stack([y, x, (x + y) / 2][:channels], -1).astype(np.float32) * np.float32(full)
    tiles, levels, _ = tiles_of(exact, PictureTiles(full))
    assert levels == [(300, 200), (150, 100)]
    found = np.asarray(Image.open(io.BytesIO(tiles["m-0-1-0"][1])), float)
    assert found.shape == (44, 200, 3)
    assert np.abs(found - 255 * exact[256:] / full).mean() < 2
