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

Invariant: every function here gets one tensor [n, 1] per axis, by the axis's name, and gives one row per point, [n, C],
that follows from this point alone; a number is a constant (`columns.py`). Coordinates are in the units of the equation,
never scaled.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from cpikan_hr.problems.equations.conditions import (
    Condition,
    FaceResidual,
    Given,
    Periodic,
    dirichlet,
    initial,
    neumann,
)
from cpikan_hr.problems.equations.solution import Function, Solution, coordinates, function_jet

__all__ = [
    "Condition", "Equation", "FaceResidual", "Function", "Given", "Periodic", "Solution", "coordinates", "dirichlet",
    "function_jet", "initial", "neumann",
]  # fmt: skip


@dataclass(frozen=True)
class Equation(ABC):
    """Base class: a frozen dataclass whose fields are the equation's parameters, all with defaults.

    `axes` come from `domain`; `channels`: how many functions u has; `components`: their names where it has several, by
    which its residual and its conditions call them.
    """

    channels: ClassVar[int] = 1
    components: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **options):
        super().__init_subclass__(**options)
        if isinstance(vars(cls).get("components"), tuple | list) and "channels" not in vars(cls):
            cls.channels = len(cls.components)

    @abstractmethod
    def domain(self) -> dict[str, tuple[float, float]]:
        """Lower and upper end of each axis, in order; time, where there is one, is called t and comes last."""

    @abstractmethod
    def residual(self, u: Solution, **at: Tensor) -> Tensor:
        """What the equation says is zero, [n, K], or K of [n, 1]."""

    @abstractmethod
    def conditions(self) -> list[Given]:
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
