"""Every format gives the same windows as the whole picture; damaged and unsupported files give one line each."""

import struct
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cpikan_hr.data import windows
from cpikan_hr.data.source import open_pages, open_source
from cpikan_hr.errors import UserError

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (83, 101), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (83, 101), dtype=np.uint16)
COLOUR = RNG.integers(0, 256, (83, 101, 3), dtype=np.uint8)
MAP = RNG.normal(size=(83, 101)).astype(np.float32)


def pillow(path, pixels):
    Image.fromarray(pixels).save(path)


def top_down_bmp(path, pixels):
    height, width = pixels.shape[:2]
    stride = (3 * width + 3) // 4 * 4
    rows = np.zeros((height, stride), np.uint8)
    rows[:, : 3 * width] = pixels[..., ::-1].reshape(height, -1)
    file, info = (b"BM", 54 + rows.size, 0, 0, 54), (40, width, -height, 1, 24, 0, 0, 0, 0, 0, 0)
    head = struct.pack("<2sIHHI IiiHHIIiiII", *file, *info)
    path.write_bytes(head + rows.tobytes())


def zarr_array(path, pixels):
    array = zarr.create_array(path, shape=pixels.shape, chunks=(32,) * 2 + pixels.shape[2:], dtype=pixels.dtype)
    array[:] = pixels


def tiff(**options):
    return lambda path, pixels: tifffile.imwrite(path, pixels, **options)


def planar(path, pixels):
    tifffile.imwrite(path, np.moveaxis(pixels, 2, 0), photometric="rgb", planarconfig="separate", tile=(32, 48))


WRITTEN = {
    "grey.bmp": (pillow, GREY),
    "colour.bmp": (pillow, COLOUR),
    "top_down.bmp": (top_down_bmp, COLOUR),
    "grey.png": (pillow, GREY),
    "deep.png": (pillow, DEEP),
    "colour.png": (pillow, COLOUR),
    "plain.tif": (tiff(), DEEP),
    "big_endian.tif": (tiff(byteorder=">"), DEEP),
    "strips.tif": (tiff(rowsperstrip=16, compression="zlib", predictor=True), DEEP),
    "tiles.tif": (tiff(tile=(32, 48), compression="zlib"), COLOUR),
    "big_tiles.tif": (tiff(tile=(32, 48), bigtiff=True), MAP),
    "planar.tif": (planar, COLOUR),
    "grey.npy": (np.save, GREY),
    "colour.npy": (np.save, COLOUR),
    "big_endian.npy": (lambda path, pixels: np.save(path, pixels.astype(">f4")), MAP),
    "map.zarr": (zarr_array, MAP),
    "colour.zarr": (zarr_array, COLOUR),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    for name, (write, pixels) in WRITTEN.items():
        write(folder / name, pixels)
    return {name: open_source(folder / name) for name in WRITTEN}


@settings(max_examples=15, deadline=None)
@given(st.tuples(st.integers(0, 82), st.integers(1, 83)), st.tuples(st.integers(0, 100), st.integers(1, 101)))
@pytest.mark.parametrize("name", WRITTEN)
def test_a_window_holds_the_pixels_of_the_whole(sources, name, rows, columns):
    pixels = WRITTEN[name][1].reshape(83, 101, -1)
    (y0, height), (x0, width) = rows, columns
    y1, x1 = min(y0 + height, 83), min(x0 + width, 101)
    window = sources[name].read(y0, y1, x0, x1)
    assert sources[name].shape == pixels.shape and window.dtype == sources[name].dtype == pixels.dtype
    np.testing.assert_array_equal(window, pixels[y0:y1, x0:x1])


def test_a_window_is_a_copy_that_may_be_changed(sources):
    sources["grey.npy"].read(0, 4, 0, 4)[...] = 0
    np.testing.assert_array_equal(sources["grey.npy"].read(0, 4, 0, 4)[..., 0], GREY[:4, :4])


@pytest.mark.parametrize("name", ["colour.bmp", "colour.png", "tiles.tif", "colour.zarr"])
def test_threads_may_read_at_once(sources, name):
    corners = [(y, x) for y in range(0, 60, 7) for x in range(0, 80, 9)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda c: sources[name].read(c[0], c[0] + 20, c[1], c[1] + 20), corners))
    for (y, x), window in zip(corners, found, strict=True):
        np.testing.assert_array_equal(window, COLOUR[y : y + 20, x : x + 20])


def test_pages_of_tiff_and_arrays_are_numbered_flat(tmp_path):
    pages = RNG.integers(0, 256, (6, 20, 30), dtype=np.uint8)
    tifffile.imwrite(tmp_path / "pages.tif", pages, photometric="minisblack")
    np.save(tmp_path / "pages.npy", pages.reshape(2, 3, 20, 30))
    for name in ("pages.tif", "pages.npy"):
        assert len(open_pages(tmp_path / name)) == 6
        np.testing.assert_array_equal(open_source(tmp_path / name, page=4).read(2, 9, 3, 30)[..., 0], pages[4, 2:9, 3:])
        with pytest.raises(UserError, match="page"):
            open_source(tmp_path / name, page=6)


def test_coloured_and_grey_palettes_of_bitmaps_are_looked_up(tmp_path):
    image = Image.fromarray(GREY)
    image.putpalette(bytes(COLOUR.reshape(-1)[:768]))
    image.save(tmp_path / "palette.bmp")
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(open_source(tmp_path / "palette.bmp").read(0, 83, 0, 101), expected)


NAMES = ["grey.jpg", "colour.jpg", "cmyk.jpg", "one.png", "alpha.png", "palette.png", "colour.webp"]


@pytest.mark.parametrize("name", NAMES)
def test_pictures_are_what_pillow_decodes(name, tmp_path):
    image = Image.fromarray(GREY if name in ("grey.jpg", "one.png", "alpha.png", "palette.png") else COLOUR)
    if name in ("cmyk.jpg", "one.png", "alpha.png"):
        image = image.convert({"cmyk.jpg": "CMYK", "one.png": "1", "alpha.png": "LA"}[name])
    if name == "palette.png":
        image.putpalette(bytes(np.repeat(np.arange(255, -1, -1, dtype=np.uint8), 3)))  # of greys
    image.save(tmp_path / name)
    source = open_source(tmp_path / name)
    expected = Image.open(tmp_path / name).convert("L" if source.shape[2] == 1 else "RGB")
    np.testing.assert_array_equal(source.read(0, 83, 0, 101), np.asarray(expected).reshape(source.shape))


def test_alpha_is_dropped(tmp_path):
    pillow(tmp_path / "alpha.png", np.dstack([COLOUR, GREY]))
    np.testing.assert_array_equal(open_source(tmp_path / "alpha.png").read(0, 83, 0, 101), COLOUR)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nothing.bmp: no such file"):
        open_source(tmp_path / "nothing.bmp")


@pytest.mark.parametrize("name", ["grey.bmp", "colour.png", "colour.jpg", "plain.tif", "tiles.tif", "grey.npy"])
@pytest.mark.parametrize("kept", [0.0, 0.002, 0.7])
def test_a_truncated_file_is_refused(tmp_path, name, kept):
    write, pixels = WRITTEN.get(name, (pillow, COLOUR))  # JPEG does not give back what was written
    write(tmp_path / name, pixels)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(UserError, match=name) as error:
        open_source(tmp_path / name).read(0, 83, 0, 101)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["text.png", "text.bmp", "text.jpg"])
def test_a_file_that_is_no_image_is_refused(tmp_path, name):
    (tmp_path / name).write_text("BMW" if name.endswith("bmp") else "The quick brown fox jumps over the lazy dog. " * 9)
    with pytest.raises(UserError, match="not an image|truncated"):
        open_source(tmp_path / name)


def test_unsupported_pixel_types_are_named(tmp_path):
    np.save(tmp_path / "map.npy", np.zeros((4, 5), "complex64"))
    with pytest.raises(UserError, match="unsupported bit depth: pixels are complex64"):
        open_source(tmp_path / "map.npy")


def test_an_image_bomb_is_refused_from_its_header_alone(tmp_path):
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    empty = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + empty)
    with pytest.raises(UserError, match="limit of 1073741824"):
        open_source(tmp_path / "bomb.png")


def test_the_pixel_limit_holds_for_every_format(tmp_path, monkeypatch):
    np.save(tmp_path / "map.npy", MAP)
    monkeypatch.setattr(windows, "MAX_PIXELS", 8000)
    with pytest.raises(UserError, match="limit of 8000"):
        open_source(tmp_path / "map.npy")


def test_decoding_leaves_no_file_in_the_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temp"))
    (tmp_path / "temp").mkdir()
    pillow(tmp_path / "colour.png", COLOUR)
    open_source(tmp_path / "colour.png").read(0, 83, 0, 101)
    assert list((tmp_path / "temp").iterdir()) == []
