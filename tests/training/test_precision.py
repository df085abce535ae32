"""Lower precision and compiled kernels through whole runs of shipped recipes."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from safetensors.torch import load_file

from cpikan_hr import jets
from cpikan_hr.data.synth import synth
from cpikan_hr.train import main as train

sys.path.append(str(Path(__file__).parents[1] / "backends"))
from harness import ROOT, launch, relative_difference  # noqa: E402


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    """A picture of 72 x 100, one photograph's worth of colours."""
    y, x = np.mgrid[0:72, 0:100]
    pixels = np.stack([128 + 60 * np.sin(x / 9) * np.cos(y / 14), 120 + 40 * np.hypot(x - 40, y - 30) % 90, 60 + x], -1)
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.fromarray(pixels.astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def stack(tmp_path_factory) -> Path:
    return synth(tmp_path_factory.mktemp("wafer") / "stack", size=(96, 128), noise=2.0, seed=1)


def words(recipe: str, run: Path, *options: str) -> list[str]:
    steps = ["--training.steps", "8", "--training.log_every", "1", "--batch.size", "32"]
    return ["--config", f"recipes/{recipe}.yaml", "--output", str(run), *steps, *options]


def run_here(words: list[str]) -> None:
    """Accelerate keeps its precision in singletons: they are made anew."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()
    assert train(words) == 0


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_a_compiled_run_gives_the_losses_of_an_eager_one(picture, tmp_path):
    """One level of the recipe's: every shape of layer is a graph of its own, and a graph takes seconds."""
    level = '[{"tile": 32, "network": {"kind": "cpikan", "hidden": [4], "degree": 3}}]'
    recipe, options = "image_progressive", ["--problem.path", str(picture), "--problem.laplacian", "0.1"]
    options += ["--field.levels", level]
    run_here(words(recipe, tmp_path / "eager", *options))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        run_here(words(recipe, tmp_path / "compiled", *options, "--field.compile", "true"))
        counted = {name: dict(numbers) for name, numbers in torch._dynamo.utils.counters.items()}
    finally:
        jets.compile_kernels(False)
    assert counted["stats"]["unique_graphs"] >= 3 and not counted.get("graph_break")
    assert counted["aot_autograd"]["ok"] >= 3  # forward and backward
    assert len(losses(tmp_path / "eager")) == 8
    assert relative_difference(losses(tmp_path / "compiled"), losses(tmp_path / "eager")) < 1e-4


def test_bf16_trains_a_picture_on_two_processes_and_keeps_its_weights(picture, tmp_path):
    options = ["--problem.path", str(picture), "--start.enabled", "false", "--training.steps", "20"]
    run_here(words("image_joint", tmp_path / "full", *options))
    options += ["--training.precision", "bf16"]
    launched = launch("ddp_cpu", "-m", "cpikan_hr.train", *words("image_joint", tmp_path / "bf16", *options))
    launched.check()
    full, half = losses(tmp_path / "full"), losses(tmp_path / "bf16")
    assert 1e-5 < relative_difference(half, full) < 0.1
    assert half[-1] < 0.8 * half[0]
    field = load_file(tmp_path / "bf16" / "field.safetensors")
    assert {value.dtype for value in field.values() if value.is_floating_point()} == {torch.float32}
    assert "note:" not in launched.output


@pytest.mark.parametrize("way", ["recipe", "launch file"])
@pytest.mark.parametrize("problem", ["heights", "slopes"])
def test_bf16_spares_phases_and_derivatives(problem, way, picture, stack, tmp_path, monkeypatch, capsys):
    """The losses are those of full precision to the last digit; who asked for bf16 in the recipe is told."""
    if problem == "heights":
        recipe, options = "wafer", ["--problem.stack", str(stack), "--batch.blocks", "2"]
    else:
        recipe, options = "image_joint", ["--problem.path", str(picture), "--problem.laplacian", "0.1"]
    run_here(words(recipe, tmp_path / "full", *options))
    if way == "recipe":
        options += ["--training.precision", "bf16"]
    else:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    capsys.readouterr()
    run_here(words(recipe, tmp_path / "bf16", *options))
    assert ("note: phases and derivatives stay in fp32" in capsys.readouterr().out) == (way == "recipe")
    assert losses(tmp_path / "bf16") == losses(tmp_path / "full")
