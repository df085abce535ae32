"""The closed-form and the growing start, launched as two real CPU processes, give the field of one process."""

import pytest
import torch
from pictures import STARTS
from safetensors.torch import load_file


@pytest.mark.parametrize("config", ["ddp_cpu", "zero3"])
def test_two_processes_solve_the_fields_of_one(config, launched):
    for name in STARTS:
        field, reference = (load_file(launched(c).run(name) / "field.safetensors") for c in (config, "alone"))
        assert field.keys() == reference.keys()
        for key, value in reference.items():
            if value.is_floating_point():
                assert (field[key] - value).abs().max() <= 1e-5 * max(1.0, float(value.abs().max())), key
            else:
                assert torch.equal(field[key], value), key
        assert sum(value.numel() for key, value in field.items() if key.endswith("active")) > 10
        assert launched(config).said(name).count("per px") == 1  # one process tells
