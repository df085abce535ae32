"""The error table of an equation's field: against the known answer, in its own equation, on every face."""

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from cpikan_hr.data.source import Source
from cpikan_hr.errors import UserError
from cpikan_hr.evaluate import costs
from cpikan_hr.fields import Field
from cpikan_hr.problems import PDE, build_problem
from cpikan_hr.problems.equations.base import Given
from cpikan_hr.problems.pde import grid_points
from cpikan_hr.training.weights import Trained

STRIP = 2**17  # points evaluated at once
MOST = 2**24  # points of a comparison: 4096 per axis of two, 256 of three
FRESH = 10000  # points of the residual
STREAM = 1_000_081  # of their random numbers, apart from those of training


def evaluate_equation(trained: Trained, reference: Source | None, file_bytes: int) -> dict:
    """rel_l2, linf and rmse against `reference` or the known answer, absent without one; residual: its root mean square
    at fresh points; conditions {name: {rms, max}}; coefficients {name: {value, true, relative_error}}; costs.

    `reference`: a map of the run's shape. UserError where it has another.
    """
    field, recipe, about = trained
    problem = build_problem(recipe)
    table = errors(problem, field, tuple(about["shape"]), reference)
    table["residual"] = residual(problem, field, recipe.training.seed)
    table["conditions"] = {c.name: on_face(problem, field, c) for c in problem.conditions}
    found = coefficients(problem, field)
    if found:
        table["coefficients"] = found
    size = costs(trained, file_bytes)
    del size["params_per_px"]  # a lattice has as many points as one likes
    return table | size


def errors(problem: PDE, field: Field, shape: tuple[int, int], reference: Source | None) -> dict[str, float]:
    """rel_l2, linf, rmse over all channels, where the answer is finite; {} without an answer.

    compared: the share of values that were, absent where all are. UserError where none is.
    """
    compared = against_map(problem, field, shape, reference) if reference else against_answer(problem, field)
    squared = truth_squared = worst = count = total = 0
    for value, truth in compared:
        known, total = np.isfinite(truth), total + truth.size
        truth, error = truth[known], (value - truth)[known]
        squared, truth_squared = squared + np.square(error).sum(), truth_squared + np.square(truth).sum()
        worst, count = np.maximum(worst, np.abs(error).max(initial=0)), count + error.size  # keeps a NaN
    if not count:
        if reference:
            raise UserError(f"reference {reference.name}: no finite value to compare with; give another")
        if total:
            raise UserError(f"{problem.options.equation}: its solution is nowhere finite; correct the equation")
        return {}
    return ({} if count == total else {"compared": count / total}) | {
        "rel_l2": math.sqrt(squared / max(truth_squared, 1e-300)),
        "linf": float(worst),
        "rmse": math.sqrt(squared / count),
    }


def against_answer(problem: PDE, field: Field) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Values and answer [n, C] over a lattice of `resolution` points per axis, `MOST` altogether."""
    dim = len(problem.axes)
    side = min(problem.options.resolution, int(MOST ** (1 / dim)))
    first, *others = [
        torch.linspace(low, high, side, dtype=torch.float64)
        for low, high in zip(problem.box.low, problem.box.high, strict=True)
    ]
    for part in first.split(max(1, STRIP // side ** (dim - 1))):
        points = grid_points([part, *others])
        truth = problem.truth(points)
        if truth is None:
            return
        yield problem.values(field, points).double().cpu().numpy(), truth.cpu().numpy()


def against_map(
    problem: PDE, field: Field, shape: tuple[int, int], reference: Source
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Values and reference [n, C] over the lattice of the map."""
    expected = (*shape, problem.channels)
    if tuple(reference.shape) != expected:
        raise UserError(f"reference {reference.name}: its shape {tuple(reference.shape)} is not the map's {expected}")
    for y0, y1, points in map_strips(problem, shape):
        truth = reference.read(y0, y1, 0, shape[1]).astype(np.float64).reshape(len(points), -1)
        yield problem.values(field, points).double().cpu().numpy(), truth


def map_strips(problem: PDE, shape: tuple[int, int]) -> Iterator[tuple[int, int, Tensor]]:
    """First row, row after the last, and points [rows W, D] of the strips of a map."""
    lines = problem.lattice_lines(shape)
    rows = max(1, STRIP // shape[1])
    for y0 in range(0, shape[0], rows):
        y1 = min(y0 + rows, shape[0])
        yield y0, y1, grid_points(lines if len(lines) == 1 else [lines[0][y0:y1], *lines[1:]])


def residual(problem: PDE, field: Field, seed: int) -> float:
    """Root mean square of the equation's residual, all equations together, at points that training has not seen."""
    rng = np.random.default_rng([seed, STREAM])
    low, high = (torch.tensor(end, dtype=torch.float64) for end in (problem.box.low, problem.box.high))
    points = low + (high - low) * torch.from_numpy(rng.random((FRESH, len(low))))
    found = problem.residual(problem.evaluate(field, points, problem.order), points)
    return float(found.double().square().sum(1).mean().sqrt())


def on_face(problem: PDE, field: Field, condition: Given) -> dict[str, float]:
    """rms and max of what a condition says is zero, on a lattice of its face, of the part where it holds; of both jumps
    where it is periodic."""
    side = min(problem.options.resolution, 1001)
    lines = [
        torch.linspace(low, high, side, dtype=torch.float64)
        for low, high in zip(problem.box.low, problem.box.high, strict=True)
    ]
    found = problem.unweighted_on(field, condition, lines)
    return {"rms": float(found.square().mean().sqrt()), "max": float(found.abs().max())}


def coefficients(problem: PDE, field: Field) -> dict[str, dict[str, float]]:
    """The unknowns' values; where they are known also true ones and the relative error."""
    table, true = {}, problem.true_coefficients()
    for name, value in problem.coefficients(field).items():
        table[name] = {"value": value}
        if name in true:
            error = abs(value - true[name]) / max(abs(true[name]), 1e-300)
            table[name] |= {"true": true[name], "relative_error": error}
    return table
