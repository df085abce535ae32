"""How much Levenberg-Marquardt damps its next step: Nielsen's rule, for one system or each of a batch.

A step that lowers the loss by what the model predicted divides the damping by three, one that lowers it by half of that
leaves it, and steps that do not lower it raise it ever faster. H. B. Nielsen 1999, "Damping parameter in Marquardt's
method", IMM-REP-1999-05.
"""

from dataclasses import dataclass

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
