"""An equation that is not finite somewhere, or whose file has a mistake: one line that says where, and nothing is lost.

What only a run can meet; mistakes that show when the file is read are in `test_bad_equations.py`.
"""

import json
import math

import numpy as np
import pytest
import yaml
from bad_input import refused, snapshot

from cpikan_hr.cli import main as cli
from cpikan_hr.train import main as train

HEAD = """import math
from dataclasses import dataclass

import torch

from cpikan_hr.problems.equations.base import Equation, dirichlet, initial


@dataclass(frozen=True)
class Mine(Equation):
    speed: float = 1.0

    def domain(self):
        return {"x": (0.0, 1.0), "t": (0.0, 1.0)}

    def residual(self, u, x, t):
        return RESIDUAL

    def conditions(self):
        return CONDITIONS

    def solution(self, x, t):
        return SOLUTION
"""
GOOD = {
    "RESIDUAL": "u.t - u.xx + u.value",
    "CONDITIONS": "initial(lambda x, t: x)",
    "SOLUTION": "x + 0 * t",
}
LINE = {name: 1 + HEAD[: HEAD.index(name)].count("\n") for name in GOOD}
SECOND_ORDER = ["levenberg_marquardt", "bfgs", "ssbroyden", "lbfgs", "additive_schwarz", "multiplicative_schwarz"]


def words(folder, *more, training=None, solve=None, problem=None, **change) -> list[str]:
    """Of a run in `folder` of the equation with these changes."""
    text = HEAD
    for name, code in (GOOD | change).items():
        text = text.replace(name, code)
    (folder / "mine.py").write_text(text)
    tree = {
        "output": str(folder / "run"),
        "problem": {
            "kind": "pde", "equation": str(folder / "mine.py"), "points": {"interior": 40, "condition": 10},
            "resolution": 11, **(problem or {}),
        },
        "field": {"precision": "double", "levels": [{"grid": [1, 1], "network": {
            "kind": "cpikan", "hidden": [4], "degree": 3}}]},
        "training": training or {"steps": 0},
        "solve": solve or {},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return ["--config", str(folder / "recipe.yaml"), *more]


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


# ---------------------------------------------------------------- not finite


@pytest.mark.parametrize("march", [False, True])
@pytest.mark.parametrize("method", SECOND_ORDER)
def test_second_order_solvers_say_where_a_power_of_a_negative_u_is_nan(method, march, tmp_path, capfd):
    solve = {"method": method, "iterations": 2} | ({"march": {"windows": 2, "iterations": 2}} if march else {})
    said = refused(train, words(tmp_path, solve=solve, RESIDUAL="u.t + u.value**1.2 * (x < 2)"), tmp_path, capfd)
    assert "not finite before the first step: the residual is nan at x = 0." in said and ", where u = -" in said
    assert "torch.clamp" in said


NOWHERE = {
    "a power": ({"RESIDUAL": "u.t + (u.value - 9) ** 0.5"}, {}, "the residual is nan at x = "),
    "a slope": ({"RESIDUAL": "u.t + torch.sqrt(0 * u.value)"}, {}, "derivative of the residual with respect to u"),
    "a forcing": ({"RESIDUAL": "u.t - torch.log(x - 0.3)"}, {}, "the residual is nan at x = 0."),
    "a condition": (
        {"CONDITIONS": "initial(lambda x, t: torch.sqrt(x - 0.4))"}, {},
        "condition 'initial': its value is not finite at x = 0.",
    ),
    "a hard condition": (
        {"CONDITIONS": "initial(lambda x, t: torch.sqrt(x - 0.4))"}, {"constraints": "values"},
        "condition 'initial': its value is not finite at x = 0.",
    ),
    "an answer that is measured": (
        {"SOLUTION": "torch.sqrt(x - 0.4)"}, {"measurements": {"points": 20}, "unknown": {"speed": 1.0}},
        "the value to compare with is not finite",
    ),
}  # fmt: skip


@pytest.mark.parametrize("training", [{"steps": 3}, {"steps": 0}])
@pytest.mark.parametrize("case", NOWHERE)
def test_what_is_not_finite_from_the_start_is_refused_before_anything_is_written(case, training, tmp_path, capfd):
    change, problem, message = NOWHERE[case]
    solve = {} if training["steps"] else {"method": "lbfgs", "iterations": 2}
    given = words(tmp_path, training=training, solve=solve, problem=problem, **change)
    assert message in refused(train, given, tmp_path, capfd)


def test_an_update_that_leaves_where_the_equation_is_defined_says_so(tmp_path, capfd):
    training = {"steps": 50, "lr": 1.0, "log_every": 1, "optimizer": "sgd", "schedule": "constant", "warmup": 0}
    residual = "torch.sqrt(5 - u.value) * 1.0"  # smallest at u = 5, where its slope has no bound
    assert train(words(tmp_path, training=training, RESIDUAL=residual)) == 2
    said = capfd.readouterr().err
    assert "is not finite at step " in said and "all ranks stopped before the update; " in said
    assert "the residual is nan at x = " in said and ", where u = " in said and said.count("\n") == 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines and all(math.isfinite(line["loss"]) for line in lines)


@pytest.mark.parametrize("method", SECOND_ORDER)
def test_a_trial_that_is_nan_is_not_taken(method, tmp_path, capfd):
    """u = -0.9 is where sqrt ends: steps beyond it are NaN, and the solver stays on this side."""
    solve = {"method": method, "iterations": 4, "local": 2}
    residual, start = "torch.sqrt(0.9 + u.value) - 0.5", "initial(lambda x, t: -0.65 + 0 * x)"
    assert train(words(tmp_path, training={"steps": 0, "log_every": 1}, solve=solve, RESIDUAL=residual,
                       CONDITIONS=start)) == 0  # fmt: skip
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines]
    assert len(losses) == 4 and losses == sorted(losses, reverse=True) and lines[-1]["evaluations"] > 5


def test_what_fresh_points_show_keeps_the_iterate_before_them(tmp_path, capfd):
    """Of the first draw no point is where the equation is not defined; of a later one some are."""
    solve = {"method": "levenberg_marquardt", "iterations": 40, "redraw_every": 2}
    given = words(tmp_path, solve=solve, problem={"points": {"interior": 4, "condition": 10}},
                  RESIDUAL="u.t + torch.log(x - 0.03) * 0.1")  # fmt: skip
    assert train(given) == 2
    said = capfd.readouterr().err
    assert "not finite at step " in said and "the residual is nan at x = 0.0" in said
    assert cli(["export", str(tmp_path / "run")]) == 0 and cli(["render", str(tmp_path / "run"), "--out",
                                                               str(tmp_path / "map.npy")]) == 0  # fmt: skip
    assert np.isfinite(np.load(tmp_path / "map.npy")).all()


def test_points_drawn_by_a_residual_that_is_nan(tmp_path, capfd):
    problem = {"refine": {"every": 2, "pool": 2000}, "points": {"interior": 4, "condition": 10}}
    given = words(tmp_path, training={"steps": 5}, problem=problem, RESIDUAL="u.t + torch.log(x - 0.03) * 0.1")
    assert train(given) == 2
    said = capfd.readouterr().err
    assert "problem.refine: no points can be drawn by the residual: the residual is nan at x = 0.0" in said


# ---------------------------------------------------------------- fields and answers that are NaN


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("solved")
    assert train(words(folder, solve={"method": "levenberg_marquardt", "iterations": 2})) == 0
    return folder


def strict(text: str):
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    return json.loads(text, parse_constant=refuse)


def test_an_equation_that_is_nan_on_the_lattice_is_null_and_a_dash(solved, capfd):
    """The equation's file may have changed since: its residual has no value on half of the box."""
    words(solved, RESIDUAL="u.t + torch.sqrt(x - 0.5)")
    run = solved / "run"
    capfd.readouterr()
    assert cli(["evaluate", str(run)]) == 0
    table = strict(capfd.readouterr().out)
    assert table["residual"] is None and math.isfinite(table["conditions"]["initial"]["rms"])
    assert math.isfinite(table["rel_l2"])
    assert cli(["report", str(run)]) == 0
    page = (run / "report.html").read_text()
    assert '<tr data-key="residual"><th scope="row">Residual</th><td class="number" data-value="nan">\u2013<' in page
    strict(page.partition('id="data">')[2].partition("</script>")[0])
    (run / "report.html").unlink()


def test_a_solution_that_is_nan_in_places_is_left_out_there(solved, capfd):
    words(solved, SOLUTION="torch.sqrt(x - 0.45)")
    assert cli(["evaluate", str(solved / "run")]) == 0
    table = strict(capfd.readouterr().out)
    assert table["compared"] == pytest.approx(6 / 11) and math.isfinite(table["rel_l2"])
    words(solved, SOLUTION="torch.sqrt(x - 2)")
    before = snapshot(solved)
    assert cli(["evaluate", str(solved / "run")]) == 2
    assert "solution is nowhere finite" in capfd.readouterr().err and snapshot(solved) == before


# ---------------------------------------------------------------- mistakes in the file

MISTAKES = {
    "if on a tensor": (
        "RESIDUAL", "u.t if x > 0.5 else u.x",
        "RuntimeError: Boolean value of Tensor with more than one value is ambiguous; choose point by point, "
        "torch.where(condition, a, b)",
    ),
    "a function of math": ("RESIDUAL", "u.t - math.sin(x)", "use functions of torch"),
    "a name in a branch": ("RESIDUAL", "u.t - (speed if len(x) > 1 else 0)", "NameError: name 'speed' is not defined"),
    "an attribute": ("RESIDUAL", "u.t - (u.xz if len(x) > 1 else 0)", "AttributeError: u.xz: there is u.value"),
    "sizes": ("RESIDUAL", "u.t - torch.ones(7, 1)[: max(len(x), 1)]", "RuntimeError: The size of tensor"),
    "a condition": ("CONDITIONS", "initial(lambda x, t: x if (x > 0.5) else 0 * x)", "torch.where(condition, a, b)"),
    "an answer": ("SOLUTION", "x if x > 0.5 else 0 * x", "torch.where(condition, a, b)"),
}  # fmt: skip


@pytest.mark.parametrize("solve", [{}, {"method": "levenberg_marquardt", "iterations": 2}])
@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_that_many_points_show_names_file_and_line(case, solve, tmp_path, capfd):
    name, code, message = MISTAKES[case]
    given = words(tmp_path, training={"steps": 0 if solve else 2}, solve=solve, **{name: code})
    said = refused(train, given, tmp_path, capfd)
    assert f"{tmp_path / 'mine.py'}, line {LINE[name]}: " in said and message in said


def test_a_mistake_made_after_the_training_is_told_by_all_commands(solved, tmp_path, capfd):
    drawn = ["render", "--out", str(tmp_path / "map.npy"), "--quantity", "residual"]
    for words_of in (["evaluate"], ["report"], drawn):
        words(solved, RESIDUAL="u.t if u.value > 0 else u.x")
        said = refused(cli, [words_of[0], str(solved / "run"), *words_of[1:]], solved, capfd)
        assert f"{solved / 'mine.py'}, line {LINE['RESIDUAL']}: RuntimeError: Boolean value" in said
        assert not list(tmp_path.iterdir())


FILES = {  # put in at line 16; the first definition of the same function is given another name
    "syntax": ("    def other(self, u, x, t)\n", "mine.py, line 16: expected ':'"),
    "import": ("    import nowhere\n", "ModuleNotFoundError: No module named 'nowhere' (line 16)"),
    "name": ("    other: float = pi\n", "NameError: name 'pi' is not defined (line 16)"),
    "signature": ("    def residual(self, u, x):\n        return u.x\n", "line 16: residual: got an"),
    "signature of the answer": ("    def solution(self, y):\n        return y\n", "line 16: solution: missing"),
    "init": ("    def __post_init__(self):\n        self.speed = 2\n", "FrozenInstanceError: cannot assign"),
    "init that raises": ("    def __post_init__(self):\n        1 / 0\n", "ZeroDivisionError: division by zero (line"),
    "conditions": ("    def conditions(self):\n        return none\n", "17: NameError: name 'none' is not defined"),
    "domain": ("    def domain(self):\n        return {}[0]\n", "domain() raised KeyError: 0 (line 17)"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_mistake_in_the_file_names_its_line(case, tmp_path, capfd):
    given, (code, message) = words(tmp_path), FILES[case]
    name = code.partition("def ")[2].partition("(")[0]
    text = (tmp_path / "mine.py").read_text()
    text = text.replace(f"def {name}(self", "def unused(self") if name else text
    lines = text.splitlines(keepends=True)
    (tmp_path / "mine.py").write_text("".join([*lines[:15], code, *lines[15:]]))
    said = refused(train, given, tmp_path, capfd)
    assert message in said and str(tmp_path / "mine.py") in said


def test_a_bug_of_the_program_itself_keeps_its_traceback(tmp_path, monkeypatch):
    from cpikan_hr.problems.pde import PDE

    def residual(self, jet, points):
        return self.equation.residual(1 / 0, points)

    given = words(tmp_path, solve={"method": "lbfgs", "iterations": 1})
    monkeypatch.setattr(PDE, "residual", residual)
    monkeypatch.setitem(residual.__globals__, "__name__", "cpikan_hr.problems.pde")
    with pytest.raises(ZeroDivisionError):
        train(given)
