"""Scaled-cPIKAN: Kolmogorov-Arnold layers whose edge functions are Chebyshev series, batched over tiles.

One layer computes y_o = sum_i sum_n a_ion T_n(s(v_i)), with s = tanh as published. The affine scaling of the domain to
[-1, 1] that gives Scaled-cPIKAN its name happens before the network, per tile.

Invariants: T_n comes from its recurrence, never from cos(n acos s), whose gradient is NaN where tanh saturates; the
recurrence runs on derivatives with respect to v, so no division and no cancellation enters; T_0 acts as a bias.

Sources: Mostajeran & Faroughi, Scaled-cPIKANs, J. Comput. Phys. 2025, 114116, and its published code (tanh, recurrence,
coefficients `[in, out, degree + 1]`, Xavier normal); Sidharth et al., arXiv:2405.07200; ChebyKAN (SynodicMonth), whose
initialisation is the option `chebykan`.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UserError
from ..jets import Jet, chain, full_precision, multiply, seed
from .base import TiledNetwork, assign, outer, select
from .chebyshev_kernels import INPUT_MAPS, chebyshev_expand, chebyshev_linear

INITS = ("xavier_normal", "chebykan", "moments")


def basis_moments(degree: int, input_map: str) -> tuple[np.ndarray, np.ndarray]:
    """E[B_n^2] and E[B_n'^2], n = 1..degree, of B_n(v) = T_n(s(v)) for v uniform in [-1, 1] (Gauss-Legendre)."""
    nodes, weights = np.polynomial.legendre.leggauss(8 * degree + 32)
    jet = seed(torch.as_tensor(nodes).unsqueeze(-1), "gradient")
    rows = chebyshev_expand(jet.rows, "gradient", 1, degree, input_map).numpy()
    value, slope = (weights[:, None, None] / 2 * rows**2).sum(0)
    return value, slope


class ChebyshevLayer(nn.Module):
    """One Chebyshev KAN layer per tile; `coefficients` is `[tiles, in, out, degree + 1]`.

    `shared_constant`: the T_0 of all inputs only ever act as their sum; then there is one `constant` `[tiles, out]` in
    their place and `coefficients` is `[tiles, in, out, degree]`: the same functions with fewer numbers.

    `input_map`: `tanh` as published; `identity` for inputs already scaled to [-1, 1]; `sine` for s = sin(pi v / 2),
    which turns T_n into the cosine basis and keeps the resolution even up to the border.
    `layer_norm`: normalises the output over its channels, with a gain and an offset per tile.
    `init`: `xavier_normal` as published for Scaled-cPIKAN, std = sqrt(2 / ((in + out) (degree + 1)));
    `chebykan`, std = 1 / (in (degree + 1));
    `moments`, the Glorot compromise with the basis' own second moments: for v uniform in [-1, 1] (variance 1/3),
    std_n^2 = 2 / (degree (3 in E[B_n^2] + out E[B_n'^2])), T_0 zero, so that the variance of values (forward) and of
    gradients (backward) is kept.
    """

    def __init__(
        self,
        tiles: int,
        in_features: int,
        out_features: int,
        degree: int = 5,
        *,
        input_map: str = "tanh",
        layer_norm: bool = False,
        shared_constant: bool = False,
        init: str = "xavier_normal",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if degree < 1:
            raise UserError(f"Chebyshev degree {degree}: it must be at least 1")
        if input_map not in INPUT_MAPS:
            raise UserError(f"unknown input_map {input_map!r}: choose one of {', '.join(INPUT_MAPS)}")
        if init not in INITS:
            raise UserError(f"unknown init {init!r}: choose one of {', '.join(INITS)}")
        self.in_features, self.out_features, self.degree, self.input_map = in_features, out_features, degree, input_map
        terms = degree if shared_constant else degree + 1
        self.coefficients = nn.Parameter(torch.empty(tiles, in_features, out_features, terms))
        self.constant = nn.Parameter(torch.zeros(tiles, out_features)) if shared_constant else None
        self.norm = TiledLayerNorm(tiles, out_features) if layer_norm else None
        self._initialise(init, generator)

    def _initialise(self, init: str, generator: torch.Generator | None) -> None:
        if self.coefficients.is_meta:  # shapes alone: the values come from a file
            return
        fan_in, fan_out, terms = self.in_features, self.out_features, self.degree + 1
        with torch.no_grad():
            self.coefficients.normal_(generator=generator)
            if init == "xavier_normal":
                self.coefficients *= math.sqrt(2 / ((fan_in + fan_out) * terms))
            elif init == "chebykan":
                self.coefficients *= 1 / (fan_in * terms)
            else:
                value, slope = basis_moments(self.degree, self.input_map)
                std = np.sqrt(2 / (self.degree * (3 * fan_in * value + fan_out * slope)))
                self.coefficients *= self.coefficients.new_tensor([*std] if self.constant is not None else [0.0, *std])

    def forward(self, jet: Jet, tiles: Tensor | None = None) -> Jet:
        """`[t, R, P, in] -> [t, R, P, out]`; the layer keeps only its input for backward, not the expansion."""
        return self.normalised(self.edges(jet, tiles), tiles)

    def edges(self, jet: Jet, tiles: Tensor | None = None) -> Jet:
        """The sum of the edges' functions: `forward` without the normalisation."""
        with full_precision(jet.order):
            coefficients = select(self.coefficients, tiles)
            if self.constant is not None:
                bias = select(self.constant, tiles)
            else:
                coefficients, bias = coefficients[..., 1:], coefficients[..., 0].sum(1)
            weight = coefficients.permute(0, 3, 1, 2).flatten(
                1, 2
            )  # [t, degree * in, out], as the expansion is laid out
            return jet._replace(rows=chebyshev_linear(jet, weight, bias, self.degree, self.input_map))

    def normalised(self, jet: Jet, tiles: Tensor | None = None) -> Jet:
        """The channels normalised, where the layer does that."""
        if self.norm is None:
            return jet
        with full_precision(jet.order):
            return self.norm(jet, tiles)

    def jacobian(self, jet: Jet, slopes: Tensor) -> list[Tensor]:
        """See `TiledNetwork.jacobian_layers`."""
        ends = []
        if self.norm is not None:
            edges = self.edges(jet)
            ends = self.norm.jacobian(edges, slopes)
            slopes = self.norm.pulled_back(edges, slopes)
        features = chebyshev_expand(jet.rows, jet.order, jet.dim, self.degree, self.input_map)  # [t, P, R, degree in]
        if self.constant is not None:
            ends.insert(0, slopes[:, 0].transpose(1, 2))
        else:
            first = torch.zeros_like(features[..., : self.in_features])  # T_0, which has no derivatives
            first[:, :, 0] = 1
            features = torch.cat([first, features], dim=-1)
        terms = outer(features, slopes.transpose(1, 2)).unflatten(1, (-1, self.in_features))
        return [terms.permute(0, 2, 3, 1, 4), *ends]

    def features(self, values: Tensor) -> Tensor:
        """Columns [1, T_1(s(v_1)), ..., T_1(s(v_in)), T_2(s(v_1)), ...]: `[t, P, in] -> [t, P, 1 + degree * in]`."""
        expansion = chebyshev_expand(values.unsqueeze(1), "value", 1, self.degree, self.input_map).squeeze(2)
        return torch.cat([torch.ones_like(expansion[..., :1]), expansion], dim=-1)

    def assign(self, tiles: Tensor | None, solution: Tensor) -> None:
        """Writes `solution` `[t, 1 + degree * in, out]`, rows ordered as `features`."""
        count, _, out = solution.shape
        terms = solution[:, 1:].reshape(count, self.degree, self.in_features, out).permute(0, 2, 3, 1)
        if self.constant is not None:
            assign(self.constant, tiles, solution[:, 0])
            assign(self.coefficients, tiles, terms)
            return
        coefficients = solution.new_zeros(count, self.in_features, out, self.degree + 1)
        coefficients[:, 0, :, 0] = solution[:, 0]
        coefficients[..., 1:] = terms
        assign(self.coefficients, tiles, coefficients)

    def zero(self) -> None:
        """Sets all coefficients to zero."""
        for parameter in (self.coefficients, self.constant):
            if parameter is not None:
                nn.init.zeros_(parameter)


class TiledLayerNorm(nn.Module):
    """Layer normalisation over channels (Ba et al., arXiv:1607.06450) of a jet, gain and offset `[tiles, features]`."""

    epsilon = 1e-5

    def __init__(self, tiles: int, features: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(tiles, features))
        self.offset = nn.Parameter(torch.zeros(tiles, features))

    def forward(self, jet: Jet, tiles: Tensor | None = None) -> Jet:
        """`[t, R, P, C] -> [t, R, P, C]`."""
        gain, offset = (select(p, tiles).to(jet.rows.dtype) for p in (self.gain, self.offset))
        rows = self._whitened(jet) * gain[:, None, None, :]
        rows[:, 0] += offset.unsqueeze(1)
        return jet._replace(rows=rows)

    def _whitened(self, jet: Jet) -> Tensor:
        centred = jet._replace(rows=jet.rows - jet.rows.mean(-1, keepdim=True))  # linear: acts on every row alike
        variance = centred._replace(rows=multiply(centred, centred).rows.mean(-1, keepdim=True))
        inverse = (variance.value + self.epsilon).rsqrt()
        cube = inverse**3
        return multiply(centred, chain(variance, inverse, -cube / 2, 0.75 * cube * inverse**2)).rows

    def jacobian(self, jet: Jet, slopes: Tensor) -> list[Tensor]:
        """See `TiledNetwork.jacobian_layers`."""
        return [(slopes * self._whitened(jet)).sum(1).transpose(1, 2), slopes[:, 0].transpose(1, 2)]

    @torch.enable_grad()
    def pulled_back(self, jet: Jet, slopes: Tensor) -> Tensor:
        """Slopes with respect to the rows of `jet`."""
        rows = jet.rows.detach().requires_grad_()
        return torch.autograd.grad(self(jet._replace(rows=rows)).rows, rows, slopes)[0]


class ScaledCPIKAN(TiledNetwork):
    """A stack of Chebyshev layers per tile: in -> hidden... -> out.

    `first_input_map`: input map of the first layer, whose inputs are already scaled to [-1, 1] (None: `input_map`, as
    published). `degree`: one for all layers, or one per layer. `layer_norm` normalises after each hidden layer, never
    after the last one. See `ChebyshevLayer`.
    """

    def __init__(
        self,
        tiles: int,
        in_features: int,
        out_features: int,
        *,
        hidden: Sequence[int] = (8, 8),
        degree: int | Sequence[int] = 5,
        input_map: str = "tanh",
        first_input_map: str | None = None,
        layer_norm: bool = False,
        shared_constant: bool = False,
        init: str = "xavier_normal",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(tiles, in_features, out_features)
        widths = [in_features, *hidden, out_features]
        degrees = [degree] * (len(hidden) + 1) if isinstance(degree, int) else list(degree)
        if len(degrees) != len(hidden) + 1:
            raise UserError(
                f"cpikan degree {degrees}: give one number, or one for each of the {len(hidden) + 1} layers"
            )
        self.layers = nn.ModuleList(
            ChebyshevLayer(
                tiles,
                width,
                widths[k + 1],
                degrees[k],
                input_map=first_input_map or input_map if k == 0 else input_map,
                layer_norm=layer_norm and k < len(hidden),
                shared_constant=shared_constant,
                init=init,
                generator=generator,
            )
            for k, width in enumerate(widths[:-1])
        )

    def forward(self, jet: Jet, tiles: Tensor | None = None) -> Jet:
        for layer in self.layers:
            jet = layer(jet, tiles)
        return jet

    def first(self, jet: Jet, tiles: Tensor | None = None) -> Jet:
        return self.layers[0].edges(jet, tiles)

    def rest(self, jet: Jet, tiles: Tensor | None = None) -> Jet:
        jet = self.layers[0].normalised(jet, tiles)
        for layer in self.layers[1:]:
            jet = layer(jet, tiles)
        return jet

    def features(self, points: Tensor, tiles: Tensor | None = None) -> Tensor:
        jet = seed(points, "value")
        for layer in self.layers[:-1]:
            jet = layer(jet, tiles)
        return self.layers[-1].features(jet.value)

    def set_last(self, tiles: Tensor | None, solution: Tensor) -> None:
        self.layers[-1].assign(tiles, solution)

    def zero_last(self) -> None:
        self.layers[-1].zero()
