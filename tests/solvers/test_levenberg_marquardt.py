"""Levenberg-Marquardt: linear problems in a few steps, a loss that falls, dense and iterative steps alike, resuming."""

import copy
import threading

import pytest
import torch
from small_pdes import CPIKAN, close, make, random_points

from cpikan_hr.solvers.levenberg_marquardt import Dense, Sparse, levenberg_marquardt
from cpikan_hr.solvers.residuals import Residuals

DAMPING = torch.tensor(1e-2, dtype=torch.float64)
FEW = {"interior": 40, "condition": 8}
CHEBYSHEV = {"kind": "chebyshev2d", "input_map": "identity"}
CASES = {
    "one tile": ("burgers", [(1, 1)], {}),
    "pairs": ("allen_cahn", [(1, 1)], {}),
    "levels": ("burgers", [(1, 1), (2, 2)], {"level": {"overlap": 0.6}}),
    "interfaces": ("helmholtz", [(1, 1), (2, 2)], {"level": {"overlap": 0}, "points": FEW | {"interface": 8}}),
    "inverse": ("reaction_diffusion", [(3,)], {"unknown": {"reaction": 0.2}, "measurements": {"points": 9}}),
}


def made(case):
    equation, grids, options = CASES[case]
    _, problem, field = make(equation, grids, CPIKAN, **({"points": FEW} | options))
    return problem, field


def iterate(problem, field, count, **options):
    return levenberg_marquardt(lambda piece: Residuals(field, problem, piece=piece), count, **options)


def relative_error(problem, field):
    points = random_points(problem, 500, seed=9)
    truth = problem.truth(points)
    return float((problem.values(field, points) - truth).norm() / truth.norm())


@pytest.mark.parametrize(
    ("equation", "degree", "options"),
    [
        ("poisson", 15, {"parameters": {"frequencies": 1}}),
        ("poisson", 15, {"parameters": {"frequencies": 1}, "constraints": "hard"}),
        ("diffusion", 16, {"parameters": {"half_width": 1.0}}),
        ("diffusion", 16, {"parameters": {"half_width": 1.0}, "constraints": "hard"}),
    ],
)
def test_a_linear_problem_takes_three_steps(equation, degree, options):
    network = CHEBYSHEV | {"degree": degree}
    points = {"interior": 2 * degree**2, "condition": 60}
    _, problem, field = make(equation, [(1, 1)], network, points=points, **options)
    steps = list(iterate(problem, field, 3, damping=1e-13))
    assert relative_error(problem, field) < 1e-9
    assert len(steps) <= 3 and steps[0].loss < 1e-10


@pytest.mark.parametrize("dense", [6000, 0])
@pytest.mark.parametrize("case", CASES)
def test_the_loss_falls_with_every_step(case, dense):
    problem, field = made(case)
    start, _ = Residuals(field, problem).loss_and_gradient()
    losses = [start]
    for step in iterate(problem, field, 6, dense=dense):
        here = Residuals(field, problem)
        loss, gradient = here.loss_and_gradient()
        assert torch.equal(here.theta(), step.theta)  # the field has the iterate
        assert step.loss == pytest.approx(loss, rel=1e-12)
        losses.append(step.loss)
        assert step.evaluations >= len(losses) - 1
    assert len(losses) == 7 and all(b < a for a, b in zip(losses, losses[1:], strict=False))
    assert losses[-1] < 0.5 * losses[0]


def test_an_iterate_tells_the_gradient_it_began_from():
    problem, field = made("pairs")
    _, gradient = Residuals(field, problem).loss_and_gradient()
    (step,) = iterate(problem, field, 1)
    assert step.gradient_norm == pytest.approx(float(gradient.norm()), rel=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_conjugate_gradients_solved_exactly_take_the_dense_step(case):
    problem, field = made(case)
    other = copy.deepcopy(field)
    for damping in (1.0, 1e-2):
        dense = Dense(Residuals(field, problem), lambda tensor: None)
        sparse = Sparse(Residuals(other, problem), lambda tensor: None, accuracy=1e-12, most=20000)
        steps = []
        for system in (dense, sparse):
            system.linearise()
            steps.append(system.solve(torch.tensor(damping, dtype=torch.float64)))
            product = dense.matrix @ steps[-1] if system is dense else sparse.product(steps[-1])
            assert close(product + damping * system.trust * steps[-1], -system.gradient, 1e-8)
        assert close(steps[1], steps[0], 1e-6)
        for here in (field, other):
            residuals = Residuals(here, problem)
            residuals.assign(residuals.theta() + steps[0])


@pytest.mark.parametrize("dense", [6000, 0])
def test_it_resumes_bitwise(dense):
    problem, field = made("inverse")
    begun = copy.deepcopy(field)
    whole = [(step.theta.clone(), step.loss, step.evaluations) for step in iterate(problem, field, 5, dense=dense)]
    *_, last = iterate(problem, begun, 2, dense=dense)
    again = copy.deepcopy(begun)
    Residuals(again, problem).assign(last.theta)
    rest = [
        (step.theta.clone(), step.loss, step.evaluations)
        for step in iterate(problem, again, 3, dense=dense, state=dict(last.state))
    ]
    for (theta, *numbers), (expected, *wanted) in zip(rest, whole[2:], strict=True):
        assert torch.equal(theta, expected) and numbers == wanted


def test_it_ends_where_nothing_lowers_the_loss():
    _, problem, field = make(
        "poisson", [(1, 1)], CHEBYSHEV | {"degree": 4}, points={"interior": 60, "condition": 20},
        parameters={"frequencies": 1},
    )  # fmt: skip
    (first, *_) = iterate(problem, field, 200, damping=1e-12)  # linear: the rest is rounding
    for _ in range(10):
        theta = Residuals(field, problem).theta()
        steps = list(iterate(problem, field, 200))
        if not steps:
            break
        assert len(steps) < 50 and steps[-1].loss > first.loss * (1 - 1e-9)
    assert steps == [] and torch.equal(Residuals(field, problem).theta(), theta)
    _, gradient = Residuals(field, problem).loss_and_gradient()
    rows = Residuals(field, problem).vector()
    assert gradient.norm() < 1e-5 * rows.norm() * rows.numel()


@pytest.mark.parametrize("system", [Dense, Sparse])
@pytest.mark.parametrize("case", ["pairs", "levels", "inverse"])
def test_two_shares_added_take_the_same_step(case, system):
    problem, field = made(case)
    linear = [Dense(Residuals(field, problem, share=share, shares=2), lambda tensor: None) for share in range(2)]
    alone = Dense(Residuals(field, problem), lambda tensor: None)
    alone.linearise()
    expected = alone.solve(DAMPING)
    for part in linear:
        part.linearise()
    if system is Dense:
        summed = iter([linear[1].matrix, linear[1].gradient, None])

        def total(tensor):
            other = next(summed)
            if other is not None:
                tensor += other

        shared = Dense(Residuals(field, problem, share=0, shares=2), total)
        shared.linearise()
        assert close(shared.solve(DAMPING), expected, 1e-7)
        return
    halves = [Sparse(Residuals(field, problem, share=share, shares=2), lambda tensor: None) for share in range(2)]
    losses = [half.linearise()[0] for half in halves]
    vector = torch.randn(len(expected), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert close(halves[0].product(vector) + halves[1].product(vector), alone.matrix @ vector, 1e-10)
    assert close(halves[0].gradient + halves[1].gradient, alone.gradient, 1e-10)
    assert sum(losses) == pytest.approx(Residuals(field, problem).loss_and_gradient()[0], rel=1e-12)


def test_two_processes_take_the_steps_of_one():
    """Two iterations in step, their sums exchanged as processes would."""
    problem, field = made("levels")
    alone = copy.deepcopy(field)
    fields = [field, copy.deepcopy(field)]
    barrier, slots, found = threading.Barrier(2), [None, None], [[], []]

    def run(rank):
        def total(tensor):
            slots[rank] = tensor.clone()
            barrier.wait()
            both = slots[0] + slots[1]
            barrier.wait()
            tensor.copy_(both)

        def residuals(piece):
            return Residuals(fields[rank], problem, share=rank, shares=2, piece=piece)

        for step in levenberg_marquardt(residuals, 3, total=total, dense=0):
            found[rank].append(step)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    expected = list(iterate(problem, alone, 3, dense=0))
    assert len(found[0]) == len(found[1]) == 3
    for first, second, one in zip(*found, expected, strict=True):
        assert torch.equal(first.theta, second.theta) and first.loss == second.loss
        assert close(first.theta, one.theta, 1e-6) and first.loss == pytest.approx(one.loss, rel=1e-6)
