"""What every equation asks of its parameters."""

from typing import Any

from torch import Tensor

from cpikan_hr.errors import UserError


def check_positive(equation: Any, *names: str) -> None:
    """UserError unless each of these parameters is larger than zero. An unknown (a tensor) may be what it likes."""
    for name in names:
        value = getattr(equation, name)
        if not isinstance(value, Tensor) and not value > 0:
            what = "a domain with no extent" if name == "half_width" else "nothing to solve"
            raise UserError(f"{type(equation).__name__}: {name} = {value} leaves {what}; give a number above 0")
