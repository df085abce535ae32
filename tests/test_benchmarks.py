"""Benchmarks that are asked for a GPU where there is none say so at once."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("name", ["images", "jets", "render"])
def test_a_gpu_that_is_not_there_is_one_line(name):
    command = [sys.executable, f"benchmarks/{name}.py", "--device", "cuda"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.splitlines()[-1].endswith("--device: there is no GPU here")
