"""Quasi-Newton iterations over all data at once: BFGS, its self-scaled relatives, and L-BFGS.

Dense methods keep the inverse Hessian H [n, n] and update it in O(n^2) by the self-scaled Broyden family

    H+ = (H - Hy Hy' / y'Hy + phi y'Hy v v') / tau + s s' / y's,      v = s / y's - Hy / y'Hy,

with s the step and y the change of the gradient. BFGS has tau = phi = 1. "ssbfgs" has tau = min(1, y's / s'Bs), B the
inverse of H (Oren and Luenberger 1974, bounded by Al-Baali 1998), "ssbroyden" also chooses phi (Al-Baali and Khalfan
2005), in the form of Urban, Stefanou and Pons 2025, "Unveiling the optimization process of physics informed neural
networks", eqs. 13-23. L-BFGS: Nocedal and Wright 2006, algorithm 7.4.
"""

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from cpikan_hr.errors import UserError
from cpikan_hr.solvers.line_search import CURVATURE, search
from cpikan_hr.solvers.objective import Counted, Objective, Step

HISTORY = 50  # pairs that L-BFGS keeps
DENSE = ("bfgs", "ssbfgs", "ssbroyden")
METHODS = (*DENSE, "lbfgs")
DENSE_LIMIT = 20_000  # parameters: 3.2 GB of inverse Hessian


class Metric(Protocol):
    """An approximate inverse Hessian."""

    def times(self, gradient: Tensor) -> Tensor:
        """H gradient, [n]."""
        ...

    def update(self, s: Tensor, y: Tensor, curvature: float) -> None:
        """Takes in a step s and the change y of the gradient over it; curvature: s'Bs, B the inverse of H."""
        ...

    def reset(self) -> None:
        """Forgets all but its scale."""
        ...

    def state(self) -> dict[str, Tensor]: ...


class Scaled:
    """Scale times identity: what a metric is before its first pair. Scale 0: not known yet, the length is free."""

    def __init__(self, state: dict[str, Tensor]):
        self.scale = float(state.get("scale", 0.0))

    def times(self, gradient: Tensor) -> Tensor:
        return (self.scale or 1 / max(1.0, float(gradient.norm()))) * gradient

    def state(self) -> dict[str, Tensor]:
        return {"scale": torch.tensor(self.scale, dtype=torch.float64)}


class Dense(Scaled):
    """The whole matrix, [n, n]. It begins as (y's / y'y) I of its first pair (Nocedal and Wright, eq. 6.20)."""

    def __init__(self, method: str, state: dict[str, Tensor]):
        super().__init__(state)
        self.method = method
        matrix = state.get("inverse_hessian")
        self.matrix = None if matrix is None else matrix.clone()

    def times(self, gradient: Tensor) -> Tensor:
        return super().times(gradient) if self.matrix is None else self.matrix @ gradient

    def update(self, s: Tensor, y: Tensor, curvature: float) -> None:
        self.scale = float(s @ y) / float(y @ y)
        if self.matrix is None:
            self.matrix = torch.eye(len(s), dtype=s.dtype, device=s.device).mul_(self.scale)
            curvature = float(s @ s) / self.scale
        if not update_inverse_hessian(self.matrix, s, y, curvature, self.method):
            self.reset()

    def reset(self) -> None:
        self.matrix = None

    def state(self) -> dict[str, Tensor]:
        return super().state() | ({} if self.matrix is None else {"inverse_hessian": self.matrix})


class Limited(Scaled):
    """The last pairs, [k, n] each, applied by the two-loop recursion."""

    def __init__(self, state: dict[str, Tensor], history: int = HISTORY):
        super().__init__(state)
        self.history = history
        self.s, self.y = state.get("s"), state.get("y")

    def times(self, gradient: Tensor) -> Tensor:
        if self.s is None:
            return super().times(gradient)
        q, weights = gradient.clone(), []
        inverse = (self.s * self.y).sum(1).reciprocal().tolist()
        for s, y, rho in zip(reversed(self.s), reversed(self.y), reversed(inverse), strict=True):
            weights.append(rho * float(s @ q))
            q.sub_(y, alpha=weights[-1])
        q.mul_(self.scale)
        for s, y, rho, weight in zip(self.s, self.y, inverse, reversed(weights), strict=True):
            q.add_(s, alpha=weight - rho * float(y @ q))
        return q

    def update(self, s: Tensor, y: Tensor, curvature: float = 0.0) -> None:
        self.scale = float(s @ y) / float(y @ y)
        self.s = s[None] if self.s is None else torch.cat([self.s[1 - self.history :], s[None]])
        self.y = y[None] if self.y is None else torch.cat([self.y[1 - self.history :], y[None]])

    def reset(self) -> None:
        self.s = self.y = None

    def state(self) -> dict[str, Tensor]:
        return super().state() | ({} if self.s is None else {"s": self.s, "y": self.y})


def update_inverse_hessian(matrix: Tensor, s: Tensor, y: Tensor, curvature: float, method: str) -> bool:
    """H [n, n] in place, so that H y = s; it stays symmetric, and positive definite where y's > 0.

    curvature: s'Bs with B the inverse of H; for a step a d along d = -H g it is -a^2 d'g. Returns False, H being as it
    was, where rounding has taken H's positive definiteness.
    """
    hy = matrix @ y
    ys, yhy = float(y @ s), float(y @ hy)
    if yhy <= 0:
        return False
    tau, phi = scaling(yhy / ys, curvature / ys, len(s), method)
    v = s / ys - hy / yhy
    matrix.addr_(hy, hy, beta=1 / tau, alpha=-1 / (tau * yhy))
    matrix.addr_(v, v, alpha=phi * yhy / tau)
    matrix.addr_(s, s, alpha=1 / ys)
    return True


def scaling(h: float, b: float, size: int, method: str) -> tuple[float, float]:
    """tau and phi from h = y'Hy / y's and b = s'Bs / y's, for `size` parameters."""
    if method == "bfgs":
        return 1.0, 1.0
    tau = min(1.0, 1 / b)
    a = h * b - 1  # not negative, by Cauchy and Schwarz
    if method == "ssbfgs" or a <= 1e-12 * h * b:  # s along Hy: phi has no effect
        return tau, 1.0
    c = math.sqrt(a / (1 + a))
    rho = min(1.0, h / ((1 + a) * (1 + c)))  # h (1 - c), without its cancellation
    theta = max((rho - 1) / a, min(1 / rho, (1 - b) / b))
    sigma = max(rho, 1 + a * theta)  # no less, whatever rounding leaves of it
    root = sigma ** (-1 / (size - 1))
    tau = tau * min(root, 1 / theta) if theta > 0 else min(tau * root, sigma)
    return tau, (1 - theta) / sigma


def usable(s: Tensor, y: Tensor) -> bool:
    """Whether a pair has curvature to learn from: y's > 0, and more than rounding."""
    return float(y @ s) > torch.finfo(s.dtype).eps * float(y.norm()) * float(s.norm())


def metric_of(method: str, state: dict[str, Tensor], size: int) -> Metric:
    """Raises: UserError for an unknown method, or too many parameters for a dense one."""
    if method not in METHODS:
        raise UserError(f"solver {method!r} is not one of {', '.join(METHODS)}")
    if method == "lbfgs":
        return Limited(state)
    if size > DENSE_LIMIT:
        raise UserError(
            f"solver {method}: {size} parameters need an inverse Hessian of {8e-9 * size**2:.0f} GB; use lbfgs, "
            f"or at most {DENSE_LIMIT} parameters"
        )
    return Dense(method, state)


def quasi_newton(
    objective: Objective,
    theta: Tensor,
    method: str,
    iterations: int,
    state: dict[str, Tensor] | None = None,
    *,
    curvature: float = CURVATURE,
) -> Iterator[Step]:
    """Minimises from theta [n], float64; one `Step` per iteration, ending early where no step lowers the loss.

    method: one of `METHODS`. state: of the step that had this theta; loss and gradient are evaluated again, so the
    objective may be another one by then. curvature: the line search's, less is more exact.
    """
    state = state or {}
    metric = metric_of(method, state, len(theta))
    counted = Counted(objective, int(state.get("evaluations", 0)))
    loss, gradient = counted.gradient(theta)
    for _ in range(iterations):
        moved = advance(counted, theta, loss, gradient, metric, curvature)
        if moved is None:
            return
        theta, loss, gradient = moved
        count = torch.tensor(counted.count)
        yield Step(theta, loss, float(gradient.norm()), counted.count, metric.state() | {"evaluations": count})


def advance(
    objective: Objective, theta: Tensor, loss: float, gradient: Tensor, metric: Metric, curvature: float = CURVATURE
) -> tuple[Tensor, float, Tensor] | None:
    """One iteration: theta, loss and gradient after it, and the metric with its pair; None where there is no step.

    Where the metric's direction leads nowhere, it is reset once.
    """
    for again in (False, True):
        if again:
            metric.reset()
        direction = -metric.times(gradient)
        found = search(objective, theta, loss, gradient, direction, curvature=curvature)
        if found is not None:
            s, y = found.theta - theta, found.gradient - gradient
            if usable(s, y):
                metric.update(s, y, -(found.length**2) * float(direction @ gradient))
            return found.theta, found.loss, found.gradient
    return None
