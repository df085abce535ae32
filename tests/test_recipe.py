"""A recipe that loads is complete; anything else is one line that names the key."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cpikan_hr.data.synth import synth
from cpikan_hr.errors import UserError
from cpikan_hr.recipe import dump_recipe, load_recipe, parse_recipe
from cpikan_hr.train import main as train
from cpikan_hr.training.weights import load_field

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
PIXELS = [path for path in RECIPES if load_recipe(path).problem.kind != "pde"]  # others: test_equation_recipes.py
WAFER = Path(__file__).parents[1] / "recipes" / "wafer.yaml"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_load_and_survive_a_round_trip(path):
    import yaml

    recipe = load_recipe(path)
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe)), "again") == recipe


def test_options_of_the_command_line_override_the_file():
    recipe = load_recipe(WAFER, ["--training.lr", "1e-3", "--field.levels.1.tile=[24,12]"])
    assert recipe.training.lr == 1e-3 and recipe.field.levels[1].tile == [24, 12]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--trainin.steps", "5"], "did you mean 'training'"),
        (["--field.levels.1.network.degre", "5"], "did you mean 'degree'"),
        (["--training.steps", "five"], "'training.steps'"),
        (["--training.lr", "-1"], "'training.lr'"),
        (["--problem.kind", "pd"], "'problem.kind' must be one of"),
        (["--field.levels.1.grid", "[2, 2]"], "either `tile`"),
        (["--field.levels.1.tile", "[32, 12]"], "half the one before"),
        (["--field.levels.1.overlap", "0.3"], "even number of px"),
        (["--field.levels.1.grow", "true"], "`grow` needs"),
        (["--field.levels.1.network.degree", "4"], "give `degree: null`"),
        (["--start.sweeps", "1"], "'start.sweeps': sweeps are over tiles that Gauss-Newton solves"),
        (["--training.sweep_every", "5"], "'training.sweep_every': sweeps are over tiles that Gauss-Newton solves"),
        (["--start.wiener", "0", "--start.texture", "true"], "'start': `texture`: is learnt for the second average"),
        (["--start.iterations", "3"], "'start.iterations': no level has hidden layers that do not grow"),
        (["--target.psnr", "40"], "give target.rmse in nm"),
        (["--training.steps"], "needs a value"),
        (["steps", "3"], "is not an option"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(words, expected):
    with pytest.raises(UserError) as caught:
        load_recipe(WAFER, words)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


CPIKAN = {"kind": "cpikan", "hidden": [6, 5], "degree": [4, 3, 2]}
LAYERS = [
    (CPIKAN | {"degree": [4]}, "one for each of the 3 layers"),
    (CPIKAN | {"degree": [4, 3, 2, 1]}, "one for each of the 3 layers"),
    (CPIKAN | {"degree": []}, "one for each of the 3 layers"),
    (CPIKAN | {"degree": [4, 0, 2]}, "a degree is from 1 to 64"),
    (CPIKAN | {"degree": 65}, "a degree is from 1 to 64"),
    (CPIKAN | {"degree": -1}, "a degree is from 1 to 64"),
    (CPIKAN | {"hidden": [6, 0]}, "a layer has from 1"),
    (CPIKAN | {"hidden": [-1, 6]}, "a layer has from 1"),
    ({"kind": "siren", "hidden": []}, "at least one hidden layer"),
    ({"kind": "siren", "hidden": [0]}, "a layer has from 1"),
    ({"kind": "siren", "hidden": [8, -1]}, "a layer has from 1"),
    ({"kind": "fourier_mlp", "hidden": [0]}, "a layer has from 1"),
    ({"kind": "chebyshev2d", "sparse": True}, "give `degree: null`"),
    ({"kind": "chebyshev2d", "sparse": True, "degree": 15}, "give `degree: null`"),
]
GROWING = [
    ({"kind": "cpikan", "hidden": [6], "degree": [4]}, "one for each of the 2 layers"),
    ({"kind": "cpikan", "hidden": [6], "degree": [4, 2, 3]}, "one for each of the 2 layers"),
    ({"kind": "cpikan", "hidden": [-1]}, "a layer has from 1"),
    ({"kind": "cpikan", "hidden": [0]}, "a layer has from 1"),
    ({"kind": "siren", "hidden": [0]}, "a layer has from 1"),
]


@pytest.mark.parametrize(
    ("network", "expected", "grow"), [(*case, False) for case in LAYERS] + [(*case, True) for case in GROWING], ids=str
)
def test_layers_that_cannot_be_built_are_refused_by_name(network, expected, grow):
    with pytest.raises(UserError) as caught:
        load_recipe(WAFER, [f"--field.levels=[{{tile: 16, overlap: 0.25, grow: {grow}, network: {network}}}]"])
    assert "field.levels.0" in str(caught.value) and expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("degree", [1, 64, [4, 3, 2]])
def test_layers_within_their_bounds_are_taken(degree):
    network = {"kind": "cpikan", "hidden": [6, 5], "degree": degree}
    recipe = load_recipe(WAFER, [f"--field.levels=[{{tile: 16, network: {network}}}]"])
    assert recipe.field.levels[0].network.degree == degree


@pytest.mark.parametrize("words", [["--start.sweeps", "2"], ["--training.sweep_every", "5"]])
def test_sweeps_are_for_fields_whose_tiles_gauss_newton_solves(words):
    load_recipe(WAFER.with_name("image_cpikan.yaml"), words)
    level = ["--field.levels=[{tile: 16, network: {kind: siren}}]", "--start.iterations", "1"]
    assert load_recipe(WAFER.with_name("image.yaml"), [*level, *words]).swept_levels == [0]
    with pytest.raises(UserError, match="sweeps are over tiles that Gauss-Newton solves"):
        load_recipe(WAFER.with_name("image.yaml"), words)


def test_a_psnr_is_for_pictures_and_null_takes_it_away():
    image = WAFER.with_name("image.yaml")
    assert load_recipe(image).target.psnr == 42
    assert load_recipe(image, ["--target.psnr", "null"]).target.psnr is None
    assert load_recipe(WAFER, ["--target.rmse", "2.5"]).target.rmse == 2.5


def test_a_missing_or_broken_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        load_recipe(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(UserError, match="not valid YAML"):
        load_recipe(broken)


@pytest.mark.parametrize("path", PIXELS, ids=lambda p: p.stem)
def test_every_shipped_recipe_runs_and_ends_nearer_to_the_data_than_their_mean(path, tmp_path, monkeypatch, request):
    """On small data, with a few updates more than the recipe may ask for."""
    monkeypatch.chdir(request.config.rootpath)
    recipe, run = load_recipe(path), tmp_path / "run"
    words = ["--config", str(path), "--output", str(run), "--training.steps", "3", "--training.log_every", "1"]
    few = {name: str(min(getattr(recipe.start, name), 1)) for name in ("shifts", "wiener")}
    words += ["--batch.blocks", "2", "--start.shifts", few["shifts"], "--start.wiener", few["wiener"]]
    if recipe.problem.kind == "image":
        y, x = np.mgrid[0:70, 0:90]
        pixels = np.stack([120 + 90 * np.sin(x / 9), 120 + 90 * np.cos(y / 7), 1.3 * (x + y)], -1)
        Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).save(tmp_path / "in.png")
        words += ["--problem.path", str(tmp_path / "in.png")]
    elif recipe.problem.stack.startswith("out/"):
        words += ["--problem.stack", str(synth(tmp_path / "stack", size=(70, 90), seed=2))]
    else:
        data = {"mirror": "zernike_psi_12frame", "fringe_projection": "cfpe_multifreq_psp"}[path.stem]
        if not (request.config.rootpath / ".." / "shared" / "data" / data).is_dir():
            pytest.skip(f"the recipe's frames are not in ../shared/data/{data}")
    assert train(words) == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    trained = load_field(run)
    assert len(losses) == 3 and np.isfinite(losses).all()
    assert trained.about["levels"][-1]["rmse"] < 0.5 * float(trained.field.spread.square().sum().sqrt())
