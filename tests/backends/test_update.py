"""The update in one process, against plain torch in float64."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import nn

from cpikan_hr.training.backend import full_state_dict, make_accelerator
from cpikan_hr.training.update import GradientWatch, NonFinite, Updater


@pytest.fixture(autouse=True)
def fresh_accelerate_state(monkeypatch):
    """Accelerate keeps its state in singletons, and takes settings from the environment."""
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_MIXED_PRECISION", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()


class Cubic(nn.Module):
    """Three tiles with one weight row each; a tile whose point is huge overflows alone."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([[0.3, -0.2], [0.1, 0.5], [-0.4, 0.2]], dtype=torch.float64))
        self.scale = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, points: torch.Tensor) -> torch.Tensor:  # [tiles, points, 2] -> [tiles, points]
        return self.scale * torch.einsum("tpi,ti->tp", points, self.weight) ** 3


def points(seed: int = 0) -> torch.Tensor:
    return torch.randn(3, 8, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def updater_of(model: nn.Module, accumulate: int = 1, clip: float | None = None, **options) -> Updater:
    accelerator: Accelerator = make_accelerator(accumulate=accumulate, clip=clip)
    return Updater(accelerator, model, torch.optim.SGD(model.parameters(), lr=0.1), clip=clip, **options)


def train(updater: Updater, batches: list[torch.Tensor]) -> float:
    for batch in batches:
        with updater.micro_batch():
            updater.backward((updater.model(batch) ** 2).mean())
    return updater.step()


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_accumulated_micro_batches_make_the_full_batch_s_update(accumulate, clip):
    whole = points()
    expected = Cubic()
    loss = (expected(whole) ** 2).mean()
    loss.backward()
    norm = nn.utils.clip_grad_norm_(expected.parameters(), clip or float("inf"))
    with torch.no_grad():
        for parameter in expected.parameters():
            parameter -= 0.1 * parameter.grad

    model = Cubic()
    found = train(updater_of(model, accumulate, clip), list(whole.chunk(accumulate, dim=1)))
    assert found == pytest.approx(norm.item(), rel=1e-12)
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_the_learning_rate_is_a_function_of_the_step_alone():
    updater = updater_of(Cubic(), schedule=lambda step: 0.5**step)
    assert updater.learning_rates == [0.1]
    train(updater, [points()])
    assert updater.learning_rates == [0.05]
    updater.steps = 3  # resumed
    train(updater, [points()])
    assert updater.optimizer.param_groups[0]["lr"] == pytest.approx(0.1 / 8)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_loss_names_step_and_tile_and_changes_nothing(value):
    model = Cubic()
    updater = updater_of(model)
    train(updater, [points()])
    before = [p.detach().clone() for p in model.parameters()]
    bad = points()
    bad[1, 3, 0] = value
    with pytest.raises(NonFinite, match="loss is not finite at step 1, tile 1 of weight") as stop:
        train(updater, [bad])
    assert (stop.value.step, stop.value.tile, stop.value.parameter, stop.value.rank) == (1, 1, "weight", 0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_a_gradient_that_is_not_finite_under_a_finite_loss_is_named():
    model = Cubic()
    with torch.no_grad():
        model.weight[2] = 0.0
    updater = updater_of(model)
    with updater.micro_batch():  # a square root at zero: the loss is finite, its slope is not
        updater.backward(torch.sqrt(updater.model.weight[2] ** 2).sum() + updater.model.scale)
    with pytest.raises(NonFinite, match="gradient is not finite at step 0, tile 2 of weight"):
        updater.step()


def test_a_fault_in_any_micro_batch_stops_the_update():
    updater = updater_of(Cubic(), accumulate=3)
    bad = points()
    bad[2, 0, 0] = float("nan")
    with pytest.raises(NonFinite, match="tile 2 of weight"):
        train(updater, [points(1), bad, points(2)])


def test_the_watch_forgets_after_clear():
    model = Cubic()
    watch = GradientWatch(model)
    (model(points() * float("nan"))).mean().backward()
    assert watch.locate(int(watch.first_bad())) == ("weight", 0)
    watch.clear()
    assert watch.first_bad() == -1


def test_the_full_state_dict_has_the_bare_names_and_is_a_copy():
    model = Cubic()
    updater = updater_of(model)
    state = full_state_dict(updater.accelerator, updater.model)
    assert list(state) == ["weight", "scale"]
    assert all(value.dtype == torch.float64 for value in state.values())
    train(updater, [points()])
    assert not torch.equal(state["weight"], model.weight)


def test_the_average_of_the_weights_follows_the_recursion_and_leaves_training_alone(tmp_path):
    model, plain = Cubic(), Cubic()
    updater, other = updater_of(model, ema=0.9), updater_of(plain)
    expected = {name: value.detach().clone() for name, value in model.named_parameters()}
    for step in range(4):
        train(updater, [points(step)])
        train(other, [points(step)])
        expected = {name: 0.9 * old + 0.1 * dict(model.named_parameters())[name] for name, old in expected.items()}
        if step == 1:
            updater.average.save(tmp_path)
            half = {name: value.clone() for name, value in updater.weights().items()}
    assert all(torch.allclose(updater.weights()[name], expected[name], rtol=1e-12) for name in expected)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    updater.average.load(tmp_path)
    assert all(torch.equal(updater.weights()[name], half[name]) for name in half)
