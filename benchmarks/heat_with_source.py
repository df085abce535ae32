"""DeepXDE's diffusion example as an equation of ours, for `pdes.py`."""

import math
from dataclasses import dataclass

import torch

from cpikan_hr.problems.equations.base import Equation, dirichlet, initial


@dataclass(frozen=True)
class HeatWithSource(Equation):
    """u_t = u_xx - exp(-t) (1 - pi^2) sin(pi x) on [-1, 1] x [0, 1], with u = exp(-t) sin(pi x)."""

    def domain(self):
        return {"x": (-1.0, 1.0), "t": (0.0, 1.0)}

    def residual(self, u, x, t):
        return u.t - u.xx + torch.exp(-t) * (1 - math.pi**2) * torch.sin(math.pi * x)

    def conditions(self):
        return [*initial(lambda x, t: torch.sin(math.pi * x)), *dirichlet("x", lambda x, t: 0 * x)]

    def solution(self, x, t):
        return torch.exp(-t) * torch.sin(math.pi * x)
