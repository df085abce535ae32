"""Second-order minimisation after the first-order updates: all residuals at fixed points, in one process or several.

Processes share the points; what they add up is the same on all of them, and so are the steps they take.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from cpikan_hr.fields import Field
from cpikan_hr.problems.batches import Batches
from cpikan_hr.problems.pde import PDE
from cpikan_hr.processes import Processes
from cpikan_hr.recipe import Recipe
from cpikan_hr.solvers.levenberg_marquardt import levenberg_marquardt
from cpikan_hr.solvers.objective import Step
from cpikan_hr.solvers.quasi_newton import quasi_newton
from cpikan_hr.solvers.residuals import Residuals
from cpikan_hr.solvers.schwarz import schwarz
from cpikan_hr.training import checkpoints
from cpikan_hr.training.display import Preview
from cpikan_hr.training.stopping import Stop
from cpikan_hr.training.tensors import load_tensors
from cpikan_hr.training.trackers import Tracker

PATIENCE = 10  # iterations over which the loss has to fall


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
    options, training = recipe.solve, recipe.training
    done, state = 0, None
    if checkpoint is not None:
        state = load_tensors(checkpoint / checkpoints.SOLVE)
        done = checkpoints.step_of(checkpoint) - training.steps
        Residuals(field, problem).assign(state.pop("theta"))
        if options.redraw_every and done % options.redraw_every == 0:
            state = None  # fresh points begin here
    losses: list[float] = []
    while done < options.iterations:
        draw = done // options.redraw_every if options.redraw_every else 0
        left = options.iterations - done
        if options.redraw_every:
            left = min(left, options.redraw_every - done % options.redraw_every)
        before = done
        for step in iterations(field, problem, recipe, processes, draw, left, state):
            done, state = done + 1, step.state
            losses.append(step.loss)
            number = training.steps + done
            tracker.update(problem.collocation.total)
            if done % training.log_every == 0 or done == options.iterations:
                told = {"loss": step.loss, "grad_norm": step.gradient_norm, "evaluations": step.evaluations}
                tracker.log(number, told | residual_figure(field, problem, draw) | problem.told(field))
                preview.draw(field)
            if training.checkpoint_steps and done % training.checkpoint_steps == 0:
                kept = {"theta": step.theta, **step.state}
                checkpoints.save_second_order(
                    run, number, kept, batches.state(), field, processes, training.keep
                )
            if stop.agreed(processes) or settled(losses, options.tolerance):
                return number
        if done == before:  # no step lowers the loss any more
            tracker.say(f"no step lowers the loss after {training.steps + done} steps")
            break
        if options.redraw_every:
            state = None
    return training.steps + done


def iterations(
    field: Field,
    problem: PDE,
    recipe: Recipe,
    processes: Processes,
    draw: int,
    count: int,
    state: dict[str, Tensor] | None,
) -> Iterator[Step]:
    """At most `count` iterates of the recipe's method; the field has their parameters."""
    options = recipe.solve

    def residuals(piece: int | None) -> Residuals:
        return Residuals(field, problem, draw, processes.rank, processes.ranks, piece=piece)

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
        loss.residuals.assign(step.theta)
        yield step


@torch.no_grad()
def residual_figure(field: Field, problem: PDE, draw: int) -> dict[str, float]:
    """The root mean square residual of the equation at some of the points."""
    some = Residuals(field, problem, draw, most=2000)
    terms = [term for term in some.terms if term.group.kind == "residual"]
    squared = sum(float(some.bare(t, some.rows(t)).square().sum()) for t in terms)
    weight = max(problem.options.weights.get("residual", 1.0), 1e-300)
    name, value = problem.figure(squared / sum(len(t.weight) for t in terms) / weight)
    return {name: value}


def settled(losses: list[float], tolerance: float) -> bool:
    """Whether the loss has stopped to fall."""
    return bool(tolerance) and len(losses) > PATIENCE and losses[-1] > losses[-1 - PATIENCE] * (1 - tolerance)

