"""A run of an equation that is resumed goes on exactly: attention, causal weights, points drawn anew, and solvers."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cpikan_hr.train import main as train

NETWORK = {"kind": "cpikan", "hidden": [5], "degree": 4}


def write(folder: Path, steps: int, **changes) -> list[str]:
    problem = {
        "kind": "pde", "equation": "burgers", "points": {"interior": 60, "condition": 12}, "resolution": 11,
        "attention": {"rate": 0.05}, "causal": {"slices": 4}, "refine": {"every": 5, "pool": 200},
    }  # fmt: skip
    tree = {
        "output": "given on the command line",
        "problem": problem,
        "field": {"precision": "double", "levels": [{"grid": [2, 1], "overlap": 0.5, "network": NETWORK}]},
        "training": {
            "steps": steps, "log_every": 1, "checkpoint_steps": 3, "checkpoint_minutes": None, "schedule": "constant",
            "keep": 99,
        },
    }
    for section, given in changes.items():
        tree[section] = tree.get(section, {}) | given
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return ["--config", str(folder / "recipe.yaml"), "--output"]


def logged(run: Path) -> list[tuple]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"], row["residual"], row["grad_norm"]) for row in rows]


def same(one: Path, other: Path) -> bool:
    states = [load_file(path) for path in (one, other)]
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][k], states[1][k]) for k in states[0])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_updates_go_on_as_if_never_stopped(accumulate, tmp_path):
    words = write(tmp_path, 14, training={"accumulate": accumulate})
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train([*words, str(whole)]) == 0
    assert train([*words, str(parts), "--training.steps", "9"]) == 0  # two draws of points are behind it
    assert len(logged(parts)) == 9
    assert train([*words, str(parts)]) == 0
    assert logged(parts) == logged(whole) and len(logged(whole)) == 14
    assert same(parts / "field.safetensors", whole / "field.safetensors")
    last = Path("checkpoints") / "step_00000012" / "batches.safetensors"
    assert same(parts / last, whole / last)
    state = load_file(whole / last)
    assert state["interior"].shape == (60, 2) and len(state["attention"].unique()) > 30
    first = load_file(whole / "checkpoints" / "step_00000006" / "batches.safetensors")
    assert not torch.equal(first["interior"], state["interior"])  # the draw of update 10 lies between


@pytest.mark.parametrize("method", ["levenberg_marquardt", "ssbroyden", "multiplicative_schwarz"])
def test_iterations_go_on_from_a_checkpoint_of_either_phase(method, tmp_path):
    words = write(tmp_path, 6, solve={"method": method, "iterations": 5, "local": 2})
    run = tmp_path / "run"
    assert train([*words, str(run)]) == 0
    whole, field = logged(run), load_file(run / "field.safetensors")
    assert [row[0] for row in whole] == list(range(1, 12))
    assert whole[-1][1] < whole[6][1]
    for step in (6, 9):
        assert train([*words, str(run), "--resume", str(run / "checkpoints" / f"step_{step:08d}")]) == 0
        assert [row[0] for row in logged(run)] == list(range(1, 12))
        for row, expected in zip(logged(run), whole, strict=True):
            assert row == pytest.approx(expected, rel=1e-7)
        again = load_file(run / "field.safetensors")
        assert all(torch.allclose(again[name], field[name], rtol=1e-6, atol=1e-9) for name in field)


def test_a_march_through_time_goes_on_where_it_was(tmp_path):
    """From inside a window, from the end of one that took all its iterations, and from those over all times."""
    march = {"windows": 3, "iterations": 4, "tolerance": 0.0}
    words = write(tmp_path, 0, solve={"method": "levenberg_marquardt", "iterations": 3, "march": march})
    run = tmp_path / "run"
    words += [str(run), "--problem.causal", "null", "--problem.refine", "null", "--training.checkpoint_steps", "2"]
    words += ["--field.levels.0.grid", "[2, 3]", "--field.levels.0.overlap", "0", "--problem.points.interface", "8"]
    assert train(words) == 0
    whole, field = logged(run), load_file(run / "field.safetensors")
    assert [row[0] for row in whole] == list(range(1, 16))
    for step in (6, 8, 14):
        assert train([*words, "--resume", str(run / "checkpoints" / f"step_{step:08d}")]) == 0
        for row, expected in zip(logged(run), whole, strict=True):
            assert row == pytest.approx(expected, rel=1e-6)
        again = load_file(run / "field.safetensors")
        assert all(torch.allclose(again[name], field[name], rtol=1e-6, atol=1e-9) for name in field)


def test_the_field_kept_is_the_solver_s_and_no_average_of_earlier_weights(tmp_path):
    solved = {"method": "levenberg_marquardt", "iterations": 3}
    words = write(tmp_path, 4, training={"ema": 0.9}, solve=solved)
    assert train([*words, str(tmp_path / "run")]) == 0
    kept = load_file(tmp_path / "run" / "field.safetensors")
    last = load_file(tmp_path / "run" / "checkpoints" / "step_00000007" / "model.safetensors")
    assert all(torch.equal(kept[name], last[name]) for name in last)
