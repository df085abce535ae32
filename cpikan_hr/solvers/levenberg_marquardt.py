"""Levenberg-Marquardt on the residual vector of an equation.

Up to a number of parameters J'J is assembled, cell by cell of points that see the same tiles, and factorised, as a band
where it is one. Beyond it the system is solved by conjugate gradients on the Jacobian's blocks, preconditioned by one
block per tile, to a share of the gradient (inexact Newton). Steps and their damping: `damping.py`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cpikan_hr.solvers.banded import Banded, narrow_order
from cpikan_hr.solvers.cells import cells
from cpikan_hr.solvers.damping import Damping, attempt, dense_step, trust_of
from cpikan_hr.solvers.objective import Step
from cpikan_hr.solvers.residuals import Block, Residuals

FLOOR = 1e-10  # of D, over the mean of the diagonal
ELEMENTS = 2**23  # of the Jacobian rows of one tile that are computed at once
BANDED = 0.3  # bandwidth of J'J over its size up to which it is stored and factorised as a band
STORED = 2**27  # numbers of such a band at most
FAILURES = 12  # dampings tried in one iteration
Total = Callable[[Tensor], None]  # adds a tensor over processes, in place


def levenberg_marquardt(
    residuals: Callable[[int | None], Residuals],
    iterations: int,
    damping: float = 1e-3,
    dense: int = 6000,
    total: Total = lambda tensor: None,
    state: dict[str, Tensor] | None = None,
) -> Iterator[Step]:
    """Iterates of the field that `residuals(piece)` looks at, which has them when they are yielded.

    dense: parameters up to which J'J is a whole matrix where it is no band; 0: it is never factorised.
    Ends where no damping lowers the loss any more.
    """
    here = residuals(None)
    n = here.count
    pieces = residuals(max(1, ELEMENTS // max(here.sizes)))
    order = narrow_order(here, total)
    seen = len(order.places)
    if dense and order.width < BANDED * seen and order.width * seen < STORED:
        system: Banded | Dense | Sparse = Banded(pieces, order, total, FLOOR)
    elif n <= dense:
        system = Dense(pieces, total)
    else:
        system = Sparse(here, total)
    descent = Descent(here, system, total)
    device = descent.theta.device
    trusted, evaluations = Damping.of(torch.tensor(damping, dtype=torch.float64, device=device)), 0
    if state:
        trusted = Damping(state["damping"].to(device), state["growth"].to(device))
        evaluations = int(state["evaluations"])
    for _ in range(iterations):
        descent.linearise()
        for _ in range(FAILURES):
            evaluations += 1
            if bool(attempt(descent, trusted) > 0):
                break
        else:
            return
        state = {"damping": trusted.scale, "growth": trusted.growth, "evaluations": torch.tensor(evaluations)}
        yield Step(descent.theta, descent.loss, 2 * float(descent.gradient.norm()), evaluations, state)


class Descent:
    """A field that goes downhill: `system` says where to, its residuals how far that was (`damping.System`)."""

    def __init__(self, residuals: Residuals, system: "Banded | Dense | Sparse", total: Total):
        self.residuals, self.system, self.total = residuals, system, total
        self.theta = residuals.theta()

    def linearise(self) -> None:
        """Where the field is."""
        self.loss, self.gradient = self.system.linearise()
        self.trust = self.system.trust

    def solve(self, damping: Tensor) -> Tensor:
        return self.system.solve(damping)

    def advance(self, step: Tensor) -> Tensor:
        """See `damping.System`; the field is at theta afterwards."""
        self.residuals.assign(self.theta + step)
        squared = self.residuals.vector().square().sum()
        self.total(squared)
        gain = self.loss - squared.double()
        if gain > 0:  # false for NaN
            self.theta, self.loss = self.theta + step, float(squared)
        else:
            self.residuals.assign(self.theta)
        return gain


class Dense:
    """J'J as a matrix."""

    def __init__(self, residuals: Residuals, total: Total):
        self.residuals, self.total = residuals, total

    def linearise(self) -> tuple[float, Tensor]:
        """The loss and J'r at the field's parameters."""
        residuals, n = self.residuals, self.residuals.count
        like = residuals.theta()
        matrix, gradient, loss = like.new_zeros(n, n), like.new_zeros(n), like.new_zeros(1)
        for _, found, blocks, columns in residuals.linearised():
            for rows, places, jacobian in cells(residuals, len(found), blocks, columns):
                if len(places) == n:
                    matrix.addmm_(jacobian.T, jacobian)
                    gradient.addmv_(jacobian.T, found[rows])
                else:
                    matrix[places[:, None], places] += jacobian.T @ jacobian
                    gradient[places] += jacobian.T @ found[rows]
            loss += found.square().sum()
        for tensor in (matrix, gradient, loss):
            self.total(tensor)
        self.matrix, self.gradient = matrix, gradient
        self.trust = trust_of(matrix.diagonal(), FLOOR, 1e-300)
        return float(loss), gradient

    def solve(self, damping: Tensor) -> Tensor:
        """See `damping.System`."""
        return dense_step(self.matrix, self.gradient, self.trust, damping)


@dataclass
class Piece:
    """Residuals [N], Jacobian blocks and constants' columns of one term."""

    found: Tensor
    blocks: list[Block]
    columns: Tensor | None


class Sparse:
    """The Jacobian's blocks, and J'J as what it does to a vector."""

    def __init__(self, residuals: Residuals, total: Total, accuracy: float = 0.05, most: int = 200):
        """`accuracy` of the solution of the linear system, over its right side; `most` products for it."""
        self.residuals, self.total, self.accuracy, self.most = residuals, total, accuracy, most

    def linearise(self) -> tuple[float, Tensor]:
        """The loss and J'r at the field's parameters."""
        residuals = self.residuals
        self.pieces = [Piece(found, blocks, columns) for _, found, blocks, columns in residuals.linearised()]
        like = residuals.theta()
        loss, gradient = like.new_zeros(1), like.new_zeros(residuals.count)
        self.own = [
            like.new_zeros(len(group[0]), size, size)
            for group, size in zip(residuals.parameters, residuals.sizes, strict=True)
        ]
        for piece in self.pieces:
            loss += piece.found.square().sum()
            self._pull(piece, piece.found, gradient)
            for block in piece.blocks:
                gram = torch.bmm(block.values.transpose(1, 2), block.values)
                self.own[block.level].index_add_(0, block.slots, gram)
        for tensor in (loss, gradient, *self.own):
            self.total(tensor)
        self.gradient = gradient
        diagonal = torch.cat([own.diagonal(dim1=1, dim2=2).flatten() for own in self.own])
        constants = residuals.count - len(diagonal)
        if constants:
            own = like.new_zeros(constants)
            for piece in self.pieces:
                own += piece.columns.square().sum(0)
            self.total(own)
            diagonal = torch.cat([diagonal, own])
        self.trust = trust_of(diagonal, FLOOR, 1e-300)
        return float(loss), gradient

    def _pull(self, piece: Piece, against: Tensor, out: Tensor) -> None:
        """Adds J' against of one piece to `out`."""
        padded = torch.cat([against, against.new_zeros(1)])
        for block in piece.blocks:
            table = self._table(out, block.level)
            table.index_add_(0, block.slots, torch.einsum("tpn,tp->tn", block.values, padded[block.rows]))
        if piece.columns is not None:
            out[self.residuals.offsets[-1] :] += piece.columns.T @ against

    def _table(self, vector: Tensor, level: int) -> Tensor:
        begin, size = self.residuals.offsets[level], self.residuals.sizes[level]
        count = len(self.residuals.parameters[level][0])
        return vector[begin : begin + count * size].view(count, size)

    def product(self, step: Tensor) -> Tensor:
        """J'J step."""
        out = torch.zeros_like(step)
        for piece in self.pieces:
            along = step.new_zeros(len(piece.found) + 1)
            for block in piece.blocks:
                part = torch.einsum("tpn,tn->tp", block.values, self._table(step, block.level)[block.slots])
                along.index_add_(0, block.rows.flatten(), part.flatten())
            along = along[:-1]
            if piece.columns is not None:
                along = along + piece.columns @ step[self.residuals.offsets[-1] :]
            self._pull(piece, along, out)
        self.total(out)
        return out

    def solve(self, damping: Tensor) -> Tensor:
        """The step by preconditioned conjugate gradients; zero where a tile's block is not positive definite."""
        trust = damping * self.trust
        factors = []
        for k, own in enumerate(self.own):
            factor, info = torch.linalg.cholesky_ex(own + torch.diag_embed(self._table(trust, k)))
            if bool(info.any()):
                return torch.zeros_like(trust)
            factors.append(factor)

        def precondition(vector: Tensor) -> Tensor:
            out = vector / self.trust / (1 + damping)
            for k, factor in enumerate(factors):
                self._table(out, k).copy_(torch.cholesky_solve(self._table(vector, k)[..., None], factor)[..., 0])
            return out

        step, left = torch.zeros_like(self.gradient), -self.gradient
        near = precondition(left)
        along, size = near, float(left @ near)
        first = size
        for _ in range(self.most):
            if size <= self.accuracy**2 * first:
                break
            image = self.product(along) + trust * along
            curve = float(along @ image)
            if not curve > 0:
                break
            length = size / curve
            step, left = step + length * along, left - length * image
            near = precondition(left)
            size, before = float(left @ near), size
            along = near + size / before * along
        return step
