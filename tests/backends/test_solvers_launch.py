"""The closed-form and the growing start, launched as two real CPU processes, give the field of one process."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from harness import launch, run_alone
from safetensors.torch import load_file

GROWN = {"kind": "cpikan", "hidden": [3], "degree": [3, 3], "input_map": "sine", "first_input_map": "sine"}
SPARSE = {"kind": "chebyshev2d", "degree": None, "sparse": True}
RECIPES = {
    "quadtree": [
        {"grid": [1, 1], "network": {"kind": "chebyshev2d", "degree": 3}},
        {"tile": [32, 16, 8], "overlap": 0.25, "network": SPARSE},
    ],
    "grown": [{"tile": [64, 32, 16], "overlap": 0.25, "grow": True, "network": GROWN}],
}


def program(folder: Path, name: str, run: Path) -> tuple[str, ...]:
    """A picture of more than one block of both solvers (2^18 and 2^16 px)."""
    y, x = np.mgrid[0:530, 0:560]
    picture = np.sin(x / 9) * np.cos(y / 14) + (x > 300) * (y > 200) * np.sin(x * y / 900) / 2
    np.save(folder / "picture.npy", picture.astype(np.float32))
    tree = {
        "output": str(run),
        "problem": {"kind": "image", "path": str(folder / "picture.npy")},
        "field": {"levels": RECIPES[name]},
        "start": {"sweeps": int(name == "grown")},
        "target": {"psnr": 24},
        "training": {"steps": 0},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return ("-m", "cpikan_hr.train", "--config", str(folder / "recipe.yaml"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict[str, dict[str, torch.Tensor]]:
    fields = {}
    for name in RECIPES:
        folder = tmp_path_factory.mktemp(name)
        run_alone(*program(folder, name, folder / "run")).check()
        fields[name] = load_file(folder / "run" / "field.safetensors")
    return fields


@pytest.mark.parametrize("config", ["ddp_cpu", "zero3"])
@pytest.mark.parametrize("name", RECIPES)
def test_two_processes_solve_the_field_of_one(name, config, alone, tmp_path):
    launched = launch(config, *program(tmp_path, name, tmp_path / "run"))
    launched.check()
    field, reference = load_file(tmp_path / "run" / "field.safetensors"), alone[name]
    assert field.keys() == reference.keys()
    for key, value in reference.items():
        if value.is_floating_point():
            assert (field[key] - value).abs().max() <= 1e-5 * max(1.0, float(value.abs().max())), key
        else:
            assert torch.equal(field[key], value), key
    assert sum(value.numel() for key, value in field.items() if key.endswith("active")) > 10
    assert launched.output.count("per px") == 1  # one table
