"""Which leaves a quadtree has: the cheapest partition of every coarsest tile, bottom-up.

A node's cost is its distortion plus the price of its parameters; a node is split where its children together cost less
(Coifman and Wickerhauser 1992, best basis; Sullivan and Baker 1994, rate-distortion quadtrees). Costs add up, so the
choice is optimal for the price, and one pass over the sizes finds it.
"""

import torch
from torch import Tensor


def prune(costs: list[Tensor]) -> list[Tensor]:
    """The leaves: per size, coarse to fine, a bool mask of the shape of its costs.

    costs[k]: [ny 2^k, nx 2^k], of a tile of each size as a leaf; a tile that does not exist costs nothing.
    """
    best, split = costs[-1], []
    for cost in costs[-2::-1]:
        children = best.unflatten(0, (-1, 2)).unflatten(2, (-1, 2)).sum((1, 3))
        split.insert(0, children < cost)
        best = torch.minimum(children, cost)
    leaves, open_ = [], torch.ones_like(costs[0], dtype=torch.bool)
    for divided in split:
        leaves.append(open_ & ~divided)
        open_ = (open_ & divided).repeat_interleave(2, 0).repeat_interleave(2, 1)
    return [*leaves, open_]
