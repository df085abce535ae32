"""Which tiles may leave first-order training, and what the optimizer keeps of those that stay."""

import numpy as np
import pytest
import torch
from cases import field_of, natural, on_ranks, reader, rendered

from cpikan_hr.fields import Field, Region
from cpikan_hr.processes import ALONE
from cpikan_hr.recipe import FieldOptions, TrainingOptions
from cpikan_hr.solvers import settling
from cpikan_hr.solvers.optimizers import build_optimizer, carry_state, states_of
from cpikan_hr.solvers.settling import settled_tiles, tile_errors

CPIKAN = {"kind": "cpikan", "hidden": [3], "degree": 3}
LEVELS = [
    {"grid": [1, 1], "network": CPIKAN},
    {"tile": 8, "overlap": 0.5, "network": {"kind": "siren", "hidden": [4], "first_omega": 3.0}},
]
PICTURE = natural("coffee", 100, 200)[:37, :52]


def noisy(levels: list[dict] = LEVELS, picture: np.ndarray = PICTURE) -> Field:
    field = field_of(levels, picture)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in field.parameters():
            p += 0.3 * torch.randn(p.shape, generator=generator)
        for level in field.levels:
            level.scale += 20.0
    return field


@pytest.mark.parametrize("side", [512, 16])
@pytest.mark.parametrize("cut", [False, True])
def test_errors_are_those_of_the_whole_field_under_each_window(side, cut, monkeypatch):
    monkeypatch.setattr(settling, "SIDE", side)
    field, known = noisy(), np.ones(PICTURE.shape[:2], np.float32)
    known[5:11, 20:40] = 0
    if cut:
        field, _ = field.settle({1: torch.arange(len(field.levels[1].active_tiles)) % 3 == 0})
    found = tile_errors(field, None, reader(PICTURE, known), PICTURE.shape[:2], ALONE)
    square = ((rendered(field, PICTURE.shape[:2]) - PICTURE) ** 2).mean(-1)
    iy, ix = np.mgrid[: PICTURE.shape[0], : PICTURE.shape[1]]
    points = torch.from_numpy(np.stack([iy.ravel(), ix.ravel()], -1) + 0.5)
    assert sorted(found) == [0, 1]
    for k, error in found.items():
        level = field.levels[k]
        point, tile, window = level.tile_grid.cover(points, "value")
        expected = []
        for number in level.active_tiles.tolist():
            here = tile == number
            weight = window[here, 0].numpy() * known.ravel()[point[here]]
            expected.append((square.ravel()[point[here]] * weight).sum() / weight.sum())
        assert np.allclose(error.numpy(), expected, rtol=1e-4)


def test_where_nothing_is_known_nothing_is_left_to_train():
    known = np.ones(PICTURE.shape[:2], np.float32)
    known[:20] = 0
    errors = tile_errors(noisy(), None, reader(PICTURE, known), PICTURE.shape[:2], ALONE)[1]
    assert (errors.view(5, 7)[0] == 0).all() and (errors.view(5, 7)[3] > 0).all()


def test_settled_parts_of_the_picture_are_not_read(monkeypatch):
    monkeypatch.setattr(settling, "SIDE", 16)
    field, read = noisy(LEVELS[1:]), []
    field, _ = field.settle({0: torch.arange(35) != 34})  # the last tile covers the lower right corner alone

    def target(y0: int, y1: int, x0: int, x1: int, stride: int):
        read.append((y0, x0))
        return reader(PICTURE)(y0, y1, x0, x1, stride)

    assert tile_errors(field, None, target, PICTURE.shape[:2], ALONE)[0].shape == (1,)
    assert {(32, 48)} <= set(read) <= {(16, 32), (16, 48), (32, 32), (32, 48)}


def test_levels_that_have_not_joined_stay_and_those_without_a_rate_leave():
    options = FieldOptions(levels=[LEVELS[0] | {"lr_scale": 0.0}, LEVELS[1]])
    field = noisy()
    arguments = (reader(PICTURE), PICTURE.shape[:2])
    errors = tile_errors(field, None, *arguments, ALONE)[1]
    tolerance = float(errors.median().sqrt())
    both = settled_tiles(field, options, None, *arguments, tolerance, ALONE)
    assert both[0].all() and torch.equal(both[1], errors <= tolerance**2) and 0 < both[1].sum() < len(errors)
    assert list(settled_tiles(field, options, 1, *arguments, tolerance, ALONE)) == [0]


def test_processes_that_share_the_pass_find_the_same(monkeypatch):
    monkeypatch.setattr(settling, "SIDE", 16)
    field = noisy()
    one = tile_errors(field, None, reader(PICTURE), PICTURE.shape[:2], ALONE)
    for other in on_ranks(lambda ranks: tile_errors(field, None, reader(PICTURE), PICTURE.shape[:2], ranks), 3):
        assert all(torch.allclose(other[k], value, rtol=1e-12) for k, value in one.items())


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "nadam", "radam", "adamax", "rmsprop", "sgd", "soap"])
@pytest.mark.parametrize("wholly", [False, True])
def test_the_next_updates_are_those_with_the_settled_tiles_held_fixed(optimizer, wholly):
    """Exactly, in float64, and with pixels that no trained tile sees left out."""
    levels = [*LEVELS, {"tile": 16, "overlap": 0.25, "network": {"kind": "chebyshev2d", "degree": 3}}]
    options = TrainingOptions(optimizer=optimizer, lr=1e-3, weight_decay=0.0)
    choice = FieldOptions(levels=levels)
    field = noisy(levels).double()
    iy, ix = np.mgrid[: PICTURE.shape[0], : PICTURE.shape[1]]
    points = torch.from_numpy(np.stack([iy.ravel(), ix.ravel()], -1) + 0.5)
    data = torch.from_numpy(PICTURE.reshape(-1, 3)).double()

    def update(field: Field, optimizer: torch.optim.Optimizer, kept: torch.Tensor) -> None:
        optimizer.zero_grad()
        ((field(points[kept]).value - data[kept]).square().sum() / len(points)).backward()
        optimizer.step()

    solver, everywhere = build_optimizer(field, options, choice), torch.ones(len(points), dtype=torch.bool)
    for _ in range(3):
        update(field, solver, everywhere)
    leaving = {
        0: torch.ones(1, dtype=torch.bool), 1: torch.arange(35) < 20, 2: torch.arange(12) < (12 if wholly else 8),
    }  # fmt: skip
    after, rows = field.settle(leaving)
    carried = build_optimizer(after, options, choice)
    carry_state(solver, states_of(solver, field), field, carried, after, rows)

    def held() -> dict[str, torch.Tensor]:
        """The settled rows of the uncut field's parameters."""
        kept = {}
        for k, gone in leaving.items():
            for name, value in field.levels[k].named_parameters():
                kept[f"{k}.{name}"] = value.detach()[gone].clone()
        return kept

    region = Region(after).lattice(*(torch.arange(n, dtype=torch.float64) + 0.5 for n in PICTURE.shape[:2])).flatten()
    assert 0 < region.sum() < len(points)
    for _ in range(4):
        frozen = held()
        update(field, solver, everywhere)
        with torch.no_grad():
            for k, gone in leaving.items():
                for name, value in field.levels[k].named_parameters():
                    value[gone] = frozen[f"{k}.{name}"]
        update(after, carried, region)
        joined = after.joined().state_dict()
        for name, value in field.state_dict().items():
            assert torch.allclose(joined[name], value, rtol=1e-9, atol=1e-12), name
