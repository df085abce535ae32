"""Sweeps: never worse, better where tiles blend, alike on any number of processes."""

import numpy as np
import pytest
import torch
from cases import GROWN, GROWN_SIREN, field_of, mean_square, natural, on_ranks, reader, recipe_of, rendered

from cpikan_hr.processes import ALONE
from cpikan_hr.solvers import growth
from cpikan_hr.solvers.grid_sweeps import sweep_grid
from cpikan_hr.solvers.start import fit_field, sweep_field
from cpikan_hr.solvers.sweeps import sweep

SHAPE = (56, 64)


def grown(levels: list[dict], picture: np.ndarray, psnr: float = 28):
    recipe = recipe_of(levels, target={"psnr": psnr})
    field = field_of(levels, picture)
    fit_field(field, reader(picture), picture.shape[:2], recipe, 255.0, ALONE)
    return field, recipe


def level(tile, network=GROWN, overlap: float = 0.5) -> dict:
    return {"tile": tile, "overlap": overlap, "grow": True, "network": network}


EQUAL = {
    "deep": {"tile": 12, "overlap": 0.5, "network": {"kind": "cpikan", "hidden": [4, 3], "degree": 3}},
    "siren": {"grid": [3, 5], "overlap": 0.4, "network": {"kind": "siren", "hidden": [6], "first_omega": 3.0}},
    "large": {"grid": [1, 2], "overlap": 0.25, "network": {"kind": "fourier_mlp", "hidden": [8], "bands": 1}},
}


def equal(name: str, picture: np.ndarray, **start):
    """A field of equal tiles after a start of some iterations, not yet swept."""
    torch.manual_seed(0)
    recipe = recipe_of([EQUAL[name]], start={"iterations": 3} | start)
    field = field_of([EQUAL[name]], picture)
    fit_field(field, reader(picture), picture.shape[:2], recipe, 255.0, ALONE)
    return field, recipe


def error_of(field, picture: np.ndarray) -> float:
    return mean_square(rendered(field, picture.shape[:2]), picture)


@pytest.mark.parametrize("network", [GROWN, GROWN_SIREN], ids=["cpikan", "siren"])
@pytest.mark.parametrize(("tile", "overlap"), [(8, 0.5), ([16, 8], 0.5), ([32, 16, 8], 0.25), ([16, 8], 0.0)])
def test_the_error_is_never_larger_after_a_sweep(tile, overlap, network):
    picture = natural("coffee", 100, 200)[: SHAPE[0], : SHAPE[1]]
    field, recipe = grown([level(tile, network, overlap)], picture)
    errors = [error_of(field, picture)]
    for _ in range(3):
        parameters = [p.detach().clone() for p in field.parameters()]
        better = sweep_field(field, reader(picture), SHAPE, recipe, ALONE)
        errors.append(error_of(field, picture))
        kept = all(torch.equal(a, b) for a, b in zip(field.parameters(), parameters, strict=True))
        assert errors[-1] < errors[-2] if better else kept
    if overlap:
        assert errors[1] < 0.99 * errors[0]


@pytest.mark.parametrize("name", EQUAL)
def test_equal_tiles_are_never_worse_after_a_sweep(name):
    picture = natural("coffee", 100, 200)[: SHAPE[0], : SHAPE[1]]
    field, recipe = equal(name, picture)
    errors = [error_of(field, picture)]
    for _ in range(2):
        parameters = [p.detach().clone() for p in field.parameters()]
        better = sweep_field(field, reader(picture), SHAPE, recipe, ALONE)
        errors.append(error_of(field, picture))
        kept = all(torch.equal(a, b) for a, b in zip(field.parameters(), parameters, strict=True))
        assert errors[-1] < errors[-2] if better else kept  # which of the two, rounding may decide from the second on
    assert errors[1] < 0.98 * errors[0]


def test_equal_tiles_are_swept_with_their_neighbours_held_and_by_their_windows():
    """One tile alone, by brute force: no other weights than its own bring the picture nearer."""
    picture = natural("camera", side=32)
    field, recipe = equal("deep", picture)
    for _ in range(6):
        sweep_field(field, reader(picture), (32, 32), recipe, ALONE)
    network, least = field.levels[0].network, error_of(field, picture)
    assert least < 0.8 * error_of(equal("deep", picture)[0], picture)
    last = network.layers[-1].coefficients
    for tile in range(field.levels[0].network.tiles):  # along each last layer the error rises to both sides
        for scale in (0.98, 1.02):
            with torch.no_grad():
                last[tile] *= scale
            assert error_of(field, picture) > least * (1 - 1e-4)
            with torch.no_grad():
                last[tile] /= scale


def test_unknown_pixels_take_no_part_in_equal_tiles():
    picture = natural("camera", side=32)
    weight = np.ones((32, 32), np.float32)
    weight[10:14, 4:28], weight[20:, 20:] = 0, 0
    results = []
    for value in (0.0, 1e5):
        spoilt = np.where(weight[..., None] > 0, picture, np.float32(value))
        field, recipe = field_of([EQUAL["deep"]], picture), recipe_of([EQUAL["deep"]], start={"iterations": 2})
        torch.manual_seed(0)
        for level in field.levels:
            level.network.layers[0].coefficients.data.normal_().mul_(0.3)
            level.network.layers[1].coefficients.data.normal_().mul_(0.3)
        fit_field(field, reader(spoilt, weight), (32, 32), recipe, 255.0, ALONE)
        sweep_field(field, reader(spoilt, weight), (32, 32), recipe, ALONE)
        results.append(rendered(field, (32, 32)))
    assert np.abs(results[0] - results[1]).max() < 1e-2


@pytest.mark.parametrize("name", ["deep", "siren"])
def test_the_processes_shares_of_equal_tiles_give_what_one_gives(name):
    picture = natural("coffee", 100, 200)[: SHAPE[0], : SHAPE[1]]
    field, recipe = equal(name, picture)
    state = {key: value.clone() for key, value in field.state_dict().items()}

    def swept(processes) -> dict:
        mine = type(field).from_layout(recipe.field, SHAPE, 3, state)
        sweep_grid(mine, 0, reader(picture), SHAPE, processes)
        return mine.state_dict()

    one = swept(ALONE)
    assert any(not torch.equal(one[key], state[key]) for key in one)
    for other in on_ranks(swept, 3):
        assert all(torch.allclose(other[key], one[key], rtol=1e-6, atol=1e-7) for key in one)


def test_sweeps_of_the_start_are_told_in_the_contributions():
    picture = natural("camera", side=48)
    levels = [level([16, 8])]
    field, told = field_of(levels, picture), {}
    recipe = recipe_of(levels, target={"psnr": 28}, start={"sweeps": 2})
    labels = []
    rows = fit_field(
        field, reader(picture), (48, 48), recipe, 255.0, ALONE,
        lambda label, _: labels.append(label), lambda rows: told.update({labels[-1]: rows[-1]["rmse"]}),
    )  # fmt: skip
    assert list(told)[:2] == ["level 1 of 1", "sweep 1 of 2"] and (np.diff(list(told.values())) < 0).all()
    assert rows[-1]["rmse"] ** 2 == pytest.approx(error_of(field, picture), rel=1e-4)


@pytest.mark.parametrize("fraction", [0.25, 0.75])
def test_a_sweep_that_is_stopped_between_its_colours_is_undone(fraction):
    picture = natural("camera", side=48)
    levels = [level([16, 8])]
    field, solved = field_of(levels, picture), []
    recipe = recipe_of(levels, target={"psnr": 28}, start={"sweeps": 2})

    def progress(label: str, done: float) -> None:
        if label.startswith("sweep") and done == fraction:
            raise InterruptedError

    def keep(_) -> None:
        solved[:] = [p.detach().clone() for p in field.parameters()]

    with pytest.raises(InterruptedError):
        fit_field(field, reader(picture), (48, 48), recipe, 255.0, ALONE, progress, keep)
    assert all(torch.equal(a, b) for a, b in zip(field.parameters(), solved, strict=True))


def test_a_sweep_sees_the_other_levels():
    picture = natural("camera", side=48)
    levels = [{"tile": 24, "overlap": 0.5, "network": {"kind": "chebyshev2d", "degree": 3}}, level([16, 8])]
    field, recipe = grown(levels, picture)
    before, above = error_of(field, picture), [p.detach().clone() for p in field.levels[0].parameters()]
    assert sweep_field(field, reader(picture), (48, 48), recipe, ALONE)
    assert error_of(field, picture) < before
    assert all(torch.equal(a, b) for a, b in zip(field.levels[0].parameters(), above, strict=True))


def test_unknown_pixels_take_no_part():
    """Whatever stands there, the sweep does not move the field by it."""
    picture = natural("camera", side=48)
    weight = np.ones((48, 48), np.float32)
    weight[20:24, 8:40] = 0
    results = []
    for value in (0.0, 1e5):
        spoilt = np.where(weight[..., None] > 0, picture, np.float32(value))
        levels = [level([16, 8])]
        field, recipe = field_of(levels, picture), recipe_of(levels, target={"psnr": 28}, start={"sweeps": 1})
        fit_field(field, reader(spoilt, weight), (48, 48), recipe, 255.0, ALONE)
        results.append(rendered(field, (48, 48)))
    assert np.abs(results[0] - results[1]).max() < 1e-2


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_processes_shares_give_what_one_gives(ranks, monkeypatch):
    monkeypatch.setattr(growth, "BLOCK", 16 * 32)
    picture = natural("coffee", 100, 200)[: SHAPE[0], : SHAPE[1]]
    field, recipe = grown([level([16, 8])], picture)
    state = {name: value.clone() for name, value in field.state_dict().items()}

    def swept(processes) -> dict:
        mine = type(field).from_layout(recipe.field, SHAPE, 3, state)
        sweep(mine, 0, recipe.field.levels[0], reader(picture), SHAPE, processes)
        return mine.state_dict()

    one = swept(ALONE)
    assert any(not torch.equal(one[name], state[name]) for name in one)
    for other in on_ranks(swept, ranks):
        assert all(torch.allclose(other[name], one[name], rtol=1e-6, atol=1e-7) for name in one)


def test_blocks_do_not_matter_to_a_sweep(monkeypatch):
    picture = natural("coffee", 100, 200)[: SHAPE[0], : SHAPE[1]]
    field, recipe = grown([level([16, 8])], picture)
    state, results = {name: value.clone() for name, value in field.state_dict().items()}, []
    for pixels in (growth.BLOCK, 16 * 16):
        monkeypatch.setattr(growth, "BLOCK", pixels)
        mine = type(field).from_layout(recipe.field, SHAPE, 3, state)
        sweep(mine, 0, recipe.field.levels[0], reader(picture), SHAPE, ALONE)
        results.append(error_of(mine, picture))
    assert results[0] == pytest.approx(results[1], rel=1e-2)
