"""Mistakes in a recipe of an equation, in its files and in what a backend is asked for: one line, nothing written."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from bad_input import refused

from cpikan_hr.cli import main as cli
from cpikan_hr.train import main as train
from cpikan_hr.training.weights import load_field

sys.path.append(str(Path(__file__).parent / "backends"))

NETWORK = {"kind": "cpikan", "hidden": [4], "degree": 3}


def words(folder: Path, *change: str, equation: str = "diffusion", axes: int = 2, **solve) -> list[str]:
    tree = {
        "output": str(folder / "not" / "there"),
        "problem": {"kind": "pde", "equation": equation, "points": {"interior": 40, "condition": 10}},
        "field": {"levels": [{"grid": [1] * axes, "network": NETWORK}]},
        "training": {"steps": 2},
        "solve": solve,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return ["--config", str(folder / "recipe.yaml"), *change]


RECIPES = {
    "unknown equation": (["--problem.equation", "difusion"], "did you mean 'diffusion'?"),
    "unknown parameter": (["--problem.parameters", "{alpa: 1.0}"], "unknown parameter 'alpa'; did you mean 'alpha'?"),
    "wrong type": (["--problem.parameters", "{alpha: much}"], "alpha = 'much' has the wrong type"),
    "no extent": (["--problem.parameters", "{half_width: 0.0}"], "no extent"),
    "no interior": (["--problem.points.interior", "0"], "'problem.points.interior'"),
    "no points of conditions": (["--problem.points.condition", "0"], "'problem.points.condition'"),
    "fewer points than shares": (["--problem.points.interior", "1", "--training.accumulate", "2"], "at least one per"),
    "unknown weight": (["--problem.weights", "{x_lo: 2.0}"], "there is no 'x_lo'; did you mean 'x_low'?"),
    "negative weight": (["--problem.weights", "{x_low: -1.0}"], "not negative"),
    "weight that is none": (["--problem.weights", "{x_low: .nan}"], "weights"),
    "axes": (["--field.levels.0.grid", "[1, 1, 1]"], "has 2 axes, x, t"),
    "no tiles": (["--field.levels.0.grid", "[0, 1]"], "at least one tile"),
    "px": (["--field.levels.0", f"{{tile: 32, network: {NETWORK}}}"], "no px: give `grid`"),
    "sparse": (["--field.levels.0.network", "{kind: chebyshev2d, degree: null, sparse: true}"], "for fields of pixels"),
    "grow": (["--field.levels.0.grow", "true"], "for fields of pixels"),
    "sine": (["--field.levels.0.network", "{kind: chebyshev2d, degree: 4}"], "input_map sine has no slope"),
    "cosine": (["--field.window", "cosine", "--field.levels.0.grid", "[2, 1]"], "no second derivative"),
    "settle": (["--training.settle_rmse", "0.1"], "'training.settle_rmse': is for fields of pixels"),
    "sweeps": (["--training.sweep_every", "1"], "sweeps are over tiles that Gauss-Newton solves"),
    "start": (["--start.threshold", "1"], "'start': is for fields of pixels"),
    "batch": (["--batch.size", "64"], "'batch': is for fields of pixels"),
    "target": (["--target.rmse", "0.1"], "'target.rmse': is for fields of pixels"),
    "unknown without data": (["--problem.unknown", "{alpha: 1.0}"], "give problem.measurements"),
    "unknown that is no parameter": (["--problem.unknown", "{beta: 1.0}", "--problem.measurements", "{}"], "no 'beta'"),
    "unknown without a number": (["--problem.unknown", "{alpha: .inf}"], "'problem.unknown.alpha'"),
    "attention on other points": (["--problem.attention", "{}", "--problem.points.redraw_every", "5"], "leave out"),
    "refined twice": (["--problem.refine", "{}", "--problem.points.redraw_every", "5"], "leave out"),
    "solver": (["--solve.method", "newton"], "'solve.method'"),
    "option": (["--problem.causal", "{eps: 1.0}"], "did you mean 'epsilon'?"),
}


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


@pytest.mark.parametrize("case", RECIPES)
def test_a_mistake_in_the_recipe(case, tmp_path, capfd):
    change, message = RECIPES[case]
    assert message in refused(train, words(tmp_path, *change), tmp_path, capfd)


def test_what_some_equations_cannot(tmp_path, capfd):
    hard = ["--problem.constraints", "hard", "--field.levels.0.grid", "[2, 1]"]
    said = refused(train, words(tmp_path, *hard, equation="allen_cahn"), tmp_path, capfd)
    assert "hard periodicity needs one tile along x" in said
    for asked in ("problem.causal", "solve.march"):
        said = refused(train, words(tmp_path, f"--{asked}", "{}", equation="helmholtz"), tmp_path, capfd)
        assert f"{asked}: helmholtz has no time axis t" in said
    said = refused(train, ["--config", "recipes/image.yaml", "--solve.method", "lbfgs"], tmp_path, capfd)
    assert "'solve': minimises an equation's residuals" in said


# ---------------------------------------------------------------- equations in files

HEAD = """
from dataclasses import dataclass
from cpikan_hr.problems.equations.base import Condition, Equation, Periodic, dirichlet, initial

@dataclass(frozen=True)
class Mine(Equation):
    speed: float = 1.0

    def domain(self):
        return DOMAIN

    def residual(self, u, x, t):
        return RESIDUAL

    def conditions(self):
        return CONDITIONS
"""
GOOD = {
    "DOMAIN": "{'x': (0.0, 1.0), 't': (0.0, 1.0)}",
    "RESIDUAL": "u.t - u.xx",
    "CONDITIONS": "initial(lambda x, t: x)",
}
EQUATIONS = {
    "no extent": ({"DOMAIN": "{'x': (1.0, 1.0), 't': (0.0, 1.0)}"}, "gives x from 1.0 to 1.0, no extent"),
    "no domain": ({"DOMAIN": "None"}, "give a dict of 1 to 3 axes"),
    "third derivative": ({"RESIDUAL": "u.t + u.xxx"}, "AttributeError: u.xxx: there is u.value"),
    "another axis": ({"RESIDUAL": "u.y"}, "AttributeError: u.y: there is u.value"),
    "no residual": ({"RESIDUAL": "None"}, "residual gives NoneType"),
    "residual that broadcasts": ({"RESIDUAL": "u.t - x[:, 0]"}, "give a tensor [n, K]"),
    "residual that raises": ({"RESIDUAL": "u.t / (1 // 0)"}, "line 13: ZeroDivisionError"),
    "no condition": ({"CONDITIONS": "[]"}, "no condition on any face"),
    "nested conditions": ({"CONDITIONS": "[initial(lambda x, t: x)]"}, "unpack lists"),
    "condition twice": ({"CONDITIONS": "[*initial(lambda x, t: x), *initial(lambda x, t: x)]"}, "is there twice"),
    "condition elsewhere": ({"CONDITIONS": "[Periodic('y')]"}, "is on axis 'y'; the axes are x, t"),
    "second derivative": ({"CONDITIONS": "[Condition('a', 'x', 'low', lambda x, t: t, 2)]"}, "its derivative 0 or 1"),
    "side": ({"CONDITIONS": "[Condition('a', 'x', 'left', lambda x, t: t)]"}, "its side is 'low' or 'high'"),
    "value that raises": ({"CONDITIONS": "initial(lambda x: x)"}, "condition 'initial': its value(x, t) raised"),
    "value that is none": ({"CONDITIONS": "initial(lambda x, t: x / 0 * float('nan'))"}, "is not finite"),
}


@pytest.mark.parametrize("case", EQUATIONS)
def test_a_mistake_in_an_equation(case, tmp_path, capfd):
    change, message = EQUATIONS[case]
    text = HEAD
    for name, code in (GOOD | change).items():
        text = text.replace(name, code)
    (tmp_path / "mine.py").write_text(text)
    assert message in refused(train, words(tmp_path, equation=str(tmp_path / "mine.py")), tmp_path, capfd)


# ---------------------------------------------------------------- measurements


def table(path: Path, values: object) -> None:
    np.savetxt(path, values, delimiter=",")


MEASUREMENTS = {
    "missing": (lambda path: None, "cannot be read"),
    "words": (lambda path: path.write_text("some text\nand more, text\n"), "cannot be read as a table"),
    "empty": (lambda path: path.write_text(""), "3 columns"),
    "columns": (lambda path: table(path, np.zeros((4, 2))), "3 columns"),
    "NaN": (lambda path: table(path, [[0.0, 0.5, np.nan]]), "not finite"),
    "outside": (lambda path: table(path, [[0.0, 0.5, 0.1], [0.0, 1.5, 0.1]]), "row 2 at [0.0, 1.5] is outside the box"),
    "no npy": (lambda path: path.write_text("no array"), "cannot be read"),
}


@pytest.mark.parametrize("case", MEASUREMENTS)
def test_a_bad_table_of_measurements(case, tmp_path, capfd):
    write, message = MEASUREMENTS[case]
    path = tmp_path / ("measured.npy" if case == "no npy" else "measured.csv")
    write(path)
    given = ["--problem.measurements.path", str(path), "--problem.unknown", "{alpha: 1.0}"]
    assert message in refused(train, words(tmp_path, *given), tmp_path, capfd)


# ---------------------------------------------------------------- export


def test_a_field_of_an_equation_is_packed(tmp_path):
    run = tmp_path / "run"
    steps = ["--output", str(run), "--field.precision", "double", "--solve.method", "levenberg_marquardt"]
    assert train([*words(tmp_path, *steps), "--solve.iterations", "4", "--training.checkpoint_steps", "3"]) == 0
    assert cli(["export", str(run), "--bits", "16"]) == 0
    exact, packed = (load_field(path).field.state_dict() for path in (run, run / "field.packed.safetensors"))
    for name, value in exact.items():
        limit = 2**-15 * float(value.abs().max()) if "network" in name else 0.0
        assert (packed[name] - value).abs().max() <= limit, name
    assert cli(["export", str(run), "--out", str(tmp_path / "joined.safetensors")]) == 0
    third = load_field(tmp_path / "joined.safetensors")
    state = third.field.state_dict()
    assert third.about["steps"] == 5 and not all(torch.equal(state[name], exact[name]) for name in exact)
