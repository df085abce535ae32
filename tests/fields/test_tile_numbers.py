"""A fault is told by the number of the tile in its level's grid, wherever the tile stands in the network."""

import pytest
import torch
from test_field import NETWORKS, random_field

from cpikan_hr.fields import Field
from cpikan_hr.recipe import FieldOptions
from cpikan_hr.training.update import GradientWatch


def centre(level, tile: int) -> torch.Tensor:
    index = level.tile_grid.unravel(torch.tensor(tile))
    return torch.stack([axis.centre(i) for axis, i in zip(level.tile_grid.axes, index, strict=True)])[None]


@pytest.mark.parametrize("name", ["levels.5", "levels.6", "levels.7"])
def test_of_the_leaves_of_a_quadtree(name):
    field = random_field("quintic", shape=(40, 60))
    watch = GradientWatch(field)
    level = field.get_submodule(name)
    tiles = level.active_tiles.tolist()
    assert tiles != list(range(len(tiles)))
    for tile in tiles[:: max(1, len(tiles) // 5)]:
        counts = level.network.offset.diff()
        if not counts[tiles.index(tile)]:
            continue
        watch.clear()
        (level(centre(level, tile), "value") * float("nan")).sum().backward()
        assert watch.locate(int(watch.first_bad())) == (f"{name}.network.coefficients", tile)


def test_of_grown_tiles_and_of_tiles_all_in_use():
    grown = {"tile": 8, "grow": True, "network": {"kind": "cpikan", "hidden": [2], "degree": 3}}
    options = FieldOptions(levels=[{"tile": 16, "network": NETWORKS[1]}, grown])
    active = {1: torch.tensor([2, 7]), 2: torch.tensor([0, 5, 11]), 3: torch.tensor([8])}
    field = Field.build(options, (32, 32), 1, active=active)
    watch = GradientWatch(field)
    for number, tile in [(0, 2), (1, 7), (2, 5), (2, 11), (3, 8)]:
        watch.clear()
        level = field.levels[number]
        (level(centre(level, tile), "value") * float("nan")).sum().backward()
        name, found = watch.locate(int(watch.first_bad()))
        assert name.startswith(f"levels.{number}.network.") and found == tile
