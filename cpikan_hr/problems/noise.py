"""How much each sample of a frame is worth: read noise, shot noise, quantisation, and samples that tell nothing."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cpikan_hr.problems.phases import Demodulator

QUANTISATION = 1 / 12  # variance of rounding to whole grey levels


@dataclass(frozen=True)
class Noise:
    """Variance of a sample of level I: read^2 + gain I + 1/12, in squared grey levels (1/12 in integer frames only).

    `read`: standard deviation in grey levels. `gain`: variance per grey level (shot noise).
    """

    read: float
    gain: float = 0.0
    quantised: bool = True

    def variance(self, level: Tensor | float) -> Tensor | float:
        """Of samples whose expected level is `level`."""
        positive = level.clamp_min(0) if isinstance(level, Tensor) else max(level, 0.0)
        return self.read**2 + QUANTISATION * self.quantised + self.gain * positive


def usable(frames: Tensor, bit_depth: int, present: Tensor) -> Tensor | None:
    """Which samples of `frames` [J, K, ...] are neither clipped at 0 nor at 2**bit_depth - 1.

    None where all are that are `present` [J, K].
    """
    low, high = frames.aminmax()
    top = 2**bit_depth - 1
    if low > 0 and high < top:
        return None
    good = (frames > 0) & (frames < top)
    good[~present] = True
    return None if good.all() else good


class Weighing:
    """Demodulation with each sample's inverse variance. `noise` None: one grey level; `bit_depth` None: no clipping."""

    def __init__(self, demodulator: Demodulator, noise: Noise | None, bit_depth: int | None):
        self.demodulator, self.noise, self.bit_depth = demodulator, noise, bit_depth

    def demodulate(self, frames: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Background, modulation, phase / 2 pi and weight [J, n] of frames [J, K, n]."""
        good = self._good(frames)
        if self.noise is not None and self.noise.gain:
            return self.demodulator.demodulate(frames, self._by_level(frames, good))
        *answer, weight = self.demodulator.demodulate(frames, good)
        return (*answer, weight if self.noise is None else weight * self._same)

    def weights(self, frames: Tensor) -> Tensor:
        """Inverse variance [J, K, n] of each sample, 0 where it is clipped or there is no such frame."""
        good = self._good(frames)
        if self.noise is not None and self.noise.gain:
            weights = self._by_level(frames, good)
        else:
            weights = torch.ones_like(frames) if good is None else good
            weights = weights if self.noise is None else weights * self._same
        return weights * self._present(frames)[..., None]

    def _present(self, frames: Tensor) -> Tensor:
        return torch.from_numpy(self.demodulator.present).to(frames.device)

    def _good(self, frames: Tensor) -> Tensor | None:
        """1 where a sample is not clipped, 0 where it is; None where none is."""
        if self.bit_depth is None:
            return None
        good = usable(frames, self.bit_depth, self._present(frames))
        return None if good is None else good.to(frames)

    @property
    def _same(self) -> float:
        return 1 / self.noise.variance(0.0)

    def _by_level(self, frames: Tensor, good: Tensor | None) -> Tensor:
        """The variance follows the level that is fitted: by the sample's own noise dark ones would weigh more."""
        fitted = self.demodulator.levels(*self.demodulator.demodulate(frames, good)[:3])
        inverse = 1 / self.noise.variance(fitted)
        return inverse if good is None else inverse * good
