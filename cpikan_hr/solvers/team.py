"""How the processes of a run share a local solve: who has which part, and how the results come together.

The solvers know no distribution beyond this; the loop hands them the backend's collectives.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Team:
    """Process number `rank` of `ranks`. `sum` adds a tensor over all in place, `gather` lists an object of each."""

    rank: int = 0
    ranks: int = 1
    sum: Callable[[Tensor], Any] = lambda tensor: tensor
    gather: Callable[[Any], list] = lambda value: [value]
