"""Conditions: of one function of several, slopes, Robin's, periodic, on parts of faces; against exact solutions."""

import pytest
import torch
from small_pdes import CPIKAN, close, jacobian_by_autograd, make, random_points, rows_by_autograd

from cpikan_hr.errors import UserError
from cpikan_hr.evaluate_pde import on_face
from cpikan_hr.problems.equations.base import coordinates, function_jet
from cpikan_hr.solvers.levenberg_marquardt import levenberg_marquardt
from cpikan_hr.solvers.residuals import Residuals

HEAD = """
import math
from dataclasses import dataclass

import torch

from cpikan_hr.problems.equations.base import *

@dataclass(frozen=True)
class Mine(Equation):
"""
SOUND = HEAD + """
    components = ("u", "v")

    def domain(self):
        return {"x": (0.0, 1.0), "t": (0.0, 0.5)}

    def residual(self, w, x, t):
        return w.u.t - w.v.x, w.v.t - w.u.x

    def conditions(self):
        u = lambda x, t: self.solution(x, t)[:, :1]
        return [*initial(self.solution), *dirichlet("x", u, component="u")]

    def solution(self, x, t):
        right, left = torch.sin(2 * (x + t)), torch.cos(3 * (x - t))
        return torch.cat([right + left, right - left], dim=1)
"""
MIXED = HEAD + """
    h: float = 2.0

    def domain(self):
        return {"x": (0.0, 1.0), "y": (0.0, 1.0)}

    def residual(self, u, x, y):
        return u.xx + u.yy

    def conditions(self):
        slope = lambda x, y: torch.exp(x) * torch.sin(y)
        return [
            *dirichlet("x", self.solution, side="low", where=lambda x, y: y < 0.5),
            *neumann("x", slope, side="low", where=lambda x, y: y >= 0.5),
            FaceResidual("robin", "x", "high", lambda u, x, y: u.x + self.h * u.value - 3 * math.e * torch.sin(y)),
            *dirichlet("y", self.solution, side="low"),
            *neumann("y", lambda x, y: torch.exp(x) * torch.cos(y), side="high"),
        ]

    def solution(self, x, y):
        return torch.exp(x) * torch.sin(y)
"""
ROUND = HEAD + """
    def domain(self):
        return {"x": (0.0, 1.0), "t": (0.0, 0.5)}

    def residual(self, u, x, t):
        return u.t + u.x

    def conditions(self):
        return [*initial(lambda x, t: torch.sin(2 * math.pi * x)), Periodic("x")]

    def solution(self, x, t):
        return torch.sin(2 * math.pi * (x - t))
"""
CASES = {"sound": SOUND, "mixed": MIXED, "round": ROUND}
CHEBYSHEV = {"kind": "chebyshev2d", "input_map": "identity", "degree": 12}


def made(folder, case, grids=((1, 1),), network=CPIKAN, text=None, **options):
    path = folder / f"{case}.py"
    path.write_text(text or CASES[case])
    _, problem, field = make(path, grids, network, **options)
    return problem, field


def group_of(problem, name):
    (number,) = [k for k, group in enumerate(problem.groups) if group.name == name]
    return problem.groups[number], problem.collocation.placed()[number][0]


def misfit(problem, name, function):
    """What a term says is zero, for the jet of a function."""
    group, placed = group_of(problem, name)
    jet = function_jet(function, placed.points, problem.axes, "hessian", problem.channels)
    return problem.unweighted(group, jet, placed.points, placed.values)


@pytest.mark.parametrize("case", CASES)
def test_what_a_term_says_is_zero_of_the_solution_alone(case, tmp_path):
    problem, _ = made(tmp_path, case)
    exact = problem.equation.solution
    for group in problem.groups:
        assert misfit(problem, group.name, exact).abs().max() < 1e-12, group.name
        wrong = misfit(problem, group.name, lambda **at: exact(**at) + at["x"] ** 3 + at["x"] + list(at.values())[1])
        assert wrong.abs().max() > 0.1, group.name


@pytest.mark.parametrize(("case", "constraints"), [
    ("sound", "soft"), ("sound", "values"), ("mixed", "soft"), ("mixed", "values"), ("round", "soft"),
])  # fmt: skip
def test_the_solution_is_found(case, constraints, tmp_path):
    points = {"interior": 300, "condition": 40}
    problem, field = made(tmp_path, case, network=CHEBYSHEV, points=points, constraints=constraints)
    list(levenberg_marquardt(lambda piece: Residuals(field, problem, piece=piece), 3, damping=1e-13))
    at = random_points(problem, 300)
    truth = problem.truth(at)
    assert (problem.values(field, at) - truth).norm() < 1e-6 * truth.norm()
    for condition in problem.conditions:
        assert on_face(problem, field, condition)["max"] < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_those_of_autograd_whatever_the_solver(case, tmp_path):
    problem, field = made(tmp_path, case, [(2, 2)], points={"interior": 3, "condition": 2})
    expected = rows_by_autograd(field, problem).square().sum()[None]
    loss, gradient = Residuals(field, problem).loss_and_gradient()
    assert loss == pytest.approx(expected.item(), rel=1e-12)
    assert close(gradient, jacobian_by_autograd(field, expected)[0], 1e-10)
    pulled = torch.zeros_like(gradient)  # Levenberg-Marquardt's J'r
    residuals = Residuals(field, problem)
    for _, found, blocks, _ in residuals.linearised():
        padded = torch.cat([found, found.new_zeros(1)])
        for block in blocks:
            size = residuals.sizes[block.level]
            place = residuals.offsets[block.level] + block.slots[:, None] * size + torch.arange(size)
            part = torch.einsum("tpn,tp->tn", block.values, padded[block.rows])
            pulled.index_add_(0, place.flatten(), part.flatten())
    assert close(2 * pulled, gradient, 1e-10)
    batch = problem.collocation.read(0, 0, 1)  # and first-order updates see the same loss
    first, _ = problem.loss(field(batch["points"], problem.order), batch)
    assert first.mean().item() == pytest.approx(loss, rel=1e-10)


def test_a_function_without_a_condition_on_a_face_is_free(tmp_path):
    problem, _ = made(tmp_path, "sound")
    exact = problem.equation.solution

    def other(**at):
        return exact(**at) + torch.cat([0 * at["x"], 1 + at["x"]], dim=1)

    assert misfit(problem, "x_low_u", other).abs().max() < 1e-12 and misfit(problem, "initial", other).abs().max() > 0.9
    assert misfit(problem, "x_low_u", other).shape[1] == 1 and misfit(problem, "initial", other).shape[1] == 2


@pytest.mark.parametrize("constraints", ["values", "hard"])
def test_hard_values_are_those_of_their_function_alone(constraints, tmp_path):
    problem, field = made(tmp_path, "sound", constraints=constraints)
    assert [group.name for group in problem.groups] == ["residual"]
    points = random_points(problem, 40)
    points[:, 0] = problem.box.high[0]
    error = problem.values(field, points) - problem.truth(points)
    assert error[:, 0].abs().max() < 1e-12 and error[:, 1].abs().min() > 1e-6
    points[:, 1] = 0
    assert (problem.values(field, points) - problem.truth(points)).abs().max() < 1e-12


def test_what_cannot_be_hard_stays_a_term_of_the_loss(tmp_path):
    problem, _ = made(tmp_path, "mixed", constraints="hard")
    assert [g.name for g in problem.groups] == ["residual", "x_low", "x_low_slope", "robin", "y_high_slope"]
    assert "hard does not hold x_low, x_low_slope, robin, y_high_slope" in problem.note()
    one = ROUND.replace("class Mine(Equation):\n", 'class Mine(Equation):\n    components = ("u", "v")\n')
    one = one.replace('Periodic("x")', 'Periodic("x", "u")').replace("(lambda", "(component='v', value=lambda")
    one = one.replace("return torch.sin(2 * math.pi * (x - t))", "return None")
    problem, _ = made(tmp_path, "one", text=one, constraints="hard")
    assert [g.name for g in problem.groups] == ["residual", "periodic_x_u"] and problem.box.periodic == ()
    moved = misfit(problem, "periodic_x_u", lambda x, t: torch.cat([torch.cos(2 * torch.pi * x), x**2], dim=1))
    assert moved.shape[1] == 2 and moved.abs().max() < 1e-12


def test_a_part_of_a_face_is_where_its_points_are(tmp_path):
    problem, field = made(tmp_path, "mixed", points={"interior": 8, "condition": 50})
    for name, part in (("x_low", lambda y: y < 0.5), ("x_low_slope", lambda y: y >= 0.5)):
        _, placed = group_of(problem, name)
        assert len(placed.points) == 50 and part(placed.points[:, 1]).all() and not placed.points[:, 0].any()
        y = placed.points[:, 1:]
        assert torch.equal(placed.values, torch.sin(y))  # both u and its slope at x = 0
    condition = problem.conditions[0]
    y = torch.linspace(0, 1, problem.options.resolution, dtype=torch.float64)[:, None]
    y = y[y[:, 0] < 0.5]
    at = torch.cat([0 * y, y], dim=1)
    error = problem.values(field, at) - problem.equation.solution(**coordinates(at, ("x", "y")))
    assert on_face(problem, field, condition)["max"] == pytest.approx(float(error.abs().max()), rel=1e-12)


def test_a_coefficient_of_a_condition_can_be_unknown(tmp_path):
    options = {"unknown": {"h": 0.5}, "measurements": {"points": 60}, "points": {"interior": 80, "condition": 12}}
    problem, field = made(tmp_path, "mixed", network=CHEBYSHEV | {"degree": 6}, **options)
    list(levenberg_marquardt(lambda piece: Residuals(field, problem, piece=piece), 5, damping=1e-8))
    assert problem.coefficients(field)["h"] == pytest.approx(2.0, rel=1e-3)


SECOND = HEAD + """
    def domain(self):
        return {"x": (0.0, 1.0)}

    def residual(self, u, x):
        return u.x - 2 * x

    def conditions(self):
        return [FaceResidual("bend", "x", "high", lambda u, x: u.xx - 2), *dirichlet("x", lambda x: 0.0, side="low")]
"""


def test_a_residual_on_a_face_may_need_more_derivatives_than_the_equation(tmp_path):
    problem, field = made(tmp_path, "second", ((1,),), text=SECOND)
    assert problem.order == "hessian" and misfit(problem, "bend", lambda x: x**2).abs().max() < 1e-12
    assert set(problem.told(field)) == {"rms_bend", "rms_x_low"}


REFUSED = {
    "no such name": ("component=\"u\"", "component=\"w\"", "there is no component 'w'; give u, v, or a number from 0"),
    "no such number": ("component=\"u\"", "component=2", "there is no component 2; give u, v, or a number from 0 to 1"),
    "no component": (", component=\"u\"", "", "for each of 2 functions; a condition of one says component="),
    "one face twice": ("[*initial", "[*dirichlet('x', u, 0), *initial", "'x_low_0' and 'x_low_u' give the same"),
    "other faces": ('dirichlet("x", u', 'dirichlet("y", u', "is on axis 'y'; the axes are x, t"),
    "other sides": ('component="u"', 'component="u", side="top"', "its side is 'low' or 'high'"),
    "a number for a function": ('dirichlet("x", u', 'dirichlet("x", 0.0', "are functions: lambda x, t: ..."),
    "name of another term": ("[*initial", "[Condition('residual', 'x', 'low', u, 1, 0), *initial", "cannot be called"),
    "names of derivatives": ('("u", "v")', '("u", "t")', "a component cannot be called 't'"),
    "names twice": ('("u", "v")', '("u", "u")', "two components are called 'u'"),
    "names without functions": ('("u", "v")', '("u", "v")\n    channels = 3', "2 names in components for 3 channels"),
    "no functions": ('components = ("u", "v")', "channels = 0", "channels = 0; give the number of functions"),
    "nowhere": ('component="u"', 'component="u", where=lambda x, t: t > 3', "where is true at 0 of"),
    "a corner": ('component="u"', 'component="u", where=lambda x, t: t == 0', "with an extent"),
    "no truth value": ('component="u"', 'component="u", where=lambda x, t: t', "where gives float64; give True or"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_conditions_that_make_no_sense_are_refused(case, tmp_path):
    old, new, message = REFUSED[case]
    assert old in SOUND
    with pytest.raises(UserError) as told:
        made(tmp_path, "sound", text=SOUND.replace(old, new))
    assert message in str(told.value) and "\n" not in str(told.value)


def test_hard_values_that_a_lift_cannot_take_are_refused(tmp_path):
    apart = ROUND.replace('Periodic("x")', '*dirichlet("x", lambda x, t: 1.0)')
    with pytest.raises(UserError, match=r"^problem\.constraints: the lift .* 'initial': it does not agree .*use soft$"):
        made(tmp_path, "apart", text=apart, constraints="hard")
    made(tmp_path, "apart", text=apart)
    still = ROUND.replace('Periodic("x")', '*dirichlet("x", lambda x, t: torch.sin(2 * math.pi * (x - t)).detach())')
    with pytest.raises(UserError, match=r"condition 'x_low': its value carries no derivatives, .*use soft$"):
        made(tmp_path, "still", text=still, constraints="hard")
    own = ROUND.replace("    def solution", "    def lift(self, x, t):\n        return 0 * x + 1\n\n    def solution")
    with pytest.raises(UserError, match=r"condition 'initial': .* the equation's own lift is wrong"):
        made(tmp_path, "own", text=own, constraints="hard")
