"""Which fringe order a height has: the exhaustive search by excess fractions.

Each candidate order of one wavelength (the longest, if it is not weak) in the height range is scored with the exact
weighted scatter of the heights of all wavelengths, each taken at its order nearest to the candidate.

Sources: M. R. Benoit, J. Phys. 7 (1898) 57; C. E. Towers et al., Opt. Lett. 28 (2003) 887.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from cpikan_hr.problems.phases import whole_vectors

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
    """What is the same for all pixels: half wavelengths and candidate orders.

    Invariant: pixels are computed by whole vectors (`phases.py`).
    """

    def __init__(self, wavelengths_um: Sequence[float], height_range_um: tuple[float, float]):
        self.half = [500.0 * wavelength for wavelength in wavelengths_um]  # in nm: the period of the height
        self.base = int(np.argmax(self.half))  # the longest wavelength has the fewest candidates
        self.low, self.high = (1000.0 * end for end in height_range_um)
        self.orders = [
            range(math.floor(self.low / period - 0.5), math.ceil(self.high / period + 0.5) + 1) for period in self.half
        ]

    def search(self, fraction: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Height [n] in nm of the best candidate order, how clearly it beats the second best (0 to 1) and the margin.

        fraction [J, n]: phase over 2 pi; weight [J, n]: inverse variances of the wavelengths' heights, of sum 1.
        The margin [n] is by how much the second best costs more, in nm^2: infinite where there is no second.
        """
        found = fraction.new_empty(3, fraction.shape[1])
        for base, pixels in self.groups(weight):
            found[:, pixels] = self._search(base, fraction[:, pixels], weight[:, pixels])
        return tuple(found)

    def groups(self, weight: Tensor) -> Iterator[tuple[int, Tensor | slice]]:
        """Wavelengths and the pixels whose candidates are the orders of that one; what comes later replaces.

        The longest has the fewest; but where it is weak (saturated, or hardly modulated), its phase may be so far off
        that the others' nearest heights belong to another order, and the true one is not among the candidates.
        """
        yield self.base, slice(None)
        weak = torch.nonzero(weight[self.base] < WEAK)[:, 0]
        strongest = weight[:, weak].argmax(dim=0)
        for base in strongest.unique().tolist():
            yield base, whole_vectors(weak[strongest == base])

    def _search(self, base: int, fraction: Tensor, weight: Tensor) -> Tensor:
        best = torch.full_like(fraction[0], math.inf)
        second, height = best.clone(), torch.zeros_like(best)
        for candidate, cost in self.candidates(base, fraction, weight):
            torch.minimum(second, torch.maximum(cost, best), out=second)
            torch.where(cost < best, candidate, height, out=height)
            torch.minimum(cost, best, out=best)
        if len(self.orders[base]) == 1 or len(self.half) == 1:
            return torch.stack([height, torch.ones_like(height), torch.full_like(height, math.inf)])
        best.clamp_min_(0)  # rounding of a perfect fit
        clear = 1 - (best / second.clamp_min(torch.finfo(best.dtype).tiny)).sqrt()
        return torch.stack([height, clear, second - best])

    def candidates(self, base: int, fraction: Tensor, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Height [n] in nm and cost [n] of each order of wavelength `base`; the array of costs is used again.

        A candidate's cost is the weighted variance of the single-wavelength heights, in nm^2. Taken about their mean
        it does not depend on which wavelength the candidates come from. Over the variance of the height it is the
        chi-square of the candidate.
        """
        others = [j for j in range(len(self.half)) if j != base]
        half = torch.tensor(self.half, dtype=fraction.dtype, device=fraction.device)[:, None]
        start, along, across = fraction[base] * half[base], weight * half, weight * half * half
        deviation, whole, square, mean = fraction.new_empty(4, fraction.shape[1])
        for order in self.orders[base]:
            candidate = start + order * self.half[base]
            mean.zero_()
            square.zero_()
            for j in others:
                # How far the nearest height of wavelength j lies from the candidate, in its half wavelengths.
                torch.add(fraction[j], candidate, alpha=-1 / self.half[j], out=deviation)
                deviation -= torch.round(deviation, out=whole)
                mean.addcmul_(deviation, along[j])
                deviation *= deviation
                square.addcmul_(deviation, across[j])
            square.addcmul_(mean, mean, value=-1)
            candidate += mean
            if outside := self._beyond(base, order):
                square += outside(candidate)
            yield candidate, square

    def _beyond(self, base: int, order: int) -> Callable[[Tensor], Tensor] | None:
        """Squared distance of candidates from the height range; None where an order lies wholly inside.

        A soft limit: noise may carry a height a little beyond the end, but an equally good height inside wins.
        """
        period = self.half[base]
        if (order - 0.5) * period >= self.low and (order + 0.5) * period <= self.high:
            return None
        return lambda height: (self.low - height).maximum(height - self.high).clamp_min_(0).square_()
