"""Networks of one hidden layer whose tiles share their pixels: values, slopes and normal equations without a network.

A tile's function is N_c(x) = b_c + sum_o sum_n a_con B_n(v_o) with v_o = sum_m w_om phi_m(x): for Scaled-cPIKAN phi are
1 and the Chebyshev terms of both coordinates and B_n = T_n(s(v)), n = 1..degree; for SIREN phi are 1, y, x and
B_1 = sin(v). phi is the same for all tiles of a size, so sum_c J_c J_c' is one GEMM of the units' products q_o q_o'
(q = dN/dv) with the products phi_m phi_m'. A prior on w, sum over k of (1 + k^2) w_k^2, keeps the function quiet
between the pixels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from cpikan_hr.networks.chebyshev_kernels import chebyshev_derivatives, input_derivatives
from cpikan_hr.solvers.projection import Model, eliminate


@dataclass(frozen=True)
class Unit:
    """What a hidden unit computes of its pre-activation v: B_1..B_terms and how a tile's coordinates enter v."""

    kind: str  # cpikan or siren
    degree: int  # of the first layer's Chebyshev terms; 1 for siren
    terms: int
    first_map: str = "sine"
    hidden_map: str = "sine"
    first_omega: float = 1.0

    def inputs(self, height: int, width: int) -> Tensor:
        """phi at the pixel centres of a height x width support: [1 + 2 degree, P].

        First 1, then y's terms, then x's.
        """
        axes = [(2 * torch.arange(n, dtype=torch.float64) + 1) / n - 1 for n in (height, width)]
        if self.kind == "siren":
            terms = [axis[None] for axis in axes]  # w takes the network's frequency in, so that no start depends on it
        else:
            terms = [
                torch.stack([b[0] for b in chebyshev_derivatives(axis, self.degree, self.first_map, 1)])
                for axis in axes
            ]
        y = terms[0][:, :, None].expand(-1, height, width).flatten(1)
        x = terms[1][:, None, :].expand(-1, height, width).flatten(1)
        return torch.cat([torch.ones(1, height * width, dtype=torch.float64), y, x]).float().contiguous()

    def basis(self, v: Tensor, slopes: bool) -> tuple[Tensor, Tensor | None]:
        """B_n(v) and dB_n/dv, each [t, terms, h, P], of v [t, h, P]."""
        if self.kind == "siren":
            return torch.sin(v)[:, None], torch.cos(v)[:, None] if slopes else None
        count, shape = 2 if slopes else 1, (v.shape[0], self.terms, *v.shape[1:])
        values, derivatives = v.new_empty(shape), v.new_empty(shape) if slopes else None
        s = input_derivatives(v, self.hidden_map, count)
        values[:, 0] = s[0]
        if slopes:
            derivatives[:, 0] = s[1]
        twice = [2 * term for term in s]
        for n in range(1, self.terms):  # in place: no temporary beyond the result
            torch.mul(twice[0], values[:, n - 1], out=values[:, n])
            values[:, n] -= values[:, n - 2] if n > 1 else 1
            if slopes:
                torch.mul(twice[1], values[:, n - 1], out=derivatives[:, n])
                derivatives[:, n].addcmul_(twice[0], derivatives[:, n - 1])
                if n > 1:
                    derivatives[:, n] -= derivatives[:, n - 2]
        return values, derivatives

    def penalty(self, units: int, prior: float, like: Tensor) -> Tensor:
        """What multiplies w^2 in the loss, [h (1 + 2 degree)]: `prior` (1 + k^2), for the constant k = 0."""
        k = torch.arange(1, self.degree + 1, dtype=torch.float64)
        weights = prior * torch.cat([torch.ones(1, dtype=torch.float64), 1 + k * k, 1 + k * k])
        return weights.repeat(units).to(like.device)

    def parameters(self, units: int, channels: int) -> int:
        """Numbers of a tile with so many hidden units."""
        return units * (1 + 2 * self.degree) + channels * (units * self.terms + 1)


def features(unit: Unit, phi: Tensor, w: Tensor, weight: Tensor | None = None, slopes: bool = False):
    """A [t, h terms + 1, P], last the constant, and dB/dv; `weight` [t, P] multiplies A."""
    tiles, units, terms = w.shape
    pixels = phi.shape[1]
    values, derivatives = unit.basis((w.reshape(tiles * units, terms) @ phi).view(tiles, units, pixels), slopes)
    a = w.new_empty(tiles, units * unit.terms + 1, pixels)
    a[:, :-1] = values.view(tiles, -1, pixels)
    a[:, -1] = 1
    if weight is not None:
        a *= weight[:, None]
    return a, derivatives


@dataclass(frozen=True)
class Inputs:
    """phi [M, P] of all tiles of a size, and its products [P, M (M + 1) / 2] with their places in an M x M matrix."""

    phi: Tensor
    products: Tensor
    place: Tensor  # [M, M] which product stands where

    @classmethod
    def of(cls, phi: Tensor) -> "Inputs":
        m, n = torch.triu_indices(len(phi), len(phi), device=phi.device)
        place = torch.zeros(len(phi), len(phi), dtype=torch.long, device=phi.device)
        place[m, n] = place[n, m] = torch.arange(len(m), device=phi.device)
        return cls(phi, (phi[m] * phi[n]).T.contiguous(), place)

    def gram(self, slopes: Tensor) -> Tensor:
        """sum over channels and pixels of J J', float64 [t, h M, h M], for J_om = slopes_o phi_m.

        slopes [t, C, h, P].
        """
        tiles, _, units, pixels = slopes.shape
        o, p = torch.triu_indices(units, units, device=slopes.device)
        pairs = (slopes[:, :, o] * slopes[:, :, p]).sum(1)  # [t, h (h + 1) / 2, P]
        blocks = (pairs.view(-1, pixels) @ self.products).view(tiles, len(o), -1)
        which = torch.zeros(units, units, dtype=torch.long, device=slopes.device)
        which[o, p] = which[p, o] = torch.arange(len(o), device=slopes.device)
        full = blocks[:, which][..., self.place]  # [t, h, h, M, M]
        return full.transpose(2, 3).reshape(tiles, units * len(self.phi), -1).double()


class Units:
    """Tiles with hidden weights w [t, h, 1 + 2 degree] (`gauss_newton.Fit`); `phi` [1 + 2 degree, P] as in `Unit`."""

    def __init__(self, unit: Unit, phi: Tensor, prior: float = 0.0):
        self.unit, self.inputs, self.prior = unit, Inputs.of(phi), prior

    def elements(self, w: Tensor, channels: int) -> int:
        _, units, terms = w.shape
        return self.inputs.phi.shape[1] * units * (channels * terms + 3 * self.unit.terms)

    def linearise(self, tiles: Tensor, data: Tensor, w: Tensor, weight: Tensor | None) -> Model:
        unit, phi, (_, units, _) = self.unit, self.inputs.phi, w.shape
        a, slopes = features(unit, phi, w, weight, slopes=True)
        found = eliminate(a, data)
        a_con = found.last[:, :, :-1].unflatten(2, (unit.terms, units))[..., None]  # [t, C, terms, h, 1]
        q = slopes[:, None, 0] * a_con[:, :, 0]  # dN/dv_o, [t, C, h, P]
        for n in range(1, unit.terms):
            q.addcmul_(slopes[:, None, n], a_con[:, :, n])
        if weight is not None:
            q *= weight[:, None, None]
        matrix = self.inputs.gram(q)
        gradient = found.reduce(matrix, (q[:, :, :, None] * phi).flatten(2, 3))
        penalty, flat = unit.penalty(units, self.prior, data), w.reshape(len(w), -1).double()
        matrix.diagonal(dim1=1, dim2=2).add_(penalty)
        loss = found.loss + (penalty * flat * flat).sum(1).float()
        return Model(w, loss, found.last, matrix, gradient + penalty * flat)
