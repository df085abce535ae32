"""The Chebyshev expansion of a jet and its product with the coefficients: the inner loop of Scaled-cPIKAN.

With B_n(v) = T_n(s(v)), the jet of B_n(v) needs B_n, B_n', B_n'' and backward B_n'''. Differentiating
T_{n+1} = 2 s T_n - T_{n-1} with respect to v gives them without leaving the recurrence:

    B_{n+1}    = 2 s B_n - B_{n-1}
    B'_{n+1}   = 2 (s' B_n + s B'_n) - B'_{n-1}
    B''_{n+1}  = 2 (s'' B_n + 2 s' B'_n + s B''_n) - B''_{n-1}
    B'''_{n+1} = 2 (s''' B_n + 3 s'' B'_n + 3 s' B''_n + s B'''_n) - B'''_{n-1}

Invariants: backward keeps the layer's input and recomputes the expansion, which is `degree` times larger, in blocks of
tiles and points that stay in the cache; results do not depend on the blocks except for the order of summation. Where
torch is to differentiate the backward pass again (`create_graph`), it is taken whole, by operations that torch knows.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from ..jets import Jet, full_precision, kernel, pairs, quadratic, transformed

INPUT_MAPS = ("tanh", "identity", "sine")

# Elements of the expansion per block: 4 MiB in fp32 stays in a CPU's cache; a GPU wants few large blocks.
BLOCK_ELEMENTS_CPU = 2**20
BLOCK_ELEMENTS_GPU = 2**26


def input_derivatives(v: Tensor, input_map: str, count: int) -> list[Tensor]:
    """s(v) and its first `count - 1` derivatives (count <= 4), each of v's shape."""
    if input_map == "identity":
        return [v, torch.ones_like(v), torch.zeros_like(v), torch.zeros_like(v)][:count]
    if input_map == "sine":
        w = math.pi / 2
        s, c = torch.sin(w * v), torch.cos(w * v)
        return [s, w * c, -(w**2) * s, -(w**3) * c][:count]
    s = torch.tanh(v)
    s1 = 1 - s * s
    return [s, s1, -2 * s * s1, (6 * s * s - 2) * s1][:count]


def chebyshev_derivatives(v: Tensor, degree: int, input_map: str, count: int) -> Iterator[list[Tensor]]:
    """For n = 1..degree: T_n(s(v)) and its first `count - 1` derivatives with respect to v (count <= 4)."""
    s = input_derivatives(v, input_map, count)
    twice = [2 * term for term in s]
    older: list[Tensor] | None = None  # B_{n-1}; T_0 = 1 has no derivatives, which the first step uses
    current = s
    for n in range(1, degree + 1):
        yield current
        if n == degree:
            return
        newer = []
        for k in range(count):
            term = twice[0] * current[k]
            for j in range(1, k + 1):
                term = term + math.comb(k, j) * twice[j] * current[k - j]
            if older is not None:
                term = term - older[k]
            elif k == 0:
                term = term - 1
            newer.append(term)
        older, current = current, newer


@kernel
def chebyshev_expand(rows: Tensor, order: str, dim: int, degree: int, input_map: str) -> Tensor:
    """The jets of T_1..T_degree of s(v): `[..., R, P, C] -> [..., P, R, degree * C]`, degree-major.

    Points come before rows so that the result is one stack of pieces of equal shape `[..., P, C]`, which a compiler
    fuses into a single loop; the GEMM takes points and rows in any order.
    """
    v, *others = rows.unbind(-3)
    first, second = others[:dim], others[dim:]
    count = {"value": 1, "gradient": 2}.get(order, 3)
    products = quadratic(first, order) if count == 3 else []
    pieces: list[list[Tensor]] = [[] for _ in range(rows.shape[-3])]
    for b in chebyshev_derivatives(v, degree, input_map, count):
        jet = [b[0]]
        jet += [b[1] * u for u in first]
        jet += [b[1] * u + b[2] * product for u, product in zip(second, products, strict=True)]
        for row, piece in zip(pieces, jet, strict=True):
            row.append(piece)
    expansion = torch.stack([piece for row in pieces for piece in row], dim=-2)
    return expansion.unflatten(-2, (len(pieces), degree)).flatten(-2)


@kernel
def chebyshev_expand_vjp(
    rows: Tensor, cotangent: Tensor, order: str, dim: int, degree: int, input_map: str
) -> Tensor:
    """Pulls a cotangent `[..., P, R, degree * C]` of `chebyshev_expand` back to its `rows` `[..., R, P, C]`."""
    v, *others = rows.unbind(-3)
    first = others[:dim]
    count = {"value": 2, "gradient": 3}.get(order, 4)
    products = quadratic(first, order) if count == 4 else []
    grads = [0.0] * len(others)
    grad_v, grad_products = 0.0, [0.0] * len(products)
    terms = cotangent.unflatten(-1, (degree, -1)).unbind(-2)
    for g, b in zip(terms, chebyshev_derivatives(v, degree, input_map, count), strict=True):
        g_value, *g_others = g.unbind(-2)
        grad_v = grad_v + g_value * b[1]
        if others:  # b[1] multiplies every derivative row: its own derivative is b[2]
            grad_v = grad_v + sum(g_row * u for g_row, u in zip(g_others, others, strict=True)) * b[2]
            grads = [grad + g_row * b[1] for grad, g_row in zip(grads, g_others, strict=True)]
        if products:
            g_second = g_others[dim:]
            grad_v = grad_v + sum(g_row * q for g_row, q in zip(g_second, products, strict=True)) * b[3]
            grad_products = [grad + g_row * b[2] for grad, g_row in zip(grad_products, g_second, strict=True)]
    if order == "laplacian":
        grads[:dim] = [grad + 2 * u * grad_products[0] for grad, u in zip(grads, first, strict=False)]
    elif order == "hessian":
        for (i, j), c in zip(pairs(dim), grad_products, strict=True):
            grads[i] = grads[i] + c * first[j]
            grads[j] = grads[j] + c * first[i]
    return torch.stack([grad_v, *grads], dim=-3)


def _blocks(rows: Tensor, degree: int) -> Iterator[tuple[slice, slice]]:
    """Slices of tiles and points whose expansion has at most the block size in elements."""
    tiles, count, points, channels = rows.shape
    budget = BLOCK_ELEMENTS_GPU if rows.is_cuda else BLOCK_ELEMENTS_CPU
    per_point = count * channels * degree
    tile_step = max(1, budget // max(1, per_point * points))
    point_step = max(1, budget // per_point) if tile_step == 1 else points
    for tile in range(0, tiles, tile_step):
        for point in range(0, points, max(1, point_step)):
            yield slice(tile, tile + tile_step), slice(point, point + point_step)


def _block(rows: Tensor, tile: slice, point: slice) -> Tensor:
    # A copy, `degree` times smaller than the expansion: contiguous, detached and never a view, so that one compiled
    # graph serves every block, forward and backward.
    return rows.detach()[tile, :, point].clone(memory_format=torch.contiguous_format)


class _ChebyshevLinear(torch.autograd.Function):
    """expand(rows) @ weight, with the expansion recomputed in backward. Shapes as in `chebyshev_linear`."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor,
        order: str,
        dim: int,
        degree: int,
        input_map: str,
        gemm_dtype: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.static = (order, dim, degree, input_map)
        ctx.gemm_dtype = gemm_dtype
        weight = weight.to(gemm_dtype)
        out = rows.new_empty(*rows.shape[:3], weight.shape[-1])
        for tile, point in _blocks(rows, degree):
            basis = chebyshev_expand(_block(rows, tile, point), *ctx.static).to(gemm_dtype)
            product = torch.bmm(basis.flatten(1, 2), weight[tile])
            out[tile, :, point] = product.unflatten(1, basis.shape[1:3]).transpose(1, 2)
        out[:, 0] += bias.unsqueeze(1)
        return out

    @staticmethod
    def backward(ctx: FunctionCtx, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph
            return *_differentiable_backward(ctx, rows, weight, grad_out), None, None, None, None, None
        order, _, degree, _ = ctx.static
        needs_rows, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_rows = torch.empty_like(rows) if needs_rows else None
        grad_weight = weight.new_zeros(weight.shape, dtype=rows.dtype) if needs_weight else None
        transposed = weight.to(ctx.gemm_dtype).transpose(1, 2)
        with full_precision(order):
            for tile, point in _blocks(rows, degree):
                block = _block(rows, tile, point)
                cotangent = grad_out[tile, :, point].transpose(1, 2).to(ctx.gemm_dtype)  # [t, P, R, out]
                shape = cotangent.shape[1:3]
                cotangent = cotangent.flatten(1, 2)
                if needs_weight:
                    basis = chebyshev_expand(block, *ctx.static).to(ctx.gemm_dtype).flatten(1, 2)
                    grad_weight[tile] += torch.bmm(basis.transpose(1, 2), cotangent)
                if needs_rows:
                    pulled = torch.bmm(cotangent, transposed[tile]).unflatten(1, shape).to(rows.dtype)
                    grad_rows[tile, :, point] = chebyshev_expand_vjp(block, pulled, *ctx.static)
        grad_bias = grad_out[:, 0].sum(1) if needs_bias else None
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        return grad_rows, grad_weight, grad_bias, None, None, None, None, None


def _differentiable_backward(
    ctx: FunctionCtx, rows: Tensor, weight: Tensor, grad_out: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`_ChebyshevLinear.backward` with a graph to rows, weight and grad_out: not in blocks, the expansion is kept."""
    needs_rows, needs_weight, needs_bias = ctx.needs_input_grad[:3]
    grad_rows = grad_weight = None
    with full_precision(ctx.static[0]):
        cotangent = grad_out.transpose(1, 2).to(ctx.gemm_dtype)  # [t, P, R, out]
        shape, cotangent = cotangent.shape[1:3], cotangent.flatten(1, 2)
        if needs_weight:
            basis = chebyshev_expand(rows, *ctx.static).to(ctx.gemm_dtype).flatten(1, 2)
            grad_weight = torch.bmm(basis.transpose(1, 2), cotangent).to(weight.dtype)
        if needs_rows:
            pulled = torch.bmm(cotangent, weight.to(ctx.gemm_dtype).transpose(1, 2)).unflatten(1, shape)
            grad_rows = chebyshev_expand_vjp(rows, pulled.to(rows.dtype), *ctx.static)
    return grad_rows, grad_weight, grad_out[:, 0].sum(1) if needs_bias else None


def _plain(
    rows: Tensor, weight: Tensor, bias: Tensor, order: str, dim: int, degree: int, input_map: str, dtype: torch.dtype
) -> Tensor:
    """`_ChebyshevLinear` by operations that torch knows how to transform."""
    basis = chebyshev_expand(rows, order, dim, degree, input_map).to(dtype)
    product = torch.bmm(basis.flatten(1, 2), weight.to(dtype)).to(rows.dtype)
    value, *others = product.unflatten(1, basis.shape[1:3]).unbind(2)
    return torch.stack([value + bias.unsqueeze(1), *others], dim=1)


def chebyshev_linear(jet: Jet, weight: Tensor, bias: Tensor, degree: int, input_map: str) -> Tensor:
    """Rows of sum_n T_n(s(v)) W_n + b: `[t, R, P, C]` to `[t, R, P, out]`.

    `weight` `[t, degree * C, out]`, degree-major; `bias` `[t, out]`. Differentiable as often as torch asks.
    The expansion is computed in the precision of the rows; the GEMM of value-only jets follows autocast, that of
    derivatives the rows.
    """
    rows = jet.rows
    gemm_dtype = rows.dtype
    if jet.order == "value" and torch.is_autocast_enabled(rows.device.type):
        gemm_dtype = torch.get_autocast_dtype(rows.device.type)
    with torch.autocast(rows.device.type, enabled=False):
        layer = _plain if transformed() else _ChebyshevLinear.apply
        return layer(rows, weight, bias, jet.order, jet.dim, degree, input_map, gemm_dtype)
