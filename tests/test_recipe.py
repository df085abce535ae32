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
WAFER = Path(__file__).parents[1] / "recipes" / "wafer.yaml"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_load_and_survive_a_round_trip(path):
    import yaml

    recipe = load_recipe(path)
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe)), "again") == recipe


def test_options_of_the_command_line_override_the_file():
    recipe = load_recipe(WAFER, ["--training.lr", "1e-3", "--field.levels.0.tile=[24,12]"])
    assert recipe.training.lr == 1e-3 and recipe.field.levels[0].tile == [24, 12]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--trainin.steps", "5"], "did you mean 'training'"),
        (["--field.levels.0.network.degre", "5"], "did you mean 'degree'"),
        (["--training.steps", "five"], "'training.steps'"),
        (["--training.lr", "-1"], "'training.lr'"),
        (["--problem.kind", "pd"], "'problem.kind' must be one of"),
        (["--field.levels.0.grid", "[2, 2]"], "either `tile`"),
        (["--field.levels.0.tile", "[32, 12]"], "half the one before"),
        (["--field.levels.0.overlap", "0.3"], "even number of px"),
        (["--field.levels.0.grow", "true"], "`grow` needs"),
        (["--training.steps"], "needs a value"),
        (["steps", "3"], "is not an option"),
    ],
)
def test_mistakes_are_one_line_that_names_the_key(words, expected):
    with pytest.raises(UserError) as caught:
        load_recipe(WAFER, words)
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_a_missing_or_broken_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        load_recipe(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1")
    with pytest.raises(UserError, match="not valid YAML"):
        load_recipe(broken)


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_every_shipped_recipe_runs_and_ends_nearer_to_the_data_than_their_mean(path, tmp_path, monkeypatch, request):
    """On small data, with a few updates more than the recipe may ask for."""
    monkeypatch.chdir(request.config.rootpath)
    recipe, run = load_recipe(path), tmp_path / "run"
    words = [
        "--config",
        str(path),
        "--output",
        str(run),
        "--training.steps",
        "3",
        "--batch.blocks",
        "2",
        "--training.log_every",
        "1",
    ]
    if recipe.problem.kind == "image":
        y, x = np.mgrid[0:70, 0:90]
        pixels = np.stack([120 + 90 * np.sin(x / 9), 120 + 90 * np.cos(y / 7), 1.3 * (x + y)], -1)
        Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).save(tmp_path / "in.png")
        words += ["--problem.path", str(tmp_path / "in.png")]
    elif recipe.problem.stack.startswith("out/"):
        words += ["--problem.stack", str(synth(tmp_path / "stack", size=(70, 90), seed=2))]
    elif not (request.config.rootpath / ".." / "shared" / "data" / "zernike_psi_12frame").is_dir():
        pytest.skip("the mirror's frames are not in ../shared/data/zernike_psi_12frame")
    assert train(words) == 0
    losses = [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    trained = load_field(run)
    assert len(losses) == 3 and np.isfinite(losses).all()
    assert trained.about["levels"][-1]["rmse"] < 0.5 * float(trained.field.spread.square().sum().sqrt())
