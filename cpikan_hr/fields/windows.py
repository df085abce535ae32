"""Ramps: how one tile hands over to the next across their overlap.

Invariant: s(0) = 0, s(1) = 1 and s(t) + s(1 - t) = 1, so that neighbouring windows, one falling as the other rises,
sum to one at every point without a division. Outside [0, 1] a ramp is constant.
"""

import math

import torch
from torch import Tensor


def ramp(t: Tensor, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Value, first and second derivative of the ramp with respect to t, any shape.

    quintic: 6 t^5 - 15 t^4 + 10 t^3, twice continuously differentiable.
    cosine: (1 - cos(pi t)) / 2, once.
    bump: f(t) / (f(t) + f(1 - t)) with f = exp(-1/t), infinitely often.
    """
    inside = (t > 0) & (t < 1)
    t = t.clamp(0, 1)
    if kind == "quintic":
        s = t**3 * (10 - 15 * t + 6 * t * t)
        s1 = 30 * t * t * (1 - t) ** 2
        s2 = 60 * t * (1 - t) * (1 - 2 * t)
    elif kind == "cosine":
        s = (1 - torch.cos(math.pi * t)) / 2
        s1 = math.pi / 2 * torch.sin(math.pi * t)
        s2 = math.pi**2 / 2 * torch.cos(math.pi * t)
    elif kind == "bump":
        # s is the logistic function of g = 1/(1 - t) - 1/t; near the ends it is constant beyond double precision.
        u = t.clamp(1e-3, 1 - 1e-3)
        g1 = (1 - u) ** -2 + u**-2
        g2 = 2 * (1 - u) ** -3 - 2 * u**-3
        s = torch.sigmoid(1 / (1 - u) - 1 / u)
        slope = s * torch.sigmoid(1 / u - 1 / (1 - u))
        s1 = slope * g1
        s2 = slope * ((1 - 2 * s) * g1 * g1 + g2)
        s = torch.where(t <= 0, torch.zeros_like(s), torch.where(t >= 1, torch.ones_like(s), s))
    else:
        raise ValueError(f"unknown ramp '{kind}'")
    zero = torch.zeros_like(t)
    return s, torch.where(inside, s1, zero), torch.where(inside, s2, zero)
