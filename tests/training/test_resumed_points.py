"""A second-order phase that is resumed sees the points and weights that the updates before it left."""

import pytest
import torch

from cpikan_hr.recipe import Recipe
from cpikan_hr.training.loop import train
from cpikan_hr.training.tensors import load_tensors

METHODS = {
    "drawn": {"refine": {"every": 2, "pool": 200, "power": 2}},
    "attention": {"attention": {"rate": 0.5, "decay": 0.5}},
    "causal": {"causal": {"epsilon": 0.01, "slices": 4}},
    "balanced": {"balance": {"every": 2, "memory": 0.5}},
}


@pytest.mark.parametrize("method", METHODS)
def test_a_resumed_phase_ends_like_one_that_went_through(tmp_path, method):
    def run(name, iterations):
        recipe = {
            "output": str(tmp_path / name),
            "problem": {
                "kind": "pde", "equation": "burgers", "points": {"interior": 40, "condition": 8}, "resolution": 5,
                **METHODS[method],
            },
            "field": {
                "precision": "double",
                "levels": [{"grid": [1, 1], "network": {"kind": "cpikan", "hidden": [3], "degree": 3}}],
            },
            "training": {"steps": 5, "checkpoint_steps": 1, "keep": 1},
            "solve": {"method": "levenberg_marquardt", "iterations": iterations},
        }  # fmt: skip
        return load_tensors(train(Recipe.model_validate(recipe)) / "field.safetensors")

    whole = run("whole", 4)
    first = run("parts", 2)
    resumed = run("parts", 4)
    assert any(not torch.equal(first[name], whole[name]) for name in whole)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
