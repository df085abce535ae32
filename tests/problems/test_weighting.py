"""Weights of points and terms: each is the formula of its paper, and the same however many shares there are."""

import numpy as np
import pytest
import torch
from small_pdes import CPIKAN, jacobian_by_autograd, make, rows_by_autograd

from cpikan_hr.problems.equation_batches import EquationBatches
from cpikan_hr.solvers.balance import term_sizes

POINTS = {"interior": 60, "condition": 12}


def made(equation="burgers", grids=((1, 1),), points=POINTS, **options):
    _, problem, field = make(equation, grids, points=points, **options)
    return problem, field, EquationBatches(problem)


def update(problem, field, batches, step, shares):
    """One update without its step: all shares evaluated, then what follows from them. Returns the loss."""
    batches.prepare(step, lambda points, order: field(points, order))
    total = 0.0
    for share in range(shares):
        batch = batches.read(step, share, shares)
        losses, _ = problem.loss(field(batch["points"], problem.order), batch)
        total += float(losses.sum().detach()) / batches.points(step)
    batches.finish(lambda tensor: tensor)
    return total


def residual_sizes(problem, field, step=0):
    """|r| [N] at the interior points of a step."""
    placed = problem.collocation.placed(problem.collocation.draw_of(step))[0][0]
    jet = problem.evaluate(field, placed.points, "hessian")
    return placed.points, problem.residuals(problem.groups[0], jet, placed.points, placed.values).norm(dim=1).detach()


def change(field, step):
    """Other weights, as an update would leave."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in field.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)


# ---------------------------------------------------------------------------------------------------------------------
# Residual-based attention


@pytest.mark.parametrize("shares", [1, 3])
def test_attention_follows_its_rule(shares):
    decay, rate = 0.7, 0.4
    problem, field, batches = made(attention={"decay": decay, "rate": rate}, weights={"residual": 9.0})
    weights = np.ones(60)
    for step in range(6):
        assert np.allclose(problem.weighting.factors(torch.arange(60)), weights**2, rtol=1e-12, atol=0)
        _, sizes = residual_sizes(problem, field)
        loss = update(problem, field, batches, step, shares)
        rows = rows_by_autograd(field, problem).detach().numpy()
        expected = (weights**2 * rows[:60] ** 2).sum() + (rows[60:] ** 2).sum()
        assert np.isclose(loss, expected, rtol=1e-12)
        for k, size in enumerate(sizes.tolist()):
            weights[k] = decay * weights[k] + rate * size / sizes.max().item()
        assert np.allclose(problem.weighting.attention, weights, rtol=1e-12, atol=0)
        change(field, step)


def test_attention_is_bounded_and_follows_the_residual():
    decay, rate = 0.8, 0.5
    problem, field, batches = made(attention={"decay": decay, "rate": rate})
    for step in range(60):
        update(problem, field, batches, step, 1)
        assert problem.weighting.attention.max() <= rate / (1 - decay) * (1 + 1e-12)
    _, sizes = residual_sizes(problem, field)
    limit = rate / (1 - decay) * sizes / sizes.max()  # of the recursion with residuals that stay
    assert torch.allclose(problem.weighting.attention, limit, rtol=0, atol=5 * decay**60 + 1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Causal weights


@pytest.mark.parametrize("redraw", [None, 2])
@pytest.mark.parametrize("shares", [1, 3])
def test_causal_weights_are_the_formula_one_update_late(shares, redraw):
    epsilon, slices = 0.03, 5
    points = POINTS | {"redraw_every": redraw}
    problem, field, batches = made(points=points, causal={"epsilon": epsilon, "slices": slices})
    weights = np.ones(slices)
    for step in range(5):
        at, sizes = residual_sizes(problem, field, step)
        number = np.minimum((at[:, 1].numpy() * slices).astype(int), slices - 1)
        batches.prepare(step, lambda points, order: field(points, order))
        found = problem.weighting.factors(torch.arange(60)).numpy()
        assert np.allclose(found, weights[number], rtol=1e-12, atol=0) and weights[0] == 1
        update(problem, field, batches, step, shares)
        squared = sizes.numpy() ** 2
        losses = [squared[number == k].mean() if (number == k).any() else 0.0 for k in range(slices)]
        weights = np.exp([-epsilon * sum(losses[:k]) for k in range(slices)])
        assert np.allclose(problem.weighting.causal(), weights, rtol=1e-12, atol=0)
        change(field, step)
    assert weights[-1] < 0.9


def test_causal_weights_resume_amid_a_draw():
    def begin():
        return made(points=POINTS | {"redraw_every": 4}, causal={"epsilon": 0.03, "slices": 5})

    problem, field, batches = begin()
    for step in range(6):
        update(problem, field, batches, step, 1)
    again, _, resumed = begin()
    resumed.restore(batches.state())
    losses = [update(p, field, b, 6, 1) for p, b in ((problem, batches), (again, resumed))]
    assert losses[0] == losses[1] and torch.equal(problem.weighting.slice_of, again.weighting.slice_of)


# ---------------------------------------------------------------------------------------------------------------------
# Balance of the terms


FEW = {"interior": 5, "condition": 2}
CASES = [
    ("burgers", [(1, 1)], {}),
    ("allen_cahn", [(1, 1)], {}),  # pairs whose points one tile sees both
    ("allen_cahn", [(2, 2)], {}),
    ("poisson", [(1, 1), (2, 2)], {"points": FEW | {"interface": 2}, "level": {"overlap": 0}}),
    ("reaction_diffusion", [(3,)], {"unknown": {"diffusivity": 0.3}, "measurements": {"points": 7}}),
]


def explicit(problem, field):
    """Per term its rows of the whole Jacobian, and its gradient, without balance."""
    rows = rows_by_autograd(field, problem)
    jacobian = jacobian_by_autograd(field, rows)
    per = {"periodic": 2, "interface": 3}  # equations of one channel
    counts = [group.count * per.get(group.kind, 1) for group in problem.groups]
    names = [group.name for group in problem.groups]
    parts = zip(names, rows.detach().split(counts), jacobian.split(counts), strict=True)
    return {name: (jacobian, 2 * jacobian.T @ found) for name, found, jacobian in parts}


@pytest.mark.parametrize("method", ["gradient_norm", "ntk"])
@pytest.mark.parametrize(("equation", "grids", "options"), CASES)
def test_sizes_of_terms_are_those_of_the_explicit_jacobian(equation, grids, options, method):
    options = {"points": FEW} | options
    problem, field, _ = made(equation, grids, balance={"method": method}, **options)
    problem.weighting.balance[problem.groups[1].name] = 7.0  # what balances is left out
    found = term_sizes(field, problem, method)
    for name, (jacobian, gradient) in explicit(problem, field).items():
        expected = float(gradient.norm()) if method == "gradient_norm" else float(jacobian.square().sum())
        assert found[name] == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("method", ["gradient_norm", "ntk"])
def test_balance_makes_terms_alike(method):
    problem, field, _ = made("wave", balance={"method": method, "memory": 0.1}, weights={"initial": 1e-3})
    sizes = term_sizes(field, problem, method)
    assert max(sizes.values()) > 50 * min(sizes.values())
    for _ in range(12):
        problem.weighting.rebalance(term_sizes(field, problem, method))
    alike = [size * problem.weighting.balance[name] for name, size in term_sizes(field, problem, method).items()]
    assert problem.weighting.balance["residual"] == 1 and max(alike) / min(alike) < 1 + 1e-9


def test_balance_is_resumed_and_multiplies_its_term():
    problem, field, batches = made("wave", balance={"memory": 0.5})
    problem.weighting.rebalance(term_sizes(field, problem, "gradient_norm"))
    again, _, resumed = made("wave", balance={"memory": 0.5})
    resumed.restore(batches.state())
    assert again.weighting.balance == problem.weighting.balance
    terms = zip(problem.groups, rows_by_autograd(field, problem).detach().split([60, 12, 12, 12, 12]), strict=True)
    expected = sum(problem.weighting.balance[group.name] * float(rows.square().sum()) for group, rows in terms)
    assert update(again, field, resumed, 0, 1) == pytest.approx(expected, rel=1e-12)


# ---------------------------------------------------------------------------------------------------------------------
# Points by the residual (RAD)


@pytest.mark.parametrize(("power", "floor"), [(1.0, 1.0), (2.0, 0.0), (0.0, 1.0)])
def test_drawn_points_follow_their_density(power, floor):
    draws, cells = 80, 8
    points = {"interior": 100, "condition": 1}
    problem, _, _ = made("poisson", points=points, refine={"power": power, "floor": floor})
    counts, expected = np.zeros((cells, cells)), np.zeros((cells, cells))
    for step in range(draws):
        pool = problem.collocation.pool(step, 2000)
        size = (3 * pool[:, 0] + pool[:, 1] ** 2) ** 2
        problem.collocation.refine(step, pool, size, power, floor)
        density = size.numpy() ** power / (size.numpy() ** power).mean() + floor
        cell = (np.minimum(cells * pool.numpy(), cells - 1)).astype(int)
        np.add.at(expected, tuple(cell.T), 100 * density / density.sum())
        drawn = (np.minimum(cells * problem.collocation.placed()[0][0].points.numpy(), cells - 1)).astype(int)
        np.add.at(counts, tuple(drawn.T), 1)
    many = expected > 5
    statistic = ((counts - expected)[many] ** 2 / expected[many]).sum()
    freedom = many.sum() - 1
    assert counts.sum() == draws * 100 and many.sum() > 20
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5
    if power:  # and is not that of other densities
        uniform = np.full_like(counts, counts.mean())
        assert ((counts - uniform) ** 2 / uniform).sum() > 20 * freedom


def test_points_are_drawn_where_the_residual_is_large():
    problem, field, batches = made("burgers", refine={"every": 3, "pool": 2000, "power": 3, "floor": 0.0})
    evaluate = lambda points, order: field(points, order)  # noqa: E731
    before, size_before = residual_sizes(problem, field)
    assert not batches.prepare(0, evaluate) and not batches.prepare(2, evaluate)
    assert torch.equal(residual_sizes(problem, field)[0], before)
    assert batches.prepare(3, evaluate)
    after, size_after = residual_sizes(problem, field)
    assert size_after.median() > 1.5 * size_before.median()
    pool = problem.collocation.pool(3, 2000)
    assert (after[:, None] == pool).all(2).any(1).all()
    again, _, resumed = made("burgers", refine={"every": 3, "pool": 2000, "power": 3, "floor": 0.0})
    resumed.restore(batches.state())
    assert torch.equal(resumed.read(4, 0, 1)["points"], batches.read(4, 0, 1)["points"])


def test_new_points_begin_with_attention_one_and_their_own_times():
    options = {"refine": {"every": 2, "pool": 300}, "attention": {}, "causal": {"slices": 4}}
    problem, field, batches = made("burgers", network=CPIKAN, **options)
    for step in range(2):
        update(problem, field, batches, step, 1)
    assert not torch.equal(problem.weighting.attention, torch.ones(60))
    batches.prepare(2, lambda points, order: field(points, order))
    assert torch.equal(problem.weighting.attention, torch.ones(60, dtype=torch.float64))
    times = problem.collocation.placed()[0][0].points[:, 1]
    assert torch.equal(problem.weighting.slice_of, (4 * times).long())
