"""The Allen-Cahn equation: phases that separate."""

import math
from dataclasses import dataclass

import torch

from cpikan_hr.errors import UserError
from cpikan_hr.problems.equations.base import Equation, Periodic, dirichlet, initial
from cpikan_hr.problems.equations.checks import check_positive
from cpikan_hr.problems.equations.spectral import allen_cahn_dirichlet, allen_cahn_periodic, at_points

_NEVER = 1e-30  # a time so early that nothing has spread; later than 0, where widths have no slope


def _beginning(x):
    return x**2 * torch.cos(math.pi * x)


@dataclass(frozen=True)
class AllenCahn(Equation):
    """u_t = D u_xx - rate (u^3 - u) on [-1, 1] x [0, 1], u(x, 0) = x^2 cos(pi x).

    `boundary` "periodic": u and u_x agree at both ends, D = 1e-4 (Raissi, Perdikaris & Karniadakis 2019, J. Comput.
    Phys. 378); "dirichlet": u = -1 at both ends, with D = 0.001 the example of DeepXDE (Lu et al. 2021).
    """

    diffusivity: float = 1e-4  # D
    rate: float = 5.0
    boundary: str = "periodic"

    def __post_init__(self):
        check_positive(self, "diffusivity", "rate")
        if self.boundary not in ("periodic", "dirichlet"):
            raise UserError(f"AllenCahn: boundary = {self.boundary!r} is unknown; give 'periodic' or 'dirichlet'")

    def domain(self):
        return {"x": (-1.0, 1.0), "t": (0.0, 1.0)}

    def residual(self, u, x, t):
        return u.t - self.diffusivity * u.xx + self.rate * (u.value**3 - u.value)

    def conditions(self):
        ends = [Periodic("x")] if self.boundary == "periodic" else dirichlet("x", lambda x, t: -torch.ones_like(t))
        return [*initial(lambda x, t: _beginning(x)), *ends]

    def lift(self, x, t):
        """The beginning, whose kink at the ends, u_x from -2 to 2 across them, spreads as the equation says there.

        u + 1 is small at the ends, so w_t = D w_xx - 2 rate w there, from w = 2 |xi| at distance xi on: exp(-2 rate t)
        times the heat equation's w. What is left to the field has no kink at t > 0.
        """
        if self.boundary != "periodic":
            return None
        width = torch.sqrt(4 * self.diffusivity * t.clamp_min(_NEVER))
        lift = _beginning(x)
        for xi in (1 + x, 1 - x):
            spread = width / math.sqrt(math.pi) * torch.exp(-((xi / width) ** 2)) - xi * torch.erfc(xi / width)
            lift = lift + 2 * torch.exp(-2 * self.rate * t) * spread
        return lift

    def solution(self, x, t):
        """By a spectral method (`spectral.py`); carries no derivatives."""
        solve = allen_cahn_periodic if self.boundary == "periodic" else allen_cahn_dirichlet
        return at_points(solve(float(self.diffusivity), float(self.rate)), x, t)
