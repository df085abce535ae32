"""Equations under every kind of backend: two real CPU processes train and solve what one process does."""

import json
from pathlib import Path

import pytest
import torch
from equations import EQUATIONS, GRADIENTS, ONE_STEP, SOLVERS, recipe
from harness import relative_difference
from safetensors.torch import load_file

from cpikan_hr.fields import Field
from cpikan_hr.problems import build_problem
from cpikan_hr.recipe import parse_recipe


def logged(run: Path, key: str) -> list[float]:
    return [json.loads(line)[key] for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]


@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_every_equation_trains_the_same_under_deepspeed(config, launched):
    for name in EQUATIONS:
        found, expected = (logged(launched(c).run(f"single_{name}"), "loss") for c in (config, "alone"))
        assert len(found) == 20 and found[-1] < found[0]
        assert relative_difference(found, expected) < 1e-5, name


@pytest.mark.parametrize("name", EQUATIONS)
def test_every_equation_gives_the_same_under_ddp(name, launched):
    run, alone = (launched(config).run(f"double_{name}") for config in ("ddp_cpu", "alone"))
    found = {key: logged(run, key) for key in ("loss", "grad_norm")}
    for key, values in found.items():
        assert len(values) == 20
        assert relative_difference(values, logged(alone, key)) < 1e-8, key
    assert found["grad_norm"][0] == pytest.approx(logged(alone, "grad_norm")[0], rel=1e-10)
    field, reference = (load_file(folder / "field.safetensors") for folder in (run, alone))
    assert all(torch.allclose(field[key], reference[key], rtol=1e-7, atol=1e-10) for key in reference)


@pytest.mark.parametrize("method", SOLVERS)
def test_every_solver_gives_the_same_under_ddp(method, launched):
    found, expected = (logged(launched(config).run(method), "loss") for config in ("ddp_cpu", "alone"))
    assert len(found) == 6 and (found[-1] < found[2] or method == "march")  # whose windows have losses of their own
    assert relative_difference(found, expected) < 1e-8


@pytest.mark.parametrize("name", GRADIENTS)
def test_eight_shares_have_the_gradient_of_the_whole(name, launched):
    """Two processes with four micro-batches each, against autograd on all points at once."""
    run = launched("ddp_cpu").run(f"gradient_{name}")
    options = parse_recipe(recipe(name, "double", training=ONE_STEP) | {"output": str(run)}, name)
    problem = build_problem(options)
    field = Field.build(options.field, problem.extent, problem.channels, options.training.seed, box=problem.box)
    batch = problem.batches(options).read(0, 0, 1)
    problem.loss(field(batch["points"], problem.order), batch)[0].mean().backward()
    # The step is far too long: where it made the field worse, that of before is handed out, and this one kept.
    kept = run / "checkpoints" / "step_00000001" / "model.safetensors"
    after = load_file(kept if kept.is_file() else run / "field.safetensors")
    whole = torch.cat([p.grad.flatten() for p in field.parameters()])
    found = torch.cat([(p.detach() - after[key]).flatten() for key, p in field.named_parameters()])
    assert whole.norm() > 0 and (found - whole).norm() < 1e-10 * whole.norm()


def test_updates_and_iterations_are_resumed_exactly(launched):
    """Attention, causal weights and points drawn anew, then a solver: begun again from a checkpoint of each phase."""
    alone, two = launched("alone").run("phases"), launched("ddp_cpu").run("phases", 0, 0, 0)
    for key in ("loss", "grad_norm"):
        expected = logged(alone, key)
        assert len(expected) == 28
        assert relative_difference(logged(two, key), expected) < 1e-7
    field, reference = (load_file(folder / "field.safetensors") for folder in (two, alone))
    assert all(torch.allclose(field[name], reference[name], rtol=1e-6, atol=1e-9) for name in reference)
    assert len(list((two / "checkpoints").iterdir())) == 4
