"""What every equation asks of its parameters, and what its conditions have to be."""

from typing import Any

import torch
from torch import Tensor

from cpikan_hr.errors import UserError, explained
from cpikan_hr.problems.equations.base import Condition, Equation, Periodic


def check_positive(equation: Any, *names: str) -> None:
    """UserError unless each of these parameters is larger than zero. An unknown (a tensor) may be what it likes."""
    for name in names:
        value = getattr(equation, name)
        if not isinstance(value, Tensor) and not value > 0:
            what = "a domain with no extent" if name == "half_width" else "nothing to solve"
            raise UserError(f"{type(equation).__name__}: {name} = {value} leaves {what}; give a number above 0")


def checked_conditions(equation: Equation, name: str) -> list[Condition | Periodic]:
    """The conditions, each tried at one point of its face. UserError for one that is no condition of this box."""
    ends = equation.domain()
    try:
        conditions = list(equation.conditions())
    except Exception as error:
        raise UserError(f"{name}: conditions() raised {_told(error)}; correct the equation") from None
    names: set[str] = set()
    for condition in conditions:
        if not isinstance(condition, Condition | Periodic):
            raise UserError(f"{name}: conditions() holds {condition!r}; unpack lists: [*initial(...), *dirichlet(...)]")
        where = f"{name}: condition {condition.name!r}"
        if condition.name in names:
            raise UserError(f"{where} is there twice; give each a name of its own")
        names.add(condition.name)
        if condition.axis not in ends:
            raise UserError(f"{where} is on axis {condition.axis!r}; the axes are {', '.join(ends)}")
        if isinstance(condition, Condition):
            if condition.side not in ("low", "high") or condition.derivative not in (0, 1):
                raise UserError(f"{where}: its side is 'low' or 'high', its derivative 0 or 1")
            _try(condition, ends, equation.channels, where)
    return conditions


def _try(condition: Condition, ends: dict[str, tuple[float, float]], channels: int, where: str) -> None:
    at = {axis: torch.full((1, 1), sum(pair) / 2, dtype=torch.float64) for axis, pair in ends.items()}
    at[condition.axis].fill_(ends[condition.axis][condition.side == "high"])
    try:
        value = condition.value(**at)
        finite = bool(torch.as_tensor(value, dtype=torch.float64).expand(1, channels).isfinite().all())
    except Exception as error:
        raise UserError(f"{where}: its value({', '.join(ends)}) raised {_told(error)}; correct the equation") from None
    if not finite:
        raise UserError(f"{where}: its value is not finite; correct the equation")


def _told(error: Exception) -> str:
    return explained(error)
