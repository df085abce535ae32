"""Collocation points: where they lie, how they are shared, and measurements with what can be wrong with their files."""

import numpy as np
import pytest
import torch
from small_pdes import make

from cpikan_hr.errors import UserError
from cpikan_hr.problems.collocation import BESIDE

POINTS = {"interior": 37, "condition": 10}


def problem_of(equation="burgers", grids=((1, 1),), points=POINTS, **options):
    _, problem, _ = make(equation, grids, points=points, **options)
    return problem


def whole(problem, step=0):
    return problem.collocation.read(step, 0, 1)


def groups_of(problem, data):
    """The points of each group by its name."""
    sizes = [count * group.per for group, count in zip(problem.groups, data["counts"].tolist(), strict=True)]
    return dict(zip((group.name for group in problem.groups), data["points"].split(sizes), strict=True))


@pytest.mark.parametrize("pattern", ["sobol", "random"])
@pytest.mark.parametrize("equation", ["burgers", "allen_cahn", "wave", "helmholtz"])
def test_points_are_inside_the_box_and_on_their_faces(equation, pattern):
    problem = problem_of(equation, points=POINTS | {"pattern": pattern})
    found = groups_of(problem, whole(problem))
    for group in problem.groups:
        points = found[group.name]
        for axis, (low, high) in enumerate(zip(problem.box.low, problem.box.high, strict=True)):
            assert ((points[:, axis] >= low) & (points[:, axis] <= high)).all()
        low, high = problem.box.low[group.axis], problem.box.high[group.axis]
        if group.kind == "condition":
            assert (points[:, group.axis] == (low if group.condition.side == "low" else high)).all()
        if group.kind == "periodic":
            assert (points[0::2, group.axis] == low).all() and (points[1::2, group.axis] == high).all()
    inside = found["residual"]
    assert len(inside) == 37 and len(torch.unique(inside, dim=0)) == 37
    middle = [sum(ends) / 2 for ends in zip(problem.box.low, problem.box.high, strict=True)]
    extent = torch.tensor(problem.extent, dtype=torch.float64)
    assert ((inside.mean(0) - torch.tensor(middle)).abs() < 5 * extent / (12 * 37) ** 0.5).all()


def test_conditions_are_compared_with_their_values():
    problem = problem_of("wave")
    data = whole(problem)
    found = groups_of(problem, data)
    sizes = [len(points) for points in found.values()]
    values = dict(zip(found, data["values"].split(sizes), strict=True))
    x = found["velocity"][:, :1]
    assert torch.equal(values["velocity"], 2 * torch.sin(4 * torch.pi * x)) and not values["x_low"].any()


@pytest.mark.parametrize("shares", [1, 2, 3, 6])
@pytest.mark.parametrize("constraints", ["soft", "hard"])
def test_shares_together_are_the_whole(shares, constraints):
    problem = problem_of("allen_cahn", constraints=constraints)
    everything, parts = whole(problem), [problem.collocation.read(0, share, shares) for share in range(shares)]
    assert torch.equal(sum(part["counts"] for part in parts), everything["counts"])
    assert sum(len(part["points"]) for part in parts) == problem.collocation.total
    by_group = groups_of(problem, everything)
    for name, points in by_group.items():
        kind = next(group for group in problem.groups if group.name == name)
        pieces = [groups_of(problem, part)[name].unflatten(0, (-1, kind.per)) for part in parts]
        together = torch.empty_like(points.unflatten(0, (-1, kind.per)))
        for share, piece in enumerate(pieces):
            together[share::shares] = piece
        assert torch.equal(together.flatten(0, 1), points)
    numbers = torch.cat([part["index"] for part in parts])
    assert torch.equal(numbers.sort().values, torch.arange(37))
    for part in parts:
        assert torch.equal(by_group["residual"][part["index"]], groups_of(problem, part)["residual"])


def test_pairs_stay_together_in_every_share():
    problem = problem_of("allen_cahn")
    for share in range(3):
        pairs = groups_of(problem, problem.collocation.read(0, share, 3))["periodic_x"]
        assert len(pairs) and torch.equal(pairs[0::2, 1], pairs[1::2, 1])
        assert (pairs[0::2, 0] == -1).all() and (pairs[1::2, 0] == 1).all()


@pytest.mark.parametrize("pattern", ["sobol", "random"])
def test_points_follow_from_the_seed_and_the_draw(pattern):
    points = POINTS | {"pattern": pattern, "redraw_every": 5}
    first, again = problem_of(points=points), problem_of(points=points)
    other = problem_of(points=points, seed=1)
    again.collocation.read(12, 0, 1)  # what was read before does not matter
    for step in (0, 4, 5, 11):
        assert torch.equal(whole(first, step)["points"], whole(again, step)["points"])
        assert not torch.equal(whole(first, step)["points"], whole(other, step)["points"])
    assert torch.equal(whole(first, 0)["points"], whole(first, 4)["points"])
    assert torch.equal(whole(first, 5)["points"], whole(first, 9)["points"])
    assert not torch.equal(whole(first, 4)["points"], whole(first, 5)["points"])
    fixed = problem_of(points=POINTS)
    assert torch.equal(whole(fixed, 0)["points"], whole(fixed, 1000)["points"])


def test_the_lift_and_the_factor_belong_to_the_points_of_their_draw():
    problem = problem_of(constraints="hard", points=POINTS | {"redraw_every": 1})
    for step in (0, 3):
        data = problem.collocation.read(step, 1, 3)
        lift, factor = problem.ansatz.rows(data["points"], problem.order)
        assert torch.equal(data["lift"], lift) and torch.equal(data["factor"], factor)


# ---------------------------------------------------------------------------------------------------------------------
# Interfaces of tiles without overlap


@pytest.mark.parametrize(("equation", "grid"), [("poisson", (3, 4)), ("reaction_diffusion", (5,)), ("burgers", (1, 2))])
def test_interface_pairs_stand_on_both_sides_of_every_edge(equation, grid):
    problem = problem_of(equation, [grid], points=POINTS | {"interface": 12}, level={"overlap": 0})
    found = groups_of(problem, whole(problem))
    cut = [a for a, count in enumerate(grid) if count > 1]
    assert {name for name in found if name.startswith("interface")} == {f"interface_{problem.axes[a]}" for a in cut}
    for axis in cut:
        pairs = found[f"interface_{problem.axes[axis]}"].unflatten(0, (-1, 2))
        low, extent = problem.box.low[axis], problem.extent[axis]
        edges = low + extent * torch.arange(1, grid[axis], dtype=torch.float64) / grid[axis]
        near = (pairs.mean(1)[:, axis, None] - edges).abs().argmin(1)
        assert torch.equal(torch.bincount(near), torch.full((len(edges),), 12 // len(edges)))
        assert (pairs[:, 0, axis] < edges[near]).all() and (pairs[:, 1, axis] > edges[near]).all()
        assert ((pairs[:, 1, axis] - pairs[:, 0, axis]) <= 3 * BESIDE * extent).all()
        others = [a for a in range(len(grid)) if a != axis]
        assert torch.equal(pairs[:, 0, others], pairs[:, 1, others])


def test_points_of_an_interface_lie_all_along_it():
    """Also where the number of interfaces is a power of two, as the periods of a Sobol sequence are."""
    problem = problem_of("poisson", [(1, 5)], points=POINTS | {"interface": 128}, level={"overlap": 0})
    pairs = groups_of(problem, whole(problem))["interface_y"].unflatten(0, (-1, 2)).mean(1)
    low, extent = problem.box.low[1], problem.extent[1]
    for edge in (1, 2, 3, 4):
        (along,) = pairs[((pairs[:, 1] - low - extent * edge / 5).abs() < 0.01 * extent), :1].T
        counts = torch.histc((along - problem.box.low[0]) / problem.extent[0], 8, 0, 1)
        assert len(along) == 32 and counts.tolist() == [4.0] * 8


def test_tiles_that_overlap_have_no_interfaces():
    problem = problem_of("poisson", [(2, 2)], points=POINTS | {"interface": 12}, level={"overlap": 0.5})
    assert all(group.kind != "interface" for group in problem.groups)


def test_fewer_interface_points_than_interfaces_are_refused():
    with pytest.raises(UserError, match=r"^problem\.points\.interface: 7 interfaces along an axis need .* each$"):
        problem_of("poisson", [(2, 8)], points=POINTS | {"interface": 6}, level={"overlap": 0})


def test_weights_of_interfaces_are_those_of_their_parts():
    options = {"points": POINTS | {"interface": 6}, "level": {"overlap": 0}}
    problem_of("poisson", [(2, 2)], weights={"interface_flux": 3}, **options)
    with pytest.raises(UserError, match=r"^problem\.weights: there is no 'interface_x'; "):
        problem_of("poisson", [(2, 2)], weights={"interface_x": 3}, **options)


# ---------------------------------------------------------------------------------------------------------------------
# Measurements


def test_measurements_are_the_answer_with_noise_of_the_level_asked_for():
    count, level = 4000, 0.1
    problem = problem_of("poisson", measurements={"points": count, "noise": level})
    points, values = problem.collocation.measured
    truth = problem.truth(points)
    error = (values - truth) / truth.std()
    assert abs(error.std() / level - 1) < 5 / (2 * count) ** 0.5 and abs(error.mean()) < 5 * level / count**0.5
    clean = problem_of("poisson", measurements={"points": count})
    assert torch.equal(clean.collocation.measured[0], points)
    assert torch.equal(clean.collocation.measured[1], truth)
    read = groups_of(problem, whole(problem))["measurements"]
    assert torch.equal(read, points)


TABLE = np.array([[0.1, 0.2, -1.5], [0.75, 1.0, 2e-3], [0.5, 0.25, 3.0]])


@pytest.mark.parametrize("name", ["table.npy", "plain.csv", "named.csv"])
def test_measurements_are_read_from_files(tmp_path, name):
    path = tmp_path / name
    if path.suffix == ".npy":
        np.save(path, TABLE)
    else:
        np.savetxt(path, TABLE, delimiter=",", header="x,t,u" if name == "named.csv" else "", comments="")
        text = path.read_text().lstrip("\n")
        path.write_text(text)
    problem = problem_of(measurements={"path": str(path)})
    points, values = problem.collocation.measured
    assert np.array_equal(points, TABLE[:, :2]) and np.array_equal(values, TABLE[:, 2:])


BAD = {
    "missing.csv": None,
    "missing.npy": None,
    "words.csv": b"x,t,u\n0,0,high\n",
    "ragged.csv": b"0,0,1\n0,1\n",
    "narrow.csv": b"0,0\n1,1\n",
    "empty.csv": b"",
    "header.csv": b"x,t,u\n",
    "hole.csv": b"0,0,nan\n",
    "binary.csv": bytes(range(128, 256)),
    "broken.npy": b"\x93NUMPY\x01\x00",
    "text.npy": b"0,0,1\n",
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_told_in_one_line(tmp_path, name):
    path = tmp_path / name
    if BAD[name] is not None:
        path.write_bytes(BAD[name])
    with pytest.raises(UserError) as told:
        problem_of(measurements={"path": str(path)})
    assert str(told.value).startswith(f"problem.measurements.path: {path}: ") and "\n" not in str(told.value)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "table",
    [np.zeros(3), np.zeros((0, 3)), np.zeros((2, 4)), np.zeros((2, 3, 1)), np.array([["a", "b", "c"]]),
     np.array([[0.0, 1.0, np.inf]]), np.array([[object()] * 3]), np.zeros((2, 3), complex)],
)  # fmt: skip
def test_bad_arrays_are_told_in_one_line(tmp_path, table):
    np.save(tmp_path / "bad.npy", table)
    with pytest.raises(UserError) as told:
        problem_of(measurements={"path": str(tmp_path / "bad.npy")})
    assert "bad.npy" in str(told.value) and "\n" not in str(told.value)


def test_points_outside_the_box_are_refused(tmp_path):
    np.save(tmp_path / "far.npy", TABLE + [[0, 0, 0], [0, 0, 0], [9, 0, 0]])
    with pytest.raises(UserError, match=r"far\.npy: row 3 .* outside the box") as told:
        problem_of(measurements={"path": str(tmp_path / "far.npy")})
    assert "\n" not in str(told.value)
