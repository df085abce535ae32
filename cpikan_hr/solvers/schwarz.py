"""L-BFGS preconditioned by Schwarz iterations over blocks of parameters.

Each iteration first lets every block of the objective (a layer, a sub-domain) take some L-BFGS iterations with the
others frozen, then makes one global L-BFGS step from where that led. Additive: all blocks start from the same iterate
and the sum of their corrections is one direction, searched along. Multiplicative: each starts where the one before
ended. Kopanicakova, Kothari, Karniadakis and Krause 2023, "Enhancing training of physics-informed neural networks using
domain-decomposition based preconditioning strategies" (arXiv 2306.17648), ASPQN and MSPQN. As there, the global step's
secant pair begins at the preconditioned iterate; beyond that, the way to this iterate gives a pair as well, for free.
"""

from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor

from cpikan_hr.errors import UserError
from cpikan_hr.solvers.line_search import search
from cpikan_hr.solvers.objective import Counted, Objective, Restricted, Step
from cpikan_hr.solvers.quasi_newton import Limited, advance, quasi_newton, usable

METHODS = ("additive_schwarz", "multiplicative_schwarz")
LOCAL = 10  # iterations of a block

Iterate = tuple[Tensor, float, Tensor]  # theta, loss, gradient


def schwarz(
    objective: Objective,
    theta: Tensor,
    method: str,
    iterations: int,
    state: dict[str, Tensor] | None = None,
    *,
    local: int = LOCAL,
) -> Iterator[Step]:
    """Minimises from theta [n], float64; one `Step` per outer iteration, ending early where nothing lowers the loss.

    method: one of `METHODS`. state: as for `quasi_newton`. local: iterations of each block per outer iteration.
    """
    if method not in METHODS:
        raise UserError(f"solver {method!r} is not one of {', '.join(METHODS)}")
    precondition = additive if method == "additive_schwarz" else multiplicative
    state = state or {}
    metric = Limited(state)
    counted = Counted(objective, int(state.get("evaluations", 0)))
    now = (theta, *counted.gradient(theta))
    for _ in range(iterations):
        better = precondition(counted, now, local)
        if better is not None:
            s, y = better[0] - now[0], better[2] - now[2]
            if usable(s, y):
                metric.update(s, y)
        moved = advance(counted, *(better or now), metric)
        if moved is None and better is None:
            return
        now = moved or better
        theta, loss, gradient = now
        count = torch.tensor(counted.count)
        yield Step(theta, loss, float(gradient.norm()), counted.count, metric.state() | {"evaluations": count})


def additive(objective: Objective, now: Iterate, local: int) -> Iterate | None:
    """All blocks from the same iterate, their corrections searched along as one; None where that leads nowhere."""
    theta, loss, gradient = now
    direction = torch.zeros_like(theta)
    for block in objective.blocks:
        found = _solve_block(objective, theta, block, local)
        if found is not None:
            direction[block] = found.theta - theta[block]
    best = search(objective, theta, loss, gradient, direction)
    return None if best is None else (best.theta, best.loss, best.gradient)


def multiplicative(objective: Objective, now: Iterate, local: int) -> Iterate | None:
    """Block after block; None where none of them lowers the loss."""
    theta, moved = now[0], False
    for block in objective.blocks:
        found = _solve_block(objective, theta, block, local)
        if found is not None:
            theta, moved = theta.index_copy(0, block, found.theta), True
    return (theta, *objective.gradient(theta)) if moved else None


def _solve_block(objective: Objective, theta: Tensor, block: Tensor, local: int) -> Step | None:
    local_steps = quasi_newton(Restricted(objective, theta, block), theta[block], "lbfgs", local)
    return next(iter(deque(local_steps, maxlen=1)), None)
