"""Hard constraints: u = lift + factor * N satisfies values on faces and velocities whatever N is (Lagaris et al. 1998).

`factor` vanishes on the constrained faces, and as the square where a velocity is given too; it is a product of
polynomials of one axis each, of maximum about 1. `lift` takes the values there: one axis after the other is
interpolated linearly (transfinite interpolation, Gordon and Hall 1973), which is exact where the conditions agree on
their common edges. Axes with a velocity come first. An equation may bring a lift of its own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cpikan_hr.errors import UserError
from cpikan_hr.jets import Jet, add, multiply
from cpikan_hr.problems.equations.base import Condition, Equation, Function, Periodic, function_jet

SAME = 1e-9  # how well both ends have to agree, over the largest value


@dataclass(frozen=True)
class Faces:
    """What is given on the two faces of one axis; None where nothing is."""

    axis: str
    low: Function | None
    high: Function | None
    velocity: Function | None


class Ansatz:
    """The lift and the factor of an equation's hard conditions. UserError where they cannot be hard."""

    def __init__(self, equation: Equation, hard: list[Condition | Periodic]):
        self.equation = equation
        self.domain = equation.domain()
        given: dict[str, dict[str, Function]] = {}
        for condition in hard:
            if isinstance(condition, Condition):
                name = "velocity" if condition.derivative else condition.side
                given.setdefault(condition.axis, {})[name] = condition.value
        self.faces = [Faces(axis, f.get("low"), f.get("high"), f.get("velocity")) for axis, f in given.items()]
        self.faces.sort(key=lambda faces: faces.velocity is None)
        for faces in self.faces:
            if faces.velocity is not None and faces.high is not None:
                raise UserError(
                    f"problem.constraints: hard values on both faces of {faces.axis} and a velocity do not go "
                    "together; use soft"
                )

    def rows(self, points: Tensor, order: str) -> tuple[Tensor, Tensor]:
        """Jet rows of the lift [n, R, C] and of the factor [n, R, 1] at float64 points [n, D]."""
        axes, channels = self.equation.axes, self.equation.channels
        lift = function_jet(self.lift, points, axes, order, channels)
        factor = function_jet(self.factor, points, axes, order)
        return lift.rows.transpose(0, 1), factor.rows.transpose(0, 1)

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
        own = self.equation.lift(**at) if self.faces else None
        return self._lift(len(self.faces), at) if own is None else own

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


def hard_conditions(
    equation: Equation, conditions: list[Condition | Periodic], constraints: str
) -> list[Condition | Periodic]:
    """Those of the equation's conditions that `constraints` makes exact.

    soft: none; values: values and velocities; hard: periodicity too.
    """
    if constraints == "soft":
        return []
    circle = constraints == "hard"
    return [c for c in conditions if is_hard(c, equation, circle)]


def is_hard(condition: Condition | Periodic, equation: Equation, circle: bool = True) -> bool:
    """Whether the ansatz, or the circle that networks see, can satisfy it.

    Slopes only as velocities beside a value; beside periodicity by the circle only what is periodic itself.
    """
    if isinstance(condition, Periodic):
        return circle
    if condition.derivative:
        beside = [c for c in equation.conditions() if isinstance(c, Condition) and c.axis == condition.axis]
        value = next((c for c in beside if c.side == "low" and not c.derivative), None)
        if condition.side != "low" or value is None or not is_hard(value, equation, circle):
            return False
    around = [c.axis for c in equation.conditions() if isinstance(c, Periodic)]
    return not circle or all(_repeats(condition, axis, equation) for axis in around)


def _repeats(condition: Condition, axis: str, equation: Equation) -> bool:
    """Whether what is given on a face, and its slope, are the same at both ends of `axis`: the lift takes them on."""
    if condition.axis == axis:
        return False
    ends = equation.domain()
    lines = [torch.linspace(*ends[name], 17, dtype=torch.float64) for name in equation.axes]
    lines[equation.axes.index(axis)] = torch.tensor(ends[axis], dtype=torch.float64)
    lines[equation.axes.index(condition.axis)] = torch.tensor([ends[condition.axis][condition.side == "high"]]).double()
    points = torch.cartesian_prod(*lines)
    order = points[:, equation.axes.index(axis)].argsort(stable=True)
    jet = function_jet(condition.value, points[order], equation.axes, "gradient", equation.channels)
    rows = torch.stack([jet.value, jet.gradient[equation.axes.index(axis)]])
    low, high = rows.chunk(2, dim=1)
    return bool(((high - low).abs().amax((1, 2)) <= SAME * rows.abs().amax((1, 2)).clamp_min(1)).all())


def constrained(network: Jet, lift: Jet, factor: Jet) -> Jet:
    """lift + factor * N, [R, n, C]."""
    return add(lift, multiply(network, factor))
