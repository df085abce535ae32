"""Training in files: the numbers of training in memory, and nothing of the field that stays resident."""

import json
import re
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from cpikan_hr.errors import UserError
from cpikan_hr.fields import Field
from cpikan_hr.mapped import file_copy, file_zeros, in_files, release
from cpikan_hr.networks.base import select
from cpikan_hr.recipe import FieldOptions, load_recipe
from cpikan_hr.solvers import file_adam
from cpikan_hr.solvers.file_adam import FileAdam, clip_gradients
from cpikan_hr.train import main as train
from cpikan_hr.training.in_files import goes_into_files
from cpikan_hr.training.update import Updater
from cpikan_hr.training.weights import load_field

SPARSE = {"tile": [16, 8], "overlap": 0.5, "network": {"kind": "chebyshev2d", "degree": None, "sparse": True}}
DENSE = {"tile": 24, "overlap": 0.5, "network": {"kind": "cpikan", "hidden": [4], "degree": 3}}


def words(folder: Path, *, levels: list[dict] = (SPARSE, DENSE), **training) -> list[str]:
    """Trains on a picture of 64 x 96."""
    y, x = np.mgrid[:64, :96]
    noise = np.random.default_rng(0).standard_normal((64, 96)) * 8
    Image.fromarray(np.uint8(120 + 60 * np.sin(x / 9) * np.cos(y / 7) + noise)).save(folder / "picture.png")
    options = {"steps": 8, "log_every": 1, "lr": 1e-2} | training
    given = [f"--training.{key}={json.dumps(value)}" for key, value in options.items()]
    recipe = {
        "output": "unused", "problem": {"kind": "image", "path": str(folder / "picture.png")},
        "field": {"levels": list(levels)}, "start": {"enabled": False},
        "batch": {"blocks": 2, "size": 32, "stride": 2},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return ["--config", str(folder / "recipe.yaml"), *given]


def losses(run: Path) -> list[float]:
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [row["loss"] for row in rows if "loss" in row]


def resident_files() -> int:
    """Bytes of temporary files that are resident through this process's maps."""
    maps = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    mine = [text for text in maps if "(deleted)" in text.split("\n")[0]]
    return 1024 * sum(int(re.search(r"^Rss: +(\d+) kB", text, re.MULTILINE)[1]) for text in mine)


def test_tensors_in_files_are_what_they_were_copied_from():
    values = torch.rand(3, 500_000)
    copied, zeros = file_copy(values), file_zeros((700, 2000), torch.float64)
    copied[1, 7] = 5
    release()
    assert copied[1, 7] == 5 and torch.equal(copied[2], values[2]) and copied.shape == values.shape
    assert zeros.shape == (700, 2000) and zeros.dtype == torch.float64 and not zeros.any()
    assert file_copy(torch.tensor(2.5)).item() == 2.5 and file_zeros((0, 3), torch.float32).shape == (0, 3)


def test_the_gradient_of_selected_rows_is_sparse_and_right():
    parameter = nn.Parameter(torch.rand(9, 4, dtype=torch.float64))
    plain = nn.Parameter(parameter.detach().clone())
    parameter.sparse_gradient = True
    rows = torch.tensor([3, 3, 0, 8])
    for weights in (parameter, plain):
        (select(weights, rows).square().sum() + 3 * select(weights, rows[:2]).sum()).backward()
    assert parameter.grad.is_sparse and torch.allclose(parameter.grad.to_dense(), plain.grad, rtol=1e-14)
    with torch.no_grad():
        assert torch.equal(select(parameter, rows), plain[rows])


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("sparse", [False, True])
def test_updates_are_those_of_torch(decoupled, sparse, monkeypatch):
    monkeypatch.setattr(file_adam, "PIECE", 12)  # pieces of three rows
    torch.manual_seed(0)
    plain = nn.Parameter(torch.rand(10, 4, dtype=torch.float64))
    filed = nn.Parameter(file_copy(plain.detach()))
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    expected = kind([plain], 0.1, (0.8, 0.95), weight_decay=0.01, fused=True)
    found = FileAdam([filed], 0.1, (0.8, 0.95), 0.01, decoupled)
    for step in range(6):
        plain.grad = torch.zeros_like(plain)
        rows = torch.randperm(10)[:4]
        plain.grad[rows] = torch.rand(4, 4, dtype=torch.float64)
        filed.grad = plain.grad.clone()
        if sparse:
            filed.grad = torch.sparse_coo_tensor(rows[None], plain.grad[rows], (10, 4), check_invariants=True)
        expected.step(), found.step()
        assert torch.allclose(filed, plain, rtol=1e-14, atol=0)
        if step == 2:  # and goes on from the other's state
            found.load_state_dict(deepcopy(expected.state_dict()))
    assert found.state[filed]["step"] == 6


@pytest.mark.parametrize("most", [0.3, 100.0, float("inf")])
def test_gradients_are_clipped_as_torch_does(most):
    torch.manual_seed(0)
    plain = [nn.Parameter(torch.rand(6, 2, dtype=torch.float64)) for _ in range(3)]
    filed = [nn.Parameter(value.detach().clone()) for value in plain]
    rows, slopes = torch.tensor([4, 1, 4]), torch.rand(3, 2, dtype=torch.float64)
    filed[0].grad = torch.sparse_coo_tensor(rows[None], slopes, (6, 2), check_invariants=True)
    filed[1].grad = torch.rand(6, 2, dtype=torch.float64)
    plain[0].grad, plain[1].grad = filed[0].grad.to_dense(), filed[1].grad.clone()
    expected, found = nn.utils.clip_grad_norm_(plain, most), clip_gradients(filed, most)
    assert torch.allclose(found, expected, rtol=1e-14)
    for value, other in zip(filed[:2], plain[:2], strict=True):
        assert torch.allclose(value.grad.to_dense(), other.grad, rtol=1e-14)


@pytest.mark.parametrize(
    "training", [{}, {"optimizer": "adamw", "clip": 1e-3, "weight_decay": 0.1}, {"accumulate": 2}]
)
def test_a_run_in_files_gives_the_losses_of_one_in_memory(training, tmp_path):
    runs = {memory: tmp_path / str(memory) for memory in (None, 0)}
    for memory, run in runs.items():
        assert train([*words(tmp_path, memory_mb=memory, **training), "--output", str(run)]) == 0
    expected, found = (losses(run) for run in runs.values())
    assert len(found) == 8 and found[-1] < 0.99 * found[0]
    assert np.abs(np.divide(found, expected) - 1).max() < 1e-5
    whole, filed = (load_field(run).field.state_dict() for run in runs.values())
    for name, value in whole.items():
        assert (filed[name] - value).double().norm() <= 1e-4 * value.double().norm(), name


@pytest.mark.parametrize(("before", "after"), [(0, 0), (0, None), (None, 0)])
def test_a_run_is_resumed_in_files_and_out_of_them(before, after, tmp_path):
    whole, run = tmp_path / "whole", tmp_path / "run"
    every = {"checkpoint_steps": 4, "schedule": "constant"}
    assert train([*words(tmp_path, memory_mb=0, **every), "--output", str(whole)]) == 0
    assert train([*words(tmp_path, memory_mb=before, **every | {"steps": 4}), "--output", str(run)]) == 0
    assert train([*words(tmp_path, memory_mb=after, **every), "--output", str(run)]) == 0
    assert np.abs(np.divide(losses(run), losses(whole)) - 1).max() < 1e-5
    from cpikan_hr.training.export import export

    state = load_field(whole).field.state_dict()
    for name, value in load_field(export(run, tmp_path / "field.safetensors")).field.state_dict().items():
        assert (value - state[name]).double().norm() <= 1e-4 * state[name].double().norm(), name


def test_a_damaged_checkpoint_is_one_line(tmp_path, capfd):
    run = tmp_path / "run"
    start = words(tmp_path, memory_mb=0, checkpoint_steps=4, steps=4)
    assert train([*start, "--output", str(run)]) == 0
    moments = run / "checkpoints" / "step_00000004" / "adam.safetensors"
    moments.write_bytes(moments.read_bytes()[:-100])
    capfd.readouterr()
    assert train([*words(tmp_path, memory_mb=0), "--output", str(run)]) == 2
    told = capfd.readouterr().err.strip().splitlines()[-1]
    assert "step_00000004: cannot be resumed from" in told and "Traceback" not in told


def test_a_fault_in_a_sparse_gradient_is_told_with_its_tile():
    field = Field.build(FieldOptions(levels=[DENSE]), (96, 96), 1)
    in_files(field)
    updater = Updater(Accelerator(cpu=True), field, FileAdam(field.parameters(), 1e-3, (0.9, 0.99), 0.0, False))
    before = [value.clone() for value in field.parameters()]
    points = torch.tensor([[10.0, 10.0], [60.0, 60.0]], dtype=torch.float64)  # tiles 0 and 10 of 4 x 4
    with updater.micro_batch():
        out = updater.model(points).value[:, 0]
        out.register_hook(lambda slopes: slopes * torch.tensor([1.0, float("nan")]))
        updater.backward(out.sum())
    with pytest.raises(UserError, match=r"gradient is not finite at step 0, tile 10 of levels\.0"):
        updater.step()
    assert all(torch.equal(value, old) for value, old in zip(field.parameters(), before, strict=True))


def test_a_batch_that_sees_no_term_changes_nothing():
    field = Field.build(FieldOptions(levels=[SPARSE | {"tile": 16}]), (64, 64), 1)
    field.levels[0].network.set_terms(torch.tensor([0] * 15 + [3]), torch.arange(3), torch.ones(3))
    in_files(field)
    updater = Updater(Accelerator(cpu=True), field, FileAdam(field.parameters(), 1e-3, (0.9, 0.99), 0.0, False))
    with updater.micro_batch():
        updater.backward(updater.model(torch.full((3, 2), 4.0, dtype=torch.float64)).value.sum())
    assert updater.step() == 0 and torch.equal(field.levels[0].network.coefficients, torch.ones(3))


def test_what_is_resident_does_not_grow_with_the_field(tmp_path):
    """Updates of some of 16384 tiles touch a few pages; passes over all weights and moments hand theirs back."""
    level = {"tile": 16, "overlap": 0.5, "network": {"kind": "chebyshev2d", "degree": 15}}
    field = Field.build(FieldOptions(levels=[level]), (2048, 2048), 1)  # 16384 tiles of 256 terms: 17 MB
    in_files(field)
    updater = Updater(Accelerator(cpu=True), field, FileAdam(field.parameters(), 1e-3, (0.9, 0.99), 0.0, False))
    points = torch.rand(500, 2, dtype=torch.float64) * 64
    release()
    for _ in range(2):
        with updater.micro_batch():
            updater.backward(updater.model(points).value.square().mean())
        (gradient,) = (value.grad for value in field.parameters())
        assert gradient.is_sparse and gradient._values().shape[0] < 100
        updater.step()
    assert resident_files() < 2**21
    assert updater.weights()["levels.0.network.coefficients"].data_ptr() == next(field.parameters()).data_ptr()


def test_only_what_is_large_plain_and_alone_goes_into_files(tmp_path):
    words(tmp_path)
    accelerator = Accelerator(cpu=True)

    def goes(*options: str) -> bool:
        recipe = load_recipe(tmp_path / "recipe.yaml", list(options))
        field = Field.build(recipe.field, (64, 96), 1)
        return goes_into_files(field, recipe, accelerator)

    assert not goes() and goes("--training.memory_mb", "0") and not goes("--training.memory_mb", "null")
    for key, value in (("ema", "0.9"), ("settle_rmse", "1"), ("optimizer", "sgd")):
        assert not goes("--training.memory_mb", "0", f"--training.{key}", value)
