"""Orders that noise has got wrong, decided again with the help of the pixels around them.

An order that noise picks lies whole orders (2.5 um and more) from the true one, and hardly ever beats it by much:
its margin, the chi-square by which it fits better than the second best, is small. Every pixel of small margin is
decided again, by the chi-square of its own candidates plus a penalty for their distance from the heights around:

    cost(k) = chi_square(k) + PENALTY * mean over neighbours n of min(1, |h_k - h_n| / half an order)^2

where a neighbour counts by its own margin. This is a truncated quadratic prior (A. Blake and A. Zisserman, Visual
Reconstruction, 1987) on orders instead of heights.

Invariants
* A height only ever becomes another candidate of its own phases. Steps and particles, below half an order, stay.
* A margin of PENALTY or more can not be outweighed, so such a pixel is not even looked at.
* The result at a pixel depends on the pixels within `HALO` only.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from cpikan_hr.parallel import at_once

PENALTY = 32.0  # chi-square that wholly different surroundings weigh: odds of exp(16) against a jump by an order
DECIDED = 6.0  # margin that an order keeps in the end, or its pixel is undecided: odds of exp(3)
REACH = 2  # neighbours are the pixels of a square of 2 REACH + 1
PASSES = 4  # from one to the next, pixels without a confident neighbour see what their neighbours have become
HALO = REACH * PASSES
CHUNK = 16384  # pixels decided at a time
FEW = 0.25  # neighbours weigh less where their confidence is less than this part of what it can be

Candidates = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def repair_orders(height: Tensor, margin: Tensor, valid: Tensor, candidates: Candidates, spacing: float) -> Tensor:
    """Decides the doubtful pixels of `height` [h, w] (nm) again, in place; returns where that failed, bool [h, w].

    margin [h, w]: chi-square by which the best order fits better than the second best; updated in place too.
    valid [h, w]: pixels that are decided, and are listened to. `candidates(iy, ix)`: heights (nm) and chi-squares
    [K, n] of all orders of the pixels (iy, ix) [n]. `spacing`: between the heights of two orders, in nm.
    """
    y, x = torch.nonzero(valid & ~(margin >= PENALTY), as_tuple=True)
    looked_at = y, x
    for _ in range(PASSES):
        if not len(y):
            break
        # A border of pixels that say nothing spares every neighbour the question whether it is inside.
        around = pad(height, [REACH] * 4)
        confidence = pad(torch.where(valid, (margin / PENALTY).clamp(0, 1), 0), [REACH] * 4)
        chunk = at_once(CHUNK, height.device)
        for iy, ix in zip(y.split(chunk), x.split(chunk), strict=True):
            heights, cost = candidates(iy, ix)
            cost = cost + _penalty(heights, around, confidence, iy, ix, 2 / spacing)
            order = cost.argmin(dim=0, keepdim=True)
            height[iy, ix] = heights.gather(0, order)[0]
            margin[iy, ix] = cost.scatter(0, order, torch.inf).amin(dim=0) - cost.gather(0, order)[0]
        left = ~(margin[y, x] >= PENALTY)
        y, x = y[left], x[left]
    undecided = torch.zeros_like(valid)
    undecided[looked_at] = ~(margin[looked_at] >= DECIDED)
    return undecided


def _penalty(heights, around, confidence, iy, ix, scale) -> Tensor:
    """Penalty [K, n] of the candidates' heights [K, n] at pixels (iy, ix) of the maps inside their border."""
    total, weights = torch.zeros_like(heights), torch.zeros_like(heights[0])
    side = range(2 * REACH + 1)
    for dy, dx in ((dy, dx) for dy in side for dx in side if (dy, dx) != (REACH, REACH)):
        weight = confidence[iy + dy, ix + dx]
        distance = heights - around[iy + dy, ix + dx]
        distance *= scale
        distance *= distance
        total += distance.clamp_max_(1) * weight
        weights += weight
    return total * (PENALTY / weights.clamp_min(FEW * (len(side) ** 2 - 1)))
