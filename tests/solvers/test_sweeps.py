"""Sweeps: never worse, better where tiles blend, alike on any number of processes."""

import numpy as np
import pytest
import torch
from cases import GROWN, GROWN_SIREN, field_of, mean_square, natural, on_ranks, reader, recipe_of, rendered

from cpikan_hr.processes import ALONE
from cpikan_hr.solvers import growth
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
