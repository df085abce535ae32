"""Tiles that are good enough leave the training: their weights are frozen, the optimizer forgets them.

Invariant: what goes on trains exactly as if the others had only been held fixed. Weights, moments and averages keep the
rows of the tiles that train, and a pixel is left out where none of them sees it.
"""

from cpikan_hr.fields import Field
from cpikan_hr.problems import Problem
from cpikan_hr.processes import Processes
from cpikan_hr.recipe import Recipe
from cpikan_hr.solvers.optimizers import build_optimizer, carry_state
from cpikan_hr.solvers.settling import settled_tiles
from cpikan_hr.training.update import Updater


def settle(
    updater: Updater, before: Field, problem: Problem, recipe: Recipe, groups: int | None, processes: Processes
) -> int:
    """Collective. Lets tiles of the recipe's first `groups` levels (None: all) leave; how many in all still train.

    `before`: the field that trains, whole. Where some leave, `updater` has another field and optimizer; where none
    would stay, all is as before.
    """
    tolerance = recipe.training.settle_rmse
    leaving = settled_tiles(before, recipe.field, groups, problem.target, problem.shape, tolerance, processes)
    count = sum(int(tiles.sum()) for tiles in leaving.values())
    left = before.trained_tiles - count
    if not count or not left:
        return left
    after, rows = before.settle(leaving)
    optimizer = build_optimizer(after, recipe.training, recipe.field)
    carry_state(updater.optimizer.optimizer, updater.states(), before, optimizer, after, rows)
    updater.replace(after, optimizer, rows)
    return left
