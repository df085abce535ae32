"""A recipe that loads is complete; anything else is one line that names the key."""

from pathlib import Path

import pytest

from cpikan_hr.errors import UserError
from cpikan_hr.recipe import dump_recipe, load_recipe, parse_recipe

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
WAFER = Path(__file__).parents[1] / "recipes" / "wafer.yaml"


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_shipped_recipes_load_and_survive_a_round_trip(path):
    import yaml

    recipe = load_recipe(path)
    assert parse_recipe(yaml.safe_load(dump_recipe(recipe)), "again") == recipe


def test_options_of_the_command_line_override_the_file():
    recipe = load_recipe(WAFER, ["--training.lr", "1e-3", "--field.levels.1.tile=24"])
    assert recipe.training.lr == 1e-3 and recipe.field.levels[1].tile == 24


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--trainin.steps", "5"], "did you mean 'training'"),
        (["--field.levels.0.network.degre", "5"], "did you mean 'degree'"),
        (["--training.steps", "five"], "'training.steps'"),
        (["--training.lr", "-1"], "'training.lr'"),
        (["--problem.kind", "pd"], "'problem.kind' must be one of"),
        (["--field.levels.0.tile", "8"], "either `tile`"),
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
