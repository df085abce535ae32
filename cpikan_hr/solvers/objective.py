"""What a full-batch solver is given and what it gives back: a loss of one flat vector, and the iterates on its way."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Objective(Protocol):
    """A loss of the flat parameter vector theta [n], float64, the same on every process."""

    # int64 numbers of the parameters of each sub-problem (layers of a network, or sub-domains); disjoint, cover all
    blocks: list[Tensor]

    def gradient(self, theta: Tensor) -> tuple[float, Tensor]:
        """Loss and gradient [n] there."""
        ...


@dataclass(frozen=True)
class Step:
    """An iterate.

    state: resumes the iteration exactly from `theta`. Its tensors are those in use: clone what is kept for longer.
    """

    theta: Tensor  # float64 [n]
    loss: float
    gradient_norm: float  # Euclidean
    evaluations: int  # of loss and gradient so far, resumed ones included
    state: dict[str, Tensor]


class Counted:
    """An objective that counts its evaluations. `count`: those made before."""

    def __init__(self, objective: Objective, count: int = 0):
        self.blocks, self.count = objective.blocks, count
        self._objective = objective

    def gradient(self, theta: Tensor) -> tuple[float, Tensor]:
        self.count += 1
        return self._objective.gradient(theta)


class Restricted:
    """An objective of one block of the parameters [b], the others frozen at `theta` [n]."""

    def __init__(self, objective: Objective, theta: Tensor, block: Tensor):
        self.blocks = [block.new_tensor(range(len(block)))]
        self._objective, self._theta, self._block = objective, theta, block

    def whole(self, part: Tensor) -> Tensor:
        """All parameters [n] with those of the block replaced."""
        return self._theta.index_copy(0, self._block, part)

    def gradient(self, theta: Tensor) -> tuple[float, Tensor]:
        loss, gradient = self._objective.gradient(self.whole(theta))
        return loss, gradient[self._block]
