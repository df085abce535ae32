"""Orders that noise has got wrong, decided again with the help of the pixels around them.

An order that noise picks lies whole orders (2.5 um and more) from the true one, and hardly ever beats it by much:
its margin, the chi-square by which it fits better than the second best, is small. Every pixel of small margin is
decided again, by the chi-square of its own candidates plus a penalty for their distance from the heights around
(`neighbours.py`), where a neighbour counts by its own margin. Then regions of such pixels that agree with each other,
and not with what is around them, are decided as a whole (`regions.py`).

Invariants
* A height only ever becomes another candidate of its own phases. Steps and particles, below half an order, stay.
* A margin of PENALTY or more can not be outweighed, so such a pixel is not even looked at.
* The result at a pixel depends on the pixels within `HALO` only.
"""

import torch
from torch import Tensor

from cpikan_hr.parallel import at_once
from cpikan_hr.problems.neighbours import PENALTY, REACH, Neighbours
from cpikan_hr.problems.regions import WIDEST, Candidates, move_regions

DECIDED = 6.0  # margin that an order keeps in the end, or its pixel is undecided: odds of exp(3)
PASSES = 4  # from one to the next, pixels without a confident neighbour see what their neighbours have become
HALO = REACH * PASSES + WIDEST + REACH
CHUNK = 16384  # pixels decided at a time


def repair_orders(height: Tensor, margin: Tensor, valid: Tensor, candidates: Candidates, spacing: float) -> Tensor:
    """Decides the doubtful pixels of `height` [h, w] (nm) again, in place; returns where that failed, bool [h, w].

    margin [h, w]: chi-square by which the best order fits better than the second best; updated in place too.
    valid [h, w]: pixels that are decided, and are listened to. `candidates(iy, ix)`: heights (nm), ascending, and
    chi-squares [K, n] of all orders of the pixels (iy, ix) [n]. `spacing`: between the heights of two orders, in nm.
    """
    doubtful, evidence = valid & ~(margin >= PENALTY), margin.clone()

    def decide(y: Tensor, x: Tensor) -> None:
        """Each pixel by what its neighbours are now."""
        neighbours, chunk = Neighbours(height, margin, valid, spacing), at_once(CHUNK, height.device)
        for iy, ix in zip(y.split(chunk), x.split(chunk), strict=True):
            heights, cost = candidates(iy, ix)
            cost = cost + neighbours.penalty(heights, iy, ix)
            order = cost.argmin(dim=0, keepdim=True)
            height[iy, ix] = heights.gather(0, order)[0]
            margin[iy, ix] = cost.scatter(0, order, torch.inf).amin(dim=0) - cost.gather(0, order)[0]

    left = doubtful
    for number in range(PASSES):
        if number == PASSES - 1 and move_regions(height, margin, evidence, valid, doubtful, candidates, spacing):
            left = doubtful  # what lies beside a region that was moved was decided against it
        if not left.any():
            break
        decide(*torch.nonzero(left, as_tuple=True))
        left = left & ~(margin >= PENALTY)
    return doubtful & ~(margin >= DECIDED)
