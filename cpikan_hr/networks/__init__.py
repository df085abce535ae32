"""The networks a field may use, by the name a recipe gives them."""

import torch

from ..errors import UserError
from .base import TiledNetwork
from .chebyshev import ChebyshevLayer, ScaledCPIKAN
from .chebyshev2d import Chebyshev2D
from .mlp import SIREN, FourierMLP

NETWORKS: dict[str, type[TiledNetwork]] = {
    "cpikan": ScaledCPIKAN,
    "siren": SIREN,
    "fourier_mlp": FourierMLP,
    "chebyshev2d": Chebyshev2D,
}

__all__ = [
    "NETWORKS",
    "Chebyshev2D",
    "ChebyshevLayer",
    "FourierMLP",
    "SIREN",
    "ScaledCPIKAN",
    "TiledNetwork",
    "build_network",
]


def build_network(
    kind: str,
    tiles: int,
    in_features: int,
    out_features: int,
    *,
    generator: torch.Generator | None = None,
    **options,
) -> TiledNetwork:
    """The network `kind` for `tiles` tiles; `options` are those of its class.

    Initial parameters come from `generator`, or from torch's global one. UserError for an unknown kind.
    """
    if kind not in NETWORKS:
        raise UserError(f"unknown network {kind!r}: choose one of {', '.join(NETWORKS)}")
    return NETWORKS[kind](tiles, in_features, out_features, generator=generator, **options)
