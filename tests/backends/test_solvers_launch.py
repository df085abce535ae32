"""The closed-form and the growing start, launched as two real CPU processes, give the field of one process."""

from pathlib import Path

import numpy as np
import pytest
import torch
from harness import launch, run_alone, train_each
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


def trees(folder: Path) -> list[dict]:
    """A picture of more than one block of both solvers (2^18 and 2^16 px)."""
    y, x = np.mgrid[0:530, 0:560]
    picture = np.sin(x / 9) * np.cos(y / 14) + (x > 300) * (y > 200) * np.sin(x * y / 900) / 2
    np.save(folder / "picture.npy", picture.astype(np.float32))
    return [
        {
            "output": str(folder / name),
            "problem": {"kind": "image", "path": str(folder / "picture.npy")},
            "field": {"levels": levels},
            "start": {"sweeps": int(name == "grown")},
            "target": {"psnr": 24},
            "training": {"steps": 0},
        }
        for name, levels in RECIPES.items()
    ]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    run_alone(*train_each(folder, trees(folder))).check()
    return folder


@pytest.mark.parametrize("config", ["ddp_cpu", "zero3"])
def test_two_processes_solve_the_fields_of_one(config, alone, tmp_path):
    launched = launch(config, *train_each(tmp_path, trees(tmp_path)))
    launched.check()
    for name in RECIPES:
        field, reference = (load_file(folder / name / "field.safetensors") for folder in (tmp_path, alone))
        assert field.keys() == reference.keys()
        for key, value in reference.items():
            if value.is_floating_point():
                assert (field[key] - value).abs().max() <= 1e-5 * max(1.0, float(value.abs().max())), key
            else:
                assert torch.equal(field[key], value), key
        assert sum(value.numel() for key, value in field.items() if key.endswith("active")) > 10
    assert launched.output.count("per px") == len(RECIPES)  # one table each
