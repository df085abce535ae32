"""Chebyshev2D: per tile the linear tensor-product expansion u(y, x) = sum_mn a_mn T_m(s(y)) T_n(s(x)).

The linear member of the family: solved in closed form, evaluated separably on a lattice, and able to keep any subset of
its terms in each tile. With the `sine` input map it is the cosine expansion of a tile, orthogonal on pixel centres.

Invariants: coordinate 0 is y (index m), coordinate 1 is x (index n). A dense network has coefficients
`[tiles, C, (M + 1)(N + 1)]`. A sparse one lists only the terms in use, tile after tile: `coefficients [K]`, their flat
indices (c (M + 1) + m)(N + 1) + n in `index [K]`, ascending within a tile, and where each tile begins in
`offset [tiles + 1]`. Terms that are not listed are zero and are no parameters. The lists may lie in a file (see
`mapped.py`): only what belongs to the tiles asked for is read.
"""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..jets import Jet, full_precision, pairs, transformed, unwrapped
from .base import TiledNetwork, assign, outer, select
from .chebyshev_kernels import INPUT_MAPS, chebyshev_derivatives

# Per jet order: how often u is differentiated along (y, x), in the order of pairs(2) after value and gradient.
LOCAL_DERIVATIVES = [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2)]
LOCAL_COUNTS = {"value": 1, "gradient": 3, "laplacian": 6, "hessian": 6}  # how many of them an order needs


class Chebyshev2D(TiledNetwork):
    """`degree`: one for both axes or [degree_y, degree_x].

    `sparse`: only listed terms exist; a fresh network has the constant of every tile and channel, `set_terms` replaces
    the list. Coefficients start at zero; `generator` belongs to the common interface, nothing here is random.
    UserError for other than two inputs, or an unknown map.
    """

    separable = True

    def __init__(
        self,
        tiles: int,
        in_features: int = 2,
        out_features: int = 1,
        *,
        degree: int | tuple[int, int] = 15,
        input_map: str = "sine",
        sparse: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(tiles, in_features, out_features)
        if in_features != 2:
            raise UserError(f"chebyshev2d works in 2 coordinates, not {in_features}: choose another network")
        if input_map not in INPUT_MAPS:
            raise UserError(f"unknown input_map {input_map!r}: choose one of {', '.join(INPUT_MAPS)}")
        self.degree = (degree, degree) if isinstance(degree, int) else tuple(degree)
        self.input_map, self.shape = input_map, (self.degree[0] + 1, self.degree[1] + 1)
        if min(self.degree) < 0 or max(self.degree) > 511:
            raise UserError(f"chebyshev2d degree {list(self.degree)}: it must be from 0 to 511")
        self.sparse = sparse
        self.index_dtype = index_dtype(out_features * self.shape[0] * self.shape[1])
        self.register_buffer("index", None)
        self.register_buffer("offset", None)
        if sparse:
            self._set_constants()
        else:
            self.coefficients = nn.Parameter(torch.zeros(tiles, out_features, self.shape[0] * self.shape[1]))

    # ----------------------------------------------------------------------------------------------- terms in use

    def _set_constants(self) -> None:
        """The constant of every tile and channel, zero, as the only terms."""
        count, channels = self.tiles * self.out_features, self.out_features
        offset = torch.empty(self.tiles + 1, dtype=torch.int32)
        index = torch.empty(self.tiles, channels, dtype=self.index_dtype)
        if not offset.is_meta:  # where there are no values
            torch.arange(0, count + 1, channels, out=offset)
            index[:] = torch.arange(channels) * (self.shape[0] * self.shape[1])
        self.adopt_terms(offset, index.flatten(), torch.zeros(count))

    @torch.no_grad()
    def set_terms(self, counts: Tensor, index: Tensor, values: Tensor) -> None:
        """Replaces all terms of a sparse network: `counts` `[tiles]`, `index` and `values` `[K]`, tile after tile.

        Makes a new parameter, so it comes before any optimizer.
        """
        like = values if self.index is None else self.coefficients  # its device and precision stay
        offset = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(like.device, torch.int32)
        index = index.to(like.device, self.index_dtype, copy=True)
        self.adopt_terms(offset, index, values.to(like, copy=True).contiguous())

    def adopt_terms(self, offset: Tensor, index: Tensor, values: Tensor) -> None:
        """The same with tensors that become the network's own, uncopied."""
        trained = self.index is None or self.coefficients.requires_grad  # stays
        self.offset, self.index = offset, index
        self.coefficients = nn.Parameter(values, requires_grad=trained)

    def tile_of(self, number: int) -> int:
        """The tile that row `number` of `coefficients` belongs to."""
        if not self.sparse:
            return number
        return int(torch.searchsorted(self.offset, number, right=True)) - 1

    def rows(self, tiles: Tensor) -> Tensor:
        return self._listed(tiles)[0] if self.sparse else tiles

    def pick(self, tiles: Tensor, other: "Chebyshev2D | None" = None) -> "Chebyshev2D":
        if not self.sparse:
            return super().pick(tiles, other)
        network, parts = copy.deepcopy(self), [self] if other is None else [self, other]
        counts, index, values = (
            torch.cat(list(tensors))
            for tensors in zip(*((p.offset.diff(), p.index, p.coefficients.detach()) for p in parts), strict=True)
        )
        network.tiles = len(counts)
        network.set_terms(counts, index, values)
        number = network.rows(tiles)
        network.tiles = len(tiles)
        network.set_terms(counts[tiles], index[number], values[number])
        return network

    def _load_from_state_dict(self, state, prefix, metadata, *arguments) -> None:
        if self.sparse and prefix + "index" in state:  # as many terms as the file has
            index, offset = state[prefix + "index"], state[prefix + "offset"]
            if index.numel() != self.index.numel() and offset.shape == self.offset.shape:
                values = state.get(prefix + "coefficients", self.coefficients.new_zeros(index.numel()))
                if metadata.get("assign_to_params_buffers"):
                    self.adopt_terms(offset, index, values)
                else:
                    self.set_terms(offset.diff(), index, values)
        super()._load_from_state_dict(state, prefix, metadata, *arguments)

    def dense(self, tiles: Tensor | None = None) -> Tensor:
        """All coefficients of `tiles`, zeros where a term is not in use: `[t, C, M + 1, N + 1]`."""
        if not self.sparse:
            return select(self.coefficients, tiles).unflatten(2, self.shape)
        if tiles is not None and transformed() and unwrapped(tiles) is None:  # vmap: no lists of any length
            return self.dense()[tiles]
        number, tile = self._listed(tiles)
        count = self.tiles if tiles is None else len(tiles)
        size = self.out_features * self.shape[0] * self.shape[1]
        values = select(self.coefficients, number)
        flat = values.new_zeros(count * size).index_add(0, tile * size + self.index[number], values)
        return flat.view(count, self.out_features, *self.shape)

    @torch.no_grad()
    def lattice_coefficients(self, tiles: Tensor) -> Tensor:
        """The same as `[M + 1, C, t, N + 1]`, the layout in which both contractions of a lattice are one GEMM."""
        if not self.sparse:
            return select(self.coefficients, tiles).unflatten(2, self.shape).permute(2, 1, 0, 3).contiguous()
        number, tile = self._listed(tiles)
        (high, wide), channels = self.shape, self.out_features
        index = self.index[number].long()
        line = index // wide  # c (M + 1) + m
        row = line if channels == 1 else line % high * channels + line // high
        place = index + (row * len(tiles) - line + tile) * wide
        flat = self.coefficients.new_zeros(self.out_features * len(tiles) * self.shape[0] * self.shape[1])
        flat[place] = self.coefficients[number]
        return flat.view(self.shape[0], self.out_features, len(tiles), self.shape[1])

    def _listed(self, tiles: Tensor | None) -> tuple[Tensor, Tensor]:
        """Numbers [K'] of the coefficients of `tiles`, and which of the `tiles` each belongs to."""
        if tiles is None:
            first, last = self.offset[:-1].long(), self.offset[1:].long()
        else:
            first, last = self.offset[tiles].long(), self.offset[tiles + 1].long()
        counts = last - first
        tile = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
        place = torch.arange(len(tile), device=counts.device)
        return place + (first - counts.cumsum(0) + counts)[tile], tile

    def zero_last(self) -> None:
        nn.init.zeros_(self.coefficients)

    # ------------------------------------------------------------------------------------------------- evaluation

    def basis(self, xi: Tensor, axis: int, order: str) -> Tensor:
        """T_0..T_M of s(xi) and, by order, their first and second derivatives with respect to xi.

        `xi` `[t, P]`; `axis` 0 (y) or 1 (x); returns `[t, 1 to 3, P, M + 1]`.
        """
        count = {"value": 1, "gradient": 2}.get(order, 3)
        zero = torch.zeros_like(xi)
        columns = [torch.stack([torch.ones_like(xi), zero, zero][:count], dim=1)]
        if self.degree[axis]:
            derivatives = chebyshev_derivatives(xi, self.degree[axis], self.input_map, count)
            columns += [torch.stack(b, dim=1) for b in derivatives]
        return torch.stack(columns, dim=-1)

    def forward(self, jet: Jet, tiles: Tensor | None = None) -> Jet:
        with full_precision(jet.order):
            return self._scattered(jet, self.dense(tiles).to(jet.rows.dtype))

    def _scattered(self, jet: Jet, coefficients: Tensor) -> Jet:
        by, bx = self.basis(jet.value[..., 0], 0, jet.order), self.basis(jet.value[..., 1], 1, jet.order)
        tiles, channels = coefficients.shape[:2]
        along_y = by.flatten(1, 2) @ coefficients.transpose(1, 2).flatten(2)  # [t, k P, C (N + 1)]
        along_y = along_y.view(tiles, by.shape[1], -1, channels, self.shape[1])

        local = [
            (along_y[:, dy] @ bx[:, dx].unsqueeze(-1)).squeeze(-1)  # [t, P, C]
            for dy, dx in LOCAL_DERIVATIVES[: LOCAL_COUNTS[jet.order]]
        ]
        return jet._replace(rows=self._chained(jet, local))

    @staticmethod
    def _chained(jet: Jet, local: Sequence[Tensor]) -> Tensor:
        """Rows of u from its derivatives with respect to the local coordinates `[t, P, C]`, whose jet is `jet`."""
        rows, slopes = [local[0]], local[1:3]
        if jet.order != "value":
            first = jet.gradient.unsqueeze(-1)  # [t, D, P, 2, 1]: d xi_c / d x_d
            rows += [slopes[0] * first[:, d, :, 0] + slopes[1] * first[:, d, :, 1] for d in range(jet.dim)]
        if jet.order in ("laplacian", "hessian"):
            yy, yx, xx = local[3:]

            def curvature(i: int, j: int) -> Tensor:
                (iy, ix), (jy, jx) = first[:, i].unbind(-2), first[:, j].unbind(-2)
                return yy * iy * jy + yx * (iy * jx + ix * jy) + xx * ix * jx

            if jet.order == "laplacian":
                bends = [sum(curvature(d, d) for d in range(jet.dim))]
            else:
                bends = [curvature(i, j) for i, j in pairs(jet.dim)]
            second = jet.second.unsqueeze(-1)
            rows += [b + slopes[0] * second[:, k, :, 0] + slopes[1] * second[:, k, :, 1] for k, b in enumerate(bends)]
        return torch.stack(rows, dim=1)

    # ---------------------------------------------------------------------------------------------- the last layer

    @property
    def jacobian_layers(self) -> "list[Chebyshev2D]":
        assert not self.sparse, "the terms of a sparse network are found in closed form"
        return [self]

    def jacobian(self, jet: Jet, slopes: Tensor) -> list[Tensor]:
        """See `TiledNetwork.jacobian_layers`."""
        by, bx = (self.basis(jet.value[..., axis], axis, jet.order) for axis in (0, 1))  # [t, k, P, M + 1]
        used = LOCAL_DERIVATIVES[: LOCAL_COUNTS[jet.order]]
        with torch.enable_grad():  # what each local derivative counts for
            local = [slopes.new_zeros(slopes[:, 0].shape, requires_grad=True) for _ in used]
            weights = torch.autograd.grad(self._chained(jet, local), local, slopes)
        along_x = slopes.new_zeros(*by.shape[:3], slopes.shape[-1], self.shape[1])  # [t, k, P, C, N + 1]
        for (dy, dx), weight in zip(used, weights, strict=True):
            along_x[:, dy].addcmul_(weight.unsqueeze(-1), bx[:, dx].unsqueeze(2))
        products = outer(by.transpose(1, 2), along_x.transpose(1, 2).flatten(3))  # [t, M + 1, C (N + 1), P]
        return [products.unflatten(2, (-1, self.shape[1])).transpose(1, 2).flatten(2, 3)]

    def features(self, points: Tensor, tiles: Tensor | None = None) -> Tensor:
        """All products T_m(s(y)) T_n(s(x)), `[t, P, (M + 1)(N + 1)]`, m-major, whichever terms are in use."""
        by, bx = self.basis(points[..., 0], 0, "value")[:, 0], self.basis(points[..., 1], 1, "value")[:, 0]
        return (by.unsqueeze(-1) * bx.unsqueeze(-2)).flatten(2)

    def set_last(self, tiles: Tensor | None, solution: Tensor) -> None:
        """Writes `solution` `[t, (M + 1)(N + 1), C]` into a dense network. A sparse one takes `set_terms`."""
        assert not self.sparse, "a sparse network's terms are set together: set_terms"
        assign(self.coefficients, tiles, solution.transpose(1, 2))


def index_dtype(terms: int) -> torch.dtype:
    """The smallest type that numbers so many terms of a tile."""
    return torch.int16 if terms <= 2**15 else torch.int32
