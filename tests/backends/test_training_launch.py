"""Sweeps, settling, joining levels and checkpoints by the clock, launched as two processes: one launch for all."""

import sys
from pathlib import Path

import pytest
import yaml
from harness import ROOT, launch, run_alone, train_each

sys.path.append(str(ROOT / "tests" / "training"))
from test_loop import GROWN, SPARSE, losses, write  # noqa: E402
from test_settling import SETTLE, TILES, same, state, tiles  # noqa: E402

JOINING = [
    {"grid": [1, 1], "network": {"kind": "cpikan", "hidden": [4], "degree": 4}},
    {"tile": 24, "network": {"kind": "siren", "hidden": [4], "first_omega": 3.0}},
    {"tile": 8, "network": {"kind": "chebyshev2d", "degree": 2}},
]


def tree(folder: Path, name: str, levels: list[dict], psnr: float, **training) -> dict:
    write(folder, levels, psnr, **training)
    return yaml.safe_load((folder / "recipe.yaml").read_text()) | {"output": str(folder / name)}


def joining(folder: Path) -> dict:
    """Some levels have no point yet, and of others a process sees no tile: all take part in every collective."""
    found = tree(folder, "joining", JOINING, 25, steps=6, lr=1e-3)
    found["field"]["mode"], found["batch"] = "progressive", {"blocks": 2, "size": 16, "stride": 2}
    return found


def trees(folder: Path) -> list[dict]:
    folder.mkdir(exist_ok=True)
    clock = tree(folder, "clock", [SPARSE], 25, steps=4, checkpoint_minutes=1e-9, keep=9)
    again = clock | {"resume": str(folder / "clock" / "checkpoints" / "step_00000002")}
    return [
        tree(folder, "swept", [GROWN], 28, steps=20, lr=1e-6, sweep_every=10),
        tree(folder, "settled", [TILES], 30, steps=10, ema=0.5, **SETTLE),
        joining(folder), clock, again,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run_alone(*train_each(folder, trees(folder)[:4])).check()
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    launch("ddp_cpu", *train_each(folder, trees(folder))).check()
    return folder


def test_sweeps_between_steps_lower_the_loss_alike(alone, two):
    one = losses(alone / "swept")
    assert len(one) == 20 and losses(two / "swept") == pytest.approx(one, rel=1e-5)
    assert one[10] < 0.99 * one[9]
    assert abs(one[9] / one[0] - 1) < 1e-3  # the steps themselves do next to nothing


def test_the_same_tiles_settle(alone, two):
    assert tiles(two / "settled") == tiles(alone / "settled") and tiles(alone / "settled")[-1] < 24
    assert losses(two / "settled") == pytest.approx(losses(alone / "settled"), rel=1e-4)
    assert same(state(two / "settled"), state(alone / "settled"), 1e-3)


def test_levels_that_join_one_after_another_train_alike(alone, two, tmp_path):
    launch("zero3", *train_each(tmp_path, [joining(tmp_path)])).check()
    for folder in (two, tmp_path):
        assert len(losses(folder / "joining")) == 6
        assert losses(folder / "joining") == pytest.approx(losses(alone / "joining"), rel=1e-4)


def test_checkpoints_by_the_clock_are_agreed_on(alone, two):
    """The run was resumed from its second step."""
    made = sorted(path.name for path in (two / "clock" / "checkpoints").iterdir())
    assert made == [f"step_{k:08d}" for k in range(1, 5)]
    assert len(losses(two / "clock")) == 4
    assert losses(two / "clock") == pytest.approx(losses(alone / "clock"), rel=1e-6)


EACH = """
from accelerate.state import AcceleratorState, GradientState
from cpikan_hr.train import main

for words in LISTS:
    assert main(words) == 2
    AcceleratorState._reset_state()  # the next one makes its own accelerator
    GradientState._reset_state()
"""


def test_what_needs_whole_weights_is_refused_before_the_start(tmp_path):
    """One launch of one process for all: what is refused depends neither on their number nor on the stage."""
    equation = ["--config", "recipes/burgers.yaml", "--solve.method"]
    picture = write(tmp_path, [GROWN], 28, steps=20)[:2]
    refusals = {
        "solve.method ssbroyden": [*equation, "ssbroyden"],
        "problem.balance needs": [*equation, "none", "--problem.balance", "{}"],
        "field.precision double:": [*equation, "none"],
        "training.sweep_every needs": [*picture, "--training.sweep_every", "10"],
        "training.settle_rmse needs": [*picture, "--training.settle_every", "4", "--training.settle_rmse", "2.5"],
    }
    run = tmp_path / "run"
    program = tmp_path / "each.py"
    program.write_text(EACH.replace("LISTS", repr([[*words, "--output", str(run)] for words in refusals.values()])))
    launched = launch("zero3", str(program), processes=1)
    launched.check()
    said = [line for line in launched.output.splitlines() if line.startswith("error: ")]
    assert [" ".join(line.split()[1:3]) for line in said] == list(refusals)
    assert all("launch with cpu, single_gpu or ddp" in line for line in said)
    assert "parameters" not in launched.output and not run.exists()
