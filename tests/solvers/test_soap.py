"""SOAP over tiled networks: its factors, tiles that keep to themselves, resuming, and backends that shard."""

import io
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from accelerate.utils import DistributedType
from PIL import Image

from cpikan_hr.errors import UserError
from cpikan_hr.fields import Field
from cpikan_hr.recipe import FieldOptions, TrainingOptions
from cpikan_hr.solvers.optimizers import build_optimizer
from cpikan_hr.solvers.soap import TileSOAP
from cpikan_hr.train import main as train_recipe
from cpikan_hr.training.backend import check_optimizer

SHAPES = [(6, 3, 8, 5), (6, 8, 1, 5), (6, 8), (7,)]  # [tiles, in, out, terms], [tiles, out], and flat terms


def parameters(dtype: torch.dtype, shapes=SHAPES) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]


def soap(weights: list[torch.nn.Parameter], lr: float = 1e-2) -> TileSOAP:
    return TileSOAP([{"params": weights[:2]}, {"params": weights[2:]}], lr, (0.9, 0.99), 0.0)


def train(weights: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, steps: int) -> float:
    for _ in range(steps):
        optimizer.zero_grad()
        loss = sum((weight.square() - 1).square().mean() for weight in weights)
        loss.backward()
        optimizer.step()
    return float(loss.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_belong_to_the_dimensions_within_a_tile(dtype):
    weights = parameters(dtype)
    optimizer = soap(weights)
    first = train(weights, optimizer, 1)
    assert train(weights, optimizer, 120) < 0.3 * first
    for weight, shape in zip(weights, SHAPES, strict=True):
        state = optimizer.state[weight]
        assert [tuple(getattr(q, "shape", ())) for q in state["Q"]] == [(), *((size, size) for size in shape[1:])]
        for q in state["Q"][1:]:
            assert q.dtype == dtype
            assert torch.allclose(q.T @ q, torch.eye(len(q), dtype=dtype), atol=1e-5)  # the library's QR is float32
        assert state["exp_avg_sq"].shape == shape and state["exp_avg_sq"].dtype == dtype


def test_the_first_rotated_update_is_adams_in_the_eigenbasis():
    """One matrix, by hand: sign(Q' g) turned back, for the second gradient is the first."""
    weight = parameters(torch.float64, [(1, 4, 3)])[0]
    gradient = torch.randn_like(weight)
    optimizer = TileSOAP([weight], 0.1, (0.9, 0.99), 0.0)
    before = weight.detach().clone()
    for _ in range(2):
        weight.grad = gradient.clone()
        optimizer.step()
    g = gradient[0]
    left, right = (torch.linalg.eigh(product)[1] for product in (g @ g.T, g.T @ g))
    rotated = left.T @ g @ right
    kept = rotated.abs() > 1e-4 * rotated.abs().max()  # off the singular values it is rounding over eps
    expected = left @ (rotated / (rotated.abs() + 1e-7)) @ right.T  # eps 1e-8 against sqrt(1 - 0.99) |g|
    moved = (before - weight.detach())[0] / 0.1
    assert torch.allclose((left.T @ moved @ right)[kept], (left.T @ expected @ right)[kept], atol=1e-5)
    assert kept.sum() == 3


def test_a_tile_without_gradient_stays_where_it_is():
    weights = parameters(torch.float64)
    before = weights[0].detach().clone()
    optimizer = TileSOAP(weights, 1e-2, (0.9, 0.99), 0.0)
    for _ in range(15):
        optimizer.zero_grad()
        (weights[0][:4].square() - 1).square().mean().backward()
        optimizer.step()
    assert torch.equal(weights[0][4:], before[4:])
    assert not torch.isclose(weights[0][:4], before[:4]).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(dtype):
    weights = parameters(dtype)
    optimizer = soap(weights)
    train(weights, optimizer, 17)
    file = io.BytesIO()
    torch.save({"weights": [weight.detach() for weight in weights], "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = [torch.nn.Parameter(weight) for weight in saved["weights"]]
    resumed = soap(again)
    resumed.load_state_dict(saved["optimizer"])
    train(weights, optimizer, 15)
    train(again, resumed, 15)
    assert all(torch.equal(one, other) for one, other in zip(weights, again, strict=True))


def test_a_recipe_builds_it_with_the_share_of_each_level():
    levels = [
        {"tile": 64, "lr_scale": 0.5, "network": {"kind": "cpikan", "hidden": [4], "degree": 3}},
        {"tile": 32, "network": {"kind": "cpikan", "hidden": [4], "degree": 3}},
    ]
    choice = FieldOptions(levels=levels)
    field = Field.build(choice, (64, 64), 1)
    optimizer = build_optimizer(field, TrainingOptions(optimizer="soap", lr=1e-3, betas=(0.8, 0.9)), choice)
    assert isinstance(optimizer, TileSOAP)
    assert [group["lr"] for group in optimizer.param_groups] == [5e-4, 1e-3]
    assert all(group["betas"] == (0.8, 0.9) and group["weight_decay"] == 0 for group in optimizer.param_groups)


@pytest.mark.parametrize("backend", [DistributedType.DEEPSPEED, DistributedType.FSDP])
def test_backends_that_shard_parameters_are_refused_in_one_line(backend):
    optimizer = soap(parameters(torch.float32))
    with pytest.raises(UserError, match="TileSOAP needs whole parameters.*use adam") as refused:
        check_optimizer(SimpleNamespace(distributed_type=backend), optimizer)
    assert "\n" not in str(refused.value)
    check_optimizer(SimpleNamespace(distributed_type=DistributedType.MULTI_CPU), optimizer)


def test_a_run_resumed_from_its_checkpoint_gives_the_same_losses(tmp_path):
    y, x = np.mgrid[0:32, 0:64]
    Image.fromarray((128 + 100 * np.sin(x / 5) * np.cos(y / 7)).astype(np.uint8)).save(tmp_path / "picture.png")
    level = {"tile": 16, "overlap": 0.25, "network": {"kind": "cpikan", "hidden": [6], "degree": 4}}
    training = {"steps": 24, "optimizer": "soap", "lr": 3e-3, "schedule": "constant", "warmup": 0, "log_every": 1}
    tree = {
        "output": "unused",
        "problem": {"kind": "image", "path": str(tmp_path / "picture.png")},
        "field": {"levels": [level]},
        "batch": {"blocks": 2, "size": 32, "stride": 1},
        "training": training | {"checkpoint_steps": 12, "keep": 2},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    words, run = ["--config", str(tmp_path / "recipe.yaml"), "--output", str(tmp_path / "run")], tmp_path / "run"

    def losses() -> list[float]:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in rows if "loss" in row]

    assert train_recipe(words) == 0
    whole = losses()
    assert train_recipe([*words, "--resume", str(run / "checkpoints" / "step_00000012")]) == 0
    assert losses() == whole and len(whole) == 24
    assert min(whole[-4:]) < 0.5 * whole[0]
