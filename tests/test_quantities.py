"""Maps beside the height: background, modulation, residual, validity and standard deviation of a small wafer."""

import json

import numpy as np
import pytest
import tifffile
import torch
import yaml
from PIL import Image

from cpikan_hr.cli import QUANTITIES
from cpikan_hr.cli import main as cli
from cpikan_hr.data.camera import MEAN_LEVEL, MODULATION
from cpikan_hr.data.scene import Wafer
from cpikan_hr.data.source import open_source
from cpikan_hr.data.synth import synth
from cpikan_hr.errors import UserError
from cpikan_hr.quantities import NAMES, quantity_of
from cpikan_hr.render import render
from cpikan_hr.train import main as train
from cpikan_hr.training.weights import load_field

SHAPE = (150, 200)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("maps")
    stack = synth(folder / "stack", size=SHAPE, noise=2.0, seed=1)
    words = ["--config", "recipes/wafer.yaml", "--problem.stack", str(stack), "--output", str(folder / "run")]
    assert train(words) == 0
    return folder / "run"


def rendered(run, tmp_path, name, *words):
    (tmp_path / "map.npy").unlink(missing_ok=True)
    assert not cli(["render", str(run), "--out", str(tmp_path / "map.npy"), "--quantity", name, *words])
    return np.load(tmp_path / "map.npy")


def test_the_command_line_knows_all_quantities():
    assert QUANTITIES == NAMES


def test_background_and_modulation_are_the_scene_s(run, tmp_path):
    brightness = 255 * Wafer(SHAPE, 1).brightness(0, SHAPE[0], 0, SHAPE[1])
    for name, share, few in (("background", MEAN_LEVEL, 1.1), ("modulation", MODULATION, 1.6)):
        error = rendered(run, tmp_path, name) - share * brightness[..., None]
        assert error.shape == (*SHAPE, 4)
        assert abs(error.mean()) < 0.1 and error.std() < few  # noise 2 over four frames: 1 and 2^0.5


def test_the_residual_is_the_noise(run, tmp_path):
    residual = rendered(run, tmp_path, "residual")
    assert np.sqrt(np.square(residual).mean()) == pytest.approx(2.0, rel=0.05)


def test_two_thirds_of_the_errors_lie_within_sigma(run, tmp_path):
    truth = np.load(run.parent / "stack" / "height_true.npy")
    error = np.abs(rendered(run, tmp_path, "value").reshape(SHAPE) - truth)
    sigma = rendered(run, tmp_path, "sigma").reshape(SHAPE)
    assert 0.63 < np.mean(error < sigma) < 0.73
    part = rendered(run, tmp_path, "sigma", "--region", "33:97,40:151")
    assert np.allclose(part.reshape(64, 111), sigma[33:97, 40:151], rtol=1e-4)


def test_pixels_without_fringes_are_not_valid(run, tmp_path):
    stack = run.parent / "stack"
    for frame in sorted(stack.glob("bucket_*.bmp")):
        pixels = open_source(frame).read(0, SHAPE[0], 0, SHAPE[1])[..., 0].copy()
        pixels[20:30, 40:60] = 255
        Image.fromarray(pixels).save(tmp_path / frame.name)
    (tmp_path / "stack.yaml").write_text((stack / "stack.yaml").read_text().replace("reference: height_true.npy", ""))
    trained = load_field(run, torch.device("cpu"))
    problem = trained.recipe.problem.model_copy(update={"stack": str(tmp_path)})
    trained = trained._replace(recipe=trained.recipe.model_copy(update={"problem": problem}))
    ys, xs = (torch.arange(n, dtype=torch.float64) + 0.5 for n in SHAPE)
    valid = quantity_of(trained, "valid").block(ys, xs)[..., 0]
    expected = np.full(SHAPE, 255.0)
    expected[20:30, 40:60] = 0
    assert np.array_equal(valid, expected)
    render(trained, tmp_path / "masked.npy", mask="valid")
    assert np.array_equal(np.isnan(np.load(tmp_path / "masked.npy").reshape(SHAPE)), expected == 0)
    for name in ("background", "residual", "sigma"):
        unknown = np.isnan(quantity_of(trained, name).block(ys, xs)).any(-1)
        assert unknown[22:28, 42:58].all() and not unknown[:18].any()


def test_maps_are_written_with_their_unit_at_any_scale(run, tmp_path):
    out = tmp_path / "b.tif"
    assert not cli(["render", str(run), "--out", str(out), "--quantity", "modulation", "--scale", "0.5"])
    with tifffile.TiffFile(out) as file:
        assert "grey levels" in file.pages[0].description and file.asarray().shape == (75, 100, 4)
    assert not cli(["render", str(run), "--out", str(tmp_path / "v.png"), "--quantity", "valid"])
    assert not cli(["render", str(run), "--out", str(tmp_path / "s.png"), "--quantity", "sigma"])


def test_what_a_problem_does_not_have_is_refused(run):
    trained = load_field(run, torch.device("cpu"))
    plain = trained.recipe.model_copy(update={"start": trained.recipe.start.model_copy(update={"shifts": 0})})
    with pytest.raises(UserError, match="start.shifts"):
        quantity_of(trained._replace(recipe=plain), "sigma")


@pytest.fixture
def described(run):
    """Changes keys of the stack's file for one test; None takes a key out."""
    path = run.parent / "stack" / "stack.yaml"
    text = path.read_text()

    def change(**keys):
        changed = yaml.safe_load(text) | keys
        path.write_text(yaml.safe_dump({key: value for key, value in changed.items() if value is not None}))

    yield change
    path.write_text(text)


def evaluated(run, capsys, *words):
    capsys.readouterr()
    assert cli(["evaluate", str(run), *map(str, words)]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_form_of_a_surface_needs_no_reference(run, described, capsys):
    known = evaluated(run, capsys, "--remove", "bow")
    described(reference=None)
    found = evaluated(run, capsys, "--remove", "bow")
    assert not {"rmse", "psnr", "ssim", "rel_l2"} & found.keys() and {"rmse", "psnr"} < known.keys()
    for name in ("pv", "sq", "sa", "bow", "warp", "seam", "params"):
        assert found[name] == known[name]


def test_errors_count_inside_the_stack_s_mask_alone(run, described, tmp_path, capsys):
    truth = np.load(run.parent / "stack" / "height_true.npy").reshape(SHAPE)
    error = rendered(run, tmp_path, "value").reshape(SHAPE) - truth
    described(mask={"circle": [60.0, 90.0, 40.0]})
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]] + 0.5
    inside = np.hypot(y - 60, x - 90) <= 40
    found = evaluated(run, capsys)
    assert found["rmse"] == pytest.approx(np.sqrt(np.square(error[inside]).mean()), rel=1e-5)
    np.save(tmp_path / "spoilt.npy", np.where(inside, truth, 1e6))
    spoilt = evaluated(run, capsys, "--reference", tmp_path / "spoilt.npy")
    assert {name: spoilt[name] for name in ("rmse", "psnr", "ssim")} == {
        name: found[name] for name in ("rmse", "psnr", "ssim")
    }


@pytest.mark.parametrize("name", ["map.tif", "map.ome.tif"])
def test_the_unit_of_a_reference_counts(name, run, tmp_path, capsys):
    for unit in ("nm", "um", "m"):
        out = tmp_path / unit / name
        out.parent.mkdir()
        assert cli(["render", str(run), "--out", str(out), "--unit", unit]) == 0
        assert evaluated(run, capsys, "--reference", out)["rmse"] < 2e-3  # float32 heights of up to 13 um


def test_regions_that_do_not_touch_are_told(tmp_path, caplog):
    """One wavelength, and a strip across the frame that is masked out: the pistons of both sides are unknown."""
    stack = synth(tmp_path / "stack", size=SHAPE, wavelengths_um=[5.0], steps=5, noise=1.0)
    mask = np.ones(SHAPE, np.uint8)
    mask[:, 90:110] = 0
    np.save(stack / "mask.npy", mask)
    with (stack / "stack.yaml").open("a") as file:
        file.write("mask: mask.npy\n")
    words = ["--config", "recipes/wafer.yaml", "--problem.stack", str(stack), "--output", str(tmp_path / "run")]
    assert train([*words, "--training.steps", "1", "--problem.noise", "1"]) == 0
    assert json.loads((tmp_path / "run" / "about.json").read_text())["regions"] == 2
    assert cli(["report", str(tmp_path / "run")]) == 0
    assert "2 regions of the mask do not touch" in (tmp_path / "run" / "report.html").read_text()
    caplog.clear()
    assert cli(["render", str(tmp_path / "run"), "--out", str(tmp_path / "s.npy"), "--quantity", "sigma"]) == 0
    assert "does not know of the updates since" in caplog.text and "its mask" not in caplog.text
    stack.rename(tmp_path / "elsewhere")
    assert cli(["render", str(tmp_path / "run"), "--out", str(tmp_path / "h.npy")]) == 0
    assert "its mask" in caplog.text and np.isfinite(np.load(tmp_path / "h.npy")).all()
