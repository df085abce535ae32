"""How the terms and points of an equation's loss are weighed while it is trained.

What depends on residuals is one update old, so that it is the same however many processes and micro-batches share the
points.
"""

import math

import torch
from torch import Tensor

from cpikan_hr.errors import UserError
from cpikan_hr.recipe import PDEProblem


class Weighting:
    """Factors of the squared residuals of the interior points, and of whole terms.

    `attention` [N]: residual-based attention, lambda of each point. `balance`: factor of each term by name.
    """

    def __init__(self, options: PDEProblem, count: int, names: list[str]):
        self.options = options
        self.attention = torch.ones(count, dtype=torch.float64)
        self.balance = {name: 1.0 for name in names}
        self.slice_of = torch.zeros(count, dtype=torch.long)  # of time, for each interior point
        slices = options.causal.slices if options.causal else 1
        self.losses = torch.zeros(slices, dtype=torch.float64)
        self._seen = torch.zeros(count, dtype=torch.float64)

    @property
    def watches(self) -> bool:
        """Whether residuals of single points are needed."""
        return self.options.attention is not None or self.options.causal is not None

    def slices(self, time: Tensor, low: float, high: float) -> Tensor:
        """Which slice times [N] are in."""
        slices = len(self.losses)
        return ((time - low) / (high - low) * slices).long().clamp(0, slices - 1)

    def place(self, slice_of: Tensor) -> None:
        """Tells the slices [N] of the interior points."""
        self.slice_of = slice_of

    def factors(self, index: Tensor, slice_of: Tensor | None = None) -> Tensor:
        """What multiplies the squared residuals of interior points `index`, float64.

        `slice_of`: their slices, where they are not those of the points that were placed.
        """
        index = index.cpu()
        out = torch.ones(len(index), dtype=torch.float64)
        if self.options.attention:
            out = self.attention[index] ** 2
        if self.options.causal:
            out = out * self.causal()[self.slice_of[index] if slice_of is None else slice_of]
        return out

    def causal(self) -> Tensor:
        """exp(-epsilon * losses of all earlier slices) [slices] (Wang et al. 2024, eq. 16)."""
        before = self.losses.cumsum(0) - self.losses
        return torch.exp(-self.options.causal.epsilon * before)

    def note(self, index: Tensor, squared: Tensor) -> None:
        """What the squared residuals of interior points were in this update."""
        self._seen[index.cpu()] += squared.detach().cpu().double()

    def finish(self, total) -> None:
        """After an update; `total` sums a tensor over processes."""
        if not self.watches:
            return
        seen = total(self._seen)
        if self.options.attention:
            size = seen.sqrt()
            options = self.options.attention
            self.attention = options.decay * self.attention + options.rate * size / size.max().clamp_min(1e-300)
        if self.options.causal:
            slices = len(self.losses)
            sums = torch.zeros(slices, dtype=torch.float64).index_add(0, self.slice_of, seen)
            self.losses = sums / torch.bincount(self.slice_of, minlength=slices).clamp_min(1)
        self._seen = torch.zeros_like(self._seen)

    def rebalance(self, sizes: dict[str, float]) -> None:
        """Moves the factors towards those that make all terms' sizes alike; that of the residual stays 1.

        UserError for a size that is not finite.
        """
        memory, most = self.options.balance.memory, sizes["residual"]
        for name, size in sizes.items():
            if not math.isfinite(size):
                raise UserError(
                    f"problem.balance: the size of the term {name!r} is {size}, not finite: look at what the equation "
                    "gives there, or lower the learning rate"
                )
        for name, size in sizes.items():
            if name != "residual" and size > 0:
                self.balance[name] = memory * self.balance[name] + (1 - memory) * most / size

    def forget_points(self) -> None:
        """After points were drawn anew."""
        self.attention = torch.ones_like(self.attention)

    def state(self) -> dict[str, Tensor]:
        return {
            "attention": self.attention,
            "losses": self.losses,
            "balance": torch.tensor(list(self.balance.values()), dtype=torch.float64),
        }

    def restore(self, state: dict[str, Tensor]) -> None:
        self.attention, self.losses = state["attention"], state["losses"]
        self.balance = dict(zip(self.balance, state["balance"].tolist(), strict=True))
