"""The price of a parameter that meets a target, found on a sample of the picture before the one pass over all of it.

At a price t (in the data's unit) a term stays where its square is above t^2: distortion D and number of terms N are then
at the optimum of D + t^2 N. Both are monotonic in t, so a bisection meets a wanted D or N.
"""

import math

import numpy as np
import torch

from cpikan_hr.fields import Field
from cpikan_hr.recipe import TargetOptions
from cpikan_hr.solvers.blocks import Block, ReadTarget, blocks_of, read_block
from cpikan_hr.solvers.spectral import choose, coefficients, exists, sizes_of, thresholds

SAMPLED = 2**20  # pixels looked at


class Sample:
    """Coefficients of some blocks of the picture at every leaf size."""

    def __init__(self, field: Field, group: int, target: ReadTarget, shape: tuple[int, int], sigmas: float, seed: int = 0):
        self.sizes, halo = sizes_of(field, group)
        self.sigmas, self.shape, self.channels = sigmas, shape, field.mix.shape[0]
        coarsest = self.sizes[0]
        # About 64 places, so that no single region decides.
        blocks = blocks_of(shape, coarsest.stride, max(coarsest.stride**2, SAMPLED // 64))
        order = np.random.default_rng(seed).permutation(len(blocks))
        self.pixels, self.parts = 0, []
        for number in order:
            if self.pixels >= SAMPLED:
                break
            block: Block = blocks[number]
            data = read_block(field, group, target, shape, block, coarsest.stride, halo)
            present = [exists(block, size, coarsest) for size in self.sizes]
            scaled = [coefficients(data, size) for size in self.sizes]
            self.parts.append((scaled, [thresholds(data, size, 0.0, sigmas) for size in self.sizes], present))
            self.pixels += self._inside(block, coarsest.stride)

    def _inside(self, block: Block, stride: int) -> int:
        rows = min((block.row + block.rows) * stride, self.shape[0]) - block.row * stride
        columns = min((block.column + block.columns) * stride, self.shape[1]) - block.column * stride
        return rows * columns

    def at(self, price: float) -> tuple[float, float]:
        """Mean squared error and terms, both per pixel and channel, at a price."""
        error = terms = 0.0
        for scaled, limits, present in self.parts:
            limits = [limit.clamp_min(price) for limit in limits]
            for coefficient, limit, leaf in zip(scaled, limits, choose(scaled, limits, present), strict=True):
                square = coefficient[leaf].square()
                keep = square > limit.expand(*leaf.shape, 1, 1, 1)[leaf].square()
                terms += float(keep.sum())
                error += float((square * ~keep).sum(dtype=torch.float64))
        return error / (self.pixels * self.channels), terms / (self.pixels * self.channels)

    def price_for(self, wanted: float, which: int, rounds: int = 18) -> float:
        """The price at which `at(price)[which]` meets `wanted`: 0 the error (from below), 1 the terms (from above)."""
        low, high = math.log(1e-6), math.log(1e6)
        for _ in range(rounds):
            middle = (low + high) / 2
            value = self.at(math.exp(middle))[which]
            if (value > wanted) == (which == 0):
                high = middle
            else:
                low = middle
        return math.exp(low if which == 0 else high)


def wanted_of(target: TargetOptions, full_range: float) -> tuple[float | None, float | None]:
    """Mean squared error (None: any) and parameters per px and channel (None: any) that a target asks for."""
    errors = []
    if target.psnr is not None:
        errors.append(full_range**2 * 10 ** (-target.psnr / 10))
    if target.rmse is not None:
        errors.append(target.rmse**2)
    return (min(errors) if errors else None), target.params_per_px
