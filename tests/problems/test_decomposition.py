"""Domain decomposition: interfaces (XPINN), overlapping windows (FBPINN), several levels, tiles in space and time."""

import pytest
import torch
from small_pdes import CPIKAN, close, make, random_points

from cpikan_hr.problems.collocation import BESIDE
from cpikan_hr.solvers.levenberg_marquardt import levenberg_marquardt
from cpikan_hr.solvers.residuals import Residuals

POLYNOMIALS = {"kind": "chebyshev2d", "degree": 11, "input_map": "identity"}
SERIES = {"kind": "cpikan", "hidden": [], "degree": 16, "first_input_map": "identity", "input_map": "identity"}
KAN = {"kind": "cpikan", "hidden": [5], "degree": 4}


def solve(problem, field, count, **options):
    return list(levenberg_marquardt(lambda piece: Residuals(field, problem, piece=piece), count, **options))


def relative_error(problem, field):
    points = random_points(problem, 400, seed=9)
    truth = problem.truth(points)
    return float((problem.values(field, points) - truth).norm() / truth.norm())


def jumps(problem, field, grid):
    """The largest step of u and of its normal derivative across the interfaces of a grid."""
    found = []
    for axis, count in enumerate(grid):
        for k in range(1, count):
            points = random_points(problem, 50, seed=k)
            low, high = points.clone(), points.clone()
            edge, reach = problem.box.low[axis] + problem.extent[axis] * k / count, BESIDE * problem.extent[axis]
            low[:, axis], high[:, axis] = edge - reach, edge + reach
            sides = [problem.evaluate(field, side, "gradient") for side in (low, high)]
            step = (sides[1].value - sides[0].value).abs().max()
            found.append((float(step), float((sides[1].gradient[axis] - sides[0].gradient[axis]).abs().max())))
    return [max(column) for column in zip(*found, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Tiles that meet


@pytest.mark.parametrize(
    ("equation", "grid", "network", "parameters", "points"),
    [
        ("poisson", (2, 2), POLYNOMIALS, {"frequencies": 1}, {"interior": 600, "condition": 50}),
        ("reaction_diffusion", (4,), SERIES, {"reaction": 0.0}, {"interior": 200}),
        ("poisson", (4,), SERIES, {"dimensions": 1, "frequencies": 2}, {"interior": 200}),
    ],
)  # fmt: skip
def test_interface_terms_join_tiles(equation, grid, network, parameters, points):
    found = {}
    for interface in (39, 0):
        options = {"parameters": parameters, "points": points | {"interface": interface}}
        _, problem, field = make(equation, [grid], network, level={"overlap": 0}, **options)
        solve(problem, field, 5, damping=1e-12)
        found[interface] = *jumps(problem, field, grid), relative_error(problem, field)
    step, flux, error = found[39]
    assert step < 1e-6 and flux < 1e-6 and error < 1e-6
    step, flux, error = found[0]
    assert max(step, flux) > 1e-2 and error > 1e-2


def test_interface_terms_are_the_steps_of_u_of_the_residual_and_of_the_flux():
    weights = {"interface_value": 4.0, "interface_residual": 0.0, "interface_flux": 9.0}
    _, problem, field = make("poisson", [(2, 1)], level={"overlap": 0}, points={"interface": 6}, weights=weights)
    (term,) = [term for term in Residuals(field, problem).terms if term.group.kind == "interface"]
    residuals = Residuals(field, problem).bare(term, Residuals(field, problem).rows(term))
    low, high = (problem.evaluate(field, term.points[k::2], "hessian") for k in (0, 1))
    assert close(residuals[:, 0], 2 * (high.value - low.value)[:, 0], 1e-12)
    assert close(residuals[:, 2], 3 * (high.gradient[0] - low.gradient[0])[:, 0], 1e-12)
    assert not residuals[:, 1].any()
    problem.options.weights["interface_residual"] = 1.0
    found = Residuals(field, problem).bare(term, Residuals(field, problem).rows(term))[:, 1]
    assert close(found, -(high.laplacian - low.laplacian)[:, 0], 1e-6)  # the source moves by 2e-9 of its slope


# ---------------------------------------------------------------------------------------------------------------------
# Tiles that overlap


@pytest.mark.parametrize("grid", [(1, 1), (2, 2), (4, 8), (32, 32)])
def test_all_tiles_are_one_batched_network(grid):
    tiles = grid[0] * grid[1]
    _, problem, field = make("helmholtz", [grid], CPIKAN, level={"overlap": 0.5}, points={"interior": 8 * tiles + 100})
    (level,) = field.levels
    parameters = list(level.network.parameters())
    assert all(len(parameter) == tiles for parameter in parameters)
    batch = problem.collocation.read(0, 0, 1)
    losses, _ = problem.loss(field(batch["points"], problem.order), batch)
    losses.mean().backward()
    for parameter in parameters:
        assert parameter.grad.isfinite().all()
    seen = torch.stack([parameter.grad.flatten(1).abs().amax(1) for parameter in parameters]).amax(0)
    assert (seen > 0).all()


@pytest.mark.parametrize("window", ["quintic", "bump"])
@pytest.mark.parametrize("grids", [[(4, 8)], [(32, 32)], [(1, 1), (4, 4)]])
def test_windows_of_each_level_sum_to_one_with_derivatives(grids, window):
    _, problem, field = make("helmholtz", grids, POLYNOMIALS | {"degree": 0}, level={"overlap": 0.7}, window=window)
    with torch.no_grad():
        for level in field.levels:
            level.network.coefficients.fill_(1.5)
    jet = field(random_points(problem, 300), "hessian")
    assert torch.allclose(jet.value, torch.full_like(jet.value, 1.5 * len(grids)), rtol=0, atol=1e-12)
    assert jet.gradient.abs().max() < 1e-9 and jet.hessian.abs().max() < 1e-7


def test_a_tile_reads_its_own_parameters_alone():
    _, problem, field = make("helmholtz", [(4, 4)], CPIKAN, level={"overlap": 0.5})
    points = random_points(problem, 400)
    before = problem.values(field, points)
    with torch.no_grad():
        for parameter in field.parameters():
            parameter[5] += 1.0  # row 1, column 1: [-0.5, 0] in x and y, and a quarter of a tile around it
    changed = ((problem.values(field, points) - before).abs() > 0)[:, 0]
    inside = ((points > -0.625) & (points < 0.125)).all(1)
    assert changed.any() and not (changed & ~inside).any() and (changed | ~inside).float().mean() > 0.99


def test_tiles_in_space_and_time():
    errors = {}
    for overlap, interface in ((0.6, 0), (0.0, 30)):
        _, problem, field = make(
            "diffusion", [(2, 3)], KAN, parameters={"half_width": 1.0}, level={"overlap": overlap},
            points={"interior": 240, "condition": 30, "interface": interface},
        )  # fmt: skip
        names = {group.name for group in problem.groups}
        assert {"interface_x", "interface_t"} <= names if interface else not names & {"interface_x", "interface_t"}
        solve(problem, field, 15)
        errors[overlap] = relative_error(problem, field)
    assert errors[0.6] < 0.03 and errors[0.0] < 0.1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_coarse_level_carries_what_tiles_alone_do_not(seed):
    """Preconditioned tile by tile, conjugate gradients need a coarse space (Toselli & Widlund 2005, ch. 3)."""
    errors = []
    for grids in ([(4, 4)], [(1, 1), (4, 4)]):
        _, problem, field = make(
            "poisson", grids, POLYNOMIALS | {"degree": 4}, parameters={"frequencies": 2}, constraints="hard",
            level={"overlap": 0.5}, points={"interior": 700}, seed=seed,
        )  # fmt: skip
        residuals = Residuals(field, problem)
        residuals.assign(torch.zeros(residuals.count, dtype=torch.float64))
        solve(problem, field, 1, dense=0, damping=1e-6)
        errors.append(relative_error(problem, field))
    assert errors[1] < 0.5 * errors[0]
