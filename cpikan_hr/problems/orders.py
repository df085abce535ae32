"""Which fringe order a height has: the exhaustive search by excess fractions.

Each candidate order of one wavelength (the longest, if it is not weak) in the height range is scored with the exact
weighted scatter of the heights of all wavelengths, each taken at its order nearest to the candidate.

Sources: M. R. Benoit, J. Phys. 7 (1898) 57; C. E. Towers et al., Opt. Lett. 28 (2003) 887.
"""

from collections.abc import Iterator, Sequence

import numpy as np

WEAK = 0.05  # part of the whole weight below which a wavelength's orders are not what the candidates come from


def unambiguous_range_um(wavelengths_um: Sequence[float]) -> tuple[float, float]:
    """Height range over which two of the wavelengths never repeat, centred on zero.

    A pair repeats after half its synthetic wavelength l1 l2 / |l1 - l2|; the pair with the longest one decides.
    """
    lengths = sorted(wavelengths_um)
    if len(set(lengths)) < 2:
        return -lengths[0] / 4, lengths[0] / 4
    longest = max(a * b / (b - a) for a, b in zip(lengths, lengths[1:], strict=False) if b > a)
    return -longest / 4, longest / 4


class OrderSearch:
    """What is the same for all pixels: half wavelengths and candidate orders."""

    def __init__(self, wavelengths_um: Sequence[float], height_range_um: tuple[float, float], dtype: type):
        self.dtype = dtype
        self.half = np.asarray(wavelengths_um, np.float64) * 500.0  # half wavelengths in nm: the period of the height
        self.base = int(np.argmax(self.half))  # the longest wavelength has the fewest candidates
        self.low, self.high = (1000.0 * end for end in height_range_um)
        self.orders = [
            range(int(np.floor(self.low / period - 0.5)), int(np.ceil(self.high / period + 0.5)) + 1)
            for period in self.half
        ]

    def search(self, fraction: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Height [n] in nm of the best candidate order, how clearly it beats the second best (0 to 1) and the margin.

        fraction [J, n]: phase over 2 pi; weight [J, n]: inverse variances of the wavelengths' heights, of sum 1.
        The margin [n] is by how much the second best costs more, in nm^2: infinite where there is no second.
        """
        found = np.empty((3, fraction.shape[1]), self.dtype)
        for base, pixels in self.groups(weight):
            found[:, pixels] = self._search(base, fraction[:, pixels], weight[:, pixels])
        return tuple(found)

    def groups(self, weight: np.ndarray) -> Iterator[tuple[int, np.ndarray | slice]]:
        """Wavelengths and the pixels whose candidates are the orders of that one; what comes later replaces.

        The longest has the fewest; but where it is weak (saturated, or hardly modulated), its phase may be so far off
        that the others' nearest heights belong to another order, and the true one is not among the candidates.
        """
        yield self.base, slice(None)
        weak = np.flatnonzero(weight[self.base] < WEAK)
        strongest = weight[:, weak].argmax(axis=0)
        for base in np.unique(strongest).tolist():
            yield base, weak[strongest == base]

    def _search(self, base: int, fraction: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, ...]:
        best = np.full(fraction.shape[1], np.inf, self.dtype)
        second, height, better = best.copy(), np.zeros_like(best), best > 0
        for candidate, cost in self.candidates(base, fraction, weight):
            np.less(cost, best, out=better)
            np.minimum(second, np.maximum(cost, best), out=second)
            np.copyto(best, cost, where=better)
            np.copyto(height, candidate, where=better)
        if len(self.orders[base]) == 1 or len(self.half) == 1:
            return height, np.ones_like(height), np.full_like(height, np.inf)
        np.maximum(best, 0, out=best)  # rounding of a perfect fit
        return height, 1 - np.sqrt(best / np.maximum(second, np.finfo(self.dtype).tiny)), second - best

    def candidates(
        self, base: int, fraction: np.ndarray, weight: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Height [n] in nm and cost [n] of each order of wavelength `base`; the array of costs is used again.

        A candidate's cost is the weighted variance of the single-wavelength heights, in nm^2. Taken about their mean
        it does not depend on which wavelength the candidates come from. Over the variance of the height it is the
        chi-square of the candidate.
        """
        others = [j for j in range(len(self.half)) if j != base]
        deviation, square, mean = np.empty((3, fraction.shape[1]), self.dtype)
        for order in self.orders[base]:
            candidate = (fraction[base] + self.dtype(order)) * self.dtype(self.half[base])
            mean[:] = square[:] = 0
            for j in others:
                # How far the nearest height of wavelength j lies from the candidate.
                np.multiply(candidate, self.dtype(-1 / self.half[j]), out=deviation)
                deviation += fraction[j]
                deviation -= np.rint(deviation)
                deviation *= self.dtype(self.half[j])
                weighted = deviation * weight[j]
                mean += weighted
                weighted *= deviation
                square += weighted
            square -= mean * mean
            candidate += mean
            square += self._outside(base, candidate, order)
            yield candidate, square

    def _outside(self, base: int, candidate: np.ndarray, order: int) -> np.ndarray | float:
        """Squared distance of the candidates from the height range; no work where an order lies wholly inside.

        A soft limit: noise may carry a height a little beyond the end, but an equally good height inside wins.
        """
        period = self.half[base]
        if (order - 0.5) * period >= self.low and (order + 0.5) * period <= self.high:
            return 0.0
        outside = np.maximum(np.maximum(self.low - candidate, candidate - self.high), 0)
        return outside * outside
