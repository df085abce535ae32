"""Multilayer perceptrons on jets, batched over tiles: SIREN and the MLP on a Fourier (NeRF) encoding.

Invariant: activations are twice continuously differentiable and come with f, f', f'' in closed form, so a jet of any
order passes through them.

Sources: Sitzmann et al., Implicit Neural Representations with Periodic Activation Functions, 2020 (SIREN and its
initialisation); Mildenhall et al., NeRF, 2020, eq. 4 (positional encoding).
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..jets import Jet, chain, chain_rows, kernel, seed
from .base import TiledLinear, TiledNetwork

Derivatives = tuple[Tensor, Tensor, Tensor]


def sine(z: Tensor) -> Derivatives:
    """sin and its first two derivatives."""
    f = torch.sin(z)
    return f, torch.cos(z), -f


def tanh(z: Tensor) -> Derivatives:
    """tanh and its first two derivatives."""
    f = torch.tanh(z)
    f1 = 1 - f * f
    return f, f1, -2 * f * f1


def silu(z: Tensor) -> Derivatives:
    """z sigmoid(z) and its first two derivatives."""
    p = torch.sigmoid(z)
    q = p * (1 - p)
    return z * p, p + z * q, q * (2 + z * (1 - 2 * p))


def gelu(z: Tensor) -> Derivatives:
    """z Phi(z) (exact, not its tanh approximation) and its first two derivatives."""
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
    probability = (1 + torch.erf(z / math.sqrt(2))) / 2
    return z * probability, probability + z * density, (2 - z * z) * density


ACTIVATIONS: dict[str, Callable[[Tensor], Derivatives]] = {"sine": sine, "tanh": tanh, "silu": silu, "gelu": gelu}


@kernel
def _activate(rows: Tensor, order: str, dim: int, activation: str, omega: float) -> Tensor:
    rows = omega * rows
    return chain_rows(rows, order, dim, *ACTIVATIONS[activation](rows.select(-3, 0)))


def activate(jet: Jet, activation: str, omega: float = 1.0) -> Jet:
    """The jet of activation(omega u), by the activation's name."""
    return jet._replace(rows=_activate(jet.rows, jet.order, jet.dim, activation, omega))


class TiledMLP(TiledNetwork):
    """Linear layers with an activation between them, on an encoding of the coordinates (the identity by default)."""

    layers: nn.ModuleList

    def encode(self, jet: Jet) -> Jet:
        """The input of the first layer: `[t, R, P, in] -> [t, R, P, E]`."""
        return jet

    @abstractmethod
    def activation(self, jet: Jet, layer: int) -> Jet:
        """The jet after hidden layer number `layer`."""

    def first(self, jet: Jet, tiles: Tensor | None = None) -> Jet:
        jet = self.encode(jet)
        return self.layers[0](jet, tiles) if len(self.layers) > 1 else jet

    def rest(self, jet: Jet, tiles: Tensor | None = None) -> Jet:
        return self.layers[-1](self._hidden(jet, tiles), tiles)

    def _hidden(self, jet: Jet, tiles: Tensor | None) -> Jet:
        """What the last layer sees, of the jet that `first` gives."""
        for k, layer in enumerate(self.layers[:-1]):
            jet = self.activation(layer(jet, tiles) if k else jet, k)
        return jet

    def forward(self, jet: Jet, tiles: Tensor | None = None) -> Jet:
        return self.rest(self.first(jet, tiles), tiles)

    def features(self, points: Tensor, tiles: Tensor | None = None) -> Tensor:
        hidden = self._hidden(self.first(seed(points, "value"), tiles), tiles).value
        return torch.cat([torch.ones_like(hidden[..., :1]), hidden], dim=-1)

    def set_last(self, tiles: Tensor | None, solution: Tensor) -> None:
        self.layers[-1].assign(tiles, solution)

    def zero_last(self) -> None:
        self.layers[-1].zero()


class SIREN(TiledMLP):
    """sin(omega (W u + b)) layers and a linear last one.

    `first_omega` and `hidden_omega` scale the first and the other layers. Initialisation as published: first weights
    uniform in +-1 / in, the others in +-sqrt(6 / in) / hidden_omega; biases in +-1 / sqrt(in).
    """

    def __init__(
        self,
        tiles: int,
        in_features: int,
        out_features: int,
        *,
        hidden: Sequence[int] = (64, 64, 64),
        first_omega: float = 30.0,
        hidden_omega: float = 30.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(tiles, in_features, out_features)
        if not hidden:
            raise UserError("siren: hidden is empty; give the width of at least one hidden layer")
        self.omegas = [first_omega] + [hidden_omega] * (len(hidden) - 1)
        widths = [in_features, *hidden, out_features]
        self.layers = nn.ModuleList(
            TiledLinear(
                tiles,
                width,
                widths[k + 1],
                1 / width if k == 0 else math.sqrt(6 / width) / hidden_omega,
                1 / math.sqrt(width),
                generator,
            )
            for k, width in enumerate(widths[:-1])
        )

    def activation(self, jet: Jet, layer: int) -> Jet:
        return activate(jet, "sine", self.omegas[layer])


class FourierMLP(TiledMLP):
    """An MLP on [x, sin(2^k pi x), cos(2^k pi x)], k = 0..bands - 1. Xavier uniform weights, zero biases."""

    def __init__(
        self,
        tiles: int,
        in_features: int,
        out_features: int,
        *,
        hidden: Sequence[int] = (64, 64),
        bands: int = 6,
        activation: str = "tanh",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(tiles, in_features, out_features)
        if activation not in ACTIVATIONS:
            raise UserError(f"unknown activation {activation!r}: choose one of {', '.join(ACTIVATIONS)}")
        self.bands, self.activation_name = bands, activation
        widths = [in_features * (1 + 2 * bands), *hidden, out_features]
        self.layers = nn.ModuleList(
            TiledLinear(tiles, width, widths[k + 1], math.sqrt(6 / (width + widths[k + 1])), 0.0, generator)
            for k, width in enumerate(widths[:-1])
        )

    def encode(self, jet: Jet) -> Jet:
        frequencies = math.pi * 2.0 ** torch.arange(self.bands, device=jet.rows.device, dtype=jet.rows.dtype)
        phase = jet._replace(rows=(jet.rows.unsqueeze(-1) * frequencies).flatten(-2))
        s, c = torch.sin(phase.value), torch.cos(phase.value)
        waves = [chain(phase, s, c, -s).rows, chain(phase, c, -s, -c).rows]
        return jet._replace(rows=torch.cat([jet.rows, *waves], dim=-1))

    def activation(self, jet: Jet, layer: int) -> Jet:
        return activate(jet, self.activation_name)
