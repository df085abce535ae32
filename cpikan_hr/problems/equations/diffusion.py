"""Diffusion of a sine over a wide domain."""

import math
from dataclasses import dataclass

import torch

from cpikan_hr.problems.equations.base import dirichlet, initial
from cpikan_hr.problems.equations.checks import check_positive
from cpikan_hr.problems.equations.closed_form import ClosedForm


@dataclass(frozen=True)
class Diffusion(ClosedForm):
    """u_t = alpha u_xx, u(x, 0) = sin(pi x), u = 0 at x = -L and L, t in [0, 1].

    u = exp(-alpha pi^2 t) sin(pi x); where the half width L is no integer, the ends follow it. Mostajeran & Faroughi
    2025, Scaled-cPIKANs (arXiv:2501.02762, defined as in the authors' code), with L = 6; L up to 50 is harder.
    """

    alpha: float = 0.1
    half_width: float = 6.0

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "alpha", "half_width")

    def domain(self):
        return {"x": (-self.half_width, self.half_width), "t": (0.0, 1.0)}

    def residual(self, u, x, t):
        return u.t - self.alpha * u.xx

    def conditions(self):
        whole = float(self.given.half_width).is_integer()
        ends = (lambda x, t: torch.zeros_like(t)) if whole else self.solution
        return [*initial(lambda x, t: torch.sin(math.pi * x)), *dirichlet("x", ends)]

    def solution(self, x, t):
        return torch.exp(-self.given.alpha * math.pi**2 * t) * torch.sin(math.pi * x)
