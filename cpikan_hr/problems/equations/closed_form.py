"""Equations whose answer is known in closed form, and whose data are made from it."""

from dataclasses import dataclass, field

from cpikan_hr.problems.equations.base import Equation


@dataclass(frozen=True)
class ClosedForm(Equation):
    """An equation with a closed form. Its source, conditions and solution are made with the parameters of `given`.

    `given` is the equation as it was first built. A copy in which an inverse problem has put an unknown (by
    `dataclasses.replace` or `copy.copy`) keeps it, so that the data do not follow the unknown.
    """

    _given: "ClosedForm | None" = field(default=None, repr=False, compare=False, kw_only=True)

    def __post_init__(self):
        if self._given is None:
            object.__setattr__(self, "_given", self)

    @property
    def given(self):
        return self._given
