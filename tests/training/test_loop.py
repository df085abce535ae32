"""Runs that are stopped, resumed, begun again or swept between steps."""

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cpikan_hr.data.sampling import PixelSampler
from cpikan_hr.train import main as train
from cpikan_hr.training import loop
from cpikan_hr.training.weights import load_field

sys.path.append(str(Path(__file__).parents[1] / "backends"))
from harness import launch  # noqa: E402

SPARSE = {"tile": [32, 16, 8], "overlap": 0.25, "network": {"kind": "chebyshev2d", "degree": None, "sparse": True}}
GROWN = {
    "tile": [16, 8], "overlap": 0.5, "grow": True,
    "network": {"kind": "cpikan", "hidden": [4], "degree": [3, 3], "input_map": "sine", "first_input_map": "sine"},
}  # fmt: skip


def write(folder: Path, levels: list[dict], psnr: float, **training) -> list[str]:
    """A picture of 64 x 96 and its recipe; the words that train it."""
    y, x = np.mgrid[0:64, 0:96]
    pixels = np.stack([128 + 60 * np.sin(x / 9) * np.cos(y / 14), 90 + 80 * np.hypot(x - 40, y - 30) % 2, 60 + x], -1)
    Image.fromarray(pixels.astype(np.uint8)).save(folder / "picture.png")
    tree = {
        "output": "unused",
        "problem": {"kind": "image", "path": str(folder / "picture.png")},
        "field": {"levels": levels},
        "target": {"psnr": psnr},
        "batch": {"blocks": 2, "size": 96, "stride": 1},  # every update sees the whole picture
        "training": {"log_every": 1, "schedule": "constant", "warmup": 0} | training,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return ["--config", str(folder / "recipe.yaml"), "--output"]


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines(run) if "loss" in line]


def test_a_start_without_steps_leaves_metrics(tmp_path):
    words, run = write(tmp_path, [SPARSE, GROWN], 30, steps=0), tmp_path / "run"
    assert train([*words, str(run)]) == 0
    rows, about = lines(run), load_field(run).about
    assert [(row["step"], row["level"]) for row in rows] == [(0, 1), (0, 2)]
    assert [(row["rmse"], row["params"]) for row in rows] == [(row["rmse"], row["params"]) for row in about["levels"]]
    assert rows[1]["psnr_db"] == pytest.approx(20 * np.log10(255 / rows[1]["rmse"]))
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    (psnr,) = events.Scalars("start/level_2/psnr_db")
    assert psnr.step == 0 and psnr.value == pytest.approx(rows[1]["psnr_db"], rel=1e-6)


def test_ctrl_c_between_steps_leaves_what_can_be_resumed(tmp_path, monkeypatch, capsys):
    words, run = write(tmp_path, [SPARSE], 25, steps=6), tmp_path / "run"
    assert train([*words, str(tmp_path / "whole")]) == 0

    class Interrupted(loop.Tracker):
        def update(self, pixels: int) -> None:
            super().update(pixels)
            self.steps = getattr(self, "steps", 0) + 1
            if self.steps == 3:
                os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "Tracker", Interrupted)
        assert train([*words, str(run)]) == 130
    assert capsys.readouterr().err.strip().endswith("render it, or resume it")
    assert load_field(run).about["steps"] == 3
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000003"]
    assert train([*words, str(run)]) == 0
    assert losses(run) == pytest.approx(losses(tmp_path / "whole"), rel=1e-6) and len(losses(run)) == 6
    assert [row["step"] for row in lines(run)] == [0, 1, 2, 3, 4, 5, 6]


def test_a_finished_field_is_not_replaced_by_another(tmp_path, capsys):
    words, run = [*write(tmp_path, [SPARSE], 25, steps=1), str(tmp_path / "run")], tmp_path / "run"
    assert train(words) == 0
    field = (run / "field.safetensors").read_bytes()
    capsys.readouterr()
    for other in (["--target.psnr", "28"], ["--batch.stride", "2"], ["--field.levels.0.overlap", "0.5"]):
        assert train([*words, *other]) == 2
        (said,) = capsys.readouterr().err.splitlines()
        assert "another field" in said and said.endswith("give another output, or --resume never")
        assert (run / "field.safetensors").read_bytes() == field
    assert train([*words, "--training.steps", "2"]) == 0 and len(losses(run)) == 2
    assert train([*words, "--target.psnr", "28", "--resume", "never"]) == 0
    assert (run / "field.safetensors").read_bytes() != field


def test_checkpoints_by_the_clock_are_made_when_due_and_resumed_exactly(tmp_path, monkeypatch):
    words, run = write(tmp_path, [SPARSE], 25, steps=8, checkpoint_minutes=0.75, keep=9), tmp_path / "run"
    now = [0.0]

    class Slow(loop.Tracker):  # 20 seconds a step
        def update(self, pixels: int) -> None:
            super().update(pixels)
            now[0] += 20

    monkeypatch.setattr(loop, "Tracker", Slow)
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    assert train([*words, str(run)]) == 0
    whole, checkpoints = losses(run), sorted(path.name for path in (run / "checkpoints").iterdir())
    assert checkpoints == ["step_00000003", "step_00000006"]  # after 60 and 120 s
    assert train([*words, str(run), "--resume", str(run / "checkpoints" / checkpoints[0])]) == 0
    assert len(whole) == 8 and losses(run) == pytest.approx(whole, rel=1e-6)


@pytest.mark.parametrize(("where", "config"), [("data", "ddp_cpu"), ("weight", "ddp_cpu"), ("data", "zero2")])
def test_a_fault_in_one_tile_on_one_rank_stops_all_before_the_update(where, config, tmp_path):
    level = {"tile": 16, "overlap": 0.0, "network": {"kind": "chebyshev2d", "degree": 3}}
    words = write(tmp_path, [level], 25, steps=6)
    tree = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    tree["batch"] = {"blocks": 4, "size": 48, "stride": 2}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    tile = 9 if where == "weight" else seen_by_rank_one(tree, step=3)
    stopped = launch(config, "tests/training/faulty.py", where, "1", "3", str(tile), *words, str(tmp_path / "run"))
    assert stopped.codes != [0]
    for rank in (0, 1):
        told = json.loads((tmp_path / f"fault_{rank}.json").read_text())
        assert told == {"step": 3, "tile": tile, "rank": 1, "what": "loss", "unchanged": True, "code": 2}
    named = f"tile {tile} of levels.0.network.coefficients, rank 1"
    assert f"error: loss is not finite at step 3, {named}: all ranks stopped before the update" in stopped.output
    assert not (tmp_path / "run" / "field.safetensors").exists()


def seen_by_rank_one(tree: dict, step: int) -> int:
    """The last tile, of 16 px in a picture of 64 x 96, in which the second of two ranks draws a pixel."""
    batch = tree["batch"]
    draws = PixelSampler((64, 96), batch["blocks"], batch["size"], batch["stride"], seed=0).draws(step, 1, 2)
    return max(int((draw.iy // 16 * 6 + draw.ix // 16).max()) for draw in draws)
