"""Diffusion with a nonlinear reaction, steady; meant for inverse problems as well."""

from dataclasses import dataclass

import torch

from cpikan_hr.problems.equations.base import dirichlet
from cpikan_hr.problems.equations.checks import check_positive
from cpikan_hr.problems.equations.closed_form import ClosedForm


@dataclass(frozen=True)
class ReactionDiffusion(ClosedForm):
    """D u_xx + kappa tanh(u) = f on [-L, L], with f and the values at the ends of u = sin(w x)^3.

    Yang, Meng & Karniadakis 2021, B-PINNs (arXiv:2003.06097): D = 0.01, kappa = 0.7, w = 6, L = 0.7. D and kappa can be
    unknown: f stays that of the values given.
    """

    diffusivity: float = 0.01  # D
    reaction: float = 0.7  # kappa
    wave_number: float = 6.0  # w
    half_width: float = 0.7  # L

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "half_width")

    def domain(self):
        return {"x": (-self.half_width, self.half_width)}

    def source(self, x):
        """f, from the closed form: u_xx = 6 w^2 sin cos^2 - 3 w^2 sin^3."""
        given = self.given
        sine, cosine = torch.sin(given.wave_number * x), torch.cos(given.wave_number * x)
        u_xx = 3 * given.wave_number**2 * sine * (2 * cosine**2 - sine**2)
        return given.diffusivity * u_xx + given.reaction * torch.tanh(sine**3)

    def residual(self, u, x):
        return self.diffusivity * u.xx + self.reaction * torch.tanh(u.value) - self.source(x)

    def conditions(self):
        return dirichlet("x", self.solution)

    def solution(self, x):
        return torch.sin(self.given.wave_number * x) ** 3
