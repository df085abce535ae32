"""Runs on pictures with pixels that hold no data, and of any range, against numpy on what they render."""

import json

import numpy as np
import pytest
import tifffile
import yaml

from cpikan_hr.cli import main as cli
from cpikan_hr.train import main as train
from cpikan_hr.training.weights import load_field

SPARSE = {"tile": [32, 16, 8], "overlap": 0.25, "network": {"kind": "chebyshev2d", "degree": None, "sparse": True}}
EXACT = {"tile": 16, "overlap": 0.25, "network": {"kind": "chebyshev2d", "degree": 2}}
DEEP = {"tile": 16, "overlap": 0.25, "network": {"kind": "cpikan", "hidden": [4], "degree": 3}}
GROWN = {
    "tile": [16, 8], "overlap": 0.5, "grow": True,
    "network": {"kind": "cpikan", "hidden": [3], "degree": [3, 3], "input_map": "sine", "first_input_map": "sine"},
}  # fmt: skip
SHAPE = 48, 64
Y, X = np.mgrid[: SHAPE[0], : SHAPE[1]]
LACKING = (Y < 18) & (X > 30) | (Y > 40) | (X == 20)  # whole tiles, a border, a line
PARABOLA = (0.3 + 0.002 * X - 0.004 * Y + 1e-4 * X * Y - 5e-5 * X**2).astype(np.float32)
PHOTO = (2000 + 1500 * np.sin(X / 9) * np.cos(Y / 14) + np.random.default_rng(0).normal(0, 40, SHAPE)).clip(1, 4000)


@pytest.fixture
def run(tmp_path, capsys):
    """Trains on pixels: `run(name, pixels, levels, nodata, {section: options})`; the run's folder."""

    def begun(name, pixels, levels, nodata=None, **sections):
        path = tmp_path / f"{name}.tif"
        tags = [] if nodata is None else [(42113, "s", 0, nodata, True)]
        tifffile.imwrite(path, pixels, extratags=tags, photometric="minisblack" if pixels.ndim == 2 else "rgb")
        tree = {"output": str(tmp_path / name), "problem": {"kind": "image", "path": str(path)}}
        tree |= {"field": {"levels": levels}, "training": {"steps": 0}} | sections
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
        assert train(["--config", str(tmp_path / "recipe.yaml")]) == 0
        return tmp_path / name

    return begun


def evaluated(run, capsys, *words) -> dict:
    capsys.readouterr()
    assert cli(["evaluate", str(run), *words]) == 0
    return json.loads(capsys.readouterr().out)


def rendered(run, suffix="npy", *words) -> np.ndarray:
    out = run / f"map.{suffix}"
    out.unlink(missing_ok=True)
    assert cli(["render", str(run), "--out", str(out), *words]) == 0
    return tifffile.imread(out) if suffix == "tif" else np.load(out)


def decibels(error, full) -> float:
    return float(10 * np.log10(full**2 / np.mean(np.square(error.astype(np.float64)))))


STEPS = {"steps": 3, "lr": 1e-3, "log_every": 1}
KINDS = {
    "closed form": ([EXACT], {}),
    "closed form, then steps": ([EXACT], {"training": STEPS, "batch": {"blocks": 1, "size": 64, "stride": 2}}),
    "Gauss-Newton": ([DEEP], {"start": {"iterations": 3}}),
    "quadtree": ([SPARSE], {"target": {"psnr": 40}}),
    "grown": ([GROWN], {"target": {"psnr": 35}}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_where_there_are_no_data_does_not_matter(kind, run):
    levels, sections = KINDS[kind]
    garbage = np.where(LACKING, np.float32(-9999), PARABOLA), np.where(LACKING, np.float32(np.nan), PARABOLA)
    runs = [run("a", garbage[0], levels, "-9999", **sections), run("b", garbage[1], levels, **sections)]
    maps = [rendered(each) for each in runs]
    np.testing.assert_array_equal(maps[0], maps[1])
    for found in maps:
        np.testing.assert_array_equal(np.isnan(found), LACKING)


def test_a_parabola_with_holes_is_found_exactly(run):
    spoilt = np.where(LACKING, np.float32(1e6), PARABOLA)
    tiles = [{"tile": 16, "overlap": 0.0, "network": EXACT["network"] | {"input_map": "identity"}}]
    whole = rendered(run("whole", PARABOLA, tiles, start={"ridge": 1e-12}))
    found = rendered(run("spoilt", spoilt, tiles, "1e6", start={"ridge": 1e-12}))
    assert np.abs(whole - PARABOLA).max() < 1e-5 and np.abs(found - PARABOLA)[~LACKING].max() < 1e-5


def test_figures_are_of_the_pixels_with_data(run, capsys):
    spoilt = np.where(LACKING, np.float32(np.nan), PHOTO.astype(np.float32))
    folder = run("photo", spoilt, [SPARSE], target={"psnr": 38})
    assert f"{LACKING.sum()} of {LACKING.size} pixels hold no data" in capsys.readouterr().out
    figures, found = evaluated(folder, capsys), rendered(folder)
    full = np.nanmax(spoilt) - np.nanmin(spoilt)
    error = (found - spoilt)[~LACKING]
    assert figures["range"] == load_field(folder).about["range"] == full
    assert figures["psnr"] == pytest.approx(decibels(error, full), abs=1e-3) and 38 <= figures["psnr"] < 38.5
    assert figures["rmse"] == pytest.approx(np.sqrt(np.mean(np.square(error, dtype=np.float64))), rel=1e-4)
    other = folder / "other.tif"
    tifffile.imwrite(other, np.where(X < 5, 7, PHOTO).astype(np.float32), extratags=[(42113, "s", 0, "7", True)])
    error = (found - PHOTO)[~LACKING & (X >= 5)]
    figures = evaluated(folder, capsys, "--reference", str(other))
    assert figures["psnr"] == pytest.approx(decibels(error, full), abs=1e-3)
    assert cli(["export", str(folder), "--step", "1", "--out", str(folder / "packed.safetensors")]) == 0
    packed = evaluated(folder / "packed.safetensors", capsys)
    assert packed["range"] == full and packed["psnr"] > 37
    assert cli(["report", str(folder)]) == 0
    assert "the PSNR refers to" in (folder / "report.html").read_text()


@pytest.mark.parametrize(("dtype", "nodata", "dark"), [("uint8", 0, 0.3), ("uint8", 255, 254.8), ("uint16", 65535, 9)])
def test_a_picture_of_integers_gets_its_no_data_value_back(dtype, nodata, dark, run):
    pixels = np.where(LACKING, nodata, 100 + (X % 7)).astype(dtype)
    pixels[~LACKING & (Y > 30)] = min(max(round(dark), 1), 254)
    found = rendered(run("p", pixels, [EXACT], str(nodata)), "tif")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found == nodata, LACKING)  # nor does any other pixel seem to lack data
    with tifffile.TiffFile(run("q", pixels, [EXACT], str(nodata)) / "../p/map.tif") as tif:
        assert float(tif.pages[0].tags["GDAL_NODATA"].value) == nodata


def test_the_loss_that_is_told_is_of_the_pixels_with_data(run):
    spoilt = np.where(LACKING, np.float32(np.nan), PHOTO.astype(np.float32))
    options = {"training": STEPS | {"lr": 1e-12}, "batch": {"blocks": 1, "size": 64, "stride": 1}}
    folder = run("photo", spoilt, [EXACT], **options)
    told = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    full = np.nanmax(spoilt) - np.nanmin(spoilt)
    expected = decibels((rendered(folder) - spoilt)[~LACKING], full)
    assert told[-1]["psnr_db"] == pytest.approx(expected, abs=1e-3)


def test_twelve_bits_in_sixteen_reach_what_is_asked_of_their_own_range(run, capsys):
    pixels = PHOTO.round().astype(np.uint16)
    folder = run("p", pixels, [SPARSE], target={"psnr": 42})
    assert "psnr: of a range of 4095" in capsys.readouterr().out
    reached = decibels(rendered(folder, "tif").astype(float) - pixels, 4095)
    assert 41.9 < reached < 42.5
    figures = evaluated(folder, capsys)
    assert figures["range"] == 4095 and figures["psnr"] == pytest.approx(reached, abs=0.05)  # the map is rounded


@pytest.mark.parametrize("factor", [2.0**-17, 2.0**10])
def test_a_unit_of_the_values_changes_nothing(factor, run, capsys):
    pixels, runs = PHOTO.astype(np.float32), []
    for name, scale in (("one", 1.0), ("other", factor)):
        runs.append(evaluated(run(name, pixels * np.float32(scale), [SPARSE], target={"psnr": 42}), capsys))
    assert runs[0]["params"] == runs[1]["params"] and runs[0]["psnr"] == pytest.approx(runs[1]["psnr"], abs=1e-3)


def test_a_range_that_is_given_is_the_one_of_all(run, capsys):
    pixels = PHOTO.round().astype(np.uint16)
    folder = run("p", pixels, [SPARSE], target={"psnr": 42, "range": 1000.0})
    figures = evaluated(folder, capsys)
    assert figures["range"] == 1000 and 42 <= figures["psnr"] < 42.3
    assert figures["psnr"] == pytest.approx(20 * np.log10(1000 / figures["rmse"]), abs=1e-6)
