"""Small equations with small fields in float64 for tests, and their residuals and derivatives by plain autograd."""

import torch

from cpikan_hr.fields import Field
from cpikan_hr.problems.pde import PDE
from cpikan_hr.recipe import Recipe

CPIKAN = {"kind": "cpikan", "hidden": [3], "degree": 3}
NETWORKS = {
    "cpikan": {"kind": "cpikan", "hidden": [3, 3], "degree": 3, "layer_norm": True},
    "siren": {"kind": "siren", "hidden": [4, 4], "first_omega": 3.0, "hidden_omega": 2.0},
    "fourier_mlp": {"kind": "fourier_mlp", "hidden": [4, 4], "bands": 1, "activation": "tanh"},
    "chebyshev2d": {"kind": "chebyshev2d", "degree": 4, "input_map": "identity"},
}


def make(
    equation, grids, network=CPIKAN, *, level=None, window="quintic", seed=0, **problem
) -> tuple[Recipe, PDE, Field]:
    """A recipe, its problem and its field with random weights.

    `grids`: one per level; `level`: options of all levels; the rest are options of the problem.
    """
    levels = [{"grid": list(grid), "network": network, **(level or {})} for grid in grids]
    recipe = Recipe.model_validate(
        {
            "output": "unused",
            "problem": {"kind": "pde", "equation": str(equation), **problem},
            "field": {"precision": "double", "window": window, "levels": levels},
            "training": {"steps": 0, "seed": seed},
        }
    )
    problem = PDE(recipe)
    return recipe, problem, build(recipe, problem)


def build(recipe: Recipe, problem: PDE) -> Field:
    field = Field.build(recipe.field, problem.extent, problem.channels, recipe.training.seed, box=problem.box)
    generator = torch.Generator().manual_seed(recipe.training.seed)
    with torch.no_grad():
        for parameter in field.levels.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return field


def random_points(problem: PDE, count: int, seed: int = 0) -> torch.Tensor:
    """Points [n, D] in the box."""
    low, high = (torch.tensor(end, dtype=torch.float64) for end in (problem.box.low, problem.box.high))
    return low + (high - low) * torch.rand(count, len(low), generator=torch.Generator().manual_seed(seed)).double()


def rows_by_autograd(field: Field, problem: PDE) -> torch.Tensor:
    """All residuals [m] over the root of the number in their group, with a graph to the parameters: group by group,
    residual by residual, equation by equation."""
    found = []
    for group, (placed, lift, factor) in zip(problem.groups, problem.collocation.placed(), strict=True):
        jet = problem.solved(field(placed.points, problem.order), lift, factor)
        found.append((problem.residuals(group, jet, placed.points, placed.values) / group.count**0.5).flatten())
    return torch.cat(found)


def jacobian_by_autograd(field: Field, rows: torch.Tensor) -> torch.Tensor:
    """Derivatives [m, n] of rows by the parameters: level after level, tile after tile, then the constants."""
    groups = [list(level.network.parameters()) for level in field.levels]
    constants = [] if field.constants is None else [field.constants.values]
    flat = [p for group in groups for p in group] + constants
    lines = []
    for row in rows:
        found = iter(torch.autograd.grad(row, flat, retain_graph=True, allow_unused=True, materialize_grads=True))
        parts = [torch.cat([next(found).reshape(len(p), -1) for p in group], dim=1).flatten() for group in groups]
        lines.append(torch.cat([*parts, *found]))
    return torch.stack(lines)


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Whether the largest difference is below `tolerance` times the largest value."""
    return found.shape == expected.shape and bool((found - expected).abs().max() <= tolerance * expected.abs().max())
