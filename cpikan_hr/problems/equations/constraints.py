"""Hard constraints: u = lift + factor * N satisfies values on faces and velocities whatever N is (Lagaris et al. 1998).

`factor` vanishes on the constrained faces, and as the square where a velocity is given too; it is a product of
polynomials of one axis each, of maximum about 1. `lift` takes the values there: one axis after the other is
interpolated linearly (transfinite interpolation, Gordon and Hall 1973), which is exact where the conditions agree on
their common edges. Axes with a velocity come first. An equation may bring a lift of its own. Of several functions each
has a lift and a factor of its own: one that nothing is given for on a face is free there.

What no ansatz here can hold stays a term of the loss: slopes without a value, residuals on faces, parts of faces.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cpikan_hr.errors import UserError
from cpikan_hr.jets import Jet, add, multiply
from cpikan_hr.problems.equations.base import Condition, Equation, Function, Given, Periodic, function_jet
from cpikan_hr.problems.equations.columns import columns
from cpikan_hr.problems.equations.conditions import face_points, functions_of, values_of

SAME = 1e-9  # how well both ends have to agree, over the largest value
HELD = 1e-6  # how well the lift has to take the values, over the largest one
LOOKS = 64  # points of a face where that is looked at


@dataclass(frozen=True)
class Faces:
    """What is given to one function on the two faces of one axis, [n, 1]; None where nothing is."""

    axis: str
    low: Function | None
    high: Function | None
    velocity: Function | None


class Ansatz:
    """The lift and the factor of an equation's hard conditions. UserError where they cannot be hard."""

    def __init__(self, equation: Equation, hard: list[Given]):
        self.equation = equation
        self.domain = equation.domain()
        values = [condition for condition in hard if isinstance(condition, Condition)]
        self.faces = [self._faces(values, k) for k in range(equation.channels)]
        for condition in values:
            self._check(condition)

    def _faces(self, values: list[Condition], number: int) -> list[Faces]:
        """What one of the functions is given, axes with a velocity first."""
        given: dict[str, dict[str, Function]] = {}
        for condition in values:
            part = functions_of(condition, self.equation)
            if part.start <= number < part.stop:
                name = "velocity" if condition.derivative else condition.side
                given.setdefault(condition.axis, {})[name] = self._column(condition, number - part.start)
        found = [Faces(axis, f.get("low"), f.get("high"), f.get("velocity")) for axis, f in given.items()]
        for faces in found:
            if faces.velocity is not None and faces.high is not None:
                raise UserError(
                    f"problem.constraints: hard values on both faces of {faces.axis} and a velocity do not go "
                    "together; use soft"
                )
        return sorted(found, key=lambda faces: faces.velocity is None)

    def _column(self, condition: Condition, number: int) -> Function:
        return lambda **at: values_of(condition, self.equation, at)[:, number : number + 1]

    def _check(self, condition: Condition) -> None:
        """UserError unless the lift takes a condition's values, and their derivatives are known."""
        generator = torch.Generator().manual_seed(0)
        points = face_points(
            condition, self.domain, LOOKS,
            lambda count: torch.rand(count, len(self.domain), generator=generator, dtype=torch.float64),
        )  # fmt: skip
        axes, part = self.equation.axes, functions_of(condition, self.equation)
        inner = points.clone().requires_grad_()
        wanted = values_of(condition, self.equation, {axis: inner[:, k : k + 1] for k, axis in enumerate(axes)})
        size = HELD * float(wanted.detach().abs().max().clamp_min(1))
        if not wanted.requires_grad and bool((wanted - wanted[:1]).abs().max() > size):
            raise UserError(
                f"problem.constraints: condition {condition.name!r}: its value carries no derivatives, which hard "
                "constraints need; write it with torch functions of the coordinates, or use soft"
            )
        jet = function_jet(self.lift, points, axes, "gradient" if condition.derivative else "value", self._channels)
        found = jet.gradient[axes.index(condition.axis)] if condition.derivative else jet.value
        if bool((found[:, part] - wanted.detach()).abs().max() > size):
            raise UserError(
                f"problem.constraints: the lift does not take the values of condition {condition.name!r}: it does not "
                "agree with the others where their faces meet, or the equation's own lift is wrong; use soft"
            )

    @property
    def _channels(self) -> int:
        return self.equation.channels

    def rows(self, points: Tensor, order: str) -> tuple[Tensor, Tensor]:
        """Jet rows of the lift and of the factor [n, R, C] at float64 points [n, D]."""
        lift, factor = (
            function_jet(part, points, self.equation.axes, order, self._channels) for part in (self.lift, self.factor)
        )
        return lift.rows.transpose(0, 1), factor.rows.transpose(0, 1)

    def factor(self, **at: Tensor) -> Tensor:
        """[n, C]: what vanishes where a function is given."""
        return torch.cat([self._factor(faces, at) for faces in self.faces], dim=1)

    def _factor(self, given: list[Faces], at: dict[str, Tensor]) -> Tensor:
        product = torch.ones_like(next(iter(at.values())))
        for faces in given:
            s = self._unit(faces.axis, at)
            if faces.low is not None:
                product = product * (s * s if faces.velocity is not None else s)
            if faces.high is not None:
                product = product * (1 - s)
            if faces.low is not None and faces.high is not None:
                product = 4 * product
        return product

    def lift(self, **at: Tensor) -> Tensor:
        """[n, C]: what takes the values where a function is given."""
        own = self.equation.lift(**at) if any(self.faces) else None
        if own is not None:
            name = f"{type(self.equation).__name__}: lift"
            return columns(own, len(next(iter(at.values()))), self._channels, name)
        return torch.cat([self._lift(faces, at) for faces in self.faces], dim=1)

    def _lift(self, given: list[Faces], at: dict[str, Tensor]) -> Tensor:
        """The lift of one function by what is given on some axes."""
        if not given:
            return torch.zeros_like(next(iter(at.values())))
        *before, faces = given
        low, high = self.domain[faces.axis]
        s = self._unit(faces.axis, at)

        def missing(value: Function, end: float) -> Tensor:
            there = at | {faces.axis: torch.full_like(at[faces.axis], end)}
            return value(**there) - self._lift(before, there)

        total = self._lift(before, at)
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


def hard_conditions(equation: Equation, conditions: list[Given], constraints: str) -> list[Given]:
    """Those of the equation's conditions that `constraints` makes exact.

    soft: none; values: values and velocities; hard: periodicity of all functions too.
    """
    if constraints == "soft":
        return []
    circles = [c for c in conditions if isinstance(c, Periodic) and _all_of(c, equation)]
    around = circles if constraints == "hard" else []
    return [c for c in conditions if c in around or _is_hard(c, conditions, equation, [p.axis for p in around])]


def _all_of(condition: Periodic, equation: Equation) -> bool:
    """The circle that networks see is one for all functions."""
    return functions_of(condition, equation) == slice(0, equation.channels)


def _is_hard(condition: Given, conditions: list[Given], equation: Equation, around: list[str]) -> bool:
    """Whether the ansatz can satisfy it: values on whole faces, and slopes as velocities beside a value.

    `around`: the axes that are circles, beside which there is only what is periodic itself.
    """
    if not isinstance(condition, Condition) or condition.where is not None:
        return False
    if condition.derivative:
        part = functions_of(condition, equation)
        beside = [
            functions_of(c, equation)
            for c in conditions
            if isinstance(c, Condition) and (c.axis, c.side, c.derivative) == (condition.axis, "low", 0)
            and _is_hard(c, conditions, equation, around)
        ]  # fmt: skip
        covered = all(any(p.start <= k < p.stop for p in beside) for k in range(part.start, part.stop))
        if condition.side != "low" or not covered:
            return False
    return all(_repeats(condition, axis, equation) for axis in around)


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
    part = functions_of(condition, equation)
    count = part.stop - part.start
    jet = function_jet(lambda **at: values_of(condition, equation, at), points[order], equation.axes, "gradient", count)
    rows = torch.stack([jet.value, jet.gradient[equation.axes.index(axis)]])
    low, high = rows.chunk(2, dim=1)
    return bool(((high - low).abs().amax((1, 2)) <= SAME * rows.abs().amax((1, 2)).clamp_min(1)).all())


def constrained(network: Jet, lift: Jet, factor: Jet) -> Jet:
    """lift + factor * N, [R, n, C]."""
    return add(lift, multiply(network, factor))
