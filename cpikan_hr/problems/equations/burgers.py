"""The viscous Burgers equation: a sine that steepens into a shock layer."""

import math
from dataclasses import dataclass

import torch

from cpikan_hr.problems.equations.base import Equation, dirichlet, initial
from cpikan_hr.problems.equations.checks import check_positive
from cpikan_hr.problems.equations.spectral import at_points, burgers


@dataclass(frozen=True)
class Burgers(Equation):
    """u_t + u u_x = nu u_xx on [-1, 1] x [0, 1], u(x, 0) = -sin(pi x), u = 0 at both ends.

    Basdevant et al. 1986 (Computers & Fluids 14) with nu = 0.01 / pi; Raissi, Perdikaris & Karniadakis 2019.
    """

    nu: float = 0.01 / math.pi

    def __post_init__(self):
        check_positive(self, "nu")

    def domain(self):
        return {"x": (-1.0, 1.0), "t": (0.0, 1.0)}

    def residual(self, u, x, t):
        return u.t + u.value * u.x - self.nu * u.xx

    def conditions(self):
        return [
            *initial(lambda x, t: -torch.sin(math.pi * x)),
            *dirichlet("x", lambda x, t: torch.zeros_like(t)),
        ]

    def solution(self, x, t):
        """By Cole and Hopf's transformation (`spectral.burgers`); carries no derivatives."""
        return at_points(burgers(float(self.nu)), x, t)
