"""A run never hands out a worse field than its start, or than the best it has looked at, without saying so."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_loop import write

from cpikan_hr.cli import main as cli
from cpikan_hr.train import main as train
from cpikan_hr.training.weights import load_field

TILES = {"tile": 16, "overlap": 0.5, "network": {"kind": "cpikan", "hidden": [4], "degree": 3}}


def error(run: Path, folder: Path) -> float:
    """Root mean square over the rendered picture."""
    assert cli(["render", str(run), "--out", str(folder / "map.png")]) == 0
    found, true = (np.asarray(Image.open(folder / name)).astype(float) for name in ("map.png", "picture.png"))
    return float(np.sqrt(np.mean((found - true) ** 2)))


def test_an_absurd_learning_rate_leaves_the_start_and_says_so(tmp_path, capsys):
    words = write(tmp_path, [TILES], 25, steps=4, lr=10.0)
    assert train([*words, str(tmp_path / "start"), "--training.steps", "0"]) == 0
    capsys.readouterr()
    run = tmp_path / "run"
    assert train([*words, str(run), "--training.checkpoint_steps", "2"]) == 0
    *_, said, wrote = capsys.readouterr().out.splitlines()
    assert "the end is worse; the field is that of the start" in said and wrote == f"wrote {run}"
    assert error(run, tmp_path) == pytest.approx(error(tmp_path / "start", tmp_path))
    about, checked = json.loads((run / "about.json").read_text()), load_field(run).about["checked"]
    assert about == load_field(run).about and about["steps"] == 4
    assert (checked["field"]["step"], checked["end"]["step"]) == (0, 4)
    assert f"{checked['start']['psnr_db']:.2f} dB" in said and f"{checked['end']['psnr_db']:.2f} dB" in said
    looks = [json.loads(line) for line in (run / "looks.jsonl").read_text().splitlines()]
    assert [looks[0]["checked"], looks[-1]["checked"]] == [checked["start"]["loss"], checked["end"]["loss"]]
    assert (run / "checkpoints" / "step_00000004").is_dir() and not (run / "best.safetensors").exists()

    # Resumed from after the ruin, the start is still known.
    assert train([*words, str(run), "--training.steps", "5"]) == 0
    assert "the field is that of the start" in capsys.readouterr().out
    assert error(run, tmp_path) == pytest.approx(error(tmp_path / "start", tmp_path))


def test_a_good_learning_rate_hands_out_the_end(tmp_path, capsys):
    run = tmp_path / "run"
    assert train([*write(tmp_path, [TILES], 25, steps=6, lr=1e-4), str(run)]) == 0
    checked = load_field(run).about["checked"]
    assert checked["field"] == checked["end"] and checked["end"]["loss"] < checked["start"]["loss"]
    assert "worse" not in capsys.readouterr().out
    rms = 255 * 10 ** (-checked["end"]["psnr_db"] / 20)  # the sample is all of so small a picture
    assert error(run, tmp_path) == pytest.approx(rms, rel=0.05)  # a PNG is rounded


def test_export_does_not_replace_a_better_field_by_the_end(tmp_path):
    run = tmp_path / "run"
    assert train([*write(tmp_path, [TILES], 25, steps=2, lr=10.0, checkpoint_steps=1), str(run)]) == 0
    before = load_field(run).field.state_dict()
    assert cli(["export", str(run)]) == 0
    after = load_field(run).field.state_dict()
    assert all((after[name] == value).all() for name, value in before.items())


def test_options_without_effect_are_said(tmp_path, capsys):
    words = write(tmp_path, [TILES], 25, steps=0, lr=0.1, ema=0.5)
    assert train([*words, str(tmp_path / "run")]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if "without effect" in line]
    assert "training.lr" in notes[0] and "training.ema" in notes[0] and "training.steps is 0" in notes[0]
    assert notes[1].startswith("note: target.psnr: without effect")
    assert all(note in (tmp_path / "run" / "log.txt").read_text() for note in notes)
