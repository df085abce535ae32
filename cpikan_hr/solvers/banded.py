"""J'J as a band: where tiles that share no point are far from each other in theta, as in a row of tiles.

The band is stored by columns, A[j + k, j] at k + j (width + 1), so that a square block on the diagonal is a strided
view of it. LAPACK's banded Cholesky takes it as it is.
"""

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from cpikan_hr.solvers.cells import cells
from cpikan_hr.solvers.residuals import Residuals


def bandwidth(residuals: Residuals) -> int:
    """The largest distance in theta of two parameters that one residual sees; with constants, theta's length."""
    if residuals.field.constants is not None:
        return residuals.count
    widest = 0
    for term in residuals.terms:
        count = len(term.weight)
        low = torch.full((count + 1,), residuals.count, device=term.points.device)
        high = torch.zeros_like(low)
        for begin, size, dispatch in zip(residuals.offsets, residuals.sizes, term.dispatches, strict=False):
            rows = torch.where(dispatch.points < len(term.points), dispatch.points // term.group.per, count).flatten()
            first = (begin + dispatch.slots * size)[:, None].expand_as(dispatch.points).flatten()
            low = low.scatter_reduce(0, rows, first, "amin")
            high = high.scatter_reduce(0, rows, first + size - 1, "amax")
        widest = max(widest, int((high - low)[:count].max()))
    return widest


class Banded:
    """The normal equations of a field whose `width` is small."""

    def __init__(self, residuals: Residuals, width: int, total, floor: float):
        self.residuals, self.width, self.total, self.floor = residuals, width, total, floor

    def linearise(self) -> tuple[float, Tensor]:
        """The loss and J'r at the field's parameters."""
        residuals, n, step = self.residuals, self.residuals.count, self.width + 1
        like = residuals.theta()
        band, gradient, loss = like.new_zeros(n * step), like.new_zeros(n), like.new_zeros(1)
        for _, found, blocks, columns in residuals.linearised():
            for rows, places, jacobian in cells(residuals, len(found), blocks, columns):
                gradient[places] += jacobian.T @ found[rows]
                add_block(band, step, places, jacobian.T @ jacobian)
            loss += found.square().sum()
        for tensor in (band, gradient, loss):
            self.total(tensor)
        self.band, self.gradient = band.view(n, step), gradient
        diagonal = self.band[:, 0]
        self.trust = diagonal + self.floor * diagonal.mean() + 1e-300
        return float(loss), gradient

    def solve(self, damping: float) -> Tensor | None:
        """The step, None where the damped matrix is not positive definite in this precision."""
        damped = self.band.clone()
        damped[:, 0] += damping * self.trust
        try:
            factor = scipy.linalg.cholesky_banded(
                damped.cpu().numpy().T, overwrite_ab=True, lower=True, check_finite=False
            )
        except np.linalg.LinAlgError:
            return None
        step = scipy.linalg.cho_solve_banded((factor, True), -self.gradient.cpu().numpy(), check_finite=False)
        return torch.from_numpy(step).to(self.gradient)

    def product(self, step: Tensor) -> Tensor:
        """J'J step."""
        band = np.asfortranarray(self.band.cpu().numpy().T)
        symmetric = scipy.linalg.get_blas_funcs("sbmv", (band,))
        return torch.from_numpy(symmetric(self.width, 1.0, band, step.cpu().numpy(), lower=1)).to(step)


def add_block(band: Tensor, step: int, places: Tensor, block: Tensor) -> None:
    """Adds the lower triangle of a symmetric block [W, W], at ascending places [W], to a flat band of `step` rows."""
    cuts = (torch.nonzero(places.diff() != 1)[:, 0] + 1).tolist()
    bounds = [0, *cuts, len(places)]
    runs = [(low, high, int(places[low])) for low, high in zip(bounds[:-1], bounds[1:], strict=True)]
    for a, (i0, i1, row) in enumerate(runs):
        for j0, j1, column in runs[: a + 1]:
            part = block[i0:i1, j0:j1]
            view = torch.as_strided(band, part.shape, (1, step - 1), row - column + column * step)
            view += part.tril() if row == column else part
