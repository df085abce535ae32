"""Equations under every kind of backend: two real CPU processes train and solve what one process does."""

import json
from pathlib import Path

import pytest
import torch
from harness import launch, relative_difference, run_alone, train_each
from safetensors.torch import load_file

from cpikan_hr.fields import Field
from cpikan_hr.problems import build_problem
from cpikan_hr.recipe import parse_recipe

SLOW = 900.0  # seconds, on a machine with much else to do
CPIKAN = {"kind": "cpikan", "hidden": [5], "degree": 4}
TILES = {"diffusion": [3, 1], "helmholtz": [2, 2], "wave": [1, 2], "reaction_diffusion": [3], "inverse": [1]}
EXTRA = {  # what else there is to go wrong, one thing each
    "diffusion": {"constraints": "hard"},
    "allen_cahn": {"constraints": "hard"},  # and periodic
    "burgers": {"attention": {}, "refine": {"every": 8, "pool": 100}},
    "helmholtz": {"points": {"interior": 61, "condition": 13, "interface": 7}},
    "wave": {"causal": {"slices": 4}},
    "inverse": {"unknown": {"reaction": 0.2}, "measurements": {"points": 31, "noise": 0.01}},
}
EQUATIONS = ("allen_cahn", "burgers", "diffusion", "helmholtz", "poisson", "reaction_diffusion", "wave", "inverse")
GRADIENTS = ("burgers", "helmholtz", "wave", "inverse")  # the last has fewer points on its ends than shares
ONE_STEP = {"steps": 1, "accumulate": 4, "optimizer": "sgd", "lr": 1.0, "schedule": "constant", "warmup": 0}
SOLVERS = {
    "levenberg_marquardt": "burgers", "ssbroyden": "inverse", "additive_schwarz": "diffusion",
    "march": "wave",  # windows of time one after the other, tiles of two slabs
}  # fmt: skip
MARCH = {"method": "levenberg_marquardt", "iterations": 0, "march": {"windows": 2, "iterations": 2, "tolerance": 0.0}}


def recipe(name: str, output: Path, **changes) -> dict:
    problem = {"kind": "pde", "equation": "reaction_diffusion" if name == "inverse" else name}
    problem |= {"points": {"interior": 61, "condition": 13}, "resolution": 11} | EXTRA.get(name, {})
    overlap = 0.0 if name == "helmholtz" else 0.5
    tree = {
        "output": str(output),
        "problem": problem,
        "field": {"levels": [{"grid": TILES.get(name, [1, 1]), "overlap": overlap, "network": CPIKAN}]},
        "training": {"steps": 20, "log_every": 1, "lr": 3e-3},
    }
    for section, given in changes.items():
        tree[section] |= given
    return tree


def runs(folder: Path, double: bool, several: bool = False) -> list[dict]:
    """Every equation; in double precision also the solvers and a run of both phases; with several processes also a step
    of many shares, and that run resumed.
    """
    precision = {"precision": "double" if double else "single"}
    first = [recipe(name, folder / name) for name in EQUATIONS]
    if double:
        if several:
            first += [recipe(name, folder / f"gradient_{name}", training=ONE_STEP) for name in GRADIENTS]
        for method, name in SOLVERS.items():
            tree = recipe(name, folder / method, training={"steps": 2})
            solve = MARCH if method == "march" else {"method": method, "iterations": 4, "local": 2}
            first.append(tree | {"solve": solve})
        first += resumed(folder / "resumed") if several else resumed(folder / "resumed")[:1]
    for tree in first:
        tree["field"] |= precision
    return first


def resumed(run: Path) -> list[dict]:
    """A run of both phases, then the same again from a checkpoint of each."""
    tree = recipe("burgers", run, problem={"causal": {"slices": 4}})
    tree["training"] |= {"checkpoint_steps": 7, "schedule": "constant", "keep": 9, "steps": 14}
    tree["solve"] = {"method": "levenberg_marquardt", "iterations": 14}
    return [tree, *(tree | {"resume": str(run / "checkpoints" / f"step_{step:08d}")} for step in (7, 21))]


def logged(run: Path, key: str) -> list[float]:
    return [json.loads(line)[key] for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    trees = runs(folder / "single", double=False) + runs(folder / "double", double=True)
    run_alone(*train_each(folder, trees), timeout=SLOW).check()
    return folder


@pytest.fixture(scope="module")
def distributed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    launch("ddp_cpu", *train_each(folder, runs(folder, double=True, several=True)), timeout=SLOW).check()
    return folder


@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_every_equation_trains_the_same_under_deepspeed(config, alone, tmp_path):
    launch(config, *train_each(tmp_path, runs(tmp_path, double=False)), timeout=SLOW).check()
    for name in EQUATIONS:
        found, expected = logged(tmp_path / name, "loss"), logged(alone / "single" / name, "loss")
        assert len(found) == 20 and found[-1] < found[0]
        assert relative_difference(found, expected) < 1e-5, name


def test_every_equation_and_solver_gives_the_same_under_ddp(alone, distributed):
    double = alone / "double"
    for name in EQUATIONS:
        found = {key: logged(distributed / name, key) for key in ("loss", "grad_norm")}
        for key, values in found.items():
            assert len(values) == 20
            assert relative_difference(values, logged(double / name, key)) < 1e-8, (name, key)
        assert found["grad_norm"][0] == pytest.approx(logged(double / name, "grad_norm")[0], rel=1e-10), name
        field, reference = (load_file(folder / name / "field.safetensors") for folder in (distributed, double))
        assert all(torch.allclose(field[key], reference[key], rtol=1e-7, atol=1e-10) for key in reference), name
    for method in SOLVERS:
        found = logged(distributed / method, "loss")
        assert len(found) == 6 and (found[-1] < found[2] or method == "march")  # whose windows have losses of their own
        assert relative_difference(found, logged(double / method, "loss")) < 1e-8, method


@pytest.mark.parametrize("name", GRADIENTS)
def test_eight_shares_have_the_gradient_of_the_whole(name, distributed):
    """Two processes with four micro-batches each, against autograd on all points at once."""
    tree = recipe(name, distributed, training=ONE_STEP, field={"precision": "double"})
    options = parse_recipe(tree, name)
    problem = build_problem(options)
    field = Field.build(options.field, problem.extent, problem.channels, options.training.seed, box=problem.box)
    batch = problem.batches(options).read(0, 0, 1)
    problem.loss(field(batch["points"], problem.order), batch)[0].mean().backward()
    after = load_file(distributed / f"gradient_{name}" / "field.safetensors")
    whole = torch.cat([p.grad.flatten() for p in field.parameters()])
    found = torch.cat([(p.detach() - after[key]).flatten() for key, p in field.named_parameters()])
    assert whole.norm() > 0 and (found - whole).norm() < 1e-10 * whole.norm()


def test_updates_and_iterations_are_resumed_exactly(alone, distributed):
    """Attention, causal weights and points drawn anew, then a solver: begun again from a checkpoint of each phase."""
    for key in ("loss", "grad_norm"):
        expected = logged(alone / "double" / "resumed", key)
        assert len(expected) == 28
        assert relative_difference(logged(distributed / "resumed", key), expected) < 1e-7
    field, reference = (load_file(f / "resumed" / "field.safetensors") for f in (distributed, alone / "double"))
    assert all(torch.allclose(field[name], reference[name], rtol=1e-6, atol=1e-9) for name in reference)
    assert len(list((distributed / "resumed" / "checkpoints").iterdir())) == 4
