"""Variable projection: the linear last layer of many small networks is eliminated, only hidden weights are left.

Given the hidden weights w, the best last layer is a linear least-squares solution (Golub and Pereyra 1973; the Jacobian
is Kaufman's approximation, 1975). With features A [K, P], data Y [C, P] and J_c = dN_c/dw at a fixed last layer a:

    G = A A' + eps, a = G^-1 A Y, matrix = sum_c J_c J_c' - J_c A' G^-1 A J_c', gradient = -sum_c J_c r_c.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-5  # of the last layer's normal matrix, over its mean diagonal


@dataclass
class Model:
    """Quadratic model of tiles at hidden weights w [t, ...] of n numbers.

    Loss [t], last layer [t, C, K], matrix [t, n, n] and gradient [t, n] (of half the loss) in float64.
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
class Eliminated:
    """Features [t, K, P], the Cholesky factor of G [t, K, K], the last layer [t, C, K] and what it leaves [t, C, P]."""

    features: Tensor
    factor: Tensor
    last: Tensor
    residual: Tensor
    loss: Tensor  # [t], inf where G is not positive definite

    def reduce(self, matrix: Tensor, jacobian: Tensor) -> Tensor:
        """Takes what the last layer follows from `matrix`, sum_c J_c J_c', in place; returns the gradient.

        `jacobian` [t, C, n, P].
        """
        tiles, channels, size, _ = jacobian.shape
        crossed = torch.bmm(self.features, jacobian.flatten(1, 2).transpose(1, 2)).double()  # [t, K, C n]
        along = torch.linalg.solve_triangular(self.factor, crossed, upper=False).reshape(tiles, -1, size)
        matrix.baddbmm_(along.transpose(1, 2), along, alpha=-1)
        slope = torch.bmm(jacobian.flatten(0, 1), self.residual.flatten(0, 1)[..., None])
        return -slope.view(tiles, channels, size).sum(1).double()


def eliminate(features: Tensor, data: Tensor) -> Eliminated:
    """The last layer of tiles with these features [t, K, P], fitted to data [t, C, P]; weights are in both already."""
    gram = torch.bmm(features, features.transpose(1, 2)).double()
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += RIDGE * diagonal.mean(1, keepdim=True) + 1e-30
    factor, info = torch.linalg.cholesky_ex(gram)
    right = torch.bmm(features, data.transpose(1, 2)).double()
    last = torch.cholesky_solve(right, factor).float().transpose(1, 2).contiguous()
    residual = data - torch.bmm(last, features)
    loss = residual.square().sum((1, 2))
    loss = torch.where((info == 0) & torch.isfinite(loss), loss, math.inf)
    return Eliminated(features, factor, last, residual, loss)
