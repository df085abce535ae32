"""Chebyshev2D: per tile the linear tensor-product expansion u(y, x) = sum_mn a_mn T_m(s(y)) T_n(s(x)).

The linear member of the family: solved in closed form, evaluated separably on a grid, and able to keep only its
largest coefficients per tile. With the `sine` input map it is the cosine expansion of a tile.

Invariants: coordinate 0 is y (index m), coordinate 1 is x (index n); the dense coefficient (m, n) has the flat index
m (N + 1) + n; a term with a negative index is unused, its coefficient counts as zero and gets no gradient.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..jets import Jet, full_precision, pairs, row_count
from .base import TiledNetwork, assign, select
from .chebyshev_kernels import INPUT_MAPS, chebyshev_derivatives

# Per jet order: how often u is differentiated along (y, x), in the order of pairs(2) after value and gradient.
LOCAL_DERIVATIVES = [(0, 0), (1, 0), (0, 1), (2, 0), (1, 1), (0, 2)]


class Grid(NamedTuple):
    """Points y x x of a tile in local coordinates. `y` `[t, Py]`, `x` `[t, Px]`, `inverse_scale` 1 / s: `[2]` or
    `[t, 2]`, or None for derivatives with respect to the local coordinates."""

    y: Tensor
    x: Tensor
    order: str
    inverse_scale: Tensor | None


class Chebyshev2D(TiledNetwork):
    """`degree`: one for both axes or [degree_y, degree_x]. `coefficients` is `[tiles, C, K]`.

    `terms` None keeps all K = (M + 1)(N + 1) coefficients; a number keeps that many per tile and channel, those that
    `set_coefficients` finds largest (until then the ones of lowest total degree), listed in the int32 buffer `index`.
    Coefficients start at zero; `generator` belongs to the common interface, nothing here is random.
    UserError for other than two inputs, an unknown map, or more terms than int32 can name.
    """

    def __init__(
        self,
        tiles: int,
        in_features: int = 2,
        out_features: int = 1,
        *,
        degree: int | tuple[int, int] = 15,
        input_map: str = "sine",
        terms: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(tiles, in_features, out_features)
        if in_features != 2:
            raise UserError(f"chebyshev2d works in 2 coordinates, not {in_features}: choose another network")
        if input_map not in INPUT_MAPS:
            raise UserError(f"unknown input_map {input_map!r}: choose one of {', '.join(INPUT_MAPS)}")
        self.degree = (degree, degree) if isinstance(degree, int) else tuple(degree)
        self.input_map, self.shape = input_map, (self.degree[0] + 1, self.degree[1] + 1)
        dense = self.shape[0] * self.shape[1]
        if min(self.degree) < 0 or dense > 2**15:
            raise UserError(f"chebyshev2d degree {list(self.degree)}: it must be >= 0 with at most 32768 coefficients")
        if terms is not None and not 1 <= terms <= dense:
            raise UserError(f"chebyshev2d terms {terms}: give 1 to {dense}, or null for all")
        self.terms = terms
        self.coefficients = nn.Parameter(torch.zeros(tiles, out_features, terms or dense))
        index = None
        if terms is not None:
            total = torch.arange(self.shape[0])[:, None] + torch.arange(self.shape[1])
            lowest = total.flatten().argsort(stable=True)[:terms]
            index = lowest.to(torch.int32).expand(tiles, out_features, terms).contiguous()
        self.register_buffer("index", index)

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

    def dense(self, tiles: Tensor | None = None) -> Tensor:
        """All coefficients of `tiles`, zeros where a term is not kept: `[t, C, M + 1, N + 1]`."""
        values = select(self.coefficients, tiles)
        if self.index is not None:
            index = select(self.index, tiles).long()
            values = torch.where(index < 0, torch.zeros_like(values), values)
            full = values.new_zeros(*values.shape[:2], self.shape[0] * self.shape[1])
            values = full.scatter_add(2, index.clamp(min=0), values)
        return values.unflatten(2, self.shape)

    def forward(self, points: Jet | Grid, tiles: Tensor | None = None) -> Jet:
        """Scattered points as the jet of their coordinates, `[t, R, P, 2] -> [t, R, P, C]`, or a `Grid`.

        Both go through `forward` because ZeRO-3 gathers the coefficients there.
        """
        with full_precision(points.order):
            coefficients = self.dense(tiles)
            if isinstance(points, Grid):
                return self._on_grid(points, coefficients.to(points.y.dtype))
            return self._scattered(points, coefficients.to(points.rows.dtype))

    def grid(
        self,
        y: Tensor,
        x: Tensor,
        order: str = "value",
        inverse_scale: Tensor | None = None,
        tiles: Tensor | None = None,
    ) -> Jet:
        """The jet on the grid y x x, evaluated separably: rows `[t, R, Py * Px, C]`, x running fastest."""
        return self(Grid(y, x, order, inverse_scale), tiles)

    def _on_grid(self, grid: Grid, coefficients: Tensor) -> Jet:
        by, bx = self.basis(grid.y, 0, grid.order), self.basis(grid.x, 1, grid.order)
        tiles, channels = coefficients.shape[:2]
        count_y, count_x = grid.y.shape[-1], grid.x.shape[-1]
        scale = grid.y.new_ones(2) if grid.inverse_scale is None else grid.inverse_scale.to(grid.y)
        scale = scale.expand(tiles, 2)
        # [t, C, M + 1, k Px]: the contraction along x is shared by all rows
        along_x = coefficients @ bx.flatten(1, 2).transpose(1, 2).unsqueeze(1)
        along_x = along_x.unflatten(-1, (-1, count_x)).unbind(-2)

        def term(dy: int, dx: int) -> Tensor:
            values = by[:, dy].unsqueeze(1) @ along_x[dx]  # [t, C, Py, Px]
            factor = scale[:, 0] ** dy * scale[:, 1] ** dx
            return (values * factor[:, None, None, None]).permute(0, 2, 3, 1).reshape(tiles, -1, channels)

        rows = [term(*d) for d in LOCAL_DERIVATIVES[: {"value": 1}.get(grid.order, 3)]]
        if grid.order == "laplacian":
            rows.append(term(2, 0) + term(0, 2))
        elif grid.order == "hessian":
            rows += [term(*d) for d in LOCAL_DERIVATIVES[3:]]
        jet = Jet(torch.stack(rows, dim=1), grid.order, 2)
        assert jet.rows.shape[1:3] == (row_count(grid.order, 2), count_y * count_x)
        return jet

    def _scattered(self, jet: Jet, coefficients: Tensor) -> Jet:
        by, bx = self.basis(jet.value[..., 0], 0, jet.order), self.basis(jet.value[..., 1], 1, jet.order)
        tiles, channels = coefficients.shape[:2]
        along_y = by.flatten(1, 2) @ coefficients.transpose(1, 2).flatten(2)  # [t, k P, C (N + 1)]
        along_y = along_y.view(tiles, by.shape[1], -1, channels, self.shape[1])

        def local(dy: int, dx: int) -> Tensor:  # derivative of u with respect to the local coordinates, [t, P, C]
            return (along_y[:, dy] @ bx[:, dx].unsqueeze(-1)).squeeze(-1)

        rows = [local(0, 0)]
        if jet.order != "value":
            slopes = [local(1, 0), local(0, 1)]
            first = jet.gradient.unsqueeze(-1)  # [t, D, P, 2, 1]: d xi_c / d x_d
            rows += [slopes[0] * first[:, d, :, 0] + slopes[1] * first[:, d, :, 1] for d in range(jet.dim)]
        if jet.order in ("laplacian", "hessian"):
            yy, yx, xx = (local(*d) for d in LOCAL_DERIVATIVES[3:])

            def curvature(i: int, j: int) -> Tensor:
                (iy, ix), (jy, jx) = first[:, i].unbind(-2), first[:, j].unbind(-2)
                return yy * iy * jy + yx * (iy * jx + ix * jy) + xx * ix * jx

            if jet.order == "laplacian":
                bends = [sum(curvature(d, d) for d in range(jet.dim))]
            else:
                bends = [curvature(i, j) for i, j in pairs(jet.dim)]
            second = jet.second.unsqueeze(-1)
            rows += [b + slopes[0] * second[:, k, :, 0] + slopes[1] * second[:, k, :, 1] for k, b in enumerate(bends)]
        return jet._replace(rows=torch.stack(rows, dim=1))

    def features(self, points: Tensor, tiles: Tensor | None = None) -> Tensor:
        """All products T_m(s(y)) T_n(s(x)), `[t, P, (M + 1)(N + 1)]` in flat index order, whatever `terms` is."""
        by, bx = self.basis(points[..., 0], 0, "value")[:, 0], self.basis(points[..., 1], 1, "value")[:, 0]
        return (by.unsqueeze(-1) * bx.unsqueeze(-2)).flatten(2)

    def set_last(self, tiles: Tensor | None, solution: Tensor) -> None:
        """Writes `solution` `[t, (M + 1)(N + 1), C]`; with `terms`, its largest coefficients only."""
        self.set_coefficients(tiles, solution.transpose(1, 2).unflatten(2, self.shape))

    @torch.no_grad()
    def set_coefficients(
        self,
        tiles: Tensor | None,
        dense: Tensor,
        significance: Tensor | None = None,
        keep: Tensor | None = None,
    ) -> None:
        """Writes `dense` `[t, C, M + 1, N + 1]` into `tiles` (None: all).

        With `terms`, the K largest of |dense * significance| are kept. `significance` (positive weights) and `keep`
        (bool: False drops a coefficient whatever its size) broadcast to the shape of `dense`.
        """
        flat = dense.flatten(2)
        if keep is not None:
            flat = torch.where(keep.expand_as(dense).flatten(2), flat, torch.zeros_like(flat))
        if self.index is None:
            assign(self.coefficients, tiles, flat)
            return
        size = flat.abs() if significance is None else flat.abs() * significance.expand_as(dense).flatten(2)
        top = size.topk(self.terms, dim=2).indices.sort(dim=2).values
        kept = flat.gather(2, top)
        assign(self.coefficients, tiles, kept)
        assign(self.index, tiles, torch.where(kept == 0, -1, top).to(torch.int32))

    def count_terms(self) -> int:
        """How many coefficients are in use, over all tiles and channels."""
        return self.coefficients.numel() if self.index is None else int((self.index >= 0).sum())

    def zero_last(self) -> None:
        nn.init.zeros_(self.coefficients)
