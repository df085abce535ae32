"""Every shipped backend file, launched as two real CPU processes, trains what one process trains."""

import json
from pathlib import Path

import harness
import numpy as np
import pytest
import torch
import yaml
from harness import ROOT, TOY, Agreement, launch, relative_difference, run_alone, weight_difference
from safetensors.torch import load_file

from cpikan_hr.training.export import export
from cpikan_hr.training.weights import load_field

CONFIGS = sorted(path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml"))
TRAINED = [name for name in CONFIGS if name != "fsdp2"]
# One of each kind of checkpoint: replicated, sharded optimizer, sharded parameters on the host, optimizer on NVMe.
RESUMED = ("ddp_cpu", "zero2", "zero3_offload", "zero3_nvme")


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "weights.pt", weights_only=True)


def test_the_issue_s_backends_are_shipped():
    assert set(CONFIGS) == {
        *("cpu", "single_gpu", "ddp_cpu", "ddp", "fsdp2", "zero1", "zero2", "zero2_offload", "zero3"),
        *("zero3_offload", "zero3_nvme", "multinode_ddp", "multinode_zero3_offload"),
    }


@pytest.fixture(scope="session")
def recipe(tmp_path_factory) -> Path:
    """A small picture, a loss with second derivatives, a dense level and a sparse quadtree, two micro-batches and
    clipping.
    """
    folder = tmp_path_factory.mktemp("recipe")
    y, x = np.mgrid[0:40, 0:56]
    np.save(folder / "picture.npy", (np.sin(x / 5) * np.cos(y / 4)).astype(np.float32))
    tree = {
        "output": "given on the command line",
        "problem": {"kind": "image", "path": str(folder / "picture.npy"), "laplacian": 1e-3},
        "field": {
            "levels": [
                {"grid": [1, 1], "network": {"kind": "cpikan", "hidden": [5], "degree": 4}},
                {"tile": 12, "overlap": 0.5, "network": {"kind": "chebyshev2d", "degree": 1}},
                {"tile": [16, 8], "overlap": 0.25, "network": {"kind": "chebyshev2d", "degree": None, "sparse": True}},
            ]
        },
        "target": {"rmse": 0.1},
        "batch": {"blocks": 4, "size": 24, "stride": 3},
        "training": {"steps": 20, "accumulate": 2, "clip": 0.1, "log_every": 1, "checkpoint_steps": 10, "keep": 9},
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def program(recipe: Path, run: Path) -> tuple[str, ...]:
    return ("-m", "cpikan_hr.train", "--config", str(recipe), "--output", str(run))


def metrics(run: Path, key: str) -> list[float]:
    return [json.loads(line)[key] for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]


@pytest.fixture(scope="session")
def reference(recipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    run_alone(*program(recipe, folder)).check()
    return folder


@pytest.mark.parametrize("config", TRAINED)
def test_two_processes_agree_with_one_and_resume_exactly(config, recipe, reference, tmp_path):
    launch(config, *program(recipe, tmp_path)).check()
    about = load_field(tmp_path).about
    assert about["processes"] == 2
    agreement = Agreement(
        config,
        "2 x 1" if config in harness.MULTINODE else "2",
        relative_difference(metrics(tmp_path, "loss"), metrics(reference, "loss")),
        relative_difference(metrics(tmp_path, "grad_norm"), metrics(reference, "grad_norm")),
        weight_difference(load_file(tmp_path / "field.safetensors"), load_file(reference / "field.safetensors")),
    )
    harness.table.append(agreement)
    assert agreement.loss < 1e-5
    assert agreement.norm < 1e-4  # Adam forgives a wrong scale of the gradient, its norm does not
    assert agreement.weights < 1e-4
    if config in RESUMED:
        whole = metrics(tmp_path, "loss")
        half = str(tmp_path / "checkpoints" / "step_00000010")
        launch(config, *program(recipe, tmp_path), "--resume", half).check()
        assert metrics(tmp_path, "loss") == pytest.approx(whole, rel=1e-6)
    if config in RESUMED and config != "zero3_nvme":  # whose shards only resuming can join
        trained = load_file(tmp_path / "field.safetensors")
        joined = load_file(export(tmp_path, tmp_path / "joined.safetensors"))
        assert all(torch.equal(joined[name], trained[name]) for name in trained) and joined.keys() == trained.keys()


@pytest.mark.parametrize("config", ["ddp_cpu", "zero2"])
def test_a_checkpoint_gets_its_name_when_all_ranks_have_written(config, recipe, tmp_path):
    _, _, *words = program(recipe, tmp_path)
    launch(config, "tests/backends/late_rank.py", *words, "--training.steps", "10").check()
    assert (tmp_path / "checkpoints" / "step_00000010" / "late").read_text() == "whole"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here; FSDP2 is offered only beside one")
@pytest.mark.parametrize("config", ["single_gpu", "ddp", "fsdp2", "zero3"])
def test_a_gpu_trains_what_the_cpu_trains(config, recipe, reference, tmp_path):
    launch(config, *program(recipe, tmp_path), processes=1, gpu=True).check()
    assert relative_difference(metrics(tmp_path, "loss"), metrics(reference, "loss")) < 1e-3
    weights_of = [load_file(folder / "field.safetensors") for folder in (tmp_path, reference)]
    assert weight_difference(*weights_of) < 1e-3


def test_averaged_weights_agree_under_zero2_and_are_refused_under_zero3(recipe, tmp_path):
    averaged = ("--training.ema", "0.9", "--training.checkpoint_steps", "10")
    run_alone(*program(recipe, tmp_path / "alone"), *averaged).check()
    launch("zero2", *program(recipe, tmp_path / "zero2"), *averaged).check()
    alone, zero2 = (load_file(tmp_path / name / "field.safetensors") for name in ("alone", "zero2"))
    assert weight_difference(zero2, alone) < 1e-4
    joined = load_file(export(tmp_path / "zero2", tmp_path / "joined.safetensors"))
    assert all(torch.equal(joined[name], zero2[name]) for name in zero2)
    stopped = launch("zero3", *program(recipe, tmp_path / "zero3"), *averaged)
    assert stopped.codes != [0] and "error: training.ema needs whole weights" in stopped.output


def test_nvme_swaps_large_groups_in_fp32_and_resumes_exactly(tmp_path):
    """The small toy is below the megabyte from which DeepSpeed swaps at all; this one has both kinds of groups."""
    run = ("--steps", "6", "--accumulate", "2", "--clip", "0.1", "--width", "512", "--save-at", "3")
    run_alone(*TOY, str(tmp_path / "alone"), *run).check()
    launch("zero3_nvme", *TOY, str(tmp_path), *run).check()
    assert list(tmp_path.glob("nvme/zero_stage_3/optimizer/rank*/exp_avg*.swp"))
    swapped, alone = result(tmp_path), result(tmp_path / "alone")
    assert relative_difference(swapped["losses"], alone["losses"]) < 1e-5
    assert weight_difference(weights(tmp_path), weights(tmp_path / "alone")) < 1e-4
    launch("zero3_nvme", *TOY, str(tmp_path), *run, "--resume").check()
    assert result(tmp_path)["losses"] == pytest.approx(swapped["losses"][3:], rel=1e-6)


@pytest.mark.parametrize("config", ["ddp_cpu", "zero2", "zero3_offload"])
def test_a_nan_on_one_rank_stops_both_before_the_update(config, tmp_path):
    stopped = launch(config, *TOY, str(tmp_path), "--steps", "5", "--poison", "3:1:2")
    assert stopped.codes != [0]
    message = "error: loss is not finite at step 3, tile 2 of layers.0.weight, rank 1"
    assert stopped.output.count(message) == 2, stopped.output[-4000:]
    assert not (tmp_path / "result.json").exists()


@pytest.mark.parametrize("config", ["ddp_cpu", "zero2", "zero3"])
def test_bf16_autocasts_and_keeps_weights_and_coordinates(config, tmp_path):
    launch(config, *TOY, str(tmp_path), "--precision", "bf16").check()
    run = result(tmp_path)
    assert run["precision"] == "bf16"
    assert "torch.float64" in run["dtypes"] and "hidden torch.bfloat16" in run["dtypes"]
    assert {value.dtype for value in weights(tmp_path).values()} == {torch.float32}
    assert run["losses"][-1] < 0.5 * run["losses"][0]


def test_fsdp2_without_a_gpu_says_so_in_one_line(tmp_path):
    stopped = launch("fsdp2", *TOY, str(tmp_path))
    assert stopped.codes != [0] and "error: FSDP2 needs a GPU" in stopped.output


def test_offload_refuses_an_optimizer_that_would_silently_become_adam(tmp_path):
    stopped = launch("zero2_offload", *TOY, str(tmp_path), "--optimizer", "SGD")
    assert stopped.codes != [0] and "error: optimizer SGD cannot be offloaded" in stopped.output


def test_fp16_without_a_gpu_says_so_in_one_line(tmp_path):
    stopped = run_alone(*TOY, str(tmp_path), "--precision", "fp16")
    assert stopped.codes == [2] and "error: precision fp16 is not offered on a CPU" in stopped.output
