"""Regions of doubtful pixels that agree on an order, and jump against what is around them, moved as a whole.

Pixel by pixel such a region confirms itself: every pixel inside it finds its neighbours where it is. Decided as one,
its pixels' chi-squares stand against the jump along its border. What is really an order high has chi-squares that
outweigh it, pixel for pixel, and stays.
"""

from collections.abc import Callable

import numpy as np
import scipy  # whose parts load when they are first used
import torch
from torch import Tensor

from cpikan_hr.problems.neighbours import Neighbours

WIDEST = 16  # px, along rows and columns: a larger region is not an isolated one

Candidates = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def move_regions(
    height: Tensor, margin: Tensor, evidence: Tensor, valid: Tensor, doubtful: Tensor, candidates: Candidates,
    spacing: float,
) -> bool:  # fmt: skip
    """Moves regions of the `doubtful` pixels of `height` [h, w] (nm) where that lowers their cost, in place.

    Returns whether any was.

    evidence [h, w]: the pixels' own margins; margin [h, w]: of what was decided; that of a region, by which it beats
    the next best place of all of it, is put in place. valid, candidates and spacing as in `repair_orders`.
    """
    region = _regions(height, doubtful, valid, spacing)
    if region is None:
        return False
    y, x = torch.nonzero(region >= 0, as_tuple=True)
    label = region[y, x]
    heights, cost = candidates(y, x)
    cost = cost + Neighbours(height, evidence, valid, spacing, region).penalty(heights, y, x)
    orders, now = len(heights), (heights - height[y, x]).abs().argmin(dim=0)
    shifted = torch.arange(1 - orders, orders, device=now.device)[:, None] + now  # [2 K - 1, n], row K - 1 as it is
    exists = (shifted >= 0) & (shifted < orders)
    shifted = shifted.clamp(0, orders - 1)
    each = torch.where(exists, cost.gather(0, shifted), torch.inf)
    total = cost.new_zeros(len(each), int(label.max()) + 1).index_add_(1, label, each)
    best = total.argmin(dim=0, keepdim=True)
    lead = total.scatter(0, best, torch.inf).amin(dim=0) - total.gather(0, best)[0]
    moves = (best[0] != orders - 1)[label]
    y, x, label, shifted, heights = y[moves], x[moves], label[moves], shifted[:, moves], heights[:, moves]
    height[y, x] = heights.gather(0, shifted.gather(0, best[:, label]))[0]
    margin[y, x] = lead[label]
    return bool(moves.any())


def _regions(height: Tensor, doubtful: Tensor, valid: Tensor, spacing: float) -> Tensor | None:
    """Numbers [h, w] of the isolated regions, from 0 on, and -1 elsewhere; None where there is none.

    Doubtful neighbours belong together unless they lie half an order or more apart.
    """
    jumps = [
        (height.diff(dim=axis).abs() >= spacing / 2) & valid.narrow(axis, 0, n - 1) & valid.narrow(axis, 1, n - 1)
        for axis, n in enumerate(height.shape)
    ]
    beside = torch.zeros_like(doubtful)  # pixels with a jump on any side
    for axis, jump in enumerate(jumps):
        beside.narrow(axis, 0, jump.shape[axis]).logical_or_(jump)
        beside.narrow(axis, 1, jump.shape[axis]).logical_or_(jump)
    if not (beside & doubtful).any():
        return None
    pixels = torch.nonzero(doubtful).cpu().numpy()
    number = torch.full(doubtful.shape, -1, dtype=torch.long, device=doubtful.device)
    number[doubtful] = torch.arange(len(pixels), device=number.device)
    links = []
    for axis, jump in enumerate(jumps):
        pair = [number.narrow(axis, first, jump.shape[axis]) for first in (0, 1)]
        near = ~jump & (pair[0] >= 0) & (pair[1] >= 0)
        links.append(torch.stack([each[near] for each in pair]))
    one, two = torch.cat(links, dim=1).cpu().numpy()
    graph = scipy.sparse.coo_array((np.ones(len(one), bool), (one, two)), (len(pixels),) * 2)
    count, label = scipy.sparse.csgraph.connected_components(graph, directed=False)
    low, high = np.full((count, 2), max(doubtful.shape)), np.zeros((count, 2), int)
    np.minimum.at(low, label, pixels)
    np.maximum.at(high, label, pixels)
    isolated = (high - low < WIDEST).all(axis=1)
    isolated &= np.bincount(label, beside[doubtful].cpu().numpy(), minlength=count) > 0
    names = np.where(isolated, np.cumsum(isolated) - 1, -1)
    if not isolated.any():
        return None
    number[doubtful] = torch.from_numpy(names[label]).to(number.device)
    return number
