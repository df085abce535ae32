"""Tiles that have settled: the field is the same, however it is cut, and what is cut can be joined and read again."""

import pytest
import torch
from test_field import random_active, random_field

from cpikan_hr.fields import Field, Region
from cpikan_hr.recipe import FieldOptions

SHAPE = (23, 31)


@pytest.fixture
def field() -> Field:
    """Dense and sparse levels, quadtrees, levels given by a grid."""
    return random_field("quintic", shape=SHAPE)


def points(count: int = 400) -> torch.Tensor:
    scale = torch.tensor(SHAPE, dtype=torch.float64)
    return torch.rand(count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * scale


def some(field: Field, every: int) -> dict[int, torch.Tensor]:
    """Of every level the tiles whose index is a multiple of a number."""
    return {
        k: torch.arange(len(level.active_tiles)) % every == 0
        for k, level in enumerate(field.levels)
        if level.network is not None
    }


@pytest.mark.parametrize("order", ["value", "hessian"])
def test_settling_does_not_change_the_field(field, order):
    with torch.no_grad():
        whole = field(points(), order).rows
        twice = field.settle(some(field, 3))[0]
        twice = twice.settle(some(twice, 2))[0]
        assert torch.allclose(twice(points(), order).rows, whole, rtol=1e-9, atol=1e-9)
        ys, xs = (torch.arange(n, dtype=torch.float64) + 0.5 for n in SHAPE)
        assert torch.allclose(twice.lattice(ys, xs, order), field.lattice(ys, xs, order), rtol=1e-9, atol=1e-9)
    assert twice.count_parameters() == field.count_parameters()
    assert 0 < twice.trained_tiles < field.trained_tiles / 2
    frozen = {name for name, value in twice.named_parameters() if not value.requires_grad}
    assert frozen == {name for name, _ in twice.named_parameters() if name.startswith("settled.")}


def test_joined_it_is_what_it_was(field):
    before = field.state_dict()
    cut = field.settle(some(field, 3))[0]
    after = cut.settle(some(cut, 2))[0].joined().state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert after[name].dtype == value.dtype and torch.equal(after[name], value), name


def test_levels_that_have_settled_wholly_are_joined_as_well(field):
    leaving = {0: torch.ones(1, dtype=torch.bool), 2: torch.ones(len(field.levels[2].active_tiles), dtype=torch.bool)}
    cut = field.settle(leaving)[0]
    assert cut.levels[0].network is None and cut.levels[2].network is None
    with torch.no_grad():
        assert torch.allclose(cut(points()).rows, field(points()).rows, rtol=1e-9, atol=1e-9)
    after = cut.joined().state_dict()
    assert all(torch.equal(after[name], value) for name, value in field.state_dict().items())


def test_rows_tell_where_the_trained_parameters_come_from(field):
    after, rows = field.settle(some(field, 3))
    old, new = dict(field.named_parameters()), dict(after.named_parameters())
    assert rows.keys() == {name for name, value in new.items() if value.requires_grad}
    assert all(torch.equal(new[name], old[name][part]) for name, part in rows.items())


@pytest.mark.parametrize("wholly", [False, True])
def test_state_and_layout_are_enough_to_build_it_again(wholly):
    options = FieldOptions(levels=[
        {"tile": 8, "overlap": 0.5, "network": {"kind": "cpikan", "hidden": [3], "degree": 3}},
        {"tile": [16, 8, 4], "overlap": 0.5, "network": {"kind": "chebyshev2d", "degree": None, "sparse": True}},
    ])  # fmt: skip
    active = {1 + k: tiles for k, tiles in random_active(SHAPE).items()}
    field = Field.build(options, SHAPE, 2, active=active)
    leaving = some(field, 2) | ({0: torch.ones(len(field.levels[0].active_tiles), dtype=torch.bool)} if wholly else {})
    cut = field.settle(leaving)[0]
    again = Field.from_state(options, SHAPE, 2, cut.state_dict())
    assert all(torch.equal(again.state_dict()[name], value) for name, value in cut.state_dict().items())
    empty = Field.from_layout(options, SHAPE, 2, cut.layout())
    assert {n: (p.shape, p.requires_grad) for n, p in empty.named_parameters()} == {
        n: (p.shape, p.requires_grad) for n, p in cut.named_parameters()
    }


def test_a_region_holds_what_moves_with_a_trained_tile(field):
    field.levels[0].network = None  # a tile that covers all would hold all
    cut = field.settle(some(field, 1) | {k: value for k, value in some(field, 3).items() if k in (1, 3)})[0]
    ys, xs = (torch.arange(n, dtype=torch.float64) + 0.5 for n in SHAPE)
    held = Region(cut).lattice(ys, xs)
    with torch.no_grad():
        before = cut.lattice(ys, xs)[0]
        for level in cut.levels:
            if level.network is not None:
                for value in level.network.parameters():
                    value += torch.rand_like(value)
        moved = (cut.lattice(ys, xs)[0] != before).any(0)
    assert not moved[~held].any() and (~held).any()
    assert moved[held].float().mean() > 0.9
