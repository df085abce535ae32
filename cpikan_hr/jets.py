"""Jets: a value with its derivatives with respect to the global coordinates, propagated by ordinary operations.

Every layer maps a jet to a jet inside `forward`, so that a physics loss needs one ordinary backward and no nested
`autograd.grad` (which ZeRO and gradient accumulation break). A jet is one tensor `[..., R, P, C]` of R rows, P points
and C channels: row 0 is the value, rows 1..D the first derivatives, then, by order, one row with the Laplacian or
D (D + 1) / 2 rows with the Hessian's upper triangle (0,0), (0,1), ..., (0,D-1), (1,1), ...

Invariant: all rows of a jet belong to the same function at the same points; a function here never mixes points.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

ORDERS = ("value", "gradient", "laplacian", "hessian")


def pairs(dim: int) -> list[tuple[int, int]]:
    """Index pairs (i, j), i <= j, in the order of the Hessian rows."""
    return [(i, j) for i in range(dim) for j in range(i, dim)]


def row_count(order: str, dim: int) -> int:
    """Number of rows R of a jet of `order` in `dim` coordinates. ValueError for an unknown order."""
    if order not in ORDERS:
        raise ValueError(f"unknown jet order {order!r}: choose one of {', '.join(ORDERS)}")
    return {"value": 1, "gradient": 1 + dim, "laplacian": 2 + dim, "hessian": 1 + dim + dim * (dim + 1) // 2}[order]


def row_orders(order: str, dim: int) -> list[list[tuple[int, ...]]]:
    """What each row of a jet holds: the partial derivatives (how often along each axis) it is the sum of."""

    def partial(*axes: int) -> tuple[int, ...]:
        return tuple(axes.count(axis) for axis in range(dim))

    rows = [[partial()]]
    if order != "value":
        rows += [[partial(d)] for d in range(dim)]
    if order == "laplacian":
        rows.append([partial(d, d) for d in range(dim)])
    elif order == "hessian":
        rows += [[partial(i, j)] for i, j in pairs(dim)]
    return rows


class Jet(NamedTuple):
    """A jet. `rows` is `[..., R, P, C]`, `dim` the number D of global coordinates.

    A named tuple because DDP, FSDP2 and ZeRO-3 look for tensors inside tuples to place their backward hooks; they do
    not look inside a dataclass.
    """

    rows: Tensor
    order: str
    dim: int

    @property
    def value(self) -> Tensor:
        """`[..., P, C]`."""
        return self.rows[..., 0, :, :]

    @property
    def gradient(self) -> Tensor:
        """`[..., D, P, C]`, one row per coordinate. ValueError for a value-only jet."""
        if self.order == "value":
            raise ValueError("a jet of order 'value' has no gradient: ask for order 'gradient' or higher")
        return self.rows[..., 1 : 1 + self.dim, :, :]

    @property
    def second(self) -> Tensor:
        """The rows after the gradient as stored: `[..., 1 or D (D + 1) / 2, P, C]`. ValueError below second order."""
        if self.order not in ("laplacian", "hessian"):
            raise ValueError(f"a jet of order {self.order!r} has no second derivatives: ask for 'laplacian'")
        return self.rows[..., 1 + self.dim :, :, :]

    @property
    def laplacian(self) -> Tensor:
        """`[..., P, C]`: the stored row, or the sum of the Hessian's diagonal. ValueError below second order."""
        if self.order == "hessian":
            diagonal = [k for k, (i, j) in enumerate(pairs(self.dim)) if i == j]
            return self.second[..., diagonal, :, :].sum(-3)
        return self.second[..., 0, :, :]

    @property
    def hessian(self) -> Tensor:
        """`[..., D (D + 1) / 2, P, C]`, rows ordered as `pairs(dim)`. ValueError for any other order."""
        if self.order != "hessian":
            raise ValueError(f"a jet of order {self.order!r} has no Hessian: ask for order 'hessian'")
        return self.second


# ---------------------------------------------------------------------------------------------------------------------
# Compiled kernels and precision

_threads = 0  # those of torch for which kernels are compiled; 0: none are
GRAPHS = 64  # of one function: one for every shape of layer and order; beyond torch's limit, 8, it would stop


def compile_kernels(enabled: bool) -> None:
    """Switches every function marked `@kernel` to its `torch.compile`d version, or back.

    Only these pure functions are compiled, so the hooks of DDP, FSDP2 and ZeRO stay outside every compiled graph.
    A graph belongs to one number of threads: pieces of work side by side (see `parallel.py`) stay eager.
    """
    global _threads
    _threads = torch.get_num_threads() if enabled else 0


def kernel(function: Callable) -> Callable:
    """Marks a pure function of tensors as one that `compile_kernels` may compile.

    Tiles and points are dynamic sizes. Channels, the last axis, are static, so that inner loops are vectorised; the
    row axis is static because the functions unbind it.
    """
    compiled: list[Callable] = []

    @wraps(function)
    def dispatch(*args):
        if not _threads or torch.get_num_threads() != _threads:
            return function(*args)
        if not compiled:
            compiled.append(torch.compile(function, dynamic=True, fullgraph=True))
        if torch._dynamo.config.recompile_limit < GRAPHS:  # torch keeps its settings per thread
            torch._dynamo.config.recompile_limit = GRAPHS
        for arg in args:
            if isinstance(arg, Tensor):
                torch._dynamo.mark_static(arg, arg.dim() - 1)
        return compiled[0](*args)

    return dispatch


@contextmanager
def full_precision(order: str) -> Iterator[None]:
    """Switches autocast and TF32 off where derivatives are propagated; does nothing for order 'value'.

    A Laplacian of degree 5 has a relative error of 4e-6 in fp32, 8e-3 in TF32 and 7e-2 in bf16. It covers what runs
    inside the block: a backward pass outside follows the TF32 setting it finds.
    """
    if order == "value":
        yield
        return
    tf32 = torch.backends.cuda.matmul.allow_tf32
    cuda = torch.autocast("cuda", enabled=False) if torch.cuda.is_available() else nullcontext()
    with cuda, torch.autocast("cpu", enabled=False):
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = tf32


# ---------------------------------------------------------------------------------------------------------------------
# Torch's own derivatives, beside jets


def transformed() -> bool:
    """Whether a transform of `torch.func` or a level of forward-mode differentiation is active around the caller."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def unwrapped(tensor: Tensor) -> Tensor | None:
    """The tensor inside the wrappers of `torch.func`, without a graph; None where `vmap` batches it: it has no sizes
    and values that a program could look at."""
    inner = torch.func.debug_unwrap(tensor, recurse=True)
    return inner.detach() if inner.ndim == tensor.ndim else None


# ---------------------------------------------------------------------------------------------------------------------
# The algebra


def seed(points: Tensor, order: str, scale: Tensor | None = None) -> Jet:
    """The jet of the local coordinates xi = (x - c) / s with respect to the global coordinates x.

    `points`: xi, `[..., P, D]`; `scale`: 1 / s, `[..., D]` (ones where None). The result has C = D channels.
    """
    *batch, count, dim = points.shape
    rows = points.new_zeros(*batch, row_count(order, dim), count, dim)
    rows[..., 0, :, :] = points
    if order != "value":
        for d in range(dim):
            rows[..., 1 + d, :, d] = 1.0 if scale is None else scale[..., d, None].to(points.dtype)
    return Jet(rows, order, dim)


def quadratic(first: Sequence[Tensor], order: str) -> list[Tensor]:
    """Products of the D first derivatives that multiply f'' in the chain rule, one per row of second order.

    Laplacian: [sum of squares]; Hessian: u_i u_j in the order of `pairs`.
    """
    if order == "laplacian":
        return [sum(u * u for u in first)]
    return [first[i] * first[j] for i, j in pairs(len(first))]


def chain_rows(rows: Tensor, order: str, dim: int, f: Tensor, f1: Tensor | None, f2: Tensor | None) -> Tensor:
    """`chain` on plain tensors, to be called inside kernels that also compute f, f' and f''."""
    _, *others = rows.unbind(-3)
    first, second = others[:dim], others[dim:]
    pieces = [f, *(f1 * u for u in first)]
    if second:
        pieces += [f1 * u + f2 * product for u, product in zip(second, quadratic(first, order), strict=True)]
    return torch.stack(pieces, dim=-3)


_chain = kernel(chain_rows)


def chain(jet: Jet, f: Tensor, f1: Tensor | None = None, f2: Tensor | None = None) -> Jet:
    """The jet of f(u) for a pointwise f, given f, f', f'' at u, each `[..., P, C]`.

    `f1` is needed from order 'gradient', `f2` from second order.
    """
    return jet._replace(rows=_chain(jet.rows, jet.order, jet.dim, f, f1, f2))


@kernel
def _multiply(a: Tensor, b: Tensor, order: str, dim: int) -> Tensor:
    (a0, *a_others), (b0, *b_others) = a.unbind(-3), b.unbind(-3)
    a1, b1 = a_others[:dim], b_others[:dim]
    pieces = [a0 * b0, *(u * b0 + a0 * v for u, v in zip(a_others, b_others, strict=True))]
    if order == "laplacian":
        pieces[-1] = pieces[-1] + 2 * sum(u * v for u, v in zip(a1, b1, strict=True))
    elif order == "hessian":
        for k, (i, j) in enumerate(pairs(dim), start=1 + dim):
            pieces[k] = pieces[k] + a1[i] * b1[j] + a1[j] * b1[i]
    return torch.stack(pieces, dim=-3)


def multiply(a: Jet, b: Jet) -> Jet:
    """The jet of a product (Leibniz). Channels broadcast: a window has C = 1. ValueError where order or dim differ."""
    _check_alike(a, b)
    return a._replace(rows=_multiply(a.rows, b.rows, a.order, a.dim))


def add(a: Jet, b: Jet) -> Jet:
    """The jet of a sum. ValueError where order or dim differ."""
    _check_alike(a, b)
    return a._replace(rows=a.rows + b.rows)


def _check_alike(a: Jet, b: Jet) -> None:
    if (a.order, a.dim) != (b.order, b.dim):
        raise ValueError(f"jets do not match: order {a.order!r} in {a.dim}-D and order {b.order!r} in {b.dim}-D")


def linear(jet: Jet, weight: Tensor, bias: Tensor | None = None) -> Jet:
    """The jet of u W + b: one batched GEMM over rows and points; only row 0 (the value) sees the bias.

    `jet.rows` `[T, R, P, in]`, `weight` `[T, in, out]`, `bias` `[T, out]` or None.
    """
    tiles, count, points, width = jet.rows.shape
    rows = torch.bmm(jet.rows.reshape(tiles, count * points, width), weight)
    rows = rows.view(tiles, count, points, weight.shape[-1])
    if bias is not None:
        rows[:, 0] += bias.unsqueeze(1)  # in place: the GEMM's backward does not need its output
    return jet._replace(rows=rows)
