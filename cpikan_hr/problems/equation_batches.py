"""What an update sees of an equation, and what follows from its residuals: new points, new weights."""

from collections.abc import Callable

import torch
from torch import Tensor

from cpikan_hr.errors import UserError
from cpikan_hr.jets import Jet
from cpikan_hr.problems.batches import Batches
from cpikan_hr.problems.non_finite import first_fault
from cpikan_hr.recipe import Recipe

CHUNK = 16384  # points of a pool evaluated at once


class EquationBatches(Batches):
    """The shares of a problem's collocation points."""

    def __init__(self, problem):
        self.problem, self.points_of, self.weighting = problem, problem.collocation, problem.weighting
        self._draw = 0  # of the points whose times are told
        self._place_times()

    def points(self, step: int) -> int:
        return self.points_of.total

    def read(self, step: int, share: int, shares: int, region=None) -> dict[str, Tensor]:
        return self.points_of.read(step, share, shares)

    def sampled(self) -> int:
        return self.points_of.total

    def sample(self, share: int, shares: int) -> dict[str, Tensor]:
        return self.points_of.read(0, share, shares)

    def check(self, shares: int) -> None:
        interior = self.problem.options.points.interior
        if interior < shares:
            raise UserError(
                f"problem.points.interior is {interior}: give at least one per process and micro-batch, {shares} here"
            )

    def prepare(self, step: int, evaluate: Callable[[Tensor, str], Jet]) -> bool:
        refine = self.problem.options.refine
        if refine and step and step % refine.every == 0:
            pool = self.points_of.pool(step, refine.pool)
            sizes = [self._size(piece, evaluate) for piece in pool.split(CHUNK)]
            self.points_of.refine(step, pool, torch.cat(sizes), refine.power, refine.floor)
            self.weighting.forget_points()
            self._place_times()
            return True
        if self.points_of.draw_of(step) != self._draw:
            self._place_times(self.points_of.draw_of(step))
        return False

    def _size(self, points: Tensor, evaluate: Callable[[Tensor, str], Jet]) -> Tensor:
        """|r| [n] at interior points."""
        problem, jet = self.problem, evaluate(points, self.problem.order)
        size = problem.residual(problem.solved_at(jet, points), points).detach().cpu().norm(dim=1)
        if not size.isfinite().all():
            lift, factor = problem.ansatz.rows(points, jet.order) if problem.ansatz else (None, None)
            values = points.new_zeros(len(points), problem.channels)
            found = first_fault(problem, self.points_of.groups[0], jet, points, values, lift, factor)
            raise UserError(f"problem.refine: no points can be drawn by the residual: {found}")
        return size

    def _place_times(self, draw: int = 0) -> None:
        self._draw = draw
        if self.problem.options.causal:
            self.weighting.place(self.problem.slices(self.points_of.placed(draw)[0][0].points))

    def finish(self, total: Callable[[Tensor], Tensor]) -> None:
        self.weighting.finish(total)

    def state(self) -> dict[str, Tensor]:
        return self.weighting.state() | self.points_of.state()

    def seen(self, recipe: Recipe, steps: int) -> dict[str, Tensor]:
        """Interior points of the last draw, and what `Collocation.state` says of those drawn by the residual."""
        solved, every = steps - recipe.training.steps, recipe.solve.redraw_every
        draw = self.points_of.draw_of(max(steps - 1, 0))
        if solved > 0:
            draw = (solved - 1) // every if every else 0
        return self.points_of.seen(draw)

    def restore(self, state: dict[str, Tensor]) -> None:
        if not state:
            return
        self.weighting.restore(state)
        self.points_of.restore(state)
        self._place_times()
