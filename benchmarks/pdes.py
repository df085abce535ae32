"""The paper's equations: relative L2 error and CPU seconds of whole training runs, beside DeepXDE on three of them.

    python benchmarks/pdes.py [--rows NAME ...] [--seeds 3] [--peer]

Every row is a recipe, trained by `python -m cpikan_hr.train` in a process of its own on one thread; its seconds are all
CPU seconds of that process, some 6 of imports included. One JSON line per row: the median of the seeds, the target and
whether it was met. `--peer` adds DeepXDE's documented examples (`pde_peer.py`) of the rows that have one: our error at
its CPU seconds and our CPU seconds to its error, as ratios, both without imports.
"""

import argparse
import json
import math
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path

import yaml
from processes import run

from cpikan_hr import strict_json

RECIPES = Path(__file__).parents[1] / "recipes"
HEAT = Path(__file__).with_name("heat_with_source.py")  # DeepXDE's diffusion example


def cpikan(hidden: list[int], degree: int = 5, **options) -> dict:
    return {"kind": "cpikan", "hidden": hidden, "degree": degree, **options}


def linear(*degree: int) -> dict:
    return {"kind": "chebyshev2d", "degree": list(degree), "input_map": "identity"}


def level(network: dict, grid: list[int] | None = None, overlap: float = 0.5, **options) -> dict:
    return {"grid": grid or [1, 1], "overlap": overlap, "network": network, **options}


@dataclass(frozen=True)
class Row:
    """`measure`: rel_l2, or the name of an unknown coefficient, whose relative error is meant."""

    problem: dict
    levels: list[dict]
    target: float
    seconds: float | None  # None: the steps are the limit
    training: dict
    solve: dict
    measure: str = "rel_l2"
    precision: str = "double"
    peer: str | None = None

    def recipe(self, seed: int, output: Path) -> dict:
        return {
            "output": str(output),
            "problem": {"kind": "pde", **self.problem},
            "field": {"precision": self.precision, "levels": self.levels},
            "training": {"steps": 0, "seed": seed, "log_every": 10, **self.training},
            "solve": self.solve,
        }


def marquardt(iterations: int, **options) -> dict:
    return {"method": "levenberg_marquardt", "iterations": iterations, **options}


def row(equation: str, levels: list[dict], target: float, seconds: float | None, solve: dict, **options) -> Row:
    kept = {name: options.pop(name) for name in ("training", "measure", "precision", "peer") if name in options}
    problem = {"equation": equation, "constraints": "hard", **options}
    return Row(problem, levels, target, seconds, kept.pop("training", {}), solve, **kept)


def shipped(name: str, target: float, seconds: float) -> Row:
    """A recipe of `recipes/`."""
    tree = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    problem = {key: value for key, value in tree["problem"].items() if key != "kind"}
    return Row(problem, tree["field"]["levels"], target, seconds, tree["training"], tree["solve"])


def points(interior: int, **more: int) -> dict:
    return {"interior": interior, **more}


WIDE = {"half_width": 50.0}
PUBLISHED = cpikan([8, 8])  # 528 parameters
MLP = {"kind": "fourier_mlp", "hidden": [20, 20], "activation": "tanh"}  # about as many parameters
DIRECT = 1e-12  # damping of a linear problem: one or two steps solve it

SPLIT = {"half_width": 4.0}
INVERSE = dict(unknown={"reaction": 0.2}, levels=[level(cpikan([8]), [1])], solve=marquardt(60), measure="reaction")
MANY = {"parameters": {"frequencies": 4}, "points": points(60000)}


def model(network: dict, **options) -> Row:
    """A comparison network on the published diffusion problem, by the same solver."""
    return row("diffusion", [level(network, **options)], 1e-4, 60, marquardt(150), points=points(1000))


def front(network: dict, iterations: int) -> Row:
    """A network of about 1,300 parameters on Allen-Cahn's fronts with D = 0.001 and Dirichlet ends, about 100 CPU-s."""
    return row(
        "allen_cahn", [level(network)], 1e-3, 150, marquardt(iterations), points=points(2000),
        parameters={"boundary": "dirichlet", "diffusivity": 1e-3},
    )  # fmt: skip


def solver(method: str, iterations: int) -> Row:
    """A second-order method on the forward reaction-diffusion problem, the same network and points."""
    return row(
        "reaction_diffusion", [level(PUBLISHED, [1])], 1e-5, 300, {"method": method, "iterations": iterations},
        points=points(500), training={"log_every": 100},
    )  # fmt: skip


def inverse(noise: float, target: float) -> Row:
    return row(
        "reaction_diffusion", target=target, seconds=300, points=points(500), **INVERSE,
        measurements={"points": 400, "noise": noise},
    )  # fmt: skip


ROWS = {
    "diffusion_published": row("diffusion", [level(PUBLISHED)], 1e-4, 60, marquardt(300), points=points(1000)),
    "diffusion_linear": row(
        "diffusion", [level(linear(13, 9), [6, 1])], 1e-6, 120, marquardt(3, damping=DIRECT), points=points(3000)
    ),
    "diffusion_adam": row(
        "diffusion", [level(PUBLISHED)], 1e-2, None, {"method": "none"}, points=points(1000), precision="single",
        training={"steps": 10000, "lr": 1e-2, "log_every": 500},
    ),
    "diffusion_wide": row(
        "diffusion", [level(cpikan([8], 6), [40, 1])], 1e-4, 300, marquardt(150), parameters=WIDE, points=points(12000)
    ),
    "diffusion_wide_linear": row(
        "diffusion", [level(linear(10, 6), [64, 1])], 1e-4, 300, marquardt(2, damping=DIRECT), parameters=WIDE,
        points=points(12000),
    ),
    "helmholtz_wide_linear": row(
        "helmholtz", [level(linear(30, 13), [1, 24])], 1e-5, 300, marquardt(2, damping=DIRECT), parameters=SPLIT,
        points=points(24000),
    ),
    "reaction_diffusion": row(
        "reaction_diffusion", [level(PUBLISHED, [1])], 1e-5, 300, marquardt(150), points=points(500)
    ),
    "inverse_clean": inverse(0.0, 1e-4),
    "inverse_1_percent": inverse(0.01, 1e-2),
    "inverse_5_percent": inverse(0.05, 5e-2),
    "inverse_10_percent": inverse(0.1, 5e-2),
    "poisson_one_level": row(
        "poisson", [level(linear(6, 6), [32, 32])], 1.0, 600, marquardt(8, damping=1e-9, dense=0), **MANY
    ),
    "poisson_factorised": row(
        "poisson", [level(linear(6, 6), [32, 32])], 1.0, 600, marquardt(2, damping=1e-9), **MANY
    ),
    "poisson_multilevel": row(
        "poisson", [level(linear(6, 6), [k, k]) for k in (1, 2, 4, 8, 16, 32)], 0.1, 600,
        marquardt(8, damping=1e-9, dense=0), **MANY,
    ),
    "allen_cahn": shipped("allen_cahn", 2e-6, 600),
    "burgers": shipped("burgers", 1e-5, 600),
    "solver_bfgs": solver("bfgs", 2000),
    "solver_ssbfgs": solver("ssbfgs", 2000),
    "solver_ssbroyden": solver("ssbroyden", 2000),
    "solver_lbfgs": solver("lbfgs", 2000),
    "solver_additive_schwarz": solver("additive_schwarz", 60),
    "solver_multiplicative_schwarz": solver("multiplicative_schwarz", 60),
    "model_cpikan": model(PUBLISHED),
    "model_cpikan_unscaled": model(PUBLISHED, scaled=False),
    "model_tanh_mlp": model({**MLP, "bands": 0}),
    "model_tanh_mlp_unscaled": model({**MLP, "bands": 0}, scaled=False),
    "model_fourier": model({**MLP, "hidden": [14, 14], "bands": 3}),
    "model_siren": model({"kind": "siren", "hidden": [20, 20], "first_omega": 10.0, "hidden_omega": 5.0}),
    "front_deep": front(cpikan([8, 8, 8, 8]), 230),
    "front_wide": front(cpikan([13, 13]), 240),
    "heat_with_source": row(
        str(HEAT), [level(cpikan([8, 8]))], 1e-5, 60, marquardt(100), points=points(500), peer="diffusion"
    ),
    "helmholtz_unit_square": row(
        "helmholtz", [level(cpikan([12, 12], 6))], 1e-4, 300, marquardt(150), points=points(2000), peer="helmholtz",
        parameters={"a1": 4.0, "a2": 4.0, "k": 4 * math.pi, "half_width": 0.5},
    ),
    "allen_cahn_dirichlet": row(
        "allen_cahn", [level(cpikan([16, 16]))], 1e-3, 300, marquardt(150), points=points(4000), peer="allen_cahn",
        parameters={"boundary": "dirichlet", "diffusivity": 1e-3},
    ),
}  # fmt: skip


def measured(name: str, seed: int) -> dict:
    """One training run: error, CPU seconds, memory, parameters and its history."""
    it = ROWS[name]
    with tempfile.TemporaryDirectory() as folder:
        output, recipe = Path(folder) / "run", Path(folder) / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(it.recipe(seed, output)))
        _, seconds, memory = run(["-m", "cpikan_hr.train", "--config", str(recipe)])
        table = json.loads(run(["-m", "cpikan_hr", "evaluate", str(output)])[0])
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    error = table["rel_l2"] if it.measure == "rel_l2" else table["coefficients"][it.measure]["relative_error"]
    error = math.inf if error is None else error  # of a field that is not finite
    history = [[line["cpu_s"], line["rel_l2"]] for line in lines if line.get("rel_l2") is not None]
    return {
        "error": error, "rel_l2": table["rel_l2"], "cpu_s": round(seconds, 1), "peak_rss_mb": round(memory),
        "params": table["params"], "history": history,
    }  # fmt: skip


def compared(name: str, runs: list[dict]) -> dict:
    """DeepXDE's example against the median run."""
    from pde_peer import at, peer, reached

    from cpikan_hr.problems.equations import build

    it = ROWS[name]
    equation = build(it.problem["equation"], it.problem.get("parameters", {}))
    reference = equation.solution if it.peer == "allen_cahn" else None
    theirs = peer(it.peer, 0, 4 * it.seconds, reference)
    ours = sorted(runs, key=lambda one: one["rel_l2"])[len(runs) // 2]["history"]
    end, best = theirs["cpu_seconds"], min(error for _, error in theirs["history"])
    here, there = reached(ours, best), reached(theirs["history"], best)
    return {
        "deepxde_rel_l2": best, "deepxde_cpu_s": round(end, 1), "error_ratio_at_its_seconds": at(ours, end) / best,
        "seconds_ratio_to_its_error": None if here is None else here / there,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--peer", action="store_true")
    arguments = parser.parse_args()
    for name in arguments.rows:
        it = ROWS[name]
        runs = [measured(name, seed) for seed in range(arguments.seeds)]
        error = statistics.median(one["error"] for one in runs)
        seconds = statistics.median(one["cpu_s"] for one in runs)
        in_time = it.seconds is None or seconds <= it.seconds
        line = {
            "row": name, "measure": it.measure, "error": error, "errors": [one["error"] for one in runs],
            "target": it.target, "cpu_s": seconds, "within_s": it.seconds, "params": runs[0]["params"],
            "peak_rss_mb": max(one["peak_rss_mb"] for one in runs), "met": error <= it.target and in_time,
        }  # fmt: skip
        if arguments.peer and it.peer:
            line |= compared(name, runs)
        print(strict_json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
