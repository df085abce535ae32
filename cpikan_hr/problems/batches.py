"""What an update sees of a problem: a pure function of the step and of the share asked for."""

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from cpikan_hr.data.sampling import Draw, PixelSampler
from cpikan_hr.errors import UserError
from cpikan_hr.fields import Region, pixel_axis
from cpikan_hr.jets import Jet
from cpikan_hr.recipe import BatchOptions, Recipe


class Batches(ABC):
    """The union of the shares of a step does not depend on how many there are."""

    @abstractmethod
    def points(self, step: int) -> int:
        """Number of points of the step over all shares."""

    @abstractmethod
    def read(self, step: int, share: int, shares: int, region: Region | None = None) -> dict[str, Tensor]:
        """The share's `points` float64 [n, D], and whatever the loss wants to know there, leading dimension n."""

    @abstractmethod
    def sampled(self) -> int:
        """Number of points of the sample on which states of a run are compared."""

    @abstractmethod
    def sample(self, share: int, shares: int) -> dict[str, Tensor]:
        """A share of that sample, as `read`: the same throughout a run, whatever the seed."""

    @abstractmethod
    def check(self, shares: int) -> None:
        """UserError where there is too little for so many shares."""

    def prepare(self, step: int, evaluate: Callable[[Tensor, str], Jet]) -> bool:
        """Before an update; whether what was read ahead has to be read again."""
        return False

    def finish(self, total: Callable[[Tensor], Tensor]) -> None:
        """After an update; `total` sums a tensor over processes."""
        return None

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs beside the step, alike on all processes."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """What `state` gave."""
        return None

    def seen(self, recipe: Recipe, steps: int) -> dict[str, Tensor]:
        """Points to be kept beside the field of a run that has made so many steps; {}: none."""
        return {}


CELL = 8  # side of the windows of the sample, px
CELLS = 256  # of them: 16384 px


class PixelBatches(Batches):
    """Pixels of a problem that is read window by window."""

    def __init__(self, problem, options: BatchOptions, seed: int):
        self.problem, self.options = problem, options
        self.sampler = PixelSampler(problem.shape, options.blocks, options.size, options.stride, seed)

    def points(self, step: int) -> int:
        return self.sampler.points(step)

    def sampled(self) -> int:
        return sum((y1 - y0) * (x1 - x0) for y0, y1, x0, x1 in self._cells())

    def _cells(self) -> list[tuple[int, int, int, int]]:
        """Windows all over the frame, one of each stretch of the list of all of them; small frames as a whole."""
        height, width = self.problem.shape
        columns = -(-width // CELL)
        count = -(-height // CELL) * columns
        some = min(count, CELLS)
        numbers = ((np.arange(some) + np.random.default_rng(0).random(some)) * count / some).astype(int)
        corners = [divmod(int(number), columns) for number in numbers]
        return [
            (y * CELL, min((y + 1) * CELL, height), x * CELL, min((x + 1) * CELL, width)) for y, x in corners
        ]

    def sample(self, share: int, shares: int) -> dict[str, Tensor]:
        draws, cells = [], self._cells()
        if max((y1 - y0) * (x1 - x0) for y0, y1, x0, x1 in cells) < shares:
            share, shares = 0, 1  # too few to share: a mean over copies is the same
        for y0, y1, x0, x1 in cells:
            iy, ix = (axis.ravel()[share::shares] for axis in np.mgrid[y0:y1, x0:x1])
            draws += [Draw((y0, y1, x0, x1), iy, ix)] if len(iy) else []
        return self._data(draws)

    def check(self, shares: int) -> None:
        if self.options.blocks < shares:
            raise UserError(
                f"batch.blocks is {self.options.blocks}: give at least one per process and micro-batch, {shares} here"
            )

    def read(self, step: int, share: int, shares: int, region: Region | None = None) -> dict[str, Tensor]:
        """Of pixels outside of `region` there is at most one: none is no batch."""
        draws = self.sampler.draws(step, share, shares)
        if region is not None:
            kept = [held(region, draw) for draw in draws]
            first = draws[0].only(np.arange(1))
            draws = [draw.only(keep) for draw, keep in zip(draws, kept, strict=True) if keep.any()] or [first]
        return self._data(draws)

    def _data(self, draws: list[Draw]) -> dict[str, Tensor]:
        parts = [self.problem.samples(*draw.window, draw.iy, draw.ix) for draw in draws]
        data = {name: torch.from_numpy(np.concatenate([part[name] for part in parts])) for name in parts[0]}
        data["points"] = torch.cat([pixel_centres(draw.iy, draw.ix) for draw in draws])
        return data


def pixel_centres(iy: np.ndarray, ix: np.ndarray) -> Tensor:
    """Domain coordinates float64 [n, 2] of pixel centres."""
    return torch.from_numpy(np.stack([iy, ix], axis=-1) + 0.5)


def held(region: Region, draw: Draw) -> np.ndarray:
    """Which of the pixels of a draw lie in a region, bool [n]."""
    y0, y1, x0, x1 = draw.window
    return region.lattice(pixel_axis(y0, y1), pixel_axis(x0, x1)).numpy()[draw.iy - y0, draw.ix - x0]
