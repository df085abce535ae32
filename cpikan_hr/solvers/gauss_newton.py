"""Levenberg-Marquardt on thousands of small networks at once: one hidden layer per tile, its last layer eliminated.

A tile's function is N_c(x) = b_c + sum_o sum_n a_con B_n(v_o) with v_o = sum_m w_om phi_m(x): for Scaled-cPIKAN phi are
1 and the Chebyshev terms of both coordinates and B_n = T_n(s(v)), n = 1..degree; for SIREN phi are 1, y, x and
B_1 = sin(v). Given w, the best a and b are a linear least-squares solution, so only w is iterated (variable
projection, Golub and Pereyra 1973, with Kaufman's 1975 approximation of the Jacobian):

    A = features, G = A A' + eps, a = G^-1 A Y,  J_c = dN_c/dw at fixed a,
    (sum_c J_c J_c' - J_c A' G^-1 A J_c' + lambda D) step = sum_c J_c r_c.

phi is the same for all tiles of a size, so sum_c J_c J_c' is one GEMM of the units' products q_o q_o' (q = dN/dv) with
the products phi_m phi_m'. A prior on w, sum over k of (1 + k^2) w_k^2, keeps the function quiet between the pixels.

Normal matrices are accumulated from float32 products and solved in float64 by batched Cholesky. Damping is per tile: a
step that raises the loss is refused and the damping grows, a good one lowers it (Nielsen 1999). Tiles that no longer
improve leave the batch.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from cpikan_hr.networks.chebyshev_kernels import chebyshev_derivatives, input_derivatives
from cpikan_hr.parallel import at_once
from cpikan_hr.solvers.damping import Damping

CHUNK = 1_000_000  # elements of the largest temporary of a chunk of tiles: it stays in a core's cache
LEAST = 1e-7  # damping
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


@dataclass
class Model:
    """Quadratic model of the tiles at w.

    Loss [t], last layer [t, C, h terms + 1], matrix [t, K, K], gradient [t, K].
    """

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


def linearise(unit: Unit, inputs: Inputs, data: Tensor, w: Tensor, weight: Tensor | None, penalty: Tensor) -> Model:
    """The model of `data` [t, C, P] (multiplied by `weight` [t, P] already) at hidden weights w [t, h, M]."""
    tiles, units, _ = w.shape
    channels = data.shape[1]
    a, slopes = features(unit, inputs.phi, w, weight, slopes=True)
    gram = torch.bmm(a, a.transpose(1, 2)).double()
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += RIDGE * diagonal.mean(1, keepdim=True) + 1e-30
    factor, info = torch.linalg.cholesky_ex(gram)
    last = (
        torch.cholesky_solve(torch.bmm(a, data.transpose(1, 2)).double(), factor).float().transpose(1, 2).contiguous()
    )
    residual = data - torch.bmm(last, a)
    flat = w.reshape(tiles, -1).double()
    loss = residual.square().sum((1, 2)) + (penalty * flat * flat).sum(1).float()
    loss = torch.where((info == 0) & torch.isfinite(loss), loss, math.inf)
    a_con = last[:, :, :-1].unflatten(2, (unit.terms, units))[..., None]  # [t, C, terms, h, 1]
    q = slopes[:, None, 0] * a_con[:, :, 0]  # dN/dv_o, [t, C, h, P]
    for n in range(1, unit.terms):
        q.addcmul_(slopes[:, None, n], a_con[:, :, n])
    if weight is not None:
        q *= weight[:, None, None]
    matrix, gradient = inputs.gram(q), -penalty * flat
    matrix.diagonal(dim1=1, dim2=2).add_(penalty)
    jacobian = (q[:, :, :, None] * inputs.phi).flatten(2, 3)  # [t, C, h M, P]
    size = jacobian.shape[2]
    crossed = torch.bmm(a, jacobian.flatten(1, 2).transpose(1, 2)).double()  # [t, K, C h M]
    along = torch.linalg.solve_triangular(factor, crossed, upper=False).reshape(tiles, -1, size)
    matrix.baddbmm_(along.transpose(1, 2), along, alpha=-1)
    slope = torch.bmm(jacobian.flatten(0, 1), residual.flatten(0, 1)[..., None])
    gradient = gradient + slope.view(tiles, channels, size).sum(1).double()
    return Model(w, loss, last, matrix, gradient)


@torch.no_grad()
def levenberg_marquardt(
    unit: Unit,
    phi: Tensor,
    data: Tensor,
    w: Tensor,
    iterations: int,
    weight: Tensor | None = None,
    prior: float = 0.0,
    damping: float = 0.3,
    tolerance: float = 1e-3,
    patience: int = 3,
) -> tuple[Tensor, Tensor, Tensor]:
    """Minimises |weight (N - y)|^2 + prior |w|^2 of every tile. `data` [t, C, P] is y times weight; w [t, h, M].

    A tile leaves after `patience` iterations that lowered its loss by less than `tolerance` of it.
    Returns w, the last layer [t, C, h terms + 1] and the loss [t].
    """
    tiles, channels, pixels = data.shape
    units, inputs = w.shape[1:]
    w, last, loss = w.clone(), data.new_empty(tiles, channels, units * unit.terms + 1), data.new_empty(tiles)
    step = max(1, at_once(CHUNK, phi.device) // (pixels * units * (channels * inputs + 3 * unit.terms)))
    known, penalty = Inputs.of(phi), unit.penalty(units, prior, data)
    for start in range(0, tiles, step):
        numbers = torch.arange(start, min(tiles, start + step), device=data.device)
        mine, here = data[numbers], None if weight is None else weight[numbers]
        model = linearise(unit, known, mine, w[numbers], here, penalty)
        trusted = Damping.of(torch.full((len(numbers),), damping, dtype=torch.float64, device=data.device), LEAST)
        stalled = torch.zeros_like(trusted.scale)
        for iteration in range(iterations):
            diagonal = model.matrix.diagonal(dim1=1, dim2=2)
            trust = diagonal + 1e-4 * diagonal.mean(1, keepdim=True) + 1e-12
            damped = model.matrix + torch.diag_embed(trusted.scale[:, None] * trust)
            factor, info = torch.linalg.cholesky_ex(damped)
            move = torch.cholesky_solve(model.gradient[..., None], factor)[..., 0]
            move = torch.where((info == 0)[:, None], move, 0.0)
            moved = model.w + move.float().view_as(model.w)
            new = linearise(unit, known, mine, moved, here, penalty)
            gain = model.loss - new.loss
            accepted = new.loss < model.loss
            stalled = torch.where(gain > tolerance * model.loss, 0.0, stalled + 1)
            predicted = (move * (trusted.scale[:, None] * trust * move + model.gradient)).sum(1)
            trusted.learn(gain.double(), predicted, accepted)
            model = model.take(accepted, new)
            live = stalled < patience
            if iteration + 1 < iterations and int(live.sum()) < 0.75 * len(numbers):  # compact what is left
                w[numbers], last[numbers], loss[numbers] = model.w, model.last, model.loss
                numbers, model = numbers[live], model.pick(live)
                trusted, stalled = trusted.pick(live), stalled[live]
                mine, here = mine[live], None if here is None else here[live]
                if not len(numbers):
                    break
        if len(numbers):
            w[numbers], last[numbers], loss[numbers] = model.w, model.last, model.loss
    return w, last, loss
