"""What the pixels around say of a height: a truncated quadratic prior on orders.

    penalty(k) = PENALTY * mean over neighbours n of min(1, |h_k - h_n| / half an order)^2

where a neighbour counts by its confidence, 0 to 1. Source: A. Blake and A. Zisserman, Visual Reconstruction, 1987,
there on heights.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

PENALTY = 32.0  # chi-square that wholly different surroundings weigh: odds of exp(16) against a jump by an order
REACH = 2  # neighbours are the pixels of a square of 2 REACH + 1
FEW = 0.25  # neighbours weigh less where their confidence is less than this part of what it can be


class Neighbours:
    """The maps [h, w] of heights (nm) and confidences, as they are when this is made.

    `spacing`: between the heights of two orders, in nm. `region`: pixels of one number >= 0 are decided as one.
    """

    def __init__(self, height: Tensor, margin: Tensor, valid: Tensor, spacing: float, region: Tensor | None = None):
        # A border of pixels that say nothing spares every neighbour the question whether it is inside.
        confidence = torch.where(valid, (margin / PENALTY).clamp(0, 1), 0)
        self.around, self.confidence = (pad(each, [REACH] * 4) for each in (height, confidence))
        self.region = None if region is None else pad(region, [REACH] * 4, value=-1)
        self.scale = 2 / spacing

    def penalty(self, heights: Tensor, iy: Tensor, ix: Tensor) -> Tensor:
        """Penalty [K, n] of the candidates' heights [K, n] at pixels (iy, ix) [n].

        Pixels of the same region go along: they stay as far apart as they are.
        """
        total, weights = torch.zeros_like(heights), torch.zeros_like(heights[0])
        side = range(2 * REACH + 1)
        here = self.around[iy + REACH, ix + REACH]
        own = None if self.region is None else self.region[iy + REACH, ix + REACH]
        for dy, dx in ((dy, dx) for dy in side for dx in side if (dy, dx) != (REACH, REACH)):
            place = iy + dy, ix + dx
            weight, there = self.confidence[place], self.around[place]
            distance = heights - there
            if own is not None:
                distance = torch.where(self.region[place] == own, here - there, distance)
            distance *= self.scale
            distance *= distance
            total += distance.clamp_max_(1) * weight
            weights += weight
        return total * (PENALTY / weights.clamp_min(FEW * (len(side) ** 2 - 1)))
