"""From frames to background, modulation and phase, each wavelength and pixel by itself: least squares in closed form.

Frame model I_jk = A_j + B_j cos(phi_j + delta_jk). Source: least-squares phase with general steps, J. E. Greivenkamp,
Opt. Eng. 23 (1984) 350.
"""

from collections.abc import Sequence

import numpy as np

from cpikan_hr.errors import UserError


class Demodulator:
    """The normal equations, which are the same for all pixels. UserError: steps that do not determine a phase."""

    def __init__(self, wavelengths_um: Sequence[float], phase_steps_rad: np.ndarray, dtype: type):
        steps = np.atleast_2d(np.asarray(phase_steps_rad, np.float64))
        inverse, variance = zip(*(_least_squares(j, row) for j, row in enumerate(steps)), strict=True)
        self.inverse = np.stack(inverse).astype(dtype)
        half = np.asarray(wavelengths_um, np.float64) * 500.0
        # Height variance per squared grey level is (half / 2 pi)^2 variance / B^2; the weight is its inverse.
        self.information = ((2 * np.pi / half) ** 2 / variance).astype(dtype)

    def demodulate(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Frames [J, K, n] -> background, modulation [J, n] in grey levels, phase / 2 pi, weight [J, n].

        The weight is the inverse variance of the wavelength's height (nm^-2) for noise of one grey level.
        """
        background, modulation, fraction = np.empty((3, frames.shape[0], frames.shape[-1]), frames.dtype)
        for j, each in enumerate(frames):
            # Not `@`: many threads decode at once, and each would wake BLAS's own threads for 50 thousand products.
            a, c, s = np.einsum("rk,kn->rn", self.inverse[j], each)
            background[j], modulation[j] = a, np.hypot(c, s)
            np.arctan2(s, c, out=fraction[j])
        fraction *= 1 / (2 * np.pi)
        return background, modulation, fraction, modulation**2 * self.information[:, None]


def _least_squares(j: int, steps: np.ndarray) -> tuple[np.ndarray, float]:
    """Matrix [3, K] from frames to (A, B cos phi, B sin phi), and the mean variance of the last two for unit noise."""
    model = np.stack([np.ones_like(steps), np.cos(steps), -np.sin(steps)], axis=1)
    if np.linalg.matrix_rank(model, tol=1e-3) < 3:
        raise UserError(f"phase_steps_rad: the steps of wavelength {j} do not determine a phase; use 3 different ones")
    covariance = np.linalg.inv(model.T @ model)
    return covariance @ model.T, 0.5 * float(covariance[1, 1] + covariance[2, 2])
