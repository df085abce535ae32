"""The pruned quadtree against every partition there is."""

from itertools import product

import pytest
import torch

from cpikan_hr.solvers.quadtree import prune


def partitions(depth: int, k: int = 0, y: int = 0, x: int = 0) -> list[list[tuple[int, int, int]]]:
    """All quadtrees below tile (y, x) of size k, each as its leaves (k, y, x)."""
    found = [[(k, y, x)]]
    if k + 1 < depth:
        children = [partitions(depth, k + 1, 2 * y + a, 2 * x + b) for a in (0, 1) for b in (0, 1)]
        found += [sum(choice, []) for choice in product(*children)]
    return found


def random_costs(ny: int, nx: int, depth: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Means alike per area, so that every size wins somewhere.
    scales = [(1 + 2 * (k == 0)) / 4**k for k in range(depth)]
    return [
        scale * torch.rand(ny << k, nx << k, generator=generator, dtype=torch.float64) for k, scale in enumerate(scales)
    ]


def total(costs: list[torch.Tensor], leaves: list[torch.Tensor]) -> float:
    return sum(float(cost[leaf].sum()) for cost, leaf in zip(costs, leaves, strict=True))


def coverage(leaves: list[torch.Tensor]) -> torch.Tensor:
    """How many leaves cover each of the finest tiles."""
    depth = len(leaves)
    return sum(
        leaf.int().repeat_interleave(2 ** (depth - 1 - k), 0).repeat_interleave(2 ** (depth - 1 - k), 1)
        for k, leaf in enumerate(leaves)
    )


def test_there_are_seventeen_quadtrees_of_three_sizes():
    assert [len(partitions(depth)) for depth in (1, 2, 3)] == [1, 2, 17]


@pytest.mark.parametrize("seed", range(30))
def test_the_leaves_are_the_cheapest_of_all_partitions(seed):
    costs = random_costs(1, 1, 3, seed)
    leaves = prune(costs)
    best = min(sum(float(costs[k][y, x]) for k, y, x in leaf) for leaf in partitions(3))
    assert total(costs, leaves) == pytest.approx(best, abs=1e-12)
    assert (coverage(leaves) == 1).all()


def test_the_random_costs_make_every_size_a_leaf_somewhere():
    used = {k for seed in range(30) for k, leaf in enumerate(prune(random_costs(1, 1, 3, seed))) if leaf.any()}
    assert used == {0, 1, 2}


@pytest.mark.parametrize("depth", [1, 2, 4])
def test_coarsest_tiles_are_chosen_independently_and_leaves_are_a_partition(depth):
    costs = random_costs(3, 2, depth, seed=7)
    leaves = prune(costs)
    assert (coverage(leaves) == 1).all()
    for y, x in product(range(3), range(2)):
        cut = [(slice(y << k, (y + 1) << k), slice(x << k, (x + 1) << k)) for k in range(depth)]
        alone = prune([cost[c] for cost, c in zip(costs, cut, strict=True)])
        assert all(torch.equal(leaf[c], a) for leaf, c, a in zip(leaves, cut, alone, strict=True))


@pytest.mark.parametrize("seed", range(20))
def test_tiles_that_do_not_exist_cost_nothing(seed):
    """The frame ends inside the coarsest tile: it holds 3 x 1 of the 4 x 4 finest tiles."""
    present = [torch.zeros(1 << k, 1 << k, dtype=torch.bool) for k in range(3)]
    for mask, rows, columns in zip(present, (1, 2, 3), (1, 1, 1), strict=True):
        mask[:rows, :columns] = True
    costs = [cost * mask for cost, mask in zip(random_costs(1, 1, 3, seed), present, strict=True)]
    leaves = [leaf & mask for leaf, mask in zip(prune(costs), present, strict=True)]
    best = min(sum(float(costs[k][y, x]) for k, y, x in leaf if present[k][y, x]) for leaf in partitions(3))
    assert total(costs, leaves) == pytest.approx(best, abs=1e-12)
    assert (coverage(leaves)[:3, :1] == 1).all()


def test_an_equal_price_is_not_split():
    costs = [torch.full((1, 1), 4.0), torch.full((2, 2), 1.0)]
    assert prune(costs)[0].all() and not prune(costs)[1].any()
