"""The wave equation on a string."""

import math
from dataclasses import dataclass

import torch

from cpikan_hr.errors import UserError
from cpikan_hr.problems.equations.base import dirichlet, initial
from cpikan_hr.problems.equations.checks import check_positive
from cpikan_hr.problems.equations.closed_form import ClosedForm


@dataclass(frozen=True)
class Wave(ClosedForm):
    """u_tt = c^2 u_xx on [0, 1] x [0, 1], u = 0 at both ends, u(x, 0) = sin(pi x), u_t(x, 0) = v sin(m pi x).

    u = cos(c pi t) sin(pi x) + v / (c m pi) sin(c m pi t) sin(m pi x): two standing waves, Strauss, Partial
    Differential Equations, sec. 4.1.
    """

    c: float = 2.0
    velocity: float = 2.0  # v
    mode: int = 4  # m

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "c")
        if self.mode < 1:
            raise UserError(f"Wave: mode = {self.mode} is no mode of a string; give a whole number from 1")

    def domain(self):
        return {"x": (0.0, 1.0), "t": (0.0, 1.0)}

    def residual(self, u, x, t):
        return u.tt - self.c**2 * u.xx

    def conditions(self):
        given = self.given
        start = initial(
            lambda x, t: torch.sin(math.pi * x), lambda x, t: given.velocity * torch.sin(given.mode * math.pi * x)
        )
        return [*start, *dirichlet("x", lambda x, t: torch.zeros_like(t))]

    def solution(self, x, t):
        given = self.given
        rate = given.c * given.mode * math.pi
        first = torch.cos(given.c * math.pi * t) * torch.sin(math.pi * x)
        return first + given.velocity / rate * torch.sin(rate * t) * torch.sin(given.mode * math.pi * x)
