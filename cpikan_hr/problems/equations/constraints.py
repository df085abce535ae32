"""Hard constraints: u = lift + factor * N satisfies values on faces and velocities whatever N is (Lagaris et al. 1998).

`factor` vanishes on the constrained faces, and as the square where a velocity is given too; it is a product of
polynomials of one axis each, of maximum about 1. `lift` takes the values there: one axis after the other is
interpolated linearly (transfinite interpolation, Gordon and Hall 1973), which is exact where the conditions agree on
their common edges. Axes with a velocity come first.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cpikan_hr.errors import UserError
from cpikan_hr.jets import Jet, add, multiply
from cpikan_hr.problems.equations.base import Condition, Equation, Function, Periodic, function_jet


@dataclass(frozen=True)
class Faces:
    """What is given on the two faces of one axis; None where nothing is."""

    axis: str
    low: Function | None
    high: Function | None
    velocity: Function | None


class Ansatz:
    """The lift and the factor of an equation's hard conditions. UserError where they cannot be hard."""

    def __init__(self, equation: Equation):
        self.equation = equation
        self.domain = equation.domain()
        given: dict[str, dict[str, Function]] = {}
        for condition in equation.conditions():
            if isinstance(condition, Condition) and is_hard(condition, equation):
                name = "velocity" if condition.derivative else condition.side
                given.setdefault(condition.axis, {})[name] = condition.value
        self.faces = [Faces(axis, f.get("low"), f.get("high"), f.get("velocity")) for axis, f in given.items()]
        self.faces.sort(key=lambda faces: faces.velocity is None)
        for faces in self.faces:
            if faces.velocity is not None and faces.high is not None:
                raise UserError(
                    f"problem.constraints: hard values on both faces of {faces.axis} and a velocity do not go together; "
                    "use soft"
                )

    def jets(self, points: Tensor, order: str) -> tuple[Jet, Jet]:
        """Lift [R, n, C] and factor [R, n, 1] at float64 points [n, D]."""
        axes, channels = self.equation.axes, self.equation.channels
        return (
            function_jet(self.lift, points, axes, order, channels),
            function_jet(self.factor, points, axes, order),
        )

    def factor(self, **at: Tensor) -> Tensor:
        product = torch.ones_like(next(iter(at.values())))
        for faces in self.faces:
            s = self._unit(faces.axis, at)
            if faces.low is not None:
                product = product * (s * s if faces.velocity is not None else s)
            if faces.high is not None:
                product = product * (1 - s)
            if faces.low is not None and faces.high is not None:
                product = 4 * product
        return product

    def lift(self, **at: Tensor) -> Tensor:
        return self._lift(len(self.faces), at)

    def _lift(self, count: int, at: dict[str, Tensor]) -> Tensor:
        """The lift of the first `count` axes."""
        if not count:
            return torch.zeros_like(next(iter(at.values())))
        faces = self.faces[count - 1]
        low, high = self.domain[faces.axis]
        s = self._unit(faces.axis, at)

        def missing(value: Function, end: float) -> Tensor:
            there = at | {faces.axis: torch.full_like(at[faces.axis], end)}
            return value(**there) - self._lift(count - 1, there)

        total = self._lift(count - 1, at)
        both = faces.low is not None and faces.high is not None
        if faces.low is not None:
            total = total + missing(faces.low, low) * (1 - s if both else 1)
        if faces.high is not None:
            total = total + missing(faces.high, high) * (s if both else 1)
        if faces.velocity is not None:  # axes with one come first, so that nothing before has a slope here
            there = at | {faces.axis: torch.full_like(at[faces.axis], low)}
            total = total + (at[faces.axis] - low) * faces.velocity(**there)
        return total

    def _unit(self, axis: str, at: dict[str, Tensor]) -> Tensor:
        low, high = self.domain[axis]
        return (at[axis] - low) / (high - low)


def is_hard(condition: Condition | Periodic, equation: Equation) -> bool:
    """Whether the ansatz, or the circle that networks see, can satisfy it: slopes only as velocities beside a value."""
    if isinstance(condition, Periodic) or not condition.derivative:
        return True
    beside = [c for c in equation.conditions() if isinstance(c, Condition) and c.axis == condition.axis]
    return condition.side == "low" and any(c.side == "low" and not c.derivative for c in beside)


def constrained(network: Jet, lift: Jet, factor: Jet) -> Jet:
    """lift + factor * N, [R, n, C]."""
    return add(lift, multiply(network, factor))
