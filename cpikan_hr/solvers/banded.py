"""J'J as a band: tiles that share no point lie far from each other once they are numbered well.

Tiles are numbered as they are, or by reverse Cuthill-McKee (scipy) on the graph of those that see a residual together
where that is narrower, as on rings; tiles that see none are left out. The band is stored by columns, A[j + k, j] at
k + j (width + 1), so that a square block on the diagonal is a strided view of it. LAPACK's banded Cholesky takes it as
it is.
"""

from dataclasses import dataclass

import numpy as np
import scipy  # whose parts load when they are first used
import torch
from torch import Tensor

from cpikan_hr.solvers.cells import cells
from cpikan_hr.solvers.damping import trust_of
from cpikan_hr.solvers.residuals import Residuals


@dataclass(frozen=True)
class Order:
    """`places` [m]: which parameters are in the band, one after the other.

    `width`: the largest distance of two that one residual sees.
    """

    places: Tensor
    width: int


def narrow_order(residuals: Residuals, total) -> Order:
    """Collective. Of the tiles that any process sees; with constants, which all residuals see, theta as it is."""
    if residuals.field.constants is not None:
        return Order(torch.arange(residuals.count), residuals.count)
    counts = [len(group[0]) for group in residuals.parameters]
    sizes = np.repeat(residuals.sizes, counts)
    begins = np.cumsum(sizes) - sizes
    together = _seen_together(residuals, counts)
    seen = torch.from_numpy(together.diagonal())
    total(seen)
    tiles = np.flatnonzero(seen.numpy())
    if not len(tiles):
        return Order(torch.arange(0), 0)
    graph = torch.from_numpy(together[tiles][:, tiles].toarray())
    total(graph)
    graph = scipy.sparse.csr_array(graph.numpy() > 0)
    begins, sizes = begins[tiles], sizes[tiles]
    a, b = graph.nonzero()
    found = []
    for order in (np.arange(len(tiles)), scipy.sparse.csgraph.reverse_cuthill_mckee(graph, symmetric_mode=True)):
        first = np.empty_like(begins)
        first[order] = np.cumsum(sizes[order]) - sizes[order]
        places = np.concatenate([begins[tile] + np.arange(sizes[tile]) for tile in order])
        found.append(Order(torch.from_numpy(places), int((first[a] + sizes[a] - 1 - first[b]).max(initial=0))))
    return min(found, key=lambda order: order.width)


def _seen_together(residuals: Residuals, counts: list[int]) -> "scipy.sparse.csr_array":
    """[T, T]: in how many residuals two tiles meet; tiles of all levels one after the other."""
    together = scipy.sparse.csr_array((sum(counts), sum(counts)))
    firsts = np.cumsum(counts) - counts
    for term in residuals.terms:
        rows, tiles = [], []
        for first, dispatch in zip(firsts, term.varying, strict=True):
            here = dispatch.points < len(term.points)
            rows.append((dispatch.points // term.group.per)[here])
            tiles.append(first + dispatch.slots[:, None].expand_as(dispatch.points)[here])
        row, tile = torch.cat(rows).cpu().numpy(), torch.cat(tiles).cpu().numpy()
        seen = scipy.sparse.csr_array((np.ones(len(row)), (row, tile)), shape=(len(term.weight), sum(counts)))
        together = together + seen.T @ seen
    return together


class Banded:
    """The normal equations of a field in a narrow order."""

    def __init__(self, residuals: Residuals, order: Order, total, floor: float):
        self.residuals, self.order, self.total, self.floor = residuals, order, total, floor
        self.width = order.width
        self.position = torch.full((residuals.count,), -1)
        self.position[order.places] = torch.arange(len(order.places))

    def linearise(self) -> tuple[float, Tensor]:
        """The loss and J'r at the field's parameters."""
        residuals, m, step = self.residuals, len(self.order.places), self.width + 1
        like = residuals.theta()
        band, gradient, loss = like.new_zeros(m * step), torch.zeros_like(like), like.new_zeros(1)
        for _, found, blocks, columns in residuals.linearised():
            for rows, places, jacobian in cells(residuals, len(found), blocks, columns):
                gradient[places] += jacobian.T @ found[rows]
                where, by = self.position.to(places.device)[places].sort()
                jacobian = jacobian[:, by]
                add_block(band, step, where, jacobian.T @ jacobian)
            loss += found.square().sum()
        for tensor in (band, gradient, loss):
            self.total(tensor)
        self.band, self.gradient = band.view(m, step), gradient
        self._trust = trust_of(self.band[:, 0], self.floor, 1e-300)
        self.trust = self._spread(self._trust)
        return float(loss), gradient

    def solve(self, damping: Tensor) -> Tensor:
        """See `damping.System`."""
        damped = self.band.clone()
        damped[:, 0] += damping * self._trust
        try:
            factor = scipy.linalg.cholesky_banded(
                damped.cpu().numpy().T, overwrite_ab=True, lower=True, check_finite=False
            )
        except np.linalg.LinAlgError:
            return torch.zeros_like(self.gradient)
        right = -self.gradient[self.order.places].cpu().numpy()
        found = scipy.linalg.cho_solve_banded((factor, True), right, check_finite=False)
        return self._spread(torch.from_numpy(found))

    def _spread(self, found: Tensor) -> Tensor:
        """In theta's order, zero where nothing is seen."""
        out = torch.zeros_like(self.gradient)
        out[self.order.places] = found.to(out)
        return out


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
