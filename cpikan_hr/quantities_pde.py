"""What a map of an equation's field can show, on the lattice of `problem.resolution` points per axis, ends included.

Coordinates of a block are those of the lattice: k is point k of an axis, fractions lie in between; rows are the first
axis, columns the second, a line has one row. Derivatives are with respect to the equation's own coordinates.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cpikan_hr.errors import UserError
from cpikan_hr.problems import PDE, build_problem
from cpikan_hr.problems.pde import grid_points
from cpikan_hr.training.weights import Trained

EQUATION_MAPS = ("value", "gradient", "laplacian", "residual", "error")

Block = Callable[[Tensor, Tensor], np.ndarray]


def lattice_coordinates(low: int, high: int, count: int, scale: float) -> Tensor:
    """Lattice coordinates, float64, of the output points of lattice points low to high - 1 of `count`.

    The whole lattice of round(count * scale) points reaches from end to end; a region is a part of it.
    """
    whole = max(1, round(count * scale))
    first = min(round(low * scale), whole - 1)
    last = max(first + 1, min(round(high * scale), whole))
    return torch.arange(first, last, dtype=torch.float64) * ((count - 1) / max(whole - 1, 1))


def lattice_note(about: dict, quantity: str) -> str:
    """What a map's file says of its axes."""
    ends = zip(about["axes"], about["box"]["low"], about["box"]["high"], strict=True)
    return f"{about['equation']}, {quantity}; rows, then columns: " + ", ".join(
        f"{axis} from {low:g} to {high:g}" for axis, low, high in ends
    )


def points_at(lines: list[Tensor], ys: Tensor, xs: Tensor) -> Tensor:
    """Points [h w, D] at lattice coordinates, of the lines of the lattice along each axis."""
    if len(lines) == 1:
        return between(lines[0], xs)[:, None]
    return grid_points([between(lines[0], ys), between(lines[1], xs), *lines[2:]])


def between(line: Tensor, at: Tensor) -> Tensor:
    """A lattice line at its own coordinates: linear between its points, at whole numbers the points themselves."""
    below = at.floor().long().clamp(0, max(len(line) - 2, 0))
    above = (below + 1).clamp_max(len(line) - 1)
    share = at - below
    inner = line[below] + share * (line[above] - line[below])
    return torch.where(share == 1, line[above], inner)


def equation_quantity(trained: Trained, name: str) -> tuple[str, int, Block]:
    """Unit, channels and block (`quantities.Quantity`) of one of EQUATION_MAPS.

    UserError for another one, and where the equation has no second derivatives, or no known answer.
    """
    field, recipe, _ = trained
    if name not in EQUATION_MAPS:
        raise UserError(f"--quantity {name}: is for heights from frames; an equation has {', '.join(EQUATION_MAPS)}")
    problem = build_problem(recipe)
    axes, lines = problem.axes, problem.lattice_lines(problem.shape)
    space = [k for k, axis in enumerate(axes) if axis != "t"]
    if name == "laplacian" and problem.order != "hessian":
        raise UserError(f"--quantity laplacian: {problem.name} has no second derivatives; give value or gradient")
    if name == "error" and problem.truth(points_at(lines, torch.zeros(1), torch.zeros(1)).double()) is None:
        raise UserError(f"--quantity error: {problem.name} has no known answer; give another quantity")
    units = {
        "gradient": ", ".join(f"1 / {axis}" for axis in axes),
        "laplacian": " + ".join(f"1 / {axes[k]}^2" for k in space),
    }
    channels = {"gradient": problem.channels * len(axes), "residual": problem.residual_width}

    def block(ys: Tensor, xs: Tensor) -> np.ndarray:
        values = _values(problem, field, points_at(lines, ys, xs), name, space)
        return values.reshape(len(ys), len(xs), -1).float().cpu().numpy()

    return units.get(name, problem.unit), channels.get(name, problem.channels), block


def _values(problem: PDE, field, points: Tensor, name: str, space: list[int]) -> Tensor:
    """A quantity [n, C'] at points [n, D]. gradient: all of d/d(first axis), then of the next; the Laplacian is that of
    space."""
    channels = problem.channels
    if name == "value":
        return problem.values(field, points)
    if name == "error":
        return problem.values(field, points).cpu() - problem.truth(points)
    if name == "gradient":
        gradient = problem.evaluate(field, points, "gradient").gradient[..., :channels]
        return torch.cat(gradient.unbind(0), dim=-1)
    if name == "residual":
        return problem.residual(problem.evaluate(field, points, problem.order), points)
    jet = problem.evaluate(field, points, "hessian")
    dim = len(problem.axes)
    diagonal = [k * dim - k * (k - 1) // 2 for k in space]  # of the Hessian's upper triangle
    return jet.hessian[diagonal].sum(0)[..., :channels]
