"""The interface of every network: one module holds the networks of all tiles of a level, batched.

Invariants:
* every parameter has a leading dimension `tiles`, of which tile k reads only its own slice; a module whose parameter is
  a flat list of terms says with a method `tile_of` which tile each of its numbers belongs to;
* a network maps the jet of its local coordinates to the jet of its output, `[t, R, P, in] -> [t, R, P, out]`;
* a parameter is read in training only inside `forward` of the module that owns it, because ZeRO-3 and FSDP gather
  parameters module by module;
* the layers that own the parameters give their own Jacobian (`jacobian_layers`, see `solvers/jacobian.py`);
* the output is linear in the parameters of the last (or only) layer: `value == features @ solution` after
  `set_last(tiles, solution)`. That is what the closed-form start and the tile-wise solvers rely on.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..jets import Jet, full_precision, linear
from ..mapped import release


def select(parameter: Tensor, tiles: Tensor | None) -> Tensor:
    """Rows `tiles` of a `[tiles, ...]` tensor; all of them, uncopied, where `tiles` is None."""
    if tiles is None:
        return parameter
    if getattr(parameter, "sparse_gradient", False) and torch.is_grad_enabled():
        return SparseRows.apply(parameter, tiles)
    return parameter.index_select(0, tiles)


class SparseRows(torch.autograd.Function):
    """Rows of a tensor whose gradient holds them alone (sparse): nothing as large as the tensor is made."""

    @staticmethod
    def forward(context, parameter: Tensor, rows: Tensor) -> Tensor:
        context.shape = parameter.shape
        context.save_for_backward(rows)
        selected = parameter.index_select(0, rows)
        release()  # 16 pages become resident for each that a row is on
        return selected

    @staticmethod
    def backward(context, slopes: Tensor) -> tuple[Tensor, None]:
        (rows,) = context.saved_tensors
        return torch.sparse_coo_tensor(rows[None], slopes, context.shape, check_invariants=False), None


def assign(parameter: Tensor, tiles: Tensor | None, values: Tensor) -> None:
    """Writes `values` `[t, ...]` into rows `tiles` (None: all) of a parameter or buffer, without gradient."""
    with torch.no_grad():
        if tiles is None:
            parameter.copy_(values)
        else:
            parameter.index_copy_(0, tiles, values.to(parameter))


def outer(features: Tensor, slopes: Tensor) -> Tensor:
    """Features `[t, P, R, K]` times slopes `[t, P, R, out]`, summed over the rows of a jet: `[t, K, out, P]`.

    In memory points come last for one row, where that is one product along them, and before K and out for more.
    """
    if features.shape[2] == 1:
        features, slopes = (part.squeeze(2).transpose(1, 2).contiguous() for part in (features, slopes))
        return features.unsqueeze(2) * slopes.unsqueeze(1)
    product = torch.bmm(features.flatten(0, 1).transpose(1, 2), slopes.flatten(0, 1))
    return product.unflatten(0, features.shape[:2]).permute(0, 2, 3, 1)


class TiledNetwork(nn.Module, ABC):
    """Base class. `tiles`: how many networks are batched; `in_features`, `out_features`: channels of each.

    `separable`: a sum of products of one basis per axis, which `lattice_coefficients` and `basis` give.
    """

    separable = False

    def __init__(self, tiles: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.tiles, self.in_features, self.out_features = tiles, in_features, out_features

    @abstractmethod
    def forward(self, jet: Jet, tiles: Tensor | None = None) -> Jet:
        """`jet.rows` `[t, R, P, in]` to `[t, R, P, out]`. `tiles`: LongTensor `[t]`, which tiles' parameters to use,
        or None for all in order."""

    def on_lattice(self, y: Jet, x: Jet, origin: Jet, tiles: Tensor | None = None) -> Jet:
        """The network on the product of two axes, `[t, R, Py Px, out]`, of the jets of points (y, 0), (0, x), (0, 0).

        A first layer that is a sum of functions of one coordinate each, F(y, x) = F(y, 0) + F(0, x) - F(0, 0) with all
        derivatives, is evaluated on the axes alone.
        """
        along_y, along_x, both = (self.first(jet, tiles).rows for jet in (y, x, origin))
        rows = (along_y - both).unsqueeze(3) + along_x.unsqueeze(2)
        return self.rest(y._replace(rows=rows.flatten(2, 3)), tiles)

    def first(self, jet: Jet, tiles: Tensor | None = None) -> Jet:
        """What of `forward` is a sum of functions of one coordinate each; `rest` goes on from there."""
        return jet

    def rest(self, jet: Jet, tiles: Tensor | None = None) -> Jet:
        return self(jet, tiles)

    @abstractmethod
    def features(self, points: Tensor, tiles: Tensor | None = None) -> Tensor:
        """What multiplies the last layer's parameters: local coordinates `[t, P, in]` to `[t, P, K]`; column 0 is the
        constant 1."""

    @abstractmethod
    def set_last(self, tiles: Tensor | None, solution: Tensor) -> None:
        """Writes the last layer of `tiles` (None: all) so that `value == features @ solution`; `[t, K, out]`."""

    @abstractmethod
    def zero_last(self) -> None:
        """Sets the last layer to zero: a fresh level then adds nothing to the levels above it."""

    @property
    def jacobian_layers(self) -> Iterable[nn.Module]:
        """The modules that own all parameters, in their order. Each maps a jet and `tiles` to a jet and has a method
        `jacobian(jet, slopes)`: for slopes `[t, R, P, out]` of a scalar with respect to what it makes of the jet
        `[t, R, P, in]`, those with respect to each of its parameters, point by point, `[t, .., P]`."""
        return self.layers

    def rows(self, tiles: Tensor) -> Tensor:
        """Which rows of every parameter are those of `tiles` `[t]`, in their order."""
        return tiles

    def pick(self, tiles: Tensor, other: "TiledNetwork | None" = None) -> "TiledNetwork":
        """A network with parameters of its own: `tiles` `[t]` of this one, where `other`'s count on from its last."""
        others = dict(other.named_parameters()) if other is not None else {}
        picked = {}
        for name, parameter in self.named_parameters():
            whole = torch.cat([parameter, others[name]]) if others else parameter
            picked[id(parameter)] = nn.Parameter(whole.detach()[tiles], parameter.requires_grad)
        network = copy.deepcopy(self, picked)
        network.tiles = len(tiles)
        return network


class TiledLinear(nn.Module):
    """u W + b per tile: `weight` `[tiles, in, out]` and `bias` `[tiles, out]`, both uniform in +-bound.

    `weight_bound`, `bias_bound`: half-widths of the uniform initialisation (0: zeros).
    """

    def __init__(
        self,
        tiles: int,
        in_features: int,
        out_features: int,
        weight_bound: float,
        bias_bound: float,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tiles, in_features, out_features))
        self.bias = nn.Parameter(torch.empty(tiles, out_features))
        if not self.weight.is_meta:  # else shapes alone: the values come from a file
            nn.init.uniform_(self.weight, -weight_bound, weight_bound, generator=generator)
            nn.init.uniform_(self.bias, -bias_bound, bias_bound, generator=generator)

    def forward(self, jet: Jet, tiles: Tensor | None = None) -> Jet:
        """`[t, R, P, in] -> [t, R, P, out]`; derivatives never run in reduced precision."""
        with full_precision(jet.order):
            # parameters may be stored in bf16; the precision of the GEMM is that of the rows, or autocast's
            weight, bias = (select(p, tiles).to(jet.rows.dtype) for p in (self.weight, self.bias))
            return linear(jet, weight, bias)

    def jacobian(self, jet: Jet, slopes: Tensor) -> list[Tensor]:
        """See `TiledNetwork.jacobian_layers`."""
        return [outer(jet.rows.transpose(1, 2), slopes.transpose(1, 2)), slopes[:, 0].transpose(1, 2)]

    def zero(self) -> None:
        """Sets weight and bias to zero."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def assign(self, tiles: Tensor | None, solution: Tensor) -> None:
        """Writes `solution` `[t, 1 + in, out]`: row 0 is the bias, the others the weight."""
        assign(self.bias, tiles, solution[:, 0])
        assign(self.weight, tiles, solution[:, 1:])
