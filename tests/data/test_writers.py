"""Maps written in any order read back the same; the final file appears whole or not at all."""

import json
import multiprocessing
import os
import shutil

import numpy as np
import pytest
import tifffile
from PIL import Image

from cpikan_hr.data.preview import read_decimated, save_preview
from cpikan_hr.data.source import open_source
from cpikan_hr.data.writers import MapWriter, check_space
from cpikan_hr.errors import UserError

RNG = np.random.default_rng(0)


def pixels_of(dtype, channels, shape=(600, 1030)):
    values = RNG.integers(0, 65536 if dtype == "uint16" else 256, (*shape, channels))
    return values.astype(dtype) + (0.25 if dtype.startswith("float") else 0)


def write_in_random_order(writer, pixels, rows=(250, 350), columns=(400, 630)):
    corners = [(y, x) for y in (0, rows[0]) for x in (0, columns[0])]
    for index in RNG.permutation(len(corners)):
        y, x = corners[index]
        writer.write(y, x, pixels[y : y + rows[y > 0], x : x + columns[x > 0]])


@pytest.mark.parametrize(
    ("suffix", "dtype", "channels"),
    [
        (".tif", "float32", 1), (".tif", "float32", 2), (".tif", "uint8", 3), (".tif", "uint16", 1),
        (".npy", "float32", 1), (".npy", "float64", 2), (".npy", "uint8", 3),
        (".png", "uint8", 1), (".png", "uint8", 3), (".png", "uint16", 1),
        (".bmp", "uint8", 1), (".bmp", "uint8", 3),
    ],
)  # fmt: skip
def test_windows_written_in_any_order_read_back_the_same(tmp_path, suffix, dtype, channels):
    pixels = pixels_of(dtype, channels)
    with MapWriter(tmp_path / f"map{suffix}", pixels.shape, dtype) as writer:
        write_in_random_order(writer, pixels)
        path = writer.finish()
    assert os.listdir(tmp_path) == [path.name]
    source = open_source(path)
    assert source.shape == pixels.shape and source.dtype == dtype
    np.testing.assert_array_equal(source.read(0, 600, 0, 1030), pixels)


def test_other_programs_read_the_same_files(tmp_path):
    grey, height = pixels_of("uint8", 1)[..., 0], pixels_of("float32", 1)[..., 0]
    for suffix, pixels in ((".png", grey), (".bmp", grey), (".npy", height), (".tif", height)):
        with MapWriter(tmp_path / f"map{suffix}", pixels.shape, pixels.dtype) as writer:
            write_in_random_order(writer, pixels)
            writer.finish()
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "map.png")), grey)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "map.bmp")), grey)
    np.testing.assert_array_equal(np.load(tmp_path / "map.npy"), height)
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "map.tif"), height)


def test_a_tiff_is_tiled_big_and_says_unit_and_pitch(tmp_path):
    about = dict(unit="nm", pixel_pitch_um=3.2, description="height")
    with MapWriter(tmp_path / "h.tif", (600, 700), np.float32, **about) as writer:
        writer.write(0, 0, np.zeros((600, 700), np.float32))
        writer.finish()
    with tifffile.TiffFile(tmp_path / "h.tif") as tif:
        assert tif.is_bigtiff and tif.pages[0].is_tiled
        assert json.loads(tif.pages[0].description) == about


@pytest.mark.parametrize("channels", [1, 2])
def test_an_ome_tiff_says_unit_and_pitch_as_ome_does(tmp_path, channels):
    pixels = pixels_of("float32", channels)
    about = dict(unit="um", pixel_pitch_um=3.2, description="height")
    with MapWriter(tmp_path / "h.ome.tif", pixels.shape, np.float32, **about) as writer:
        write_in_random_order(writer, pixels)
        writer.finish()
    with tifffile.TiffFile(tmp_path / "h.ome.tif") as tif:
        assert tif.is_ome and tif.is_bigtiff and tif.pages[0].is_tiled
        np.testing.assert_array_equal(tif.asarray(), np.squeeze(pixels))
        image = tifffile.xml2dict(tif.ome_metadata)["OME"]
    where = image["Image"]["Pixels"]
    assert (where["PhysicalSizeX"], where["PhysicalSizeY"]) == (3.2, 3.2)
    assert (where["PhysicalSizeXUnit"], where["PhysicalSizeYUnit"]) == ("µm", "µm")
    assert image["Image"]["Description"] == "height"
    assert image["StructuredAnnotations"]["MapAnnotation"]["Value"]["M"] == {"K": "ValueUnit", "value": "um"}
    np.testing.assert_array_equal(open_source(tmp_path / "h.ome.tif").read(0, 600, 0, 1030), pixels)


def fill(path, shape, y0, value):
    with MapWriter(path, shape, np.float32, create=False) as writer:
        writer.write(y0, 0, np.full((30, shape[1]), value, np.float32))


def test_several_processes_write_one_map(tmp_path):
    path, shape = tmp_path / "h.tif", (60, 40)
    with MapWriter(path, shape, np.float32) as writer:
        context = multiprocessing.get_context("spawn")
        workers = [context.Process(target=fill, args=(path, shape, 30 * i, i + 1.0)) for i in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
            assert worker.exitcode == 0
        writer.finish()
    np.testing.assert_array_equal(tifffile.imread(path)[[0, 29, 30, 59], 5], [1, 1, 2, 2])


@pytest.mark.parametrize("suffix", [".tif", ".npy", ".png"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, None])
def test_nothing_remains_of_a_map_that_was_not_finished(tmp_path, suffix, error):
    def write():
        with MapWriter(tmp_path / f"map{suffix}", (40, 50), np.uint8) as writer:
            writer.write(0, 0, np.zeros((40, 50), np.uint8))
            if error:
                raise error

    if error:
        with pytest.raises(error):
            write()
    else:
        write()
    assert os.listdir(tmp_path) == []


def test_a_failed_conversion_leaves_the_older_file(tmp_path, monkeypatch):
    (tmp_path / "map.tif").write_bytes(b"older, written by cpikan_hr")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"), MapWriter(tmp_path / "map.tif", (4, 5), np.uint8) as writer:
        monkeypatch.setattr(tifffile.TiffWriter, "write", full)
        writer.finish()
    assert (tmp_path / "map.tif").read_bytes() == b"older, written by cpikan_hr" and os.listdir(tmp_path) == ["map.tif"]


@pytest.mark.parametrize(
    ("name", "dtype", "channels", "message"),
    [
        ("map.png", "float32", 1, r"not float32; end the name with .tif or .npy"),
        ("map.jpg", "uint8", 1, "unknown format '.jpg'"),
        ("map.png", "uint8", 2, "1 or 3 channels, not 2"),
        ("map.tif", "int64", 1, "not int64"),
        ("nowhere/map.tif", "uint8", 1, "No such file or directory"),
    ],
)
def test_what_a_format_cannot_hold_is_refused(tmp_path, name, dtype, channels, message):
    with pytest.raises(UserError, match=message):
        MapWriter(tmp_path / name, (4, 5, channels), dtype)


def test_a_full_disk_is_found_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 0, 1000))
    with pytest.raises(UserError, match="1001 bytes are needed and 1000 are free"):
        check_space(tmp_path, 1001)
    with pytest.raises(UserError, match="bytes are needed"):
        MapWriter(tmp_path / "map.tif", (40, 50), np.float32)
    assert os.listdir(tmp_path) == []


def test_a_folder_without_permission_is_named(tmp_path, monkeypatch):
    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match="map.tif: cannot be written .Permission denied"):
        MapWriter(tmp_path / "map.tif", (4, 5), np.uint8)


def test_a_decimated_map_is_the_mean_of_its_blocks(tmp_path):
    pixels = RNG.normal(size=(64, 100))
    np.save(tmp_path / "map.npy", pixels)
    small = read_decimated(open_source(tmp_path / "map.npy"), max_side=25)
    np.testing.assert_allclose(small[..., 0], pixels.reshape(16, 4, 25, 4).mean((1, 3)), rtol=1e-6)
    np.save(tmp_path / "thin.npy", pixels[:2])
    assert read_decimated(open_source(tmp_path / "thin.npy"), max_side=10).shape == (1, 10, 1)


def test_a_preview_is_a_picture_and_bears_missing_pixels(tmp_path):
    truth = RNG.normal(size=(40, 60))
    height = truth + 0.1
    height[:5] = np.nan
    path = save_preview(tmp_path / "p.png", [height, truth, height - truth], ["map", "truth", "difference"])
    with Image.open(path) as image:
        assert image.width > image.height > 300
    assert os.listdir(tmp_path) == ["p.png"]
