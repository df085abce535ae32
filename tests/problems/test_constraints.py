"""Hard constraints: what they promise holds for whatever the network is, and the ansatz has the derivatives it says."""

import math
from textwrap import dedent

import pytest
import torch
from small_pdes import NETWORKS, close, make, random_points

from cpikan_hr.errors import UserError
from cpikan_hr.jets import pairs
from cpikan_hr.problems.equations import SHIPPED
from cpikan_hr.problems.equations.allen_cahn import AllenCahn
from cpikan_hr.problems.equations.base import Periodic, coordinates

EQUATIONS = [(name, {}) for name in SHIPPED] + [
    ("allen_cahn", {"boundary": "dirichlet", "diffusivity": 0.001}),
    ("diffusion", {"half_width": 2.3}),
    ("helmholtz", {"a1": 3.3, "a2": 0.7, "half_width": 2.0}),
    ("poisson", {"dimensions": 1}),
    ("poisson", {"dimensions": 3}),
]
HEAT = dedent("""
    import math
    from dataclasses import dataclass

    import torch

    from cpikan_hr.problems.equations.base import *

    @dataclass(frozen=True)
    class Heat(Equation):
        def domain(self):
            return {"x": (0.0, 2.0), "t": (1.0, 3.0)}

        def residual(self, u, x, t):
            return u.t - u.xx

        def conditions(self):
            return CONDITIONS
""")


def heat(folder, conditions):
    path = folder / "heat.py"
    path.write_text(HEAT.replace("CONDITIONS", conditions))
    return path


def hard(equation, parameters=None, network=NETWORKS["cpikan"], seed=3, **options):
    """A problem with hard constraints and a random field of one tile."""
    dimensions = 1 if equation == "reaction_diffusion" else (parameters or {}).get("dimensions", 2)
    options = {"points": {"interior": 8, "condition": 4}} | options
    _, problem, field = make(
        equation, [[1] * dimensions], network, parameters=parameters or {}, constraints="hard", seed=seed, **options
    )
    return problem, field


def soft_names(problem):
    return {group.name for group in problem.groups if group.kind in ("condition", "periodic")}


@pytest.mark.parametrize(("name", "parameters"), EQUATIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_faces_velocities_and_periodicity_hold(name, parameters, seed):
    problem, field = hard(name, parameters, seed=seed)
    points, held = random_points(problem, 50), 0
    inside = problem.evaluate(field, points, "gradient")
    size, steepest = inside.value.abs().max(), inside.gradient.abs().max()
    for condition in problem.equation.conditions():
        if condition.name in soft_names(problem):
            continue
        held += 1
        axis = problem.axes.index(condition.axis)
        low, high = points.clone(), points.clone()
        low[:, axis], high[:, axis] = problem.box.low[axis], problem.box.high[axis]
        at_low, at_high = (problem.evaluate(field, face, "gradient") for face in (low, high))
        if isinstance(condition, Periodic):
            assert (at_low.value - at_high.value).abs().max() <= 1e-12 * size
            assert (at_low.gradient[axis] - at_high.gradient[axis]).abs().max() <= 1e-12 * steepest
            continue
        face, jet = (low, at_low) if condition.side == "low" else (high, at_high)
        wanted = condition.value(**coordinates(face, problem.axes))
        found = jet.gradient[axis] if condition.derivative else jet.value
        assert (found - wanted).abs().max() <= 1e-12 * (steepest if condition.derivative else size)
    assert held


def test_the_field_is_free_inside():
    problem, field = hard("wave")
    points = random_points(problem, 20)
    before = problem.values(field, points)
    with torch.no_grad():
        for parameter in field.parameters():
            parameter *= 1.5
    assert (problem.values(field, points) - before).abs().min() > 1e-8


@pytest.mark.parametrize("network", ["siren", "fourier_mlp"])
@pytest.mark.parametrize(("name", "parameters"), EQUATIONS)
def test_the_jet_of_the_ansatz_is_that_of_the_composed_function(name, parameters, network):
    problem, field = hard(name, parameters, NETWORKS[network])
    points = random_points(problem, 12).requires_grad_()
    inner, at = field(points).value, coordinates(points, problem.axes)
    ansatz = problem.ansatz
    u = inner if ansatz is None else ansatz.lift(**at) + ansatz.factor(**at) * inner
    (first,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    second = [torch.autograd.grad(first[:, k].sum(), points, retain_graph=True)[0] for k in range(points.shape[1])]
    jet = problem.evaluate(field, points.detach(), "hessian")
    assert close(jet.value, u.detach(), 1e-10)
    assert close(jet.gradient[..., 0].T, first.detach(), 1e-10)
    assert close(jet.hessian[..., 0].T, torch.stack([second[i][:, j] for i, j in pairs(points.shape[1])], 1), 1e-10)


def test_slopes_without_a_value_stay_soft(tmp_path):
    path = heat(tmp_path, '[*initial(lambda x, t: torch.cos(math.pi * x)), *neumann("x", lambda x, t: 0 * t)]')
    problem, _ = hard(path)
    assert soft_names(problem) == {"x_low_slope", "x_high_slope"}


def test_hard_periodicity_keeps_a_periodic_beginning_hard(tmp_path):
    path = heat(tmp_path, '[*initial(lambda x, t: torch.sin(math.pi * x)), Periodic("x")]')
    problem, _ = hard(path)
    assert soft_names(problem) == set() and problem.box.periodic == (0,)


@pytest.mark.parametrize("beginning", ["x", "(x - 1)**2"])
def test_a_beginning_whose_value_or_slope_is_not_periodic_stays_soft(tmp_path, beginning):
    path = heat(tmp_path, f'[*initial(lambda x, t: {beginning}, lambda x, t: 0 * x), Periodic("x")]')
    problem, _ = hard(path)
    assert soft_names(problem) == {"initial", "velocity"}


def test_allen_cahn_begins_softly_beside_its_circle():
    problem, _ = hard("allen_cahn")  # x^2 cos(pi x) has slopes 2 and -2 at the ends
    assert soft_names(problem) == {"initial"} and problem.box.periodic == (0,)


def test_the_lift_of_periodic_allen_cahn_is_its_beginning_with_the_kink_spread():
    """What is added to the beginning solves the equation linearised about u = -1, and takes both slopes to zero."""
    equation = AllenCahn(diffusivity=0.05, rate=3.0)
    x, t = (torch.rand(40, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in (0, 1))
    x = (1 - 0.2 * x).requires_grad_()
    start = x**2 * torch.cos(math.pi * x)
    assert (equation.lift(x=x, t=0 * t) - start).abs().max() <= 1e-14
    t = (0.2 * t).requires_grad_()
    added = equation.lift(x=x, t=t) - start
    slope, change = torch.autograd.grad(added.sum(), (x, t), create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), x)
    assert added.abs().max() > 0.01
    assert (change - 0.05 * bend + 6 * added).abs().max() <= 1e-12 * change.abs().max()
    ends = torch.tensor([[-1.0], [1.0]], dtype=torch.float64, requires_grad=True)
    soon = torch.full_like(ends, 1e-4)
    (slope,) = torch.autograd.grad(equation.lift(x=ends, t=soon).sum(), ends)
    assert slope.flatten().abs().tolist() == pytest.approx([2 * 6e-4] * 2, rel=1e-3)  # 2 - 2 exp(-2 rate t)
    assert AllenCahn(boundary="dirichlet").lift(x=x, t=t) is None


def test_values_alone_are_hard_and_periodicity_stays_soft():
    _, problem, field = make("allen_cahn", [[3, 1]], constraints="values")
    assert soft_names(problem) == {"periodic_x"} and problem.box.periodic == ()
    points = random_points(problem, 20)
    points[:, 1] = 0.0
    begun = points[:, :1] ** 2 * torch.cos(torch.pi * points[:, :1])
    assert close(problem.values(field, points), begun, 1e-12)


def test_hard_periodicity_refuses_several_tiles():
    with pytest.raises(UserError, match=r"^field\.levels\.0\.grid: hard periodicity .* along x; .* leaves it soft$"):
        make("allen_cahn", [[2, 1]], constraints="hard")
    make("allen_cahn", [[1, 2]], constraints="hard")  # along t they may be several


def test_a_velocity_between_values_on_both_faces_is_refused(tmp_path):
    last = "Condition('last', 't', 'high', lambda x, t: 0 * x)"
    conditions = f"[*initial(lambda x, t: 0 * x, lambda x, t: 0 * x), {last}]"
    with pytest.raises(UserError, match=r"^problem\.constraints: .*both faces of t and a velocity .*use soft$"):
        hard(heat(tmp_path, conditions))


