"""Tiles that leave the training between updates: stopped and resumed, exported, launched, refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_loop import lines, losses, write

from cpikan_hr.fields import Field, Region
from cpikan_hr.problems import build_problem
from cpikan_hr.problems.batches import PixelBatches, pixel_centres
from cpikan_hr.recipe import BatchOptions, load_recipe
from cpikan_hr.train import main as train
from cpikan_hr.training.export import export
from cpikan_hr.training.weights import load_field

TILES = {"tile": 16, "overlap": 0.5, "network": {"kind": "cpikan", "hidden": [4], "degree": 3}}
GLOBAL = {"grid": [1, 1], "network": {"kind": "siren", "hidden": [6], "first_omega": 3.0}}
GROWN = {
    "tile": [16, 8], "overlap": 0.5, "grow": True,
    "network": {"kind": "cpikan", "hidden": [4], "degree": [3, 3], "input_map": "sine", "first_input_map": "sine"},
}  # fmt: skip
SETTLE = dict(settle_every=4, settle_rmse=2.5, lr=1e-3)


def tiles(run: Path) -> list[int]:
    """How many tiles trained at each update."""
    return [line["tiles"] for line in lines(run) if "loss" in line]


def state(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "field.safetensors")


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float = 0.0) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(one[name], value, rtol=tolerance, atol=tolerance) for name, value in other.items()
    )


@pytest.mark.parametrize("options", [{}, {"ema": 0.9, "optimizer": "nadam", "accumulate": 2}], ids=["plain", "ema"])
def test_a_run_resumed_after_tiles_have_settled_is_the_one_that_went_on(options, tmp_path):
    words = write(tmp_path, [TILES], 30, steps=14, checkpoint_steps=6, keep=9, **SETTLE, **options)
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert train([*words, str(whole)]) == 0
    counts = tiles(whole)
    assert 24 >= counts[0] > counts[-1] > 0 and len(counts) == 14  # some leave, and some of them later
    assert counts == sorted(counts, reverse=True) and len(set(counts[:6])) + len(set(counts[6:])) > 2
    assert state(whole).keys() == {n.replace("settled", "levels") for n in state(whole)}
    for steps in ("6", "10"):
        assert train([*words, str(run), "--training.steps", steps, "--training.schedule", "constant"]) == 0
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step_00000006"]
    assert train([*words, str(run)]) == 0
    assert losses(run) == losses(whole) and tiles(run) == counts and same(state(run), state(whole))


def test_a_checkpoint_of_settled_tiles_is_exported_as_one_field(tmp_path):
    words, run = write(tmp_path, [GLOBAL, TILES], 30, steps=8, checkpoint_steps=8, **SETTLE), tmp_path / "run"
    assert train([*words, str(run)]) == 0
    assert tiles(run)[-1] < 25 and (run / "checkpoints" / "step_00000008" / "layout.safetensors").is_file()
    assert same(load_file(export(run, tmp_path / "joined.safetensors")), state(run))
    packed = load_field(export(run, tmp_path / "packed.safetensors", bits=16)).field
    ys, xs = torch.arange(64).double() + 0.5, torch.arange(96).double() + 0.5
    assert (packed.lattice(ys, xs) - load_field(run).field.lattice(ys, xs)).abs().max() < 0.5


def test_tiles_that_have_left_do_not_change_any_more(tmp_path):
    words = write(tmp_path, [TILES], 30, steps=9, checkpoint_steps=1, keep=99, **SETTLE)
    assert train([*words, str(tmp_path / "run")]) == 0
    folders = [tmp_path / "run" / "checkpoints" / f"step_{step:08d}" for step in (5, 8)]
    early, late = (load_file(folder / "model.safetensors") for folder in folders)
    gone = early["settled.0.active"]
    assert len(gone) and torch.equal(late["settled.0.active"], gone)
    for name in ("network.layers.0.coefficients", "network.layers.1.coefficients"):
        assert torch.equal(late[f"settled.0.{name}"], early[f"settled.0.{name}"])
        assert not torch.equal(late[f"levels.0.{name}"], early[f"levels.0.{name}"])


def test_a_run_whose_tiles_have_all_settled_ends(tmp_path, capsys):
    words, run = write(tmp_path, [TILES], 30, steps=50, settle_every=3, settle_rmse=200.0), tmp_path / "run"
    assert train([*words, str(run)]) == 0
    assert "all tiles have settled after 0 updates" in capsys.readouterr().out
    assert load_field(run).about["steps"] == 0 and not losses(run)


def test_nothing_settles_where_it_is_off_or_too_strict(tmp_path):
    off = write(tmp_path, [TILES], 30, steps=6)
    assert train([*off, str(tmp_path / "off")]) == 0
    assert train([*off, str(tmp_path / "on"), "--training.settle_rmse", "1e-3", "--training.settle_every", "2"]) == 0
    assert "tiles" not in lines(tmp_path / "off")[-1] and set(tiles(tmp_path / "on")) == {24}
    assert losses(tmp_path / "on") == losses(tmp_path / "off")
    assert same(state(tmp_path / "on"), state(tmp_path / "off"))


def test_levels_settle_once_they_have_joined(tmp_path):
    words = write(tmp_path, [GLOBAL, TILES], 30, steps=8, settle_every=2, settle_rmse=2.5, lr=1e-3)
    assert train([*words, str(tmp_path / "run"), "--field.mode", "progressive"]) == 0
    counts = tiles(tmp_path / "run")
    assert set(counts[:4]) == {25} and counts[-1] < 25


@pytest.mark.parametrize(
    ("level", "start", "rmse"), [(GROWN, [], 9.0), (TILES, ["--start.iterations", "1"], 0.8)], ids=["grown", "equal"]
)
def test_sweeps_move_the_tiles_that_train(level, start, rmse, tmp_path):
    words = write(
        tmp_path, [level], 28, steps=6, lr=1e-6, sweep_every=4, settle_every=9, settle_rmse=rmse, checkpoint_steps=2,
        keep=9,
    )  # fmt: skip
    assert train([*words, str(tmp_path / "run"), *start]) == 0
    counts = tiles(tmp_path / "run")
    assert counts[-1] < sum(row["tiles"] for row in lines(tmp_path / "run") if "loss" not in row)
    folders = [tmp_path / "run" / "checkpoints" / f"step_{step:08d}" for step in (2, 4)]
    early, late = (load_file(folder / "model.safetensors") for folder in folders)
    assert any(name.startswith("settled.") for name in early)
    moved = {name for name in early.keys() & late.keys() if early[name].shape == late[name].shape}
    moved = {name for name in moved if "network" in name and (early[name] - late[name]).abs().max() > 1e-3}
    assert moved and all(name.startswith("levels.") for name in moved)
    assert load_field(tmp_path / "run").about["params"] == load_field(export(
        tmp_path / "run", tmp_path / "again.safetensors"
    )).about["params"]  # fmt: skip


def test_pixels_are_drawn_where_tiles_train(tmp_path):
    """The same pixels as without settling, less those that no trained tile sees; of windows only what is needed."""
    words = write(tmp_path, [TILES], 30)
    recipe = load_recipe(words[1])
    problem = build_problem(recipe)
    field = Field.build(recipe.field, problem.shape, problem.channels)
    field, _ = field.settle({0: torch.arange(24) != 8})
    region, batches = Region(field), PixelBatches(problem, BatchOptions(blocks=6, size=32, stride=2), 0)
    sampler = batches.sampler
    drawn = torch.cat([pixel_centres(draw.iy, draw.ix) for draw in sampler.draws(3)])
    found = batches.read(3, 0, 1, region)["points"]
    ys, xs = (torch.arange(n, dtype=torch.float64) + 0.5 for n in problem.shape)
    iy, ix = drawn.long().unbind(1)
    expected = drawn[region.lattice(ys, xs)[iy, ix]]
    assert torch.equal(found, expected) and 0 < len(expected) < len(drawn) / 4
    # A share without such a pixel still is a batch.
    counts = [len(batches.read(3, share, 6, region)["points"]) for share in range(6)]
    assert min(counts) == 1 and sum(count for count in counts if count > 1) <= len(expected)
    whole = np.concatenate([batches.read(3, share, 6)["points"] for share in range(6)])
    assert len(whole) == len(drawn)
