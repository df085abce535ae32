"""Residual rows, Jacobian and J'J of equations against plain autograd, row by row."""

from textwrap import dedent

import pytest
import torch
from small_pdes import CPIKAN, NETWORKS, close, jacobian_by_autograd, make, random_points, rows_by_autograd

from cpikan_hr.jets import Jet, pairs
from cpikan_hr.solvers.banded import Banded, narrow_order
from cpikan_hr.solvers.cells import cells
from cpikan_hr.solvers.levenberg_marquardt import FLOOR, Dense, Sparse
from cpikan_hr.solvers.residuals import Residuals

FEW = {"interior": 4, "condition": 2}
LOOSE = {"level": {"overlap": 0.6}}
TIGHT = {"points": FEW | {"interface": 2}, "level": {"overlap": 0}}
CASES = {
    "one tile": ("burgers", [(1, 1)], CPIKAN, {}),
    "tiles": ("burgers", [(2, 3)], CPIKAN, LOOSE),
    "two levels": ("burgers", [(1, 1), (2, 2)], CPIKAN, LOOSE),
    "interfaces": ("helmholtz", [(2, 2)], CPIKAN, TIGHT),
    "interfaces below a level": ("poisson", [(1, 1), (2, 2)], CPIKAN, TIGHT),
    "hard": ("wave", [(2, 1)], CPIKAN, {"constraints": "hard"}),
    "hard circle": ("allen_cahn", [(1, 2)], CPIKAN, {"constraints": "hard"}),
    "pairs": ("allen_cahn", [(1, 1)], CPIKAN, {}),
    "row of tiles": ("burgers", [(7, 1)], CPIKAN, {"points": {"interior": 60, "condition": 9}}),
    "pairs of tiles": ("allen_cahn", [(2, 2)], CPIKAN, LOOSE),
    "inverse": ("reaction_diffusion", [(3,)], CPIKAN,
                {"unknown": {"diffusivity": 0.3, "reaction": 0.2}, "measurements": {"points": 5}}),
    "weights": ("wave", [(1, 1)], CPIKAN, {"weights": {"residual": 0.01, "velocity": 30.0}}),
    "line": ("poisson", [(3,)], CPIKAN, {"parameters": {"dimensions": 1}}),
    "cube": ("poisson", [(2, 1, 2)], {"kind": "cpikan", "hidden": [2], "degree": 3}, {"parameters": {"dimensions": 3}}),
    "unscaled": ("diffusion", [(2, 2)], NETWORKS["siren"], {"level": {"scaled": False, "overlap": 0.6}}),
    **{kind: ("burgers", [(2, 1)], network, LOOSE) for kind, network in NETWORKS.items()},
}  # fmt: skip
cases = pytest.mark.parametrize("case", CASES)


def made(case):
    equation, grids, network, options = CASES[case]
    _, problem, field = make(equation, grids, network, **({"points": FEW} | options))
    return problem, field


def whole_rows(residuals):
    """Residuals [m] and their Jacobian [m, n], in the order of terms, equations and residuals."""
    found, jacobian = [], []
    for _, values, blocks, columns in residuals.linearised():
        line = values.new_zeros(len(values), residuals.count)
        for rows, places, part in cells(residuals, len(values), blocks, columns):
            line[rows[:, None], places] = part
        found.append(values)
        jacobian.append(line)
    return torch.cat(found), torch.cat(jacobian)


def by_equations(rows, problem, field):
    """Rows of `rows_by_autograd`, residual by residual, in the order equation by equation within each group."""
    order, start = [], 0
    for group in problem.groups:
        points = torch.zeros(group.per, len(problem.axes), dtype=torch.float64)
        points += torch.tensor(problem.box.low)
        width = problem.residuals(
            group, problem.evaluate(field, points, problem.order), points, points.new_zeros(group.per, problem.channels)
        ).shape[1]
        order.append(start + torch.arange(group.count * width).view(group.count, width).T.flatten())
        start += group.count * width
    return rows[torch.cat(order)]


@cases
def test_rows_and_jacobian_are_those_of_autograd(case):
    problem, field = made(case)
    rows = by_equations(rows_by_autograd(field, problem), problem, field)
    expected = jacobian_by_autograd(field, rows)
    residuals = Residuals(field, problem)
    found, jacobian = whole_rows(residuals)
    assert expected.shape[1] == residuals.count == sum(p.numel() for p in field.parameters())
    assert close(found, rows.detach(), 1e-12)
    assert close(jacobian, expected, 1e-10)
    loss, gradient = residuals.loss_and_gradient()
    assert loss == pytest.approx(float(rows.detach().square().sum()), rel=1e-12)
    assert close(gradient, 2 * expected.T @ rows.detach(), 1e-10)
    assert close(residuals.vector().square().sum(), rows.detach().square().sum(), 1e-12)


@cases
def test_normal_equations_are_the_same_in_pieces_and_in_blocks(case):
    problem, field = made(case)
    whole = Residuals(field, problem)
    found, jacobian = whole_rows(whole)
    order = narrow_order(whole, lambda tensor: None)
    assert torch.equal(order.places.sort().values, torch.arange(whole.count))
    seen = jacobian[:, order.places].bool().double()
    i, j = torch.nonzero(seen.T @ seen, as_tuple=True)  # a zero of the Jacobian may be one by chance, not the reverse
    assert int((i - j).abs().max()) <= order.width <= whole.count
    banded = [Banded(whole, order, lambda tensor: None, FLOOR)] if order.width < whole.count else []
    for system in (
        *banded,
        Dense(Residuals(field, problem), lambda tensor: None),
        Dense(Residuals(field, problem, piece=2), lambda tensor: None),
        Sparse(Residuals(field, problem), lambda tensor: None),
        Sparse(Residuals(field, problem, piece=3), lambda tensor: None),
    ):
        loss, gradient = system.linearise()
        assert loss == pytest.approx(float(found.square().sum()), rel=1e-12)
        assert close(gradient, jacobian.T @ found, 1e-10)
        matrix = jacobian.T @ jacobian
        if isinstance(system, Dense):
            assert close(system.matrix, matrix, 1e-10)
        elif isinstance(system, Banded):
            ordered = matrix[order.places[:, None], order.places]
            for k, column in enumerate(system.band.T):
                assert close(column[: len(ordered) - k], ordered.diagonal(-k), 1e-10)
        else:
            step = torch.randn(len(gradient), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
            assert close(system.product(step), matrix @ step, 1e-10)
        if banded and isinstance(system, Dense):
            assert close(*(one.solve(torch.tensor(1e-3).double()) for one in (banded[0], system)), 1e-6)
        assert close(system.trust, matrix.diagonal() + FLOOR * matrix.diagonal().mean(), 1e-10)
        if isinstance(system, Sparse):
            for level, own in enumerate(system.own):
                begin, size = system.residuals.offsets[level], system.residuals.sizes[level]
                for tile, block in enumerate(own):
                    part = jacobian[:, begin + tile * size : begin + (tile + 1) * size]
                    assert close(block, part.T @ part, 1e-10)


@cases
def test_the_loss_is_that_of_an_update_over_all_points(case):
    problem, field = made(case)
    total = 0.0
    for share in range(2):
        batch = problem.collocation.read(0, share, 2)
        losses, _ = problem.loss(field(batch["points"], problem.order), batch)
        total += float(losses.detach().sum()) / problem.collocation.total
    shared = [Residuals(field, problem, share=share, shares=2).loss_and_gradient() for share in range(2)]
    loss, gradient = Residuals(field, problem).loss_and_gradient()
    assert loss == pytest.approx(total, rel=1e-12)
    assert sum(part for part, _ in shared) == pytest.approx(loss, rel=1e-12)
    assert close(sum(part for _, part in shared), gradient, 1e-12)


@pytest.mark.parametrize("options", [{"attention": {}}, {"causal": {"slices": 3}}, {"balance": {}}])
def test_weights_of_points_and_terms_are_those_of_an_update(options):
    _, problem, field = make("burgers", [(1, 1)], points=FEW, **options)
    weighting = problem.weighting
    weighting.attention = torch.linspace(0.1, 2, 4, dtype=torch.float64)
    weighting.losses = torch.linspace(1, 2, len(weighting.losses), dtype=torch.float64)
    weighting.balance |= {"initial": 5.0, "x_low": 0.1} if "balance" in options else {}
    problem.batches(None)
    batch = problem.collocation.read(0, 0, 1)
    losses, _ = problem.loss(field(batch["points"], problem.order), batch)
    loss, _ = Residuals(field, problem).loss_and_gradient()
    assert loss == pytest.approx(float(losses.detach().sum()) / problem.collocation.total, rel=1e-12)


def test_causal_slices_are_those_of_the_points_looked_at():
    _, problem, field = make("burgers", [(1, 1)], points=FEW, causal={"slices": 3})
    problem.weighting.losses = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    (term, *_) = Residuals(field, problem, draw=4).terms
    expected = problem.weighting.causal()[(3 * term.points[:, 1]).long()] / 4
    assert torch.allclose(term.weight**2, expected, rtol=1e-12)


def test_parameters_go_out_and_in():
    problem, field = made("two levels")
    residuals = Residuals(field, problem)
    theta = residuals.theta()
    new = torch.arange(residuals.count, dtype=torch.float64)
    residuals.assign(new)
    assert torch.equal(residuals.theta(), new)
    first = [p.detach().reshape(len(p), -1) for p in field.levels[1].network.parameters()]
    begin, size = residuals.offsets[1], residuals.sizes[1]
    assert torch.equal(torch.cat(first, 1)[3], new[begin + 3 * size : begin + 4 * size])
    blocks = torch.cat(residuals.blocks)
    assert torch.equal(blocks.sort().values, torch.arange(residuals.count))
    residuals.assign(theta)
    assert torch.equal(residuals.theta(), theta)


# ---------------------------------------------------------------------------------------------------------------------
# A system of two functions, and coordinates that are not scaled

SYSTEM = dedent("""
    from dataclasses import dataclass
    from typing import ClassVar

    import torch

    from cpikan_hr.problems.equations.base import Equation, Periodic, initial

    @dataclass(frozen=True)
    class Waves(Equation):
        '''u_t = v_x + u v, v_t = u_x, and u_x + v_t = 0 besides.'''

        channels: ClassVar[int] = 2

        def domain(self):
            return {"x": (0.0, 3.0), "t": (0.0, 2.0)}

        def residual(self, w, x, t):
            (u, v), (u_x, v_x), (u_t, v_t) = (part.split(1, dim=1) for part in (w.value, w.x, w.t))
            return torch.cat([u_t - v_x - u * v, v_t - u_x, u_x + v_t * w.xt[:, :1]], dim=1)

        def conditions(self):
            return [*initial(lambda x, t: torch.cat([torch.sin(x), torch.cos(x)], dim=1)), Periodic("x")]
""")


@pytest.mark.parametrize("grids", [[(1, 1)], [(1, 1), (2, 2)]])
def test_systems_have_the_rows_and_the_jacobian_of_autograd(tmp_path, grids):
    (tmp_path / "waves.py").write_text(SYSTEM)
    _, problem, field = make(tmp_path / "waves.py", grids, points=FEW, **LOOSE)
    field.mix.copy_(torch.linalg.qr(torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64))[0])
    rows = by_equations(rows_by_autograd(field, problem), problem, field)
    assert len(rows) == 4 * 3 + 2 * 2 + 2 * 4
    found, jacobian = whole_rows(Residuals(field, problem))
    assert close(found, rows.detach(), 1e-12)
    assert close(jacobian, jacobian_by_autograd(field, rows), 1e-10)


@pytest.mark.parametrize("kind", ["siren", "fourier_mlp"])
def test_unscaled_networks_see_coordinates_of_the_equation(kind):
    _, problem, field = make("diffusion", [(1, 1)], NETWORKS[kind], level={"scaled": False})
    points = random_points(problem, 12).requires_grad_()
    network = field.levels[0].network
    u = network(Jet(points[None, None], "value", 2)).rows[0, 0]
    (first,) = torch.autograd.grad(u.sum(), points, create_graph=True)
    second = torch.stack([torch.autograd.grad(first[:, k].sum(), points, retain_graph=True)[0] for k in range(2)])
    jet = field(points.detach(), "hessian")
    assert points.abs().max() > 4  # x is from -6 to 6
    assert close(jet.value, u.detach(), 1e-12)
    assert close(jet.gradient[..., 0].T, first.detach(), 1e-10)
    assert close(jet.hessian[..., 0], torch.stack([second[i, :, j] for i, j in pairs(2)]), 1e-10)


def test_unscaled_networks_see_the_circle_of_the_box(tmp_path):
    (tmp_path / "waves.py").write_text(SYSTEM)
    _, problem, field = make(
        tmp_path / "waves.py", [(1, 1)], NETWORKS["siren"], level={"scaled": False}, constraints="hard"
    )
    points = random_points(problem, 12)
    points[:, 0] = 0
    other = points.clone()
    other[:, 0] = 3
    low, high = field(points, "gradient").rows, field(other, "gradient").rows
    assert problem.box.periodic == (0,) and close(low, high, 1e-12)
    inputs = field.levels[0].inputs(other[None], torch.zeros(1, dtype=torch.long), "value").rows[0, 0]
    assert torch.equal(inputs[:, 1], other[:, 1]) and torch.allclose(inputs[:, 0], -torch.ones(12).double())
