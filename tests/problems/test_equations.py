"""The shipped equations: closed forms satisfy what they answer; the registry tells mistakes in one line."""

import copy
import math
from dataclasses import replace

import pytest
import torch

from cpikan_hr.errors import UserError
from cpikan_hr.problems.equations import SHIPPED, build, find
from cpikan_hr.problems.equations.base import Equation, Periodic, Solution, coordinates, function_jet

CLOSED_FORMS = [
    ("diffusion", {}),
    ("diffusion", {"half_width": 50, "alpha": 0.03}),
    ("diffusion", {"half_width": 2.3}),
    ("helmholtz", {}),
    ("helmholtz", {"a1": 3.3, "a2": 0.7, "k": 5.0, "half_width": 4.0}),
    ("poisson", {}),
    ("poisson", {"frequencies": 6}),
    ("poisson", {"frequencies": 2, "dimensions": 1}),
    ("poisson", {"frequencies": 2, "dimensions": 3}),
    ("reaction_diffusion", {}),
    ("reaction_diffusion", {"diffusivity": 0.3, "reaction": 2.0, "wave_number": 11.0, "half_width": 3.0}),
    ("wave", {}),
    ("wave", {"c": 0.7, "velocity": -1.5, "mode": 3}),
]


def random_points(equation, count=200, seed=0):
    """Points [n, D] in the box."""
    low, high = torch.tensor(list(equation.domain().values()), dtype=torch.float64).T
    return low + (high - low) * torch.rand(count, len(low), generator=torch.Generator().manual_seed(seed)).double()


def on_face(equation, axis, side, points):
    """The same points moved to a face of the box."""
    points = points.clone()
    points[:, equation.axes.index(axis)] = equation.domain()[axis][side == "high"]
    return points


def solution_at(equation, points, function=None):
    jet = function_jet(function or equation.solution, points, equation.axes, "hessian", equation.channels)
    return Solution(jet, equation.axes)


def size_of_terms(u, equation):
    """The largest value and derivative: what a residual of rounding errors is compared with."""
    names = [*equation.axes, *(2 * axis for axis in equation.axes)]
    return max(1.0, u.value.abs().max(), *(getattr(u, name).abs().max() for name in names))


@pytest.mark.parametrize(("name", "parameters"), CLOSED_FORMS)
def test_closed_forms_satisfy_their_equation(name, parameters):
    equation = build(name, parameters)
    points = random_points(equation)
    u = solution_at(equation, points)
    residual = equation.residual(u, **coordinates(points, equation.axes))
    assert residual.shape == (len(points), 1)
    assert residual.abs().max() < 1e-9 * size_of_terms(u, equation)
    # and no other function does
    u = solution_at(equation, points, lambda **at: equation.solution(**at) + at["x"] ** 2)
    assert equation.residual(u, **coordinates(points, equation.axes)).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "parameters"), CLOSED_FORMS)
def test_closed_forms_satisfy_their_conditions(name, parameters):
    equation = build(name, parameters)
    conditions = equation.conditions()
    assert {c.axis for c in conditions} == set(equation.axes)
    for condition in conditions:
        points = on_face(equation, condition.axis, condition.side, random_points(equation))
        u = solution_at(equation, points)
        found = getattr(u, condition.axis) if condition.derivative else u.value
        wanted = condition.value(**coordinates(points, equation.axes))
        assert (found - wanted).abs().max() < 1e-9 * max(1.0, wanted.abs().max()), condition.name


def test_the_wave_is_given_its_velocity():
    conditions = {c.name: c for c in build("wave", {"velocity": 3.0, "mode": 2}).conditions()}
    at = {"x": torch.tensor([[0.25]]), "t": torch.zeros(1, 1)}
    assert conditions["velocity"].derivative == 1 and conditions["velocity"].value(**at).item() == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("name", "unknown"),
    [("diffusion", "alpha"), ("helmholtz", "k"), ("reaction_diffusion", "diffusivity"),
     ("reaction_diffusion", "reaction"), ("wave", "c"), ("burgers", "nu"), ("allen_cahn", "rate")],
)  # fmt: skip
@pytest.mark.parametrize("put", ["replace", "copy"])
def test_data_do_not_follow_an_unknown_and_the_residual_is_smallest_at_the_truth(name, unknown, put):
    equation = build(name, {})
    points = random_points(equation)
    at = coordinates(points, equation.axes)
    bare = (lambda **at: torch.sin(3 * at["x"]) * torch.cos(at["t"])) if name in ("burgers", "allen_cahn") else None
    u = solution_at(equation, points, bare)
    truth = torch.tensor(getattr(equation, unknown), dtype=torch.float64)
    value = (1.5 * truth).requires_grad_()
    if put == "replace":
        trial = replace(equation, **{unknown: value})
    else:
        trial = copy.copy(equation)
        object.__setattr__(trial, unknown, value)
    loss = (trial.residual(u, **at) - equation.residual(u, **at)).square().mean()
    (slope,) = torch.autograd.grad(loss, value)
    assert loss > 0 and slope > 0
    for mine, theirs in zip(trial.conditions(), equation.conditions(), strict=True):
        if not isinstance(mine, Periodic):
            torch.testing.assert_close(mine.value(**at), theirs.value(**at), rtol=0, atol=0)
    assert repr(equation) == repr(build(name, {})) and equation == build(name, {})


def test_function_jets_against_known_derivatives():
    points = torch.rand(50, 3, generator=torch.Generator().manual_seed(0)).double()
    x, y, z = points.split(1, dim=1)
    axes = ("x", "y", "z")

    def two(x, y, z):
        return torch.cat([torch.sin(2 * x) * y**3, x * z], 1)

    u = Solution(function_jet(two, points, axes, "hessian", 2), axes)
    sine, cosine, zero, one = torch.sin(2 * x), torch.cos(2 * x), 0 * x, 1 + 0 * x
    known = {
        "value": (sine * y**3, x * z), "x": (2 * cosine * y**3, z), "y": (3 * sine * y**2, zero), "z": (zero, x),
        "xx": (-4 * sine * y**3, zero), "xy": (6 * cosine * y**2, zero), "yx": (6 * cosine * y**2, zero),
        "yy": (6 * sine * y, zero), "xz": (zero, one), "zz": (zero, zero), "yz": (zero, zero),
    }  # fmt: skip
    for name, columns in known.items():
        torch.testing.assert_close(getattr(u, name), torch.cat(columns, 1), rtol=1e-13, atol=1e-13)
    laplacian = function_jet(lambda x, y, z: torch.sin(2 * x) * y**3, points, axes, "laplacian")
    torch.testing.assert_close(laplacian.laplacian, -4 * sine * y**3 + 6 * sine * y, rtol=1e-13, atol=1e-13)
    constant = function_jet(lambda x, y, z: 2.0, points, axes, "hessian")
    assert (constant.value == 2).all() and not constant.rows[1:].any()
    with pytest.raises(AttributeError, match="u.xxx"):
        _ = u.xxx


def test_every_shipped_equation_is_found_and_built_with_its_defaults():
    for name in SHIPPED:
        equation = build(name, {})
        assert isinstance(equation, Equation) and type(equation) is find(name)
        assert equation.conditions() and type(equation).__doc__


GOOD = """
from __future__ import annotations
import math, torch
from dataclasses import dataclass
from cpikan_hr.problems.equations.base import Equation, dirichlet

@dataclass(frozen=True)
class Line(Equation):
    '''u_xx = 0.'''
    slope: float = 1.0
    ends: tuple[float, float] = (0.0, 1.0)
    def domain(self): return {"x": self.ends}
    def residual(self, u, x): return u.xx
    def conditions(self): return dirichlet("x", self.solution)
    def solution(self, x): return self.slope * x
"""


def test_an_equation_of_ones_own(tmp_path):
    path = tmp_path / "line.py"
    path.write_text(GOOD)
    equation = build(str(path), {"slope": 3, "ends": [0.0, 2.0]})
    assert equation.slope == 3.0 and equation.domain() == {"x": (0.0, 2.0)}
    points = random_points(equation)
    assert equation.residual(solution_at(equation, points), **coordinates(points, ("x",))).abs().max() == 0


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("difusion", {}, "did you mean 'diffusion'"),
        ("navier_stokes_3d_", {}, "allen_cahn, burgers"),
        ("diffusion", {"half_widht": 6.0}, "did you mean 'half_width'"),
        ("diffusion", {"_given": None}, "unknown parameter '_given'"),
        ("diffusion", {"half_width": "six"}, "wrong type"),
        ("diffusion", {"alpha": True}, "wrong type"),
        ("diffusion", {"alpha": math.nan}, "not finite"),
        ("diffusion", {"half_width": 0.0}, "a domain with no extent"),
        ("diffusion", {"alpha": -0.1}, "alpha = -0.1"),
        ("helmholtz", {"half_width": -1.0}, "a domain with no extent"),
        ("poisson", {"frequencies": 2.5}, "wrong type"),
        ("poisson", {"frequencies": 0}, "frequencies = 0"),
        ("poisson", {"dimensions": 4}, "give 1, 2 or 3"),
        ("allen_cahn", {"boundary": "neumann"}, "'periodic' or 'dirichlet'"),
        ("allen_cahn", {"boundary": 3}, "wrong type"),
        ("burgers", {"nu": 0.0}, "nu = 0.0"),
        ("wave", {"mode": 0}, "mode = 0"),
    ],
)
def test_mistakes_in_names_and_parameters_are_told_in_one_line(name, parameters, message):
    assert message in mistake(name, parameters)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("def f(:\n", "line 1"),
        ("x = 1 / 0\n", "ZeroDivisionError"),
        ("import sys\nsys.exit('a\\nb')\n", "SystemExit: a b"),
        ("x = 1\n", "holds no equation"),
        (GOOD + GOOD.partition("annotations")[2].replace("class Line", "class Other"), "Line, Other"),
        (GOOD.replace("@dataclass(frozen=True)", ""), "no dataclass"),
        (GOOD.replace("slope: float = 1.0", "slope: float"), "'slope' has no default"),
        (GOOD.replace("(0.0, 1.0)", "(1.0, 1.0)"), "no extent"),
        (GOOD.replace("(0.0, 1.0)", "(0.0, math.inf)"), "finite ends"),
        (GOOD.replace('"x": self', '"xy": self'), "single letter"),
        (GOOD.replace("self.ends}", "3}"), "two numbers"),
        (GOOD.replace('{"x": self.ends}', "{}"), "1 to 3 axes"),
        (GOOD.replace('{"x": self.ends}', "self.nothing"), "AttributeError"),
        (GOOD.replace("def residual", "def remainder"), "abstract method"),
    ],
)
def test_mistakes_in_a_file_are_told_in_one_line(tmp_path, text, message):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    told = mistake(str(path), {})
    assert message in told and "mine.py" in told


def mistake(name, parameters):
    """The one line that refuses them."""
    with pytest.raises(UserError) as caught:
        build(name, parameters)
    assert "\n" not in str(caught.value)
    return str(caught.value)
