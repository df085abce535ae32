"""What holds on the faces of an equation's box: a value or a slope, a residual there, or periodicity.

    dirichlet("x", lambda x, t: 0.0)                                              u = 0 at both ends of x
    neumann("x", lambda x, t: torch.sin(t), side="high")                          u_x = sin t at the high end
    dirichlet("y", lambda x, y: 1.0, component="v", where=lambda x, y: x < 0.5)   v = 1 on a half of both faces of y
    FaceResidual("cooling", "x", "high", lambda u, x, t: u.x + 2 * u.value)       u_x + 2 u = 0 (Robin)
    Periodic("x")                                                                 u and u_x agree at both ends

What no condition names stays free: the other functions, faces and parts of faces.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cpikan_hr.errors import UserError
from cpikan_hr.problems.equations.columns import columns
from cpikan_hr.problems.equations.solution import Function, coordinates

TRIES = (1, 8, 1024)  # times as many points as are wanted, of which those on the part of a face are kept


@dataclass(frozen=True)
class Condition:
    """u, or its derivative along the face's normal axis, equals `value` on the face `axis` = low or high of the box.

    `component`: which of several functions, by name or number, [n, 1]; None: all of them, [n, C]. `where`: the part of
    the face on which it holds, a function of the coordinates that is true there; None: all of it.
    """

    name: str
    axis: str
    side: str  # "low" or "high"
    value: Function
    derivative: int = 0  # 0: of u; 1: of its first derivative along `axis`
    component: str | int | None = None
    where: Function | None = None


@dataclass(frozen=True)
class FaceResidual:
    """`residual`, a function of u and the coordinates as the equation's is, is zero on a face or, by `where`, a part.

    For Robin's condition and whatever else ties u and its derivatives, or several functions, together there.
    """

    name: str
    axis: str
    side: str  # "low" or "high"
    residual: Function
    where: Function | None = None


@dataclass(frozen=True)
class Periodic:
    """u and its first derivative along `axis` are the same on the low and the high face; one `component`, or all."""

    axis: str
    component: str | int | None = None

    @property
    def name(self) -> str:
        return f"periodic_{self.axis}{_suffix(self.component)}"


Given = Condition | FaceResidual | Periodic


def initial(
    value: Function, velocity: Function | None = None, axis: str = "t", component: str | int | None = None
) -> list[Condition]:
    """u, and where given u_t, at the beginning of time."""
    end = _suffix(component)
    given = [Condition(f"initial{end}", axis, "low", value, 0, component)]
    return given + ([Condition(f"velocity{end}", axis, "low", velocity, 1, component)] if velocity else [])


def dirichlet(
    axis: str,
    value: Function,
    component: str | int | None = None,
    side: str | None = None,
    where: Function | None = None,
) -> list[Condition]:
    """u on both faces of an axis, or on one `side`."""
    return _on_sides("", axis, value, 0, component, side, where)


def neumann(
    axis: str,
    slope: Function,
    component: str | int | None = None,
    side: str | None = None,
    where: Function | None = None,
) -> list[Condition]:
    """The derivative of u along `axis`, not outwards, on both of its faces, or on one `side`."""
    return _on_sides("_slope", axis, slope, 1, component, side, where)


def _on_sides(kind: str, axis: str, value: Function, derivative: int, component, side, where) -> list[Condition]:
    end = f"{kind}{_suffix(component)}"
    sides = ("low", "high") if side is None else (side,)
    return [Condition(f"{axis}_{name}{end}", axis, name, value, derivative, component, where) for name in sides]


def _suffix(component: str | int | None) -> str:
    return "" if component is None else f"_{component}"


def functions_of(condition: Condition | Periodic, equation) -> slice:
    """Which of the equation's functions it is for. UserError where there is no such one."""
    asked, names, channels = condition.component, equation.components, equation.channels
    if asked is None:
        return slice(0, channels)
    if isinstance(asked, str) and asked in names:
        return slice(names.index(asked), names.index(asked) + 1)
    if isinstance(asked, int) and not isinstance(asked, bool) and 0 <= asked < channels:
        return slice(asked, asked + 1)
    known = f"{', '.join(names)}, or " if names else ""
    raise UserError(
        f"condition {condition.name!r}: there is no component {asked!r}; give {known}a number from 0 to {channels - 1}"
    )


def values_of(condition: Condition, equation, at: dict[str, Tensor]) -> Tensor:
    """What the condition's functions, or their slopes, equal at coordinates [n, 1]: float64 [n, one or C]."""
    part = functions_of(condition, equation)
    count, where = len(next(iter(at.values()))), f"condition {condition.name!r}: value"
    return columns(condition.value(**at), count, part.stop - part.start, where).double()


def holds_at(condition: Condition | FaceResidual, points: Tensor, axes: tuple[str, ...]) -> Tensor:
    """At which points [n, D] of its face a condition holds, bool [n]."""
    if condition.where is None:
        return torch.ones(len(points), dtype=torch.bool)
    name = f"condition {condition.name!r}: where"
    found = condition.where(**coordinates(points, axes))
    kind = getattr(found, "dtype", type(found))
    if kind not in (bool, torch.bool) and getattr(kind, "kind", "") != "b":
        raise UserError(f"{name} gives {str(kind).removeprefix('torch.')}; give True or False, as x < 0.5 does")
    return columns(found, len(points), 1, name)[:, 0] > 0


def face_points(condition: Condition | FaceResidual, domain: dict, count: int, draw: Callable[[int], Tensor]) -> Tensor:
    """Points [count, D] where a condition holds, of those of the unit cube that `draw` gives, the first ones.

    UserError where it holds on next to nothing.
    """
    low, high = (torch.tensor([float(ends[k]) for ends in domain.values()], dtype=torch.float64) for k in (0, 1))
    axis = list(domain).index(condition.axis)
    for times in TRIES if condition.where is not None else (1,):
        points = low + (high - low) * draw(times * count)
        points[:, axis] = (low if condition.side == "low" else high)[axis]
        kept = points[holds_at(condition, points, tuple(domain))]
        if len(kept) >= count:
            return kept[:count]
    share = f"{len(kept)} of {len(points)} points of its face"
    raise UserError(f"condition {condition.name!r}: where is true at {share}; give a part of {condition.axis} = "
                    f"{float(domain[condition.axis][condition.side == 'high']):g} with an extent")
