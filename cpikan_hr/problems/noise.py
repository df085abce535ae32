"""How much each sample of a frame is worth: read noise, shot noise, quantisation, and samples that tell nothing."""

from dataclasses import dataclass

import numpy as np

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

    def variance(self, level: np.ndarray | float) -> np.ndarray | float:
        """Of samples whose expected level is `level`."""
        return self.read**2 + QUANTISATION * self.quantised + self.gain * np.maximum(level, 0)


def usable(frames: np.ndarray, bit_depth: int, present: np.ndarray) -> np.ndarray | None:
    """Which samples of `frames` [J, K, ...] are neither clipped at 0 nor at 2**bit_depth - 1.

    None where all are that are `present` [J, K], and for floats, which are not clipped.
    """
    if frames.dtype.kind != "u":
        return None
    clipped = (frames - frames.dtype.type(1)) >= 2**bit_depth - 2  # unsigned: 0 - 1 is the largest number
    clipped[~present] = False
    return ~clipped if clipped.any() else None


class Weighing:
    """Demodulation with each sample's inverse variance. `noise` None: one grey level; `bit_depth` None: no clipping."""

    def __init__(self, demodulator: Demodulator, noise: Noise | None, bit_depth: int | None):
        self.demodulator, self.noise, self.bit_depth = demodulator, noise, bit_depth

    def demodulate(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Background, modulation, phase / 2 pi and weight [J, n] of frames [J, K, n] in their native dtype."""
        good, values = self._good(frames), frames.astype(self.demodulator.dtype)
        if self.noise is not None and self.noise.gain:
            return self.demodulator.demodulate(values, self._by_level(values, good))
        *answer, weight = self.demodulator.demodulate(values, good)
        return (*answer, weight if self.noise is None else weight * self._same)

    def weights(self, frames: np.ndarray) -> np.ndarray:
        """Inverse variance [J, K, n] of each sample, 0 where it is clipped or there is no such frame."""
        good = self._good(frames)
        if self.noise is not None and self.noise.gain:
            weights = self._by_level(frames.astype(self.demodulator.dtype), good)
        else:
            weights = (1 if good is None else good) * (1 if self.noise is None else self._same)
        present = self.demodulator.present[..., None].astype(self.demodulator.dtype)
        return np.broadcast_to(present * weights, frames.shape)

    def _good(self, frames: np.ndarray) -> np.ndarray | None:
        """1 where a sample is not clipped, 0 where it is; None where none is."""
        good = None if self.bit_depth is None else usable(frames, self.bit_depth, self.demodulator.present)
        return None if good is None else good.astype(self.demodulator.dtype)

    @property
    def _same(self) -> np.floating:
        return self.demodulator.dtype(1 / self.noise.variance(0.0))

    def _by_level(self, values: np.ndarray, good: np.ndarray | None) -> np.ndarray:
        """The variance follows the level that is fitted: by the sample's own noise dark ones would weigh more."""
        fitted = self.demodulator.levels(*self.demodulator.demodulate(values, good)[:3])
        inverse = 1 / self.noise.variance(fitted)
        return inverse if good is None else inverse * good
