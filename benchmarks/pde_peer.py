"""DeepXDE on three equations with the settings of its documented examples: the peer of `pdes.py`.

    python benchmarks/pde_peer.py --problem diffusion [--seed 0] [--seconds 300] [--iterations N]
    python benchmarks/pde_peer.py --problem allen_cahn --reference u.npy     u on `grid("allen_cahn")`, 20301 values

Networks, points, optimisers, rates and iterations are those of `examples/pinn_forward` in lululxvi/deepxde
(diffusion_1d.py, Helmholtz_Dirichlet_2d.py, Allen_Cahn.py) with the PyTorch backend, in its default float32, on one
thread. Left out are the test points and the metric that the examples print every 1000 iterations: they only cost time.
L-BFGS calls back every 200 iterations in place of 1000, which does not change its path.

Prints one JSON line. `history` has about 40 pairs [CPU seconds, relative L2 error on a grid of 201 x 101 points with
the edges]. The seconds are those of training: importing and building (`start_s`) come before them, and measuring the
error is left out. Training ends when `--seconds` are used up or the example's iterations are done.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from processes import run

from cpikan_hr import strict_json

GRID = (201, 101)
MEASUREMENTS = 40
LBFGS_ITERATIONS, LBFGS_CALLBACK = 15000, 200  # the first is DeepXDE's default
WAVE_NUMBER = 4 * math.pi  # two wavelengths on each edge


@dataclass(frozen=True)
class Example:
    """A documented example; coordinates are (x, t) or (x, y)."""

    low: tuple[float, float]
    high: tuple[float, float]
    solution: Callable | None  # of two arrays, in float64; None: there is no closed form
    build: Callable  # () -> DeepXDE's data and network
    iterations: int  # of Adam
    lbfgs: bool
    settings: str


def diffusion() -> tuple:
    """u_t = u_xx - e^-t (1 - pi^2) sin pi x; boundary and initial values are soft, weighted 1."""
    import deepxde as dde
    import torch

    def residual(xt, u):
        source = torch.exp(-xt[:, 1:]) * (1 - math.pi**2) * torch.sin(math.pi * xt[:, :1])
        return dde.grad.jacobian(u, xt, j=1) - dde.grad.hessian(u, xt, j=0) + source

    def exact(xt):
        return diffusion_solution(xt[:, :1], xt[:, 1:])

    space_time = dde.geometry.GeometryXTime(dde.geometry.Interval(-1, 1), dde.geometry.TimeDomain(0, 1))
    edges = dde.icbc.DirichletBC(space_time, exact, lambda _, on_boundary: on_boundary)
    start = dde.icbc.IC(space_time, exact, lambda _, on_initial: on_initial)
    points = dict(num_domain=40, num_boundary=20, num_initial=10)
    data = dde.data.TimePDE(space_time, residual, [edges, start], **points)
    return data, dde.nn.FNN([2, 32, 32, 32, 1], "tanh", "Glorot uniform")


def diffusion_solution(x, t):
    return np.exp(-t) * np.sin(math.pi * x)


def helmholtz() -> tuple:
    """-u_xx - u_yy - k^2 u = k^2 sin kx sin ky, u = 0 on the edges of the unit square by construction."""
    import deepxde as dde
    import torch

    def residual(xy, u):
        source = torch.sin(WAVE_NUMBER * xy).prod(1, keepdim=True)
        laplacian = dde.grad.hessian(u, xy, i=0, j=0) + dde.grad.hessian(u, xy, i=1, j=1)
        return -laplacian - WAVE_NUMBER**2 * (u + source)

    square = dde.geometry.Rectangle([0, 0], [1, 1])
    data = dde.data.PDE(square, residual, [], num_domain=400, num_boundary=80)
    net = dde.nn.FNN([2, 150, 150, 150, 1], "sin", "Glorot uniform")
    net.apply_output_transform(lambda xy, u: (xy * (1 - xy)).prod(1, keepdim=True) * u)
    return data, net


def helmholtz_solution(x, y):
    return np.sin(WAVE_NUMBER * x) * np.sin(WAVE_NUMBER * y)


def allen_cahn() -> tuple:
    """u_t = 0.001 u_xx + 5 (u - u^3), u(x, 0) = x^2 cos pi x and u(+-1, t) = -1 by construction."""
    import deepxde as dde
    import torch

    def residual(xt, u):
        return dde.grad.jacobian(u, xt, j=1) - 0.001 * dde.grad.hessian(u, xt, j=0) - 5 * (u - u**3)

    def ansatz(xt, u):
        x, t = xt[:, :1], xt[:, 1:]
        return x**2 * torch.cos(math.pi * x) + t * (1 - x**2) * u

    space_time = dde.geometry.GeometryXTime(dde.geometry.Interval(-1, 1), dde.geometry.TimeDomain(0, 1))
    data = dde.data.TimePDE(space_time, residual, [], num_domain=8000, num_boundary=400, num_initial=800)
    net = dde.nn.FNN([2, 20, 20, 20, 1], "tanh", "Glorot normal")
    net.apply_output_transform(ansatz)
    return data, net


EXAMPLES = {
    "diffusion": Example(
        (-1, 0), (1, 1), diffusion_solution, diffusion, 10000, False,
        "tanh 3 x 32, 40 + 20 + 10 points, soft conditions, Adam 1e-3 10000",
    ),
    "helmholtz": Example(
        (0, 0), (1, 1), helmholtz_solution, helmholtz, 5000, False,
        "sin 3 x 150, 400 + 80 points, hard conditions, Adam 1e-3 5000",
    ),
    "allen_cahn": Example(
        (-1, 0), (1, 1), None, allen_cahn, 40000, True,
        "tanh 3 x 20, 8000 + 400 + 800 points, hard conditions, Adam 1e-3 40000, L-BFGS",
    ),
}  # fmt: skip


def grid(problem: str) -> np.ndarray:
    """Points [20301, 2] where errors are measured: 201 along the first axis by 101 along the second (the faster)."""
    example = EXAMPLES[problem]
    axes = [np.linspace(*ends) for ends in zip(example.low, example.high, GRID, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)


def peer(
    problem: str, seed: int, seconds: float, reference: Callable | None = None, iterations: int | None = None
) -> dict:
    """The printed line of a fresh process, with its peak RSS (MB) and all its CPU seconds.

    `reference`: u of two float64 tensors [n, 1], the coordinates; needed where there is no closed form.
    """
    words = [__file__, "--problem", problem, "--seed", str(seed), "--seconds", str(seconds)]
    words += [] if iterations is None else ["--iterations", str(iterations)]
    with tempfile.TemporaryDirectory() as folder:
        if reference is not None:
            import torch

            points = torch.from_numpy(grid(problem))
            path = Path(folder) / "reference.npy"
            np.save(path, np.asarray(reference(points[:, :1], points[:, 1:]), dtype=np.float64))
            words += ["--reference", str(path)]
        out, cpu, rss = run(words)
    return json.loads(out) | {"process_cpu_s": round(cpu, 2), "peak_rss_mb": round(rss)}


def reached(history: list, error: float) -> float | None:
    """CPU seconds at which the error was first measured to be at most `error`; None where it never was."""
    return next((seconds for seconds, measured in history if measured <= error), None)


def at(history: list, seconds: float) -> float:
    """The smallest error measured up to then: Adam's last iterate is often worse than one before it."""
    return min((measured for when, measured in history if when <= seconds), default=history[0][1])


class Recorder:
    """Errors of a model in training over the CPU seconds of training."""

    def __init__(self, points: np.ndarray, expected: np.ndarray, seconds: float, iterations: int):
        self.points, self.expected, self.seconds, self.iterations = points, expected, seconds, iterations
        self.began, self.aside = time.process_time(), 0.0
        self.history: list[tuple[float, float]] = []
        self.iteration = -1  # of the last entry

    def used(self) -> float:
        return time.process_time() - self.began - self.aside

    def spent(self) -> bool:
        return self.used() >= self.seconds

    def due(self, iteration: int) -> bool:
        """Whether the next of the equal parts of the run is done; a run is as long as what first comes to its end."""
        done = max(self.used() / self.seconds, iteration / self.iterations)
        return done * MEASUREMENTS >= len(self.history)

    def measure(self, model) -> None:
        if model.train_state.step == self.iteration:
            return
        self.iteration = model.train_state.step
        used, began = self.used(), time.process_time()
        found = model.predict(self.points).astype(np.float64).ravel()
        error = float(np.linalg.norm(found - self.expected) / np.linalg.norm(self.expected))
        self.history.append((round(used, 3), error))
        self.aside += time.process_time() - began


def callback(recorder: Recorder):
    """DeepXDE's callback that measures when it is due and ends training when the time is spent."""
    import deepxde as dde

    class Record(dde.callbacks.Callback):
        iteration = 0

        def on_epoch_end(self):
            # L-BFGS at a point that satisfies its tolerance does nothing, and DeepXDE would call it for ever.
            stuck, self.iteration = self.model.train_state.step == self.iteration, self.model.train_state.step
            if recorder.due(self.iteration):
                recorder.measure(self.model)
            if recorder.spent() or stuck:
                self.model.stop_training = True

    return Record()


def train(problem: str, seed: int, seconds: float, expected: np.ndarray, limit: int | None = None) -> dict:
    """Trains in this process. `expected` [20301]: u on `grid`; `limit`: most iterations of each optimiser."""
    os.environ["DDE_BACKEND"] = "pytorch"
    began = time.process_time()
    import deepxde as dde
    import torch

    torch.set_num_threads(1)
    example, most = EXAMPLES[problem], limit or math.inf
    adam, lbfgs = min(example.iterations, most), min(LBFGS_ITERATIONS, most) if example.lbfgs else 0
    dde.config.set_random_seed(seed)
    data, net = example.build()
    model = dde.Model(data, net)
    model.compile("adam", lr=1e-3, verbose=0)
    start_s = time.process_time() - began
    recorder = Recorder(grid(problem), expected, seconds, adam + lbfgs)
    recorder.measure(model)
    records = [callback(recorder)]
    model.train(iterations=adam, callbacks=records, verbose=0)
    if lbfgs and not recorder.spent():
        dde.optimizers.set_LBFGS_options(maxiter=lbfgs)
        options = dde.optimizers.config.LBFGS_options
        part = min(LBFGS_CALLBACK, lbfgs)
        options |= {"iter_per_step": part, "fun_per_step": part * options["maxfun"] // lbfgs}
        model.compile("L-BFGS", verbose=0)
        model.train(callbacks=records, verbose=0)
    cpu_seconds = recorder.used()
    recorder.measure(model)
    return {
        "problem": problem, "seed": seed, "settings": example.settings, "iterations": int(model.train_state.step),
        "rel_l2": recorder.history[-1][1], "cpu_seconds": round(cpu_seconds, 3), "start_s": round(start_s, 2),
        "params": sum(p.numel() for p in net.parameters()), "history": recorder.history,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problem", choices=EXAMPLES, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=300.0, help="CPU seconds of training (default: %(default)s)")
    parser.add_argument("--iterations", type=int, help="most iterations of each optimiser (default: the example's)")
    parser.add_argument("--reference", type=Path, help=".npy file of u on the grid (default: the closed form)")
    args = parser.parse_args()
    solution, points = EXAMPLES[args.problem].solution, grid(args.problem)
    if not args.seconds > 0 or (args.iterations is not None and args.iterations < 1):
        parser.error("--seconds and --iterations: give more than 0")
    if args.reference is None and solution is None:
        parser.error(f"--reference: {args.problem} has no closed form; give a .npy file of u on the grid")
    try:
        expected = np.load(args.reference) if args.reference else solution(points[:, 0], points[:, 1])
        expected = expected.astype(np.float64).ravel()
    except (OSError, ValueError) as error:
        parser.error(f"--reference: {args.reference} cannot be read as a .npy file of numbers ({error})")
    if expected.size != len(points) or not np.isfinite(expected).all():
        parser.error(f"--reference: {args.reference} has to have a finite value for each of {len(points)} grid points")
    if importlib.util.find_spec("deepxde") is None:
        parser.error("deepxde is not installed (make install)")
    with contextlib.redirect_stdout(sys.stderr):  # DeepXDE talks
        line = train(args.problem, args.seed, args.seconds, expected, args.iterations)
    print(strict_json.dumps(line))


if __name__ == "__main__":
    main()
