"""Whole runs on a GPU: every second-order method, weights that follow residuals, lower precision, the height map.

Elsewhere tests compute on the CPU, beside a GPU too (`conftest.py`): sums there are not the same twice.
"""

import json
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState, PartialState
from PIL import Image
from safetensors.torch import load_file
from skimage import data

from cpikan_hr.cli import main as command
from cpikan_hr.data.synth import synth
from cpikan_hr.train import main as train
from cpikan_hr.training.weights import load_field

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
NETWORK = {"kind": "cpikan", "hidden": [5], "degree": 4}


@pytest.fixture(autouse=True)
def _begin_anew(monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    forget()
    yield
    forget()


def forget() -> None:
    """Accelerate keeps device and precision in singletons."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()


def run(monkeypatch, words: list, gpu: bool = True) -> None:
    if gpu:
        monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    else:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    forget()
    assert train([str(word) for word in words]) == 0


def logged(folder: Path, name: str = "loss") -> list[float]:
    return [json.loads(line)[name] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def burgers(folder: Path, **changes) -> list:
    tree = {
        "output": "given",
        "problem": {
            "kind": "pde", "equation": "burgers", "points": {"interior": 60, "condition": 12}, "resolution": 11,
        },
        "field": {"precision": "double", "levels": [{"grid": [2, 3], "overlap": 0.5, "network": NETWORK}]},
        "training": {"steps": 6, "log_every": 1, "checkpoint_steps": 3, "schedule": "constant", "keep": 99},
    }  # fmt: skip
    for section, given in changes.items():
        tree[section] = tree.get(section, {}) | given
    (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
    return ["--config", folder / "recipe.yaml", "--output"]


METHODS = {
    "band": {"method": "levenberg_marquardt"},
    "conjugate_gradients": {"method": "levenberg_marquardt", "dense": 0},
    "march": {"method": "levenberg_marquardt", "march": {"windows": 2, "iterations": 2}},
    "lbfgs": {"method": "lbfgs"},
    "ssbroyden": {"method": "ssbroyden"},
    "additive_schwarz": {"method": "additive_schwarz", "local": 2},
    "multiplicative_schwarz": {"method": "multiplicative_schwarz", "local": 2},
}


@pytest.mark.parametrize("solve", METHODS.values(), ids=METHODS)
def test_a_second_order_method_does_what_it_does_on_the_cpu_and_resumes(solve, monkeypatch, tmp_path):
    words = burgers(tmp_path, solve=solve | {"iterations": 4})
    here, there = tmp_path / "cpu", tmp_path / "gpu"
    run(monkeypatch, [*words, here], gpu=False)
    run(monkeypatch, [*words, there])
    expected = logged(here)
    assert logged(there) == pytest.approx(expected, rel=1e-4)
    run(monkeypatch, [*words, there, "--resume", there / "checkpoints" / "step_00000009"])
    assert logged(there) == pytest.approx(expected, rel=1e-4)


def test_weights_that_follow_residuals_are_those_of_the_cpu(monkeypatch, tmp_path):
    problem = {"attention": {"rate": 0.05}, "causal": {"slices": 4}, "refine": {"every": 5, "pool": 200}}
    for kind in ("gradient_norm", "ntk"):
        balanced = problem | {"balance": {"method": kind, "every": 2}}
        words = burgers(tmp_path, training={"steps": 12}, problem={
            "kind": "pde", "equation": "burgers", "points": {"interior": 60, "condition": 12}, "resolution": 11,
        } | balanced)  # fmt: skip
        run(monkeypatch, [*words, tmp_path / f"cpu-{kind}"], gpu=False)
        run(monkeypatch, [*words, tmp_path / f"gpu-{kind}"])
        assert logged(tmp_path / f"gpu-{kind}") == pytest.approx(logged(tmp_path / f"cpu-{kind}"), rel=1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precision_trains_a_picture(precision, monkeypatch, tmp_path):
    Image.fromarray(data.astronaut()[:72, 100:200]).save(tmp_path / "picture.png")
    words = [
        "--config", "recipes/image_cpikan.yaml", "--problem.path", tmp_path / "picture.png", "--training.steps", 150,
        "--start.enabled", "false", "--training.log_every", 1, "--target.psnr", "null", "--training.lr", 0.02,
    ]  # fmt: skip
    run(monkeypatch, [*words, "--output", tmp_path / "fp32"])
    run(monkeypatch, [*words, "--output", tmp_path / precision, "--training.precision", precision])
    plain, lower = (logged(tmp_path / name) for name in ("fp32", precision))
    assert sum(plain[-10:]) < 0.6 * sum(plain[:10])
    assert sum(lower[-10:]) == pytest.approx(sum(plain[-10:]), rel=0.1) and lower != plain
    state = load_file(tmp_path / precision / "field.safetensors")
    assert all(value.dtype in (torch.float32, torch.int32) for value in state.values())


def test_heights_are_those_of_the_cpu(monkeypatch, tmp_path, capsys):
    stack = synth(tmp_path / "stack", size=(300, 420), noise=2.0, seed=1)
    words = ["--config", "recipes/wafer.yaml", "--problem.stack", stack, "--start.shifts", 3, "--output"]
    figures = []
    for name in ("cpu", "gpu"):
        run(monkeypatch, [*words, tmp_path / name], gpu=name == "gpu")
        capsys.readouterr()
        assert command(["evaluate", str(tmp_path / name)]) == 0
        figures.append(json.loads(capsys.readouterr().out))
        for quantity in ("value", "sigma"):
            out = str(tmp_path / f"{name}-{quantity}.npy")
            assert command(["render", str(tmp_path / name), "--out", out, "--quantity", quantity]) == 0
    cpu, gpu = figures
    for key in ("rmse", "params", "seam", "sq", "bow"):
        assert gpu[key] == pytest.approx(cpu[key], rel=0.02), key
    assert gpu["gpu_peak_mb"] > 0


def test_a_lattice_is_that_of_the_cpu(monkeypatch, tmp_path):
    stack = synth(tmp_path / "stack", size=(200, 260), noise=2.0, seed=1)
    words = ["--config", "recipes/wafer.yaml", "--problem.stack", stack, "--start.shifts", 0]
    run(monkeypatch, [*words, "--output", tmp_path / "run"], gpu=False)
    fields = [load_field(tmp_path / "run", device).field for device in ("cpu", "cuda")]
    ys, xs = torch.arange(5.3, 150, 0.7, dtype=torch.float64), torch.arange(11.0, 240, dtype=torch.float64)
    for order in ("value", "hessian"):
        here, there = (field.lattice(ys, xs, order).cpu() for field in fields)
        assert (there - here).norm() <= 1e-5 * here.norm()
