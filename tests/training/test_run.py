"""Runs of the shipped program on small stacks and pictures, on one process."""

import json

import numpy as np
import pytest
import tifffile
from PIL import Image

from cpikan_hr.cli import main as cli
from cpikan_hr.data.sampling import PixelSampler
from cpikan_hr.data.synth import synth
from cpikan_hr.train import main as train

WAFER = ["--config", "recipes/wafer.yaml", "--batch.blocks", "4", "--batch.size", "64", "--training.log_every", "1"]


@pytest.fixture(scope="module")
def stack(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wafer") / "stack"
    synth(folder, size=(150, 200), noise=2.0, seed=1)
    return folder


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


def losses(run) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_the_wafer_recipe_beats_the_classical_decode(stack, tmp_path, capsys):
    run = tmp_path / "run"
    assert train([*WAFER, "--problem.stack", str(stack), "--output", str(run), "--training.steps", "5"]) == 0
    assert {"recipe.yaml", "metrics.jsonl", "tensorboard", "field.safetensors"} <= {p.name for p in run.iterdir()}
    capsys.readouterr()
    assert cli(["evaluate", str(run)]) == 0
    figures = json.loads(capsys.readouterr().out)
    keys = "rmse psnr range ssim rel_l2 seam params bytes params_per_px train_seconds peak_rss_mb gpu_peak_mb unit"
    keys += " pv sq sa bow warp removed"
    assert set(keys.split()) == set(figures)
    assert cli(["decode", str(stack), "--out", str(tmp_path / "h.npy")]) == 0
    truth = np.load(stack / "height_true.npy").reshape(150, 200)
    classical = np.load(tmp_path / "h.npy").reshape(150, 200)
    assert figures["rmse"] < np.sqrt(np.mean((classical - truth) ** 2))
    assert cli(["render", str(run), "--out", str(tmp_path / "map.npy")]) == 0
    field = np.load(tmp_path / "map.npy").reshape(150, 200)
    assert np.sqrt(np.mean((field - truth) ** 2)) == pytest.approx(figures["rmse"], rel=1e-4)
    y, x = np.mgrid[0:150, 0:200]
    for removed, terms in (("plane", [x * 0 + 1, y, x]), ("bow", [x * 0 + 1, y, x, y * y, x * y, x * x])):
        capsys.readouterr()
        assert cli(["evaluate", str(run), "--remove", removed]) == 0
        figures = json.loads(capsys.readouterr().out)
        basis = np.stack([term.ravel() for term in terms], 1).astype(float)
        left = field.ravel() - basis @ np.linalg.lstsq(basis, field.ravel().astype(float))[0]
        expected = [np.ptp(left), left.std(), np.abs(left).mean()]
        assert [figures[key] for key in ("pv", "sq", "sa")] == pytest.approx(expected, rel=1e-4)
        assert (figures["removed"], figures["unit"]) == (removed, "nm")
    for unit, nm in (("nm", 1), ("um", 1e3), ("m", 1e9)):
        assert cli(["render", str(run), "--out", str(tmp_path / "map.tif"), "--unit", unit]) == 0
        with tifffile.TiffFile(tmp_path / "map.tif") as tif:
            np.testing.assert_allclose(tif.asarray() * float(nm), field, rtol=1e-6)
            assert json.loads(tif.pages[0].description) == {"unit": unit, "pixel_pitch_um": 3.2}


def test_a_run_stopped_and_resumed_gives_the_same_losses(stack, tmp_path):
    common = [
        *WAFER,
        "--problem.stack",
        str(stack),
        "--training.schedule",
        "constant",
        "--training.checkpoint_steps",
        "2",
    ]
    train([*common, "--output", str(tmp_path / "whole"), "--training.steps", "6"])
    train([*common, "--output", str(tmp_path / "parts"), "--training.steps", "4"])
    train([*common, "--output", str(tmp_path / "parts"), "--training.steps", "6"])
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)


def test_a_picture_is_fitted_rendered_in_part_and_at_another_scale(tmp_path, capsys):
    y, x = np.mgrid[0:60, 0:80]
    picture = np.stack([128 + 100 * np.sin(x / 9), 128 + 90 * np.cos(y / 7), (x + y) % 256], -1).astype(np.uint8)
    Image.fromarray(picture).save(tmp_path / "in.png")
    run = tmp_path / "run"
    words = ["--config", "recipes/image.yaml", "--problem.path", str(tmp_path / "in.png"), "--output", str(run)]
    assert train([*words, "--training.steps", "3", "--batch.blocks", "2"]) == 0
    assert (
        cli(["render", str(run), "--out", str(tmp_path / "part.png"), "--region", "10:40,20:70", "--scale", "2"]) == 0
    )
    rendered = np.asarray(Image.open(tmp_path / "part.png")).astype(float)
    assert rendered.shape == (60, 100, 3)
    mean = rendered.reshape(30, 2, 50, 2, 3).mean((1, 3))
    assert np.abs(mean - picture[10:40, 20:70]).mean() < 8
    assert cli(["render", str(run), "--out", str(tmp_path / "g.npy"), "--quantity", "gradient"]) == 0
    assert np.load(tmp_path / "g.npy").shape == (60, 80, 6)
    capsys.readouterr()
    assert cli(["render", str(run), "--out", str(tmp_path / "u.npy"), "--unit", "um"]) == 2
    assert "not a height" in capsys.readouterr().err and not (tmp_path / "u.npy").exists()
    assert cli(["evaluate", str(run)]) == 0
    assert "warp" not in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["render", "nowhere", "--out", "x.tif"], "no trained field"),
        (["render", "nowhere"], "--out"),
        (["synth", "x", "--size", "12"], "WIDTHxHEIGHT"),
        (["decode", "nowhere", "--out", "x.tif"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(words, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and expected in lines[0] and not list(tmp_path.iterdir())


def test_the_union_of_the_shares_is_the_same_batch_however_many_there_are():
    sampler = PixelSampler((100, 130), blocks=6, size=32, stride=4, seed=7)

    def pixels(shares: int) -> list:
        draws = [d for share in range(shares) for d in sampler.draws(3, share, shares)]
        return sorted(zip(np.concatenate([d.iy for d in draws]), np.concatenate([d.ix for d in draws]), strict=True))

    assert pixels(1) == pixels(2) == pixels(3) and len(pixels(1)) == sampler.points(3)
    assert len(set(pixels(1))) == len(pixels(1))  # one pixel per square of blocks that differ


def test_the_mirror_recipe_reconstructs_the_real_frames(tmp_path, request):
    frames = request.config.rootpath / ".." / "shared" / "data" / "zernike_psi_12frame"
    if not frames.is_dir():
        pytest.skip(f"the mirror interferograms are not here: {frames}")
    run = tmp_path / "run"
    assert train(["--config", "recipes/mirror.yaml", "--output", str(run), "--training.steps", "3"]) == 0
    assert cli(["decode", "recipes/mirror", "--out", str(tmp_path / "classical.npy")]) == 0
    assert cli(["render", str(run), "--out", str(tmp_path / "field.npy")]) == 0
    field, classical = (np.load(tmp_path / name).reshape(600, 800) for name in ("field.npy", "classical.npy"))
    assert np.array_equal(np.isnan(field), np.isnan(classical))  # the mask of the pupil
    assert np.nanstd(field - classical) < 10 and np.nanstd(classical) > 100
