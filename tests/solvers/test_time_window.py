"""Time marching: which tiles vary in a window and which residuals count, and what it is for."""

from dataclasses import replace

import pytest
import torch
from small_pdes import CPIKAN, close, make
from solvers.test_residuals import whole_rows

from cpikan_hr.fields import TileGrid
from cpikan_hr.solvers.banded import narrow_order
from cpikan_hr.solvers.levenberg_marquardt import Dense, levenberg_marquardt
from cpikan_hr.solvers.residuals import Residuals
from cpikan_hr.solvers.time_window import Window

TIME = 1
POINTS = {"interior": 60, "condition": 9, "interface": 8}


def burgers(rows=4, **options):
    options = {"level": {"overlap": 0}, "points": POINTS} | options
    return make("burgers", [(2, rows)], CPIKAN, **options)[1:]


def march(problem, field, window, count, **options):
    """Iterations in a window, None: over all times."""
    return list(levenberg_marquardt(
        lambda piece: Residuals(field, problem, piece=piece, window=window), count, **options
    ))  # fmt: skip


def tiles(residuals):
    """theta as a table of tiles [columns, rows, parameters]."""
    return residuals.theta().view(2, -1, residuals.sizes[0])


def test_windows_follow_each_other_to_the_end():
    first, second, third = Window.split(TIME, 1.0, 4.0, 3)
    assert (first.since, first.until, second.since, second.until) == (1.0, 2.0, 2.0, 3.0)
    assert (third.since, third.until) == (3.0, 4.0)


def test_a_window_has_the_rows_and_columns_of_its_slab():
    """Of the whole Jacobian; a pair that joins the slab to the one before counts, with what varies of it."""
    problem, field = burgers()
    whole = Residuals(field, problem)
    here = Residuals(field, problem, window=Window.split(TIME, 0.0, 1.0, 4)[1])
    found, jacobian = whole_rows(whole)
    last = []
    for term in whole.terms:
        equations = whole.residual(term, whole.rows(term)).shape[1]
        last.append(term.points[:, TIME].view(-1, term.group.per).amax(1).repeat(equations))
    inside = (torch.cat(last) > 0.25) & (torch.cat(last) <= 0.5)
    column = torch.zeros_like(tiles(whole), dtype=torch.bool)
    column[:, 1] = True
    rows = jacobian[inside] * column.flatten()
    assert here.vector().shape == (int(inside.sum()),)
    loss, gradient = here.loss_and_gradient()
    assert loss == pytest.approx(float(here.vector().square().sum()), rel=1e-12)
    assert close(gradient, 2 * rows.T @ found[inside], 1e-10)
    pairs = [term for term in here.terms if term.group.name == "interface_t"]
    assert pairs and all((term.points[:, TIME] - 0.25).abs().max() < 1e-6 for term in pairs)


@pytest.mark.parametrize("dense", [6000, 0])
def test_what_came_before_stays_and_what_follows_is_not_touched(dense):
    problem, field = burgers()
    window = Window.split(TIME, 0.0, 1.0, 4)[2]
    before = tiles(Residuals(field, problem)).clone()
    steps = march(problem, field, window, 3, dense=dense)
    after = tiles(Residuals(field, problem))
    assert steps[-1].loss < 0.5 * steps[0].loss or len(steps) == 3
    assert torch.equal(after[:, [0, 1, 3]], before[:, [0, 1, 3]]) and not torch.equal(after[:, 2], before[:, 2])


def test_shares_of_a_window_add_up_to_it_also_where_one_has_no_residual():
    problem, field = burgers(points={"interior": 6, "condition": 1, "interface": 3})
    window = Window.split(TIME, 0.0, 1.0, 4)[2]
    whole = Residuals(field, problem, window=window)
    shares = [Residuals(field, problem, share=k, shares=9, window=window) for k in range(9)]
    assert not all(share.terms for share in shares) and len(whole.vector())
    parts = [share.loss_and_gradient() for share in shares]
    loss, gradient = whole.loss_and_gradient()
    assert sum(part for part, _ in parts) == pytest.approx(loss, rel=1e-12)
    assert close(sum(part for _, part in parts), gradient, 1e-12)
    for share in shares:
        system = Dense(share, lambda tensor: None)
        found, _ = system.linearise()
        assert found == pytest.approx(float(share.vector().square().sum()), rel=1e-12)
        narrow_order(share, lambda tensor: None)


def test_tiles_begin_with_what_their_neighbours_before_them_hold():
    problem, field = burgers()
    residuals = Residuals(field, problem)
    before = tiles(residuals).clone()
    first, second, *_ = Window.split(TIME, 0.0, 1.0, 4)
    first.begin(residuals.levels)
    assert torch.equal(tiles(residuals), before)
    second.begin(residuals.levels)
    after = tiles(residuals)
    assert torch.equal(after[:, 1], before[:, 0]) and torch.equal(after[:, [0, 2, 3]], before[:, [0, 2, 3]])
    Window(TIME, 0.5, 1.0).begin(residuals.levels)
    assert torch.equal(tiles(residuals)[:, 2:], after[:, [1, 1]])


@pytest.mark.parametrize(("rows", "overlap", "varies", "begin"), [(1, 0, [0], 0.0), (4, 0.4, [1, 2, 3], 0.2)])
def test_tiles_that_reach_into_earlier_times_see_them_again(rows, overlap, varies, begin):
    """One tile over all times; and tiles that blend over 0.4 of a row: those of rows 1 to 3 reach into 0.5 to 0.75."""
    problem, field = burgers(rows, level={"overlap": overlap}, points={"interior": 400, "condition": 9})
    window = Window(TIME, 0.5, 0.75)
    here = Residuals(field, problem, window=window)
    assert here.varying[0].view(2, rows)[0].nonzero()[:, 0].tolist() == varies
    times = torch.cat([term.points[:, TIME] for term in here.terms])
    assert begin < float(times.max()) <= 0.75 and begin <= float(times.min()) < begin + 0.03


def test_the_units_of_time_do_not_matter():
    """Slabs of a nanosecond."""
    problem, field = burgers()
    for level in field.levels:
        space, time = level.tile_grid.axes
        level.tile_grid = TileGrid((space, replace(time, stride=1e-9 * time.stride)))
    varying = [window.varying(field.levels[0]).view(2, 4)[0] for window in Window.split(TIME, 0.0, 1e-9, 4)]
    assert torch.equal(torch.stack(varying), torch.eye(4, dtype=torch.bool))


def test_rings_and_grids_of_tiles_are_numbered_as_narrow_bands():
    """Soft periodicity joins the first tile to the last."""
    points = {"interior": 400, "condition": 30, "interface": 40}
    _, problem, field = make("allen_cahn", [(12, 1)], CPIKAN, level={"overlap": 0}, points=points)
    residuals = Residuals(field, problem)
    order = narrow_order(residuals, lambda tensor: None)
    assert order.width < 3 * residuals.sizes[0] and len(order.places) == residuals.count
    _, problem, field = make("poisson", [(6, 6)], CPIKAN, level={"overlap": 0.5}, points={"interior": 2000})
    grid = Residuals(field, problem)
    assert narrow_order(grid, lambda tensor: None).width < 8 * grid.sizes[0]  # the next row's diagonal neighbour
    problem, field = burgers()
    window = Residuals(field, problem, window=Window.split(TIME, 0.0, 1.0, 4)[1])
    seen = narrow_order(window, lambda tensor: None).places.sort().values
    assert torch.equal(seen, torch.arange(window.count).view(2, 4, -1)[:, 1].flatten())


def test_marching_finds_fronts_that_all_times_at_once_miss():
    """Allen-Cahn at D = 0.001 with linear tiles: the error after equal iterations."""
    network = {"kind": "chebyshev2d", "degree": [8, 5], "input_map": "identity"}
    points = {"interior": 5000, "condition": 200, "interface": 1200}
    weights = {"interface_value": 100.0, "interface_flux": 0.1, "interface_residual": 1e-12, "periodic_x": 0.1}
    options = {"parameters": {"diffusivity": 0.001}, "constraints": "values", "weights": weights, "points": points}
    errors = {}
    for windows in (Window.split(TIME, 0.0, 1.0, 5), [None]):
        _, problem, field = make("allen_cahn", [(10, 5)], network, level={"overlap": 0}, **options)
        with torch.no_grad():
            for parameter in field.parameters():
                parameter.zero_()
        for window in windows:
            if window:
                window.begin(field.levels)
            march(problem, field, window, 4 if window else 8, damping=1e-6)
        errors[len(windows)] = problem.told(field)["rel_l2"]
    assert errors[5] < 0.02 and errors[5] < 0.2 * errors[1]
