"""What a field over a box of the physical world has beside one over the pixels [0, H] x [0, W] of a picture."""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Box:
    """A box `low` to `high`, one number per axis, in the units of its equation.

    `periodic`: numbers of the axes along which networks see a circle; `constants`: first values of the numbers that are
    learned beside the field, such as the coefficients of an inverse problem.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    periodic: tuple[int, ...] = ()
    constants: tuple[float, ...] = ()

    @classmethod
    def of(cls, plain: dict | None) -> "Box | None":
        """From what `plain` gave, also after JSON; None stays None."""
        return None if plain is None else cls(**{name: tuple(value) for name, value in plain.items()})

    def plain(self) -> dict:
        """As plain values, for a file."""
        return asdict(self)

    @property
    def extent(self) -> tuple[float, ...]:
        return tuple(high - low for low, high in zip(self.low, self.high, strict=True))


class Constants(nn.Module):
    """Numbers that are learned, as further channels of the field that are the same everywhere.

    A module of their own, because ZeRO-3 gathers parameters module by module.
    """

    def __init__(self, first: tuple[float, ...]):
        super().__init__()
        self.values = nn.Parameter(torch.tensor(first))

    def forward(self, rows: Tensor) -> Tensor:
        """Jet rows [R, N, K] at the points of other rows [R, N, C]."""
        count, points, _ = rows.shape
        value = self.values.to(rows.dtype).expand(1, points, -1)
        return torch.cat([value, value.new_zeros(count - 1, points, value.shape[2])])
