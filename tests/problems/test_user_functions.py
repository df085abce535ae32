"""What the functions of an equation of one's own give: taken where it is clear, refused in one line where it is not."""

import numpy as np
import pytest
import torch
from small_pdes import make, random_points

from cpikan_hr.errors import UserError
from cpikan_hr.problems.equations.columns import columns

LINE = """
from dataclasses import dataclass

import numpy as np
import torch

from cpikan_hr.problems.equations.base import *

@dataclass(frozen=True)
class Line(Equation):
    '''u_x = 2 x + 1, u(0, t) = t.'''

    components = ("u", "v")[:1]

    def domain(self):
        return {"x": (0.0, 1.0), "t": (0.0, 2.0)}

    def residual(self, u, x, t):
        return RESIDUAL

    def conditions(self):
        return dirichlet("x", lambda x, t: VALUE, side="low", where=lambda x, t: WHERE)

    def solution(self, x, t):
        return SOLUTION
"""
GOOD = {"RESIDUAL": "u.x - 2 * x - 1", "VALUE": "t", "WHERE": "t < 1", "SOLUTION": "x**2 + x + t"}


def problem_of(folder, change, **options):
    text, path = LINE, folder / "line.py"
    for name, code in (GOOD | change).items():
        text = text.replace(name, code)
    path.write_text(text)
    return make(path, [(1, 1)], points={"interior": 4, "condition": 2}, **options)[1:]


TAKEN = {
    "[n] of one equation": {"RESIDUAL": "(u.x - 2 * x - 1)[:, 0]"},
    "a list of equations": {"RESIDUAL": "[u.x - 2 * x - 1]"},
    "[n] of one function": {"VALUE": "t[:, 0]", "SOLUTION": "(x**2 + x + t)[:, 0]", "WHERE": "t[:, 0] < 1"},
    "arrays": {"VALUE": "t.numpy()", "SOLUTION": "(x**2 + x + t).numpy()[:, 0]", "WHERE": "t.numpy() < 1"},
    "everywhere": {"WHERE": "True"},
    "single precision": {"VALUE": "t.float()", "SOLUTION": "(x**2 + x + t).float()"},
}


@pytest.mark.parametrize("case", TAKEN)
def test_what_is_clear_is_taken_for_what_it_means(case, tmp_path):
    problem, field = problem_of(tmp_path, TAKEN[case])
    plain, _ = problem_of(tmp_path, GOOD | {"WHERE": TAKEN[case].get("WHERE", "t < 1")})
    points = random_points(problem, 7)
    jet = problem.evaluate(field, points, problem.order)
    assert torch.equal(problem.residual(jet, points), plain.residual(jet, points))
    torch.testing.assert_close(problem.truth(points), plain.truth(points), rtol=0, atol=1e-6)
    found, expected = problem.collocation.read(0, 0, 1), plain.collocation.read(0, 0, 1)
    assert torch.equal(found["points"], expected["points"]) and found["values"].dtype == torch.float64
    torch.testing.assert_close(found["values"], expected["values"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("number", ["2", "2.0", "torch.tensor(2)", "np.float64(2)", "[2]", "torch.full((1, 1), 2)"])
def test_a_number_is_a_constant(number, tmp_path):
    problem, _ = problem_of(tmp_path, {"VALUE": number, "SOLUTION": number})
    assert (problem.collocation.read(0, 0, 1)["values"][4:] == 2).all()
    assert torch.equal(problem.truth(random_points(problem, 3)), torch.full((3, 1), 2.0, dtype=torch.float64))


SHAPE = "gives shape (251, 251) at 251 points; give a tensor [n, 1]: where [n] meets [n, 1], torch makes [n, n]"
MEAN = "a row changes with the other points"
REFUSED = {
    "residual [n, n]": ({"RESIDUAL": "u.x - (2 * x - 1)[:, 0]"}, "line.py: residual gives shape (127, 127) at 127"),
    "value [n, n]": ({"VALUE": "t - x[:, 0]"}, f"condition 'x_low': its value(x, t) {SHAPE}"),
    "solution [n, n]": ({"SOLUTION": "x[:, 0] + t"}, f"solution(x, t) {SHAPE}"),
    "where [n, n]": ({"WHERE": "t < x[:, 0] + 1"}, f"condition 'x_low': where {SHAPE}"),
    "[1, n]": ({"SOLUTION": "(x + t).T"}, "solution(x, t) gives shape (1, 251) at 251 points; give a tensor [n, 1]"),
    "sum of all": ({"RESIDUAL": "(u.x - 1).sum()"}, "residual gives shape () at 251 points; give a tensor [n, K]"),
    "mean of all": ({"RESIDUAL": "u.x / x.mean() - 1"}, f"residual: {MEAN}"),
    "value by the mean": ({"VALUE": "t / t.max()"}, f"condition 'x_low': its value(x, t): {MEAN}"),
    "constant that is a mean": ({"VALUE": "t.mean()"}, MEAN),
    "answer by the mean": ({"SOLUTION": "x - x.mean()"}, f"solution(x, t): {MEAN}"),
    "dice": ({"RESIDUAL": "u.x - torch.rand_like(x)"}, f"residual: {MEAN}"),
    "two columns": ({"VALUE": "torch.cat([x, t], 1)"}, "gives shape (251, 2) at 251 points; give a tensor [n, 1]"),
    "two functions": ({"SOLUTION": "[x, t]"}, "solution(x, t) gives a list of 2; give a tensor [n, 1]"),
    "dict": ({"RESIDUAL": "{'u': u.x}"}, "residual gives dict; give a tensor [n, K] of K equations"),
    "None": ({"VALUE": "None"}, "its value(x, t) gives NoneType; give a tensor [n, 1]"),
    "text": ({"SOLUTION": "'x'"}, "solution(x, t) gives str"),
    "list of rows": ({"SOLUTION": "x[:, 0].tolist()"}, "solution(x, t) gives a list of 251"),
    "empty list": ({"RESIDUAL": "[]"}, "residual gives a list of 0"),
    "complex": ({"SOLUTION": "torch.exp(1j * x)"}, "solution(x, t) gives complex128; give real"),
    "half": ({"VALUE": "t.half()"}, "its value(x, t) gives float16; give real"),
    "without u": ({"RESIDUAL": "x - t"}, "residual does not depend on u"),
    "a number": ({"RESIDUAL": "[0.0]"}, "residual does not depend on u"),
    "one without u": ({"RESIDUAL": "[u.x - 1, x]"}, "residual: equation 2 of 2 does not depend on u"),
    "detached": ({"RESIDUAL": "u.x.detach() - 1"}, "residual has no derivative by u; leave out detach"),
    "one detached": ({"RESIDUAL": "[u.x.round(), u.x]"}, "residual: equation 1 of 2 has no derivative by u"),
    "array of u": ({"RESIDUAL": "np.sin(u.x)"}, "RuntimeError: Can't call numpy()"),
    "not finite": ({"VALUE": "torch.log(t - 0.5)"}, "its value is not finite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_is_refused_in_one_line(case, tmp_path):
    change, message = REFUSED[case]
    with pytest.raises(UserError) as told:
        problem_of(tmp_path, change)
    assert message in str(told.value) and "line.py" in str(told.value) and "\n" not in str(told.value)


def test_a_residual_may_depend_on_u_in_a_small_part_of_the_box(tmp_path):
    problem_of(tmp_path, {"RESIDUAL": "torch.where((x < 0.05) & (t < 0.1), u.x - 1, 0 * x)"})


def test_several_functions_take_a_column_each():
    at = torch.ones(5, 1)
    for two in (torch.ones(5, 2), [at, 1.0], [1, at[:, 0]], torch.ones(2), torch.ones(1, 2)):
        assert torch.equal(columns(two, 5, 2, "f").double(), torch.ones(5, 2, dtype=torch.float64))
    for one in (at, at[:, 0], 1.0, torch.ones(()), [at], [at, at, at], torch.ones(2, 5)):
        with pytest.raises(UserError, match=r"^f gives "):
            columns(one, 5, 2, "f")


WEIGHTS = {
    "measurements": ({}, "there is no 'measurements'"),
    "interface_value": ({}, "there is no 'interface_value'"),
    "x_low": ({"constraints": "values"}, "'x_low' holds exactly, by problem.constraints; leave it out"),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_terms_that_do_not_exist_are_refused(name, tmp_path):
    options, message = WEIGHTS[name]
    with pytest.raises(UserError) as told:
        problem_of(tmp_path, {", where=lambda x, t: t < 1": ""}, weights={name: 2.0}, **options)
    assert message in str(told.value)


def test_measurements_of_one_function_of_two_are_refused(tmp_path):
    np.save(tmp_path / "one.npy", np.full((4, 3), 0.5))
    two = {'("u", "v")[:1]': '("u", "v")', "lambda x, t: t, side": "lambda x, t: t, 0, side"}
    two["return x**2 + x + t"] = "pass"
    with pytest.raises(UserError, match=r"one\.npy: shape \(4, 3\); give rows of 4 columns"):
        problem_of(tmp_path, two, measurements={"path": str(tmp_path / "one.npy")})
    np.save(tmp_path / "one.npy", np.full((4, 4), 0.5))
    problem, _ = problem_of(tmp_path, two, measurements={"path": str(tmp_path / "one.npy")})
    assert problem.groups[-1].name == "measurements"
