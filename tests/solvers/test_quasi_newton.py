"""Quasi-Newton methods: known minima, the secant equation, finite termination, resuming, and steps that go too far."""

import itertools
import math

import pytest
import torch
from losses import Loss, Poisson, quadratic, rosenbrock, rosenbrock_start, symmetric

from cpikan_hr.errors import UserError
from cpikan_hr.solvers.line_search import search
from cpikan_hr.solvers.quasi_newton import (
    DENSE,
    DENSE_LIMIT,
    METHODS,
    Limited,
    quasi_newton,
    scaling,
    update_inverse_hessian,
    usable,
)


def pairs(matrix: torch.Tensor, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    steps = torch.randn(count, len(matrix), dtype=torch.float64, generator=generator)
    return [(s, matrix @ s) for s in steps]


def iterations_to(objective: Loss, theta: torch.Tensor, method: str, goal: float, **options) -> int:
    """Iterations until the gradient is `goal` times what it was."""
    start = float(objective.gradient(theta)[1].norm())
    for number, step in enumerate(quasi_newton(objective, theta, method, 2000, **options), 1):
        if step.gradient_norm < goal * start:
            return number
    raise AssertionError(f"{method} ended at {step.gradient_norm / start:.1e} of its gradient")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", [2, 20])
def test_rosenbrock(method, size):
    for step in quasi_newton(Loss(rosenbrock, size), rosenbrock_start(size), method, 400):
        if step.gradient_norm < 1e-12:
            break
    assert torch.allclose(step.theta, torch.ones(size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert step.loss == float(rosenbrock(step.theta))


@pytest.mark.parametrize("method", ["bfgs", "lbfgs"])
def test_near_exact_line_searches_end_a_quadratic_in_about_n_steps(method):
    """Condition number 1e6; in exact arithmetic it would be n steps."""
    size = 20
    objective = quadratic(symmetric(torch.logspace(0, 6, size, dtype=torch.float64)), torch.ones(size).double())
    start = torch.zeros(size, dtype=torch.float64)
    assert iterations_to(objective, start, method, 1e-9, curvature=1e-3) <= size + 6
    assert iterations_to(objective, start, method, 1e-9) > 2 * size  # what the exact searches are for


@pytest.mark.parametrize("method", ["ssbfgs", "ssbroyden"])
def test_self_scaling_mends_a_badly_scaled_start(method):
    """The first step sees the stiffest direction only, whose scale is far too small for all others."""
    size = 20
    objective = quadratic(symmetric(torch.logspace(0, 6, size, dtype=torch.float64)), torch.ones(size).double())
    start = torch.zeros(size, dtype=torch.float64)
    assert iterations_to(objective, start, method, 1e-8) < 0.6 * iterations_to(objective, start, "bfgs", 1e-8)


@pytest.mark.parametrize("method", DENSE)
def test_dense_updates_keep_secant_equation_symmetry_and_definiteness(method):
    matrix = torch.eye(12, dtype=torch.float64)
    for s, y in pairs(symmetric(torch.logspace(-2, 2, 12, dtype=torch.float64)), 30):
        curvature = float(s @ torch.linalg.solve(matrix, s))
        assert update_inverse_hessian(matrix, s, y, curvature, method)
        assert torch.linalg.norm(matrix @ y - s) < 1e-10 * torch.linalg.norm(s)
        assert torch.allclose(matrix, matrix.T, rtol=0, atol=1e-13 * float(matrix.abs().max()))
        assert torch.linalg.eigvalsh(matrix)[0] > 0


def test_limited_memory_keeps_the_secant_equation_and_is_bfgs_while_nothing_is_forgotten():
    hessian = symmetric(torch.logspace(-1, 1, 12, dtype=torch.float64))
    history = pairs(hessian, 8)
    limited = Limited({})
    for s, y in history:
        limited.update(s, y)
        assert torch.allclose(limited.times(y), s, rtol=0, atol=1e-10)
    dense = torch.eye(12, dtype=torch.float64) * limited.scale
    for s, y in history:
        update_inverse_hessian(dense, s, y, float(s @ torch.linalg.solve(dense, s)), "bfgs")
    probe = torch.linspace(-1, 1, 12, dtype=torch.float64)
    assert torch.allclose(limited.times(probe), dense @ probe, rtol=1e-9, atol=1e-12)


def test_limited_memory_forgets_the_oldest_pairs():
    history = pairs(symmetric(torch.logspace(-1, 1, 12, dtype=torch.float64)), 9)
    short, last = Limited({}, history=4), Limited({})
    for s, y in history:
        short.update(s, y)
    for s, y in history[-4:]:
        last.update(s, y)
    assert torch.equal(short.times(history[0][0]), last.times(history[0][0]))


def test_an_update_that_rounding_has_made_indefinite_is_refused_and_changes_nothing():
    matrix = torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))
    before = matrix.clone()
    s = torch.tensor([0.0, 1.0], dtype=torch.float64)
    assert not update_inverse_hessian(matrix, s, s, 1.0, "bfgs")
    assert torch.equal(matrix, before)


def test_self_scaling_factors():
    """Against eqs. 13-23 of Urban, Stefanou and Pons, each by its definition."""
    for h, b, size in itertools.product([0.3, 1.5, 40.0], [0.7, 3.7, 90.0], [2, 30]):
        a = h * b - 1
        if a <= 0:
            continue
        low = min(1, h * (1 - math.sqrt(a / (1 + a))))
        theta = max((low - 1) / a, min(1 / low, (1 - b) / b))
        sigma = 1 + a * theta
        power = sigma ** (1 / (1 - size))
        bounded = min(1, 1 / b)
        tau = bounded * min(power, 1 / theta) if theta > 0 else min(bounded * power, sigma)
        assert scaling(h, b, size, "ssbroyden") == pytest.approx((tau, (1 - theta) / (1 + a * theta)), rel=1e-10)
        assert scaling(h, b, size, "ssbfgs") == (bounded, 1)
        assert scaling(h, b, size, "bfgs") == (1, 1)


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_iteration_is_bitwise_the_uninterrupted_one(method):
    objective, start = Poisson(8), Poisson(8).start()
    whole = list(quasi_newton(objective, start, method, 30))
    first = list(quasi_newton(objective, start, method, 13))[-1]
    state = {name: value.clone() for name, value in first.state.items()}
    second = list(quasi_newton(objective, first.theta.clone(), method, 17, state))
    assert len(whole) == 30 and len(second) == 17
    for expected, resumed in zip(whole[13:], second, strict=True):
        assert torch.equal(expected.theta, resumed.theta)
        assert (expected.loss, expected.gradient_norm) == (resumed.loss, resumed.gradient_norm)
        assert resumed.evaluations == expected.evaluations + 1  # the one that finds loss and gradient again


@pytest.mark.parametrize("method", METHODS)
def test_a_loss_that_is_not_finite_is_a_step_too_long(method):
    """x - log x is nowhere defined beyond 0, and its first step would go there."""
    scales = torch.tensor([1.0, 30.0, 0.2], dtype=torch.float64)
    objective = Loss(lambda x: (x * scales - torch.log(x)).sum(), 3)
    for step in quasi_newton(objective, torch.full((3,), 3.0, dtype=torch.float64), method, 60):
        assert math.isfinite(step.loss)
        if step.gradient_norm < 1e-10:
            break
    assert torch.allclose(step.theta, 1 / scales, rtol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_losses_of_rounding_size_still_fall(method):
    """Near this minimum losses differ by less than their rounding, 1e-16 of the constant: slopes lead on."""
    hessian = symmetric(torch.logspace(0, 2, 6, dtype=torch.float64))
    objective = Loss(lambda x: 1.0 + 0.5 * x @ hessian @ x + (x**4).sum(), 6)
    for step in quasi_newton(objective, torch.ones(6, dtype=torch.float64), method, 200):
        if step.gradient_norm < 1e-11:
            break
    assert step.gradient_norm < 1e-11  # at a loss 1 + 1e-22 or less


def test_the_iteration_ends_at_a_minimum_and_where_no_step_helps():
    at_minimum = quadratic(torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    assert list(quasi_newton(at_minimum, torch.zeros(3, dtype=torch.float64), "bfgs", 10)) == []

    class Lying(Loss):
        def gradient(self, theta):
            loss, gradient = super().gradient(theta)
            return loss, -gradient

    lying = Lying(lambda x: (x**2).sum(), 3)
    assert list(quasi_newton(lying, torch.ones(3, dtype=torch.float64), "ssbroyden", 10)) == []


def test_the_line_search_fulfils_the_wolfe_conditions_it_was_asked_for():
    objective, theta = Loss(rosenbrock, 2), rosenbrock_start(2)
    loss, gradient = objective.gradient(theta)
    slope = float(gradient @ -gradient)
    for curvature, first in itertools.product([0.9, 0.1, 1e-4], [1e-6, 1.0, 1e3]):
        found = search(objective, theta, loss, gradient, -gradient, first, curvature)
        assert found.loss <= loss + 1e-4 * found.length * slope
        assert abs(found.slope) <= curvature * abs(slope)
        assert torch.equal(found.theta, theta - found.length * gradient)
        assert objective.gradient(found.theta)[0] == found.loss
    assert search(objective, theta, loss, gradient, gradient) is None  # uphill


def test_pairs_without_curvature_are_not_usable():
    s = torch.tensor([1.0, 2.0], dtype=torch.float64)
    across = torch.tensor([-2.0, 1.0], dtype=torch.float64)
    assert usable(s, 1e-8 * s + across) and usable(1e-100 * s, 1e100 * s)
    assert not usable(s, -s)
    assert not usable(s, across)
    assert not usable(s, across + 1e-17 * s)
    assert not usable(torch.zeros_like(s), s)


def test_what_cannot_be_solved_is_said_in_one_line():
    start = torch.zeros(2, dtype=torch.float64)
    with pytest.raises(UserError, match="'newton' is not one of bfgs"):
        next(quasi_newton(Loss(rosenbrock, 2), start, "newton", 1))
    with pytest.raises(UserError, match="use lbfgs"):
        next(quasi_newton(Loss(rosenbrock, 2), start.new_zeros(DENSE_LIMIT + 1), "bfgs", 1))
