"""The Helmholtz equation in two dimensions."""

import math
from dataclasses import dataclass

import torch

from cpikan_hr.problems.equations.base import dirichlet
from cpikan_hr.problems.equations.checks import check_positive
from cpikan_hr.problems.equations.closed_form import ClosedForm


@dataclass(frozen=True)
class Helmholtz(ClosedForm):
    """u_xx + u_yy + k^2 u = q on [-L, L]^2, with q and the values on the faces of u = sin(a1 pi x) sin(a2 pi y).

    Wang, Teng & Perdikaris 2021 (SIAM J. Sci. Comput. 43) with k = 1, a1 = 1, a2 = 4, L = 1.
    """

    a1: float = 1.0
    a2: float = 4.0
    k: float = 1.0
    half_width: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "half_width")

    def domain(self):
        return {axis: (-self.half_width, self.half_width) for axis in ("x", "y")}

    def source(self, x, y):
        """q, from the closed form."""
        given = self.given
        return (given.k**2 - math.pi**2 * (given.a1**2 + given.a2**2)) * self.solution(x, y)

    def residual(self, u, x, y):
        return u.xx + u.yy + self.k**2 * u.value - self.source(x, y)

    def conditions(self):
        return [*dirichlet("x", self.solution), *dirichlet("y", self.solution)]

    def solution(self, x, y):
        return torch.sin(self.given.a1 * math.pi * x) * torch.sin(self.given.a2 * math.pi * y)
