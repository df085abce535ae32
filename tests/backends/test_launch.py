"""Every shipped backend file, launched as two real CPU processes, trains what one process trains."""

import json
from pathlib import Path

import harness
import pytest
import torch
import yaml
from harness import ROOT, Agreement, launch, relative_difference, run_alone, weight_difference
from pictures import mixed
from programs import BF16, POISONED, RESUMED
from safetensors.torch import load_file

from cpikan_hr.training.export import export
from cpikan_hr.training.weights import load_field

CONFIGS = sorted(path.stem for path in (ROOT / "accelerate_configs").glob("*.yaml"))


def result(folder: Path, name: str = "result") -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "weights.pt", weights_only=True)


def field(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "field.safetensors")


def metrics(run: Path, key: str) -> list[float]:
    return [json.loads(line)[key] for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]


def test_the_issue_s_backends_are_shipped():
    assert set(CONFIGS) == {
        *("cpu", "single_gpu", "ddp_cpu", "ddp", "fsdp2", "zero1", "zero2", "zero2_offload", "zero3"),
        *("zero3_offload", "zero3_nvme", "multinode_ddp", "multinode_zero3_offload"),
    }


@pytest.mark.parametrize("config", CONFIGS)
def test_two_processes_agree_with_one(config, launched):
    run, reference = launched(config).run("mixed"), launched("alone").run("mixed")
    assert load_field(run).about["processes"] == 2
    agreement = Agreement(
        config,
        "2 x 1" if config in harness.MULTINODE else "2",
        relative_difference(metrics(run, "loss"), metrics(reference, "loss")),
        relative_difference(metrics(run, "grad_norm"), metrics(reference, "grad_norm")),
        weight_difference(field(run), field(reference)),
    )
    harness.table.append(agreement)
    assert len(metrics(run, "loss")) == 20
    assert agreement.loss < 1e-5
    assert agreement.norm < 1e-4  # Adam forgives a wrong scale of the gradient, its norm does not
    assert agreement.weights < 1e-4


@pytest.mark.parametrize("config", RESUMED)
def test_a_run_that_failed_is_resumed_exactly_by_another_launch(config, launched):
    run, whole = launched(config).run("resumed", 2, 0), launched(config).run("mixed")
    assert metrics(run, "loss") == pytest.approx(metrics(whole, "loss"), rel=1e-6)
    assert weight_difference(field(run), field(whole)) < 1e-6
    if config != "zero3_nvme":  # whose shards only resuming can join
        joined, trained = load_file(export(whole, whole / "joined.safetensors")), field(whole)
        assert all(torch.equal(joined[name], trained[name]) for name in trained) and joined.keys() == trained.keys()


@pytest.mark.parametrize("config", RESUMED)
def test_a_checkpoint_gets_its_name_when_all_ranks_have_written(config, launched):
    run = launched(config).run("resumed", 2, 0)
    assert (run / "checkpoints" / "step_00000010" / "late").read_text() == "whole"


def mixed_program(folder: Path) -> tuple[str, ...]:
    """Trains in `folder / "run"`."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(mixed(folder) | {"output": str(folder / "run")}))
    return "-m", "cpikan_hr.train", "--config", str(recipe)


@pytest.fixture(scope="module")
def trained_by_the_cpu(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpu")
    run_alone(*mixed_program(folder)).check()
    return folder / "run"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here; FSDP2 is offered only beside one")
@pytest.mark.parametrize("config", ["fsdp2", "zero3", "zero2", "ddp", "single_gpu"])
def test_a_gpu_trains_what_the_cpu_trains(config, trained_by_the_cpu, tmp_path):
    launch(config, *mixed_program(tmp_path), processes=1, gpu=True).check()
    run, reference = tmp_path / "run", trained_by_the_cpu
    assert relative_difference(metrics(run, "loss"), metrics(reference, "loss")) < 1e-3
    assert weight_difference(field(run), field(reference)) < 1e-3


def test_averaged_weights_agree_under_zero2(launched):
    run, alone = launched("zero2").run("averaged"), launched("alone").run("averaged")
    assert weight_difference(field(run), field(alone)) < 1e-4
    assert weight_difference(field(run), field(launched("zero2").run("mixed"))) > 1e-4
    joined = load_file(export(run, run / "joined.safetensors"))
    assert all(torch.equal(joined[name], value) for name, value in field(run).items())


def test_nvme_swaps_large_groups_in_fp32_and_resumes_exactly(launched):
    run, alone = launched("zero3_nvme").run("wide", 0, 0), launched("alone").run("wide")
    assert list(run.glob("nvme/zero_stage_3/optimizer/rank*/exp_avg*.swp"))
    assert relative_difference(result(run)["losses"], result(alone)["losses"]) < 1e-5
    assert weight_difference(weights(run), weights(alone)) < 1e-4
    assert result(run, "resumed")["losses"] == pytest.approx(result(run)["losses"][3:], rel=1e-6)


@pytest.mark.parametrize("config", POISONED)
def test_a_nan_on_one_rank_stops_both_before_the_update(config, launched):
    run = launched(config).run("poisoned", 2)
    first = launched(config).launches[0]
    assert first.codes != [0]  # it was the last of its launch
    message = "error: loss is not finite at step 3, tile 2 of layers.0.weight, rank 1"
    assert first.output.count(message) == 1, first.output[-4000:]
    assert not (run / "result.json").exists()


@pytest.mark.parametrize("config", BF16)
def test_bf16_autocasts_and_keeps_weights_and_coordinates(config, launched):
    run = launched(config).run("bf16")
    found = result(run)
    assert found["precision"] == "bf16"
    assert "torch.float64" in found["dtypes"] and "hidden torch.bfloat16" in found["dtypes"]
    assert {value.dtype for value in weights(run).values()} == {torch.float32}
    assert found["losses"][-1] < 0.5 * found["losses"][0]


def test_fsdp2_without_a_gpu_says_so_in_one_line(tmp_path):
    stopped = launch("fsdp2", "tests/backends/toy.py", str(tmp_path))
    assert stopped.codes != [0] and "error: FSDP2 needs a GPU" in stopped.output


@pytest.mark.parametrize("config", ["alone", "ddp_cpu", "zero3_offload"])
def test_processes_that_import_the_program_themselves_train_the_same(config, launched, tmp_path):
    """As a user starts them; everything else here runs in forks, and through `each.py`."""
    program = mixed_program(tmp_path)
    (run_alone(*program) if config == "alone" else launch(config, *program, forked=False)).check()
    assert metrics(tmp_path / "run", "loss") == pytest.approx(metrics(launched(config).run("mixed"), "loss"), rel=1e-6)


def test_offload_refuses_an_optimizer_that_would_silently_become_adam(launched):
    launched("zero2_offload").run("sgd", 2)
    assert "error: optimizer SGD cannot be offloaded" in launched("zero2_offload").output


def test_fp16_without_a_gpu_says_so_in_one_line(launched):
    launched("alone").run("fp16", 2)
    assert "error: precision fp16 is not offered on a CPU" in launched("alone").output
