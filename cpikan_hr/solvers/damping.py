"""One damped step of Levenberg-Marquardt, (J'J + damping D) step = -J'r, for one problem or each of a batch.

D is the trust: diag(J'J), never below a share of its mean. A step that lowers the loss by what the model predicted
divides the damping by three, one that lowers it by half of that leaves it, and steps that do not lower it are not taken
and raise it ever faster. H. B. Nielsen 1999, "Damping parameter in Marquardt's method", IMM-REP-1999-05.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

SHRINK, GROWTH = 1 / 3, 2.0


@dataclass
class Damping:
    """`scale`: what multiplies the trust, float64, of any shape. `least`: below which it does not fall."""

    scale: Tensor
    growth: Tensor
    least: float = 1e-15

    @classmethod
    def of(cls, scale: Tensor, least: float = 1e-15) -> "Damping":
        return cls(scale, torch.full_like(scale, GROWTH), least)

    def learn(self, gain: Tensor, predicted: Tensor, accepted: Tensor) -> None:
        """`gain`: by how much a step lowered the loss, `predicted`: by how much the model said it would."""
        ratio = gain / predicted.clamp_min(1e-300)
        shrunk = self.scale * (1 - (2 * ratio - 1) ** 3).clamp_min(SHRINK)
        self.scale = torch.where(accepted, shrunk.clamp_min(self.least), self.scale * self.growth)
        self.growth = torch.where(accepted, GROWTH, 2 * self.growth)

    def pick(self, some: Tensor) -> "Damping":
        return Damping(self.scale[some], self.growth[some], self.least)


class System(Protocol):
    """Problems, each linearised where it is: gradient J'r [..., n] and trust [..., n]."""

    gradient: Tensor
    trust: Tensor

    def solve(self, damping: Tensor) -> Tensor:
        """Steps [..., n], to some accuracy; zero where the damped J'J is not positive definite in this precision."""
        ...

    def advance(self, step: Tensor) -> Tensor:
        """By how much each step lowers its loss [...]; those that do are taken, and the problems linearised there."""
        ...


def attempt(system: System, damping: Damping) -> Tensor:
    """One step of every problem; returns by how much it lowered its loss [...], not above 0 where it was not taken."""
    step = system.solve(damping.scale)
    predicted = (step * (damping.scale[..., None] * system.trust * step - system.gradient)).sum(-1)
    gain = system.advance(step)
    damping.learn(gain.double(), predicted.double(), gain > 0)
    return gain


def trust_of(diagonal: Tensor, floor: float, least: float) -> Tensor:
    """The trust of J'J with this diagonal [..., n]: `floor`, over its mean, and `least` are added."""
    return diagonal + floor * diagonal.mean(-1, keepdim=True) + least


def dense_step(matrix: Tensor, gradient: Tensor, trust: Tensor, damping: Tensor) -> Tensor:
    """The steps [..., n] of J'J as matrices [..., n, n], by Cholesky (see `System.solve`)."""
    damped = matrix.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(damping[..., None] * trust)
    factor, info = torch.linalg.cholesky_ex(damped)
    step = -torch.cholesky_solve(gradient[..., None], factor)[..., 0]
    return torch.where((info == 0)[..., None], step, 0.0)
