"""The peer solves the equations it names, with the networks of DeepXDE's examples, and says how its error went."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pde_peer import GRID, MEASUREMENTS, at, grid, peer, reached
from processes import run

ROOT = Path(__file__).parents[2]
PARAMS = {"diffusion": 2241, "helmholtz": 45901, "allen_cahn": 921}
FOUND = importlib.util.find_spec("deepxde") is not None
needs_deepxde = pytest.mark.skipif(not FOUND, reason="deepxde is not installed (make install)")

# In a process of its own, as DeepXDE may set torch's default device: short runs, residuals of exact solutions in
# float64, and what the networks give on the faces where a condition is built in.
CODE = """
import contextlib, json, math, os, sys
sys.path.insert(0, "benchmarks")
os.environ["DDE_BACKEND"] = "pytorch"
import numpy as np
from pde_peer import EXAMPLES, WAVE_NUMBER, grid, train

with contextlib.redirect_stdout(sys.stderr):
    import deepxde as dde
    import torch

    still = np.cos(np.pi * grid("allen_cahn")[:, 0]) * grid("allen_cahn")[:, 0] ** 2
    references = {name: each.solution(*grid(name).T) if each.solution else still for name, each in EXAMPLES.items()}
    told = {"runs": {name: train(name, 0, 1e6, u, 20) for name, u in references.items()}}
    told["early"] = {name: train(name, 0, 0.02, u)["iterations"] for name, u in references.items()}

    dde.config.set_default_float("float64")
    def wave(x, t):  # a front of u_t = d u_xx + r (u - u^3) between 1 and 0
        d, r = 0.001, 5.0
        return (1 - torch.tanh((x - 3 * math.sqrt(r * d / 2) * t) * math.sqrt(r / d / 8))) / 2
    exact = {
        "diffusion": lambda x, t: torch.exp(-t) * torch.sin(math.pi * x),
        "helmholtz": lambda x, y: torch.sin(WAVE_NUMBER * x) * torch.sin(WAVE_NUMBER * y),
        "allen_cahn": wave,
    }
    told["residual"], told["faces"], told["scale"] = {}, {}, {}
    for name, u in exact.items():
        data, net = EXAMPLES[name].build()
        points = torch.from_numpy(grid(name)).requires_grad_()
        value = u(points[:, :1], points[:, 1:])
        told["residual"][name] = float(data.pde(points, value).abs().max())
        dde.grad.clear()
        told["scale"][name] = float(dde.grad.hessian(value, points, i=0, j=0).abs().max())
        dde.grad.clear()
        found = net(points.detach()).detach().numpy().reshape(201, 101)
        told["faces"][name] = [found[0].tolist(), found[-1].tolist(), found[:, 0].tolist(), found[:, -1].tolist()]
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def told() -> dict:
    return json.loads(run(["-c", CODE])[0])


def check_history(line: dict) -> None:
    seconds, errors = zip(*line["history"], strict=True)
    assert seconds[0] < seconds[-1] <= line["cpu_seconds"] + 1e-3 and list(seconds) == sorted(seconds)
    assert all(math.isfinite(error) and error > 0 for error in errors) and errors[-1] == line["rel_l2"]
    assert line["params"] == PARAMS[line["problem"]]


@needs_deepxde
@pytest.mark.parametrize("name", PARAMS)
def test_every_example_runs_and_tells_its_errors(told, name):
    line = told["runs"][name]
    check_history(line)
    # Adam and, where the example has it, L-BFGS, which ends at a whole part
    assert line["iterations"] > 20 if name == "allen_cahn" else line["iterations"] == 20
    assert len(line["history"]) == 21 if name != "allen_cahn" else 20 < len(line["history"]) <= MEASUREMENTS + 2


@needs_deepxde
def test_training_ends_when_its_seconds_are_used_up(told):
    assert all(0 < iterations < 5000 for iterations in told["early"].values())


@needs_deepxde
@pytest.mark.parametrize("name", PARAMS)
def test_exact_solutions_have_no_residual(told, name):
    assert told["scale"][name] > 1 and told["residual"][name] < 1e-9 * told["scale"][name]


@needs_deepxde
def test_conditions_that_are_built_in_hold_for_any_network(told):
    np.testing.assert_allclose(told["faces"]["helmholtz"][0] + told["faces"]["helmholtz"][1], 0, atol=1e-12)
    np.testing.assert_allclose(told["faces"]["helmholtz"][2] + told["faces"]["helmholtz"][3], 0, atol=1e-12)
    left, right, start, end = (np.array(face) for face in told["faces"]["allen_cahn"])
    x = np.linspace(-1, 1, 201)
    np.testing.assert_allclose(np.concatenate([left, right]), -1, atol=1e-12)
    np.testing.assert_allclose(start, x**2 * np.cos(math.pi * x), atol=1e-12)
    assert np.abs(end - start).max() > 1e-3


@needs_deepxde
def test_a_process_of_its_own_gets_nearer_to_the_reference_that_it_is_given():
    line = peer("diffusion", 1, 1e6, lambda x, t: torch.exp(-t) * torch.sin(math.pi * x), iterations=300)
    check_history(line)
    assert MEASUREMENTS <= len(line["history"]) <= MEASUREMENTS + 2
    assert (line["seed"], line["iterations"]) == (1, 300) and line["process_cpu_s"] > line["cpu_seconds"]
    assert line["rel_l2"] < 0.5 * line["history"][0][1]


def test_the_grid_has_the_edges_and_the_second_axis_runs_faster():
    points = grid("diffusion").reshape(*GRID, 2)
    assert points.shape == (201, 101, 2)
    np.testing.assert_array_equal(points[:, 7, 0], np.linspace(-1, 1, 201))
    np.testing.assert_array_equal(points[9, :, 1], np.linspace(0, 1, 101))
    assert grid("helmholtz").min() == 0 and grid("helmholtz").max() == 1


def test_when_an_error_was_reached_and_what_it_was_at_a_time():
    history = [[0.0, 1.0], [1.0, 0.2], [2.0, 0.3], [3.0, 0.1]]
    assert [reached(history, error) for error in (1.0, 0.25, 0.2, 0.15, 0.05)] == [0.0, 1.0, 1.0, 3.0, None]
    assert [at(history, seconds) for seconds in (0.0, 1.5, 2.5, 9.0)] == [1.0, 0.2, 0.2, 0.1]
    assert at([[0.5, 1.0], [1.0, 0.2]], 0.1) == 1.0


@pytest.mark.parametrize("content", [None, np.zeros(7), np.full(20301, np.nan), np.array(["u"])])
def test_a_reference_that_is_not_there_or_does_not_fit_is_one_line(tmp_path, content):
    command = [sys.executable, "benchmarks/pde_peer.py", "--problem", "allen_cahn"]
    if content is not None:
        np.save(tmp_path / "u.npy", content)
        command += ["--reference", str(tmp_path / "u.npy")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert "error: --reference: " in done.stderr.splitlines()[-1]
