"""Second-order minimisation after the first-order updates: all residuals at fixed points, in one process or several.

Processes share the points; what they add up is the same on all of them, and so are the steps they take.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cpikan_hr.errors import UserError
from cpikan_hr.fields import Field
from cpikan_hr.jets import Jet
from cpikan_hr.problems.batches import Batches
from cpikan_hr.problems.non_finite import first_fault
from cpikan_hr.problems.pde import PDE
from cpikan_hr.processes import Processes
from cpikan_hr.recipe import Recipe, SolveOptions
from cpikan_hr.solvers.levenberg_marquardt import levenberg_marquardt
from cpikan_hr.solvers.objective import Step
from cpikan_hr.solvers.quasi_newton import quasi_newton
from cpikan_hr.solvers.residuals import Residuals
from cpikan_hr.solvers.schwarz import schwarz
from cpikan_hr.solvers.time_window import Window
from cpikan_hr.training import checkpoints
from cpikan_hr.training.display import Preview
from cpikan_hr.training.stopping import Stop
from cpikan_hr.training.tensors import load_tensors
from cpikan_hr.training.trackers import Tracker

MOST, PIECE = 20000, 4096  # residuals of a term that are tried before the first step, and at once
PATIENCE = 10  # iterations over which the loss has to fall, and how many losses are kept


class SharedLoss:
    """The sum of squares of a field's residuals, over all processes, as a function of theta (`objective.Objective`)."""

    def __init__(self, residuals: Residuals, processes: Processes):
        self.residuals, self.processes, self.blocks = residuals, processes, residuals.blocks

    def gradient(self, theta: Tensor) -> tuple[float, Tensor]:
        self.residuals.assign(theta)
        loss, gradient = self.residuals.loss_and_gradient()
        both = torch.cat([gradient.double(), gradient.new_tensor([loss]).double()])
        self.processes.sum(both)
        return float(both[-1]), both[:-1]


def solve(
    field: Field,
    problem: PDE,
    batches: Batches,
    recipe: Recipe,
    run: Path,
    checkpoint: Path | None,
    processes: Processes,
    stop: Stop,
    tracker: Tracker,
    preview: Preview,
) -> int:
    """Collective. Iterates from where a checkpoint of this phase, or the updates, left off; returns the number of
    updates and iterations made.
    """
    training, todo = recipe.training, stages(problem, recipe.solve)
    done, first, spent, losses, state, kept = 0, 0, 0, [], None, None
    if checkpoint is not None:
        done = checkpoints.step_of(checkpoint) - training.steps
        saved = load_tensors(checkpoint / checkpoints.SOLVE)
        state = {name: value.to(field.device) for name, value in saved.items()}
        Residuals(field, problem).assign(state.pop("theta"))
        first, spent = state.pop("place").tolist()
        losses = state.pop("losses").tolist()
        if first < len(todo) and todo[first].over(spent, losses):
            first, spent, state = first + 1, 0, None
    for place, stage in enumerate(todo[first:], first):
        if stage.window is not None and not spent:
            losses = []
            stage.window.begin([level for level in field.levels if level.network is not None])
        for step in iterations(field, problem, recipe, processes, stage, stage.count - spent, state):
            done, spent = done + 1, spent + 1
            number = training.steps + done
            losses = [*losses, step.loss][-1 - PATIENCE :]
            tracker.update(problem.collocation.total)
            if done % training.log_every == 0 or stage is todo[-1] and stage.over(spent, losses):
                told = {"loss": step.loss, "grad_norm": step.gradient_norm, "evaluations": step.evaluations}
                tracker.log(number, told | residual_figure(field, problem, stage.draw) | problem.told(field))
                preview.draw(field)
            where = {"place": torch.tensor([place, spent]), "losses": torch.tensor(losses, dtype=torch.float64)}
            kept = {"theta": step.theta, **where, **step.state}
            if training.checkpoint_steps and done % training.checkpoint_steps == 0:
                checkpoints.save_second_order(run, number, kept, batches.state(), field, processes, training.keep)
            if stop.agreed(processes):
                return number
            if stage.over(spent, losses):
                break
        if not stage.over(spent, losses):
            try:
                check_finite(field, problem, processes, f"at step {training.steps + done}", stage.draw, stage.window)
            except UserError:
                if kept:  # the iterate before it
                    checkpoints.save_second_order(
                        run, training.steps + done, kept, batches.state(), field, processes, training.keep
                    )
                raise
        if stage.window is None and not stage.over(spent, losses):
            tracker.say(f"no step lowers the loss after {training.steps + done} steps")
        if stage.window is None and spent < stage.count:
            break
        spent, state = 0, None  # the next one is other residuals
    return training.steps + done


def check_start(field: Field, problem: PDE, recipe: Recipe, processes: Processes, whole: bool) -> None:
    """Collective. Tries the equation's functions on points of a new field, before anything is written.

    `whole`: whether the log will compare with the answer. UserError where a residual or its derivative is not finite;
    what the equation's own functions raise.
    """
    if recipe.training.steps and recipe.field.mode != "joint":
        return  # not all levels are there at the first update
    todo = stages(problem, recipe.solve)
    window = todo[0].window if todo and not recipe.training.steps else None
    if window is not None:
        window.begin([level for level in field.levels if level.network is not None])
    check_finite(field, problem, processes, "before the first step", window=window, most=MOST)
    with processes.together():
        if whole:
            problem.told(field)


def check_finite(
    field: Field,
    problem: PDE,
    processes: Processes,
    when: str,
    draw: int = 0,
    window: Window | None = None,
    most: int | None = None,
) -> None:
    """Collective. UserError where a residual of the field, or its derivative, is not finite: which, where and why."""
    with processes.together():
        some = Residuals(field, problem, draw, processes.rank, processes.ranks, most, PIECE, window)
        for term in some.terms:
            with torch.no_grad():
                jet = Jet(some.rows(term), term.order, term.points.shape[1])
            found = first_fault(problem, term.group, jet, term.points, term.values, term.lift, term.factor)
            if found:
                raise UserError(f"loss or gradient is not finite {when}: {found}")


@dataclass(frozen=True)
class Stage:
    """Iterations on the same residuals: those of a window of time, or of all times at one draw of the points."""

    count: int  # at most
    tolerance: float
    patience: int  # iterations over which the loss has to fall by this share
    window: Window | None = None
    draw: int = 0

    def over(self, spent: int, losses: list[float]) -> bool:
        """After so many iterations, which left these losses."""
        still = self.tolerance and len(losses) > self.patience
        return spent == self.count or bool(still and losses[-1] > losses[-1 - self.patience] * (1 - self.tolerance))


def stages(problem: PDE, options: SolveOptions) -> list[Stage]:
    found = []
    if options.march:
        march, time = options.march, problem.axes.index("t")
        windows = Window.split(time, problem.box.low[time], problem.box.high[time], march.windows)
        found = [Stage(march.iterations, march.tolerance, 1, window) for window in windows]
    every = options.redraw_every or max(options.iterations, 1)
    for draw, first in enumerate(range(0, options.iterations, every)):
        found.append(Stage(min(every, options.iterations - first), options.tolerance, PATIENCE, draw=draw))
    return found


def iterations(
    field: Field,
    problem: PDE,
    recipe: Recipe,
    processes: Processes,
    stage: Stage,
    count: int,
    state: dict[str, Tensor] | None,
) -> Iterator[Step]:
    """At most `count` iterates of the recipe's method; the field has their parameters."""
    options = recipe.solve

    def residuals(piece: int | None) -> Residuals:
        shared = processes.rank, processes.ranks
        return Residuals(field, problem, stage.draw, *shared, piece=piece, window=stage.window)

    if options.method == "levenberg_marquardt":
        yield from levenberg_marquardt(residuals, count, options.damping, options.dense, processes.sum, state)
        return
    loss = SharedLoss(residuals(None), processes)
    theta = loss.residuals.theta().double()
    if options.method.endswith("schwarz"):
        steps = schwarz(loss, theta, options.method, count, state, local=options.local)
    else:
        steps = quasi_newton(loss, theta, options.method, count, state)
    for step in steps:
        theta = step.theta
        loss.residuals.assign(theta)
        yield step
    loss.residuals.assign(theta)  # not that of the last trial, which was not taken


@torch.no_grad()
def residual_figure(field: Field, problem: PDE, draw: int) -> dict[str, float]:
    """The root mean square residual of the equation at some of the points."""
    some = Residuals(field, problem, draw, most=2000)
    terms = [term for term in some.terms if term.group.kind == "residual"]
    squared = sum(float(some.bare(t, some.rows(t)).square().sum()) for t in terms)
    weight = max(problem.options.weights.get("residual", 1.0), 1e-300)
    name, value = problem.figure(squared / sum(len(t.weight) for t in terms) / weight)
    return {name: value}
