"""Every shipped recipe of an equation trains, on few points and for few iterations, and says where it came from."""

import json
from pathlib import Path

import pytest
import torch

from cpikan_hr.problems import build_problem
from cpikan_hr.problems.equations import SHIPPED
from cpikan_hr.recipe import load_recipe
from cpikan_hr.train import main as train
from cpikan_hr.training.weights import load_field

ROOT = Path(__file__).parents[1]
RECIPES = [path for path in sorted((ROOT / "recipes").glob("*.yaml")) if load_recipe(path).problem.kind == "pde"]
SMALL = {
    "--problem.points.interior": "150", "--problem.points.condition": "20", "--solve.iterations": "3",
    "--training.log_every": "1", "--problem.resolution": "31",
}  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_of_an_equation_runs(path, tmp_path):
    given = load_recipe(path)
    words = [word for pair in SMALL.items() for word in pair]
    words += ["--training.steps", str(min(given.training.steps, 2))]
    if given.problem.points.interface:
        words += ["--problem.points.interface", "6"]
    if given.solve.march:
        words += ["--solve.march.windows", "2", "--solve.march.iterations", "2", "--field.levels.0.grid", "[3, 2]"]
    assert train(["--config", str(path), "--output", str(tmp_path / "run"), *words]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    assert len(losses) > 1 and losses[-1] < losses[0]
    field, recipe, about = load_field(tmp_path / "run")
    problem = build_problem(recipe)
    values = problem.values(field, problem.lattice_points(problem.shape))
    assert values.shape == (problem.shape[0] * problem.shape[1], 1) and torch.isfinite(values).all()
    assert values.std() > 0 and about["equation"] == problem.name
    assert given.output == f"runs/{path.stem}"


def test_every_shipped_equation_has_a_recipe_and_a_row_in_the_documentation():
    used = {load_recipe(path).problem.equation for path in RECIPES}
    assert used == set(SHIPPED)
    table = (ROOT / "docs" / "equations.md").read_text()
    assert all(f"| `{name}` |" in table for name in SHIPPED)
    assert all(f"`recipes/{path.name}`" in table for path in RECIPES)
