"""Levenberg-Marquardt on thousands of small networks at once: one hidden layer per tile, its last layer eliminated.

A tile's function is N_c(x) = b_c + sum_o sum_n a_con B_n(v_o) with v_o = sum_m w_om phi_m(x): for Scaled-cPIKAN phi are
1 and the Chebyshev terms of both coordinates and B_n = T_n(s(v)), n = 1..degree; for SIREN phi are 1, y, x and
B_1 = sin(omega v). Given w, the best a and b are a linear least-squares solution, so only w is iterated (variable
projection, Golub and Pereyra 1973, with Kaufman's 1975 approximation of the Jacobian):

    A = features, G = A A' + eps, a = G^-1 A Y,  J_c = dN_c/dw at fixed a,
    (sum_c J_c J_c' - J_c A' G^-1 A J_c' + lambda D) step = sum_c J_c r_c.

Normal matrices are accumulated from float32 products and solved in float64 by batched Cholesky. Damping is per tile: a
step that raises the loss is refused and the damping grows, a good one lowers it (Nielsen 1999). Tiles that no longer
improve leave the batch.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cpikan_hr.networks.chebyshev_kernels import chebyshev_derivatives, input_derivatives

CHUNK = 400_000  # elements of the largest temporary of a chunk of tiles: it stays in a core's cache
RIDGE = 1e-5  # of the last layer's normal matrix, over its mean diagonal


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
        """phi at the pixel centres of a height x width support: [1 + 2 degree, P], first 1, then y's terms, then x's."""
        axes = [(2 * torch.arange(n, dtype=torch.float64) + 1) / n - 1 for n in (height, width)]
        if self.kind == "siren":
            terms = [self.first_omega * axis[None] for axis in axes]
        else:
            terms = [
                torch.stack([b[0] for b in chebyshev_derivatives(axis, self.degree, self.first_map, 1)]) for axis in axes
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


@dataclass
class Model:
    """Quadratic model of the tiles at w: loss [t], last layer [t, C, h terms + 1], matrix [t, K, K], gradient [t, K]."""

    w: Tensor
    loss: Tensor
    last: Tensor
    matrix: Tensor
    gradient: Tensor

    def pick(self, tiles: Tensor) -> "Model":
        return Model(*(part[tiles] for part in (self.w, self.loss, self.last, self.matrix, self.gradient)))

    def take(self, accepted: Tensor, other: "Model") -> "Model":
        """The other model where it is accepted."""

        def choose(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(accepted.view(-1, *[1] * (new.dim() - 1)), new, old)

        pairs = ((other.w, self.w), (other.loss, self.loss), (other.last, self.last))
        pairs += ((other.matrix, self.matrix), (other.gradient, self.gradient))
        return Model(*(choose(new, old) for new, old in pairs))


def linearise(unit: Unit, phi: Tensor, data: Tensor, w: Tensor, weight: Tensor | None) -> Model:
    """The model of `data` [t, C, P] (multiplied by `weight` [t, P] already) at hidden weights w [t, h, 1 + 2 degree]."""
    tiles, units, inputs = w.shape
    a, slopes = features(unit, phi, w, weight, slopes=True)
    gram = torch.bmm(a, a.transpose(1, 2)).double()
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += RIDGE * diagonal.mean(1, keepdim=True) + 1e-30
    factor, info = torch.linalg.cholesky_ex(gram)
    last = torch.cholesky_solve(torch.bmm(a, data.transpose(1, 2)).double(), factor).float().transpose(1, 2).contiguous()
    residual = data - torch.bmm(last, a)
    loss = residual.square().sum((1, 2))
    loss = torch.where((info == 0) & torch.isfinite(loss), loss, math.inf)
    matrix = gradient = 0
    for channel in range(data.shape[1]):
        a_con = last[:, channel, :-1].view(tiles, unit.terms, units)
        slope = slopes[:, 0] * a_con[:, 0, :, None]  # dN/dv_o
        for n in range(1, unit.terms):
            slope.addcmul_(slopes[:, n], a_con[:, n, :, None])
        if weight is not None:
            slope *= weight[:, None]
        jacobian = (slope[:, :, None, :] * phi).view(tiles, units * inputs, -1)
        along = torch.linalg.solve_triangular(factor, torch.bmm(a, jacobian.transpose(1, 2)).double(), upper=False)
        matrix = matrix + torch.bmm(jacobian, jacobian.transpose(1, 2)).double() - torch.bmm(along.transpose(1, 2), along)
        gradient = gradient + torch.bmm(jacobian, residual[:, channel, :, None])[..., 0].double()
    return Model(w, loss, last, matrix, gradient)


@torch.no_grad()
def levenberg_marquardt(unit: Unit, phi: Tensor, data: Tensor, w: Tensor, iterations: int, weight: Tensor | None = None,
                        damping: float = 0.3, tolerance: float = 1e-3, patience: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Minimises |weight (N - y)|^2 of every tile. `data` [t, C, P] is y times weight; w [t, h, 1 + 2 degree].

    A tile leaves after `patience` iterations that lowered its loss by less than `tolerance` of it.
    Returns w, the last layer [t, C, h terms + 1] and the loss [t].
    """
    tiles, channels, pixels = data.shape
    units, inputs = w.shape[1:]
    w, last, loss = w.clone(), data.new_empty(tiles, channels, units * unit.terms + 1), data.new_empty(tiles)
    step = max(1, CHUNK // (pixels * units * (inputs + 3 * unit.terms)))
    for start in range(0, tiles, step):
        numbers = torch.arange(start, min(tiles, start + step), device=data.device)
        model = linearise(unit, phi, data[numbers], w[numbers], None if weight is None else weight[numbers])
        scale = torch.full((len(numbers),), damping, dtype=torch.float64, device=data.device)
        growth, stalled = torch.full_like(scale, 3.0), torch.zeros_like(scale)
        for iteration in range(iterations):
            diagonal = model.matrix.diagonal(dim1=1, dim2=2)
            trust = diagonal + 1e-4 * diagonal.mean(1, keepdim=True) + 1e-12
            damped = model.matrix + torch.diag_embed(scale[:, None] * trust)
            factor, info = torch.linalg.cholesky_ex(damped)
            move = torch.cholesky_solve(model.gradient[..., None], factor)[..., 0]
            move = torch.where((info == 0)[:, None], move, 0.0)
            moved = model.w + move.float().view_as(model.w)
            new = linearise(unit, phi, data[numbers], moved, None if weight is None else weight[numbers])
            gain = model.loss - new.loss
            predicted = (move * (scale[:, None] * trust * move + model.gradient)).sum(1).clamp_min(1e-30)
            ratio, accepted = gain.double() / predicted, new.loss < model.loss
            stalled = torch.where(gain > tolerance * model.loss, 0.0, stalled + 1)
            shrink = torch.where(ratio > 0.75, 0.2, torch.where(ratio > 0.25, 0.5, 1.0))
            scale = torch.where(accepted, (scale * shrink).clamp_min(1e-7), scale * growth)
            growth = torch.where(accepted, 3.0, 2 * growth)
            model = model.take(accepted, new)
            live = stalled < patience
            if iteration + 1 < iterations and int(live.sum()) < 0.75 * len(numbers):  # compact what is left
                w[numbers], last[numbers], loss[numbers] = model.w, model.last, model.loss
                numbers, model = numbers[live], model.pick(live)
                scale, growth, stalled = scale[live], growth[live], stalled[live]
                if not len(numbers):
                    break
        if len(numbers):
            w[numbers], last[numbers], loss[numbers] = model.w, model.last, model.loss
    return w, last, loss
