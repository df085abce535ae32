"""The price of a parameter that meets a target, found on a sample of the picture before the one pass over all of it.

At a price t (in the data's unit) a term stays where its square is above t^2: distortion D and number of terms N are
then at the optimum of D + t^2 N. Both are monotonic in t, so a bisection meets a wanted D or N.
"""

import math
from collections.abc import Callable
from contextlib import closing
from functools import partial

import numpy as np
import torch

from cpikan_hr.fields import Field
from cpikan_hr.parallel import at_once, in_threads
from cpikan_hr.recipe import LevelOptions, StartOptions, TargetOptions
from cpikan_hr.solvers import growth
from cpikan_hr.solvers.blocks import Block, ReadTarget, blocks_of
from cpikan_hr.solvers.leaves import Size, choose, coefficients, exists, sizes_of, thresholds
from cpikan_hr.solvers.spectral import read
from cpikan_hr.solvers.texture import Texture

SAMPLED = 2**20  # pixels looked at
GROWN = 2**18  # pixels whose networks are grown to find the price
SLACK = 0.97  # an error this close below the wanted one (0.13 dB) needs no further pass
FULL = 0.98  # and so much of the parameters allowed
BOUND = 1.45  # how far ladders overstate the error of the blend, typically: `refine` finds the true factor


class Sample:
    """Coefficients of some blocks of the picture at every leaf size."""

    def __init__(
        self,
        field: Field,
        group: int,
        target: ReadTarget,
        shape: tuple[int, int],
        start: StartOptions,
        seed: int = 0,
        sizes: list[Size] | None = None,
        texture: Texture | None = None,
    ):
        every, halo = sizes_of(field, group)
        self.sizes = sizes or every
        self.shape, self.channels = shape, field.mix.shape[0]
        self.spread = float(field.spread.max())  # prices are sought around it, whatever the data's unit
        coarsest = self.sizes[0]
        # About 64 places, so that no single region decides.
        blocks = blocks_of(shape, coarsest.stride, max(coarsest.stride**2, SAMPLED // 64))
        order = np.random.default_rng(seed).permutation(len(blocks))
        self.pixels, self.parts = 0, []
        for number in order:
            if self.pixels >= SAMPLED:
                break
            block: Block = blocks[number]
            data = read(field, group, target, shape, block, self.sizes, halo, start, texture)
            present = [exists(block, size, coarsest, field.device) for size in self.sizes]
            scaled = [coefficients(data, size) for size in self.sizes]
            self.parts.append((scaled, [thresholds(data, size, 0.0, start.threshold) for size in self.sizes], present))
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
        low, high = math.log(1e-6 * self.spread), math.log(1e6 * self.spread)
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


class GrownSample:
    """The price for growing levels: from the ladders of some blocks, first guessed from what a cosine basis would pay.

    `aims`: wanted error and parameters per pixel and channel (None: any). `price` is the present answer, `known` holds
    the ladders of blocks by number. `refine` corrects the price by what the whole picture came to.
    """

    def __init__(
        self,
        field: Field,
        group: int,
        choice: LevelOptions,
        target: ReadTarget,
        shape: tuple[int, int],
        aims: tuple[float | None, float | None],
        alive: Callable[[], None] = lambda: None,
    ):
        self.wanted, self.channels, self._device = aims, field.mix.shape[0], field.device
        self.aims = [None if aims[0] is None else BOUND * aims[0], aims[1]]
        sizes, _, _ = growth.growing_sizes(field, group, choice)
        cosine = Sample(field, group, target, shape, StartOptions(threshold=0), sizes=sizes)
        guesses = [cosine.price_for(aim, which) ** 2 for which, aim in enumerate(aims) if aim is not None]
        blocks = growth.blocks_to_grow(field, sizes, shape)
        count = max(1, -(-GROWN // at_once(growth.BLOCK, field.device)))
        self.numbers = [int(k) for k in np.random.default_rng(0).permutation(len(blocks))[:count]]
        self._fit = lambda number, price: growth.grow_block(
            field, group, choice, target, shape, blocks[number], price, alive
        )
        self.pixels = sum(
            (min((b.row + b.rows) * sizes[0].stride, shape[0]) - b.row * sizes[0].stride)
            * (min((b.column + b.columns) * sizes[0].stride, shape[1]) - b.column * sizes[0].stride)
            for b in (blocks[number] for number in self.numbers)
        )
        self.fitted_at, self.known = math.inf, {}
        self.reached: tuple[float, float] | None = None
        self._refit(0.4 * max(guesses))
        self.price = self._price()

    def _refit(self, price: float) -> None:
        self.fitted_at = price
        fit = partial(self._fit, price=price)
        with closing(in_threads(fit, self.numbers, self._device)) as fitted:
            self.known = dict(zip(self.numbers, fitted, strict=True))

    def _price(self) -> float:
        """Meets the aims; ladders that end too early for it are fitted again, at a lower price."""
        for _ in range(6):
            price = max(self._price_for(which, aim) for which, aim in enumerate(self.aims) if aim is not None)
            if price > self.fitted_at * 1.01:
                return price
            self._refit(0.4 * self.fitted_at)
        return price

    def _at(self, price: float, which: int) -> float:
        """Error (0) or parameters (1) of the sample, per pixel and channel."""
        return sum(grown.at(price)[which] for grown in self.known.values()) / (self.pixels * self.channels)

    def _price_for(self, which: int, aim: float) -> float:
        low, high = math.log(self.fitted_at), math.log(self.fitted_at * 1e4)
        for _ in range(16):
            middle = (low + high) / 2
            if (self._at(math.exp(middle), which) > aim) == (which == 0):
                high = middle
            else:
                low = middle
        return math.exp(low if which == 0 else high)

    def met(self, error: float, params: float) -> bool:
        """Whether the whole picture keeps to the parameters, and to the error unless they are used up."""
        wanted_error, wanted_params = self.wanted
        used_up = wanted_params is not None and params >= FULL * wanted_params
        within = wanted_params is None or params <= wanted_params
        return within and (used_up or wanted_error is None or error <= wanted_error)

    def refine(self, error: float, params: float) -> bool:
        """Corrects the price by the whole picture's error and parameters; False where they are as wanted, or stay."""
        before, self.reached = self.reached, (error, params)
        if before and all(math.isclose(old, new, rel_tol=1e-4) for old, new in zip(before, self.reached, strict=True)):
            return False  # no unit is left to add
        wanted_error, wanted_params = self.wanted
        if self.met(error, params):
            if wanted_error is not None and error >= SLACK * wanted_error:
                return False
            if wanted_error is None and params >= FULL * wanted_params:
                return False
        for which, (value, close) in enumerate(zip(self.reached, (SLACK, FULL), strict=True)):
            if self.wanted[which] is not None and value > 0:  # the sample is as wrong at the new price as at this one
                self.aims[which] = (1 + close) / 2 * self.wanted[which] * self._at(self.price, which) / value
        self.price = self._price()
        return True
