"""Gauss-Newton with Levenberg-Marquardt damping on thousands of small networks at once, each on its own pixels.

Only hidden weights are iterated, the last layer follows (`projection.py`). Normal matrices are accumulated from float32
products and solved in float64 by batched Cholesky. Steps and their damping are `damping.py`'s, tile by tile. Tiles that
no longer improve leave the batch.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cpikan_hr.parallel import at_once
from cpikan_hr.solvers.damping import Damping, attempt, dense_step, trust_of
from cpikan_hr.solvers.projection import Model

CHUNK = 1_000_000  # elements of the largest temporary of a chunk of tiles: it stays in a core's cache
LEAST = 1e-7  # damping
FLOOR = 1e-4  # of the trust, over its mean


class Fit(Protocol):
    """What tiles compute of their hidden weights."""

    def elements(self, w: Tensor, channels: int) -> int:
        """Of the temporaries of one tile with weights like w [t, ...]."""
        ...

    def linearise(self, tiles: Tensor, data: Tensor, w: Tensor, weight: Tensor | None) -> Model:
        """The model of tiles number `tiles` [t] at w [t, ...]: `data` [t, C, P] is times `weight` [t, P] already."""
        ...


@dataclass
class Tiles:
    """A chunk of tiles on their way down (`damping.System`)."""

    fit: Fit
    numbers: Tensor
    data: Tensor
    weight: Tensor | None
    model: Model

    @property
    def gradient(self) -> Tensor:
        return self.model.gradient

    @property
    def trust(self) -> Tensor:
        return trust_of(self.model.matrix.diagonal(dim1=1, dim2=2), FLOOR, 1e-12)

    def solve(self, damping: Tensor) -> Tensor:
        return dense_step(self.model.matrix, self.gradient, self.trust, damping)

    def advance(self, step: Tensor) -> Tensor:
        """See `damping.System`."""
        w = self.model.w + step.float().view_as(self.model.w)
        new = self.fit.linearise(self.numbers, self.data, w, self.weight)
        gain = self.model.loss - new.loss
        self.model = self.model.take(gain > 0, new)
        return gain

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Numbers, hidden weights, last layers and losses."""
        return self.numbers, self.model.w, self.model.last, self.model.loss

    def pick(self, some: Tensor) -> "Tiles":
        weight = None if self.weight is None else self.weight[some]
        return Tiles(self.fit, self.numbers[some], self.data[some], weight, self.model.pick(some))


@torch.no_grad()
def levenberg_marquardt(
    fit: Fit,
    data: Tensor,
    w: Tensor,
    iterations: int,
    weight: Tensor | None = None,
    damping: float = 0.3,
    tolerance: float = 1e-3,
    patience: int = 3,
) -> tuple[Tensor, Tensor, Tensor]:
    """Minimises |weight (N - y)|^2, and what `fit` adds, of every tile. `data` [t, C, P] is y times weight; w [t, ...].

    A tile leaves after `patience` iterations that lowered its loss by less than `tolerance` of it.
    Returns w, the last layer [t, C, K] and the loss [t].
    """
    found: list[tuple[Tensor, ...]] = []  # numbers, weights, last layers, losses
    size = max(1, at_once(CHUNK, data.device) // max(1, fit.elements(w, data.shape[1])))
    for numbers in torch.arange(len(data), device=data.device).split(size):
        mine, here = data[numbers], None if weight is None else weight[numbers]
        tiles = Tiles(fit, numbers, mine, here, fit.linearise(numbers, mine, w[numbers], here))
        trusted = Damping.of(torch.full((len(numbers),), damping, dtype=torch.float64, device=data.device), LEAST)
        stalled = torch.zeros_like(trusted.scale)
        for iteration in range(iterations):
            before = tiles.model.loss
            gain = attempt(tiles, trusted)
            stalled = torch.where(gain > tolerance * before, 0.0, stalled + 1)
            live = stalled < patience
            if iteration + 1 < iterations and int(live.sum()) < 0.75 * len(live):  # compact what is left
                found.append(tiles.pick(~live).results())
                tiles, trusted, stalled = tiles.pick(live), trusted.pick(live), stalled[live]
                if not len(stalled):
                    break
        found.append(tiles.results())
    numbers, *results = (torch.cat(parts) for parts in zip(*found, strict=True))
    order = numbers.argsort()
    w, last, loss = (part[order] for part in results)
    return w, last, loss
