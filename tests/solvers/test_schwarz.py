"""Schwarz-preconditioned L-BFGS: one block, several blocks, and what they are for."""

import itertools

import pytest
import torch
from losses import Loss, Poisson, quadratic, symmetric

from cpikan_hr.errors import UserError
from cpikan_hr.solvers.objective import Restricted
from cpikan_hr.solvers.quasi_newton import quasi_newton
from cpikan_hr.solvers.schwarz import METHODS, additive, multiplicative, schwarz

BLOCKS = [torch.tensor([0, 2, 4, 6]), torch.tensor([1, 3]), torch.tensor([5, 7, 8, 9])]


def convex() -> Loss:
    """A coupled problem of ten parameters with minimum 0 at 1..10."""
    centre = torch.arange(1.0, 11.0, dtype=torch.float64)
    hessian = symmetric(torch.logspace(0, 2, 10, dtype=torch.float64))
    return Loss(lambda x: 0.5 * (x - centre) @ hessian @ (x - centre) + ((x - centre) ** 4).sum() / 4, 10, BLOCKS)


def test_a_block_sees_its_own_part_of_the_gradient():
    objective, theta = convex(), torch.zeros(10, dtype=torch.float64)
    part = Restricted(objective, theta, BLOCKS[1])
    loss, gradient = part.gradient(torch.tensor([5.0, 6.0], dtype=torch.float64))
    theta[[1, 3]] = torch.tensor([5.0, 6.0], dtype=torch.float64)
    expected, whole = objective.gradient(theta)
    assert loss == expected and torch.equal(gradient, whole[[1, 3]])


@pytest.mark.parametrize("method", METHODS)
def test_one_block_is_l_bfgs_and_then_a_step_with_the_way_there_as_its_pair(method):
    objective = Poisson(8)
    objective.blocks = [torch.arange(25)]
    start = objective.start()
    inner = list(quasi_newton(objective, start, "lbfgs", 6))[-1]
    s = inner.theta - start
    y = objective.gradient(inner.theta)[1] - objective.gradient(start)[1]
    pair = {"s": s[None], "y": y[None], "scale": (s @ y) / (y @ y)}
    expected = next(quasi_newton(objective, inner.theta, "lbfgs", 1, pair))
    found = next(schwarz(objective, start, method, 1, local=6))
    assert torch.allclose(found.theta, expected.theta, rtol=1e-12, atol=1e-12)
    assert found.loss == pytest.approx(expected.loss, rel=1e-10)
    assert found.state["s"].shape == (2, 25)


def test_independent_blocks_are_solved_by_the_preconditioner_alone():
    """Additive and multiplicative are then the same, and exact as far as each block's own iterations are."""
    centre = torch.arange(1.0, 11.0, dtype=torch.float64)
    objective = quadratic(torch.diag(torch.linspace(1, 2, 10, dtype=torch.float64)), centre, BLOCKS)
    theta = torch.zeros(10, dtype=torch.float64)
    now = (theta, *objective.gradient(theta))
    for precondition in (additive, multiplicative):
        after, loss, gradient = precondition(objective, now, 30)
        assert torch.allclose(after, centre, rtol=0, atol=1e-7)
        assert loss == objective.gradient(after)[0] and torch.equal(gradient, objective.gradient(after)[1])


def test_multiplicative_differs_from_additive_and_both_reach_the_minimum():
    objective, start = convex(), torch.zeros(10, dtype=torch.float64)
    firsts = [next(schwarz(objective, start, method, 1)).theta for method in METHODS]
    assert not torch.allclose(*firsts, rtol=0, atol=1e-3)
    for method in METHODS:
        for step in schwarz(objective, start, method, 40, local=5):
            if step.gradient_norm < 1e-11:
                break
        assert torch.allclose(step.theta, torch.arange(1.0, 11.0, dtype=torch.float64), rtol=0, atol=1e-10), method


@pytest.mark.parametrize("method", METHODS)
def test_it_needs_fewer_outer_iterations_than_l_bfgs_on_a_network(method):
    """A coupled least squares: a Poisson equation by a tanh network, its two layers the blocks."""
    objective = Poisson(8)
    start = objective.start(seed=1)
    plain = list(quasi_newton(objective, start, "lbfgs", 25))
    preconditioned = list(schwarz(objective, start, method, 10))
    assert preconditioned[-1].loss < 0.5 * plain[-1].loss
    assert all(after.loss < before.loss for before, after in itertools.pairwise(preconditioned))


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_iteration_is_bitwise_the_uninterrupted_one(method):
    objective = Poisson(6)
    whole = list(schwarz(objective, objective.start(), method, 8, local=3))
    first = list(schwarz(objective, objective.start(), method, 3, local=3))[-1]
    second = list(schwarz(objective, first.theta, method, 5, first.state, local=3))
    for expected, resumed in zip(whole[3:], second, strict=True):
        assert torch.equal(expected.theta, resumed.theta) and expected.loss == resumed.loss
        assert resumed.evaluations == expected.evaluations + 1


def test_evaluations_are_those_of_the_objective():
    calls = []

    class Watched(Poisson):
        def gradient(self, theta):
            calls.append(theta)
            return super().gradient(theta)

    objective = Watched(6)
    for method in METHODS:
        calls.clear()
        assert list(schwarz(objective, objective.start(), method, 3))[-1].evaluations == len(calls)


def test_it_ends_at_a_minimum_and_names_its_methods():
    centre = torch.arange(1.0, 11.0, dtype=torch.float64)
    for method in METHODS:
        assert list(schwarz(convex(), centre, method, 5)) == []
    with pytest.raises(UserError, match="'schwarz' is not one of additive_schwarz"):
        next(schwarz(convex(), centre, "schwarz", 1))
