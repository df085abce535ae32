"""The benchmark of equations: every row is a recipe that the program takes, and what is compared with is at hand."""

from dataclasses import replace

import pdes
import pytest

from cpikan_hr.problems import build_problem
from cpikan_hr.problems.equations.base import Equation
from cpikan_hr.recipe import parse_recipe


@pytest.mark.parametrize("name", pdes.ROWS)
def test_rows_are_recipes(name, tmp_path):
    row = pdes.ROWS[name]
    few = {"points": row.problem.get("points", {}) | {"interior": 30, "condition": 5}}
    problem = build_problem(parse_recipe(replace(row, problem=row.problem | few).recipe(0, tmp_path), name))
    assert row.measure == "rel_l2" or row.measure in problem.options.unknown
    assert type(problem.equation).solution is not Equation.solution


def test_a_row_is_trained_and_measured(monkeypatch):
    row = pdes.ROWS["reaction_diffusion"]
    monkeypatch.setitem(pdes.ROWS, "short", replace(row, solve=pdes.marquardt(20), problem=row.problem))
    found = pdes.measured("short", 0)
    assert found["error"] == found["rel_l2"] < 0.1 and found["params"] == 480
    assert [error for _, error in found["history"]] == sorted((e for _, e in found["history"]), reverse=True)
    assert 1 < found["cpu_s"] < 600
