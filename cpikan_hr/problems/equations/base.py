"""What a new equation says of itself: a box, a residual, conditions on its faces, and an answer where one is known.

    @dataclass(frozen=True)
    class Heat(Equation):
        '''u_t = alpha u_xx, u(x, 0) = sin(pi x), u = 0 at both ends.'''

        alpha: float = 0.1

        def domain(self):
            return {"x": (-1.0, 1.0), "t": (0.0, 1.0)}

        def residual(self, u, x, t):
            return u.t - self.alpha * u.xx

        def conditions(self):
            return [*initial(lambda x, t: torch.sin(math.pi * x)), *dirichlet("x", lambda x, t: 0 * x)]

Its fields are the parameters of the recipe (`problem.parameters`), and any of them can be made an unknown of an inverse
problem (`problem.unknown`): then it is a tensor when `residual` sees it.

Invariant: every function here gets one tensor [n, 1] per axis, by the axis's name, and gives a tensor that broadcasts
with them; coordinates are in the units of the equation, never scaled.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from cpikan_hr.jets import Jet, pairs

Function = Callable[..., Tensor]


class Solution:
    """u and its derivatives at n points by name: `u.value`, `u.x`, `u.t`, `u.xx`, `u.xt`, each [n, C].

    AttributeError for anything else: jets go up to second derivatives.
    """

    def __init__(self, jet: Jet, axes: tuple[str, ...]):
        self._jet, self._axes = jet, axes

    @property
    def value(self) -> Tensor:
        return self._jet.value

    def __getattr__(self, name: str) -> Tensor:
        if name.startswith("_"):
            raise AttributeError(name)
        axes = sorted(self._axes.index(axis) if axis in self._axes else -1 for axis in name)
        if axes[0] < 0 or len(axes) > 2:
            raise AttributeError(f"u.{name}: there is u.value and its first and second derivatives, {self._names()}")
        if len(axes) == 1:
            return self._jet.gradient[..., axes[0], :, :]
        return self._jet.hessian[..., pairs(len(self._axes)).index(tuple(axes)), :, :]

    def _names(self) -> str:
        names = [*self._axes, *(self._axes[i] + self._axes[j] for i, j in pairs(len(self._axes)))]
        return ", ".join(f"u.{name}" for name in names)


@dataclass(frozen=True)
class Condition:
    """u, or its derivative along the face's normal axis, equals `value` on the face `axis` = low or high of the box."""

    name: str
    axis: str
    side: str  # "low" or "high"
    value: Function
    derivative: int = 0  # 0: of u; 1: of its first derivative along `axis`


@dataclass(frozen=True)
class Periodic:
    """u and its first derivative along `axis` are the same on the low and the high face."""

    axis: str

    @property
    def name(self) -> str:
        return f"periodic_{self.axis}"


def initial(value: Function, velocity: Function | None = None, axis: str = "t") -> list[Condition]:
    """u, and where given u_t, at the beginning of time."""
    given = [Condition("initial", axis, "low", value)]
    return given + ([Condition("velocity", axis, "low", velocity, 1)] if velocity else [])


def dirichlet(axis: str, value: Function) -> list[Condition]:
    """u on both faces of an axis."""
    return [Condition(f"{axis}_{side}", axis, side, value) for side in ("low", "high")]


def neumann(axis: str, slope: Function) -> list[Condition]:
    """The derivative of u along `axis` on both of its faces."""
    return [Condition(f"{axis}_{side}_slope", axis, side, slope, 1) for side in ("low", "high")]


@dataclass(frozen=True)
class Equation(ABC):
    """Base class: a frozen dataclass whose fields are the equation's parameters, all with defaults.

    `axes` come from `domain`; `channels`: how many functions u has.
    """

    channels: ClassVar[int] = 1

    @abstractmethod
    def domain(self) -> dict[str, tuple[float, float]]:
        """Lower and upper end of each axis, in order; time, where there is one, is called t and comes last."""

    @abstractmethod
    def residual(self, u: Solution, **at: Tensor) -> Tensor:
        """What the equation says is zero, [n, K], K equations."""

    @abstractmethod
    def conditions(self) -> list[Condition | Periodic]:
        """What holds on the faces of the box."""

    def lift(self, **at: Tensor) -> Tensor | None:
        """A function of its own that takes the hard values on their faces; None: polynomials do (`constraints.py`).

        For what no network should have to resolve, such as the first moments of a beginning with a kink.
        """
        return None

    def solution(self, **at: Tensor) -> Tensor | None:
        """The answer [n, C] at float64 points: a closed form, or a spectral solver's; None where none is known."""
        return None

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(self.domain())


def coordinates(points: Tensor, axes: tuple[str, ...]) -> dict[str, Tensor]:
    """Points [n, D] as one tensor [n, 1] per axis."""
    return {axis: points[:, k : k + 1] for k, axis in enumerate(axes)}


def function_jet(function: Function, points: Tensor, axes: tuple[str, ...], order: str, channels: int = 1) -> Jet:
    """The jet [R, n, C] of a function of the coordinates alone, by automatic differentiation; without a graph."""
    with torch.enable_grad():
        points = points.detach().requires_grad_()
        value = function(**coordinates(points, axes))
        value = torch.as_tensor(value, dtype=points.dtype).expand(len(points), channels)
        columns = [_scalar_rows(value[:, c], points, order) for c in range(channels)]
    return Jet(torch.stack(columns, dim=-1).detach(), order, points.shape[1])


def _scalar_rows(value: Tensor, points: Tensor, order: str) -> Tensor:
    """Rows [R, n] of one function [n] of the points."""
    rows = [value]
    if order != "value":
        first = _gradient(value, points)
        rows += list(first.unbind(1))
        if order in ("hessian", "laplacian"):
            second = [_gradient(first[:, i], points) for i in range(points.shape[1])]
            found = [second[i][:, j] for i, j in pairs(points.shape[1])]
            rows += found if order == "hessian" else [sum(second[i][:, i] for i in range(points.shape[1]))]
    return torch.stack(rows)


def _gradient(value: Tensor, points: Tensor) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(points)
    (found,) = torch.autograd.grad(value.sum(), points, create_graph=True, allow_unused=True)
    return torch.zeros_like(points) if found is None else found
