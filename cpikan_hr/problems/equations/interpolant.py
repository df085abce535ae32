"""A function of x and t between its samples on a grid, by local polynomials of high degree."""

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

CHUNK = 8192  # points at once: some 10 MB for windows of 10 x 14


class LocalLagrange:
    """The Lagrange coefficients on the `count` of the sorted `nodes` nearest to a point (barycentric form)."""

    def __init__(self, nodes: np.ndarray, count: int):
        self.nodes = nodes
        self._windows = sliding_window_view(nodes, count)
        differences = (self._windows[:, :, None] - self._windows[:, None, :]) / np.ptp(self._windows, 1)[:, None, None]
        differences[:, np.arange(count), np.arange(count)] = 1.0
        self._weights = 1.0 / differences.prod(-1)

    def __call__(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Indices of the nodes and their coefficients, both [n, count], at points [n]."""
        count = self._windows.shape[1]
        cell = np.searchsorted(self.nodes, x, side="right") - 1
        first = np.clip(cell - (count // 2 - 1), 0, len(self._windows) - 1)
        distances = x[:, None] - self._windows[first]
        at_node = distances == 0
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = self._weights[first] / distances
        terms = np.where(at_node.any(1, keepdims=True), at_node, terms)
        return first[:, None] + np.arange(count), terms / terms.sum(1, keepdims=True)


class Interpolant:
    """u(x, t) from samples [T, X] at sorted times [T] and nodes [X]. `period`: nodes without the last, equal one."""

    def __init__(self, times, nodes, samples, period: float | None = None, counts: tuple[int, int] = (10, 14)):
        if period:
            pad = counts[1]
            samples = np.concatenate([samples[:, -pad:], samples, samples[:, : pad + 1]], axis=1)
            nodes = np.concatenate([nodes[-pad:] - period, nodes, nodes[: pad + 1] + period])
        self._samples = samples
        self._in_t, self._in_x = LocalLagrange(times, counts[0]), LocalLagrange(nodes, counts[1])

    def __call__(self, x: np.ndarray, t: np.ndarray) -> np.ndarray:
        """Values [n] at points x [n], t [n]."""
        pieces = []
        for start in range(0, len(x), CHUNK):
            part = slice(start, start + CHUNK)
            (i, a), (j, b) = self._in_t(t[part]), self._in_x(x[part])
            pieces.append(np.einsum("nij,ni,nj->n", self._samples[i[:, :, None], j[:, None, :]], a, b))
        return np.concatenate(pieces) if pieces else np.zeros(0)
