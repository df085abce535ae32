"""From frames to background, modulation and phase, each wavelength and pixel by itself: least squares in closed form.

Frame model I_jk = A_j + B_j [cos(psi) + r_j cos(2 psi + beta_j)] with psi = phi_j + delta_jk; r_j is 0 unless told.
Source: least-squares phase with general steps, J. E. Greivenkamp, Opt. Eng. 23 (1984) 350.
"""

from collections.abc import Sequence

import numpy as np

from cpikan_hr.errors import UserError

NEWTON = 6  # iterations that take a phase from a second harmonic of 0.3 to rounding
SINGULAR = 1e-3  # smallest singular value of the normalised model that counts as three independent columns


class Demodulator:
    """What is the same for all pixels. UserError: steps that do not determine a phase.

    `phase_steps_rad` [J, K], NaN where a wavelength has no such frame. `harmonic` complex [J]: r exp(i beta).
    """

    def __init__(
        self,
        wavelengths_um: Sequence[float],
        phase_steps_rad: np.ndarray,
        dtype: type,
        harmonic: np.ndarray | None = None,
    ):
        steps = np.atleast_2d(np.asarray(phase_steps_rad, np.float64))
        self.present = np.isfinite(steps)
        self.steps = np.where(self.present, steps, 0)
        self.dtype = dtype
        wave = np.exp(1j * self.steps)
        model = np.stack([np.ones_like(steps), wave.real, -wave.imag], axis=-1) * self.present[..., None]
        inverse, variance = zip(*(_least_squares(j, each) for j, each in enumerate(model)), strict=True)
        self.model, self.inverse = model, np.stack(inverse).astype(dtype)
        half = np.asarray(wavelengths_um, np.float64) * 500.0
        # Height variance per squared grey level is (half / 2 pi)^2 variance / B^2; the weight is its inverse.
        self.per_radian = (2 * np.pi / half) ** 2
        self.information = (self.per_radian / variance).astype(dtype)
        self.overtone = None
        if harmonic is not None:
            second = np.asarray(harmonic)[:, None] * wave**2
            self.overtone = np.stack([second.real, -second.imag], axis=-1) * self.present[..., None]  # [J, K, 2]

    def demodulate(
        self, frames: np.ndarray, weights: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Frames [J, K, n] -> background, modulation [J, n] in grey levels, phase / 2 pi, weight [J, n].

        `weights` [J, K, n]: inverse variance of each sample, 0 where it tells nothing; None: 1 everywhere. The weight
        handed out is the inverse variance of the wavelength's height (nm^-2) for that noise; it is 0, like the
        modulation, where the samples do not determine a phase.
        """
        background, modulation, fraction, weight = np.empty((4, frames.shape[0], frames.shape[-1]), frames.dtype)
        for j, each in enumerate(frames):
            # Not `@`: many threads decode at once, and each would wake BLAS's own threads for 50 thousand products.
            a, c, s = np.einsum("rk,kn->rn", self.inverse[j], each)
            scale, odd = 1, None
            if weights is not None:
                own = weights[j, self.present[j]]
                odd = np.flatnonzero((own != own[0]).any(axis=0) | (own[0] == 0))
                scale = own[0]
            overtone = None
            if self.overtone is not None:
                overtone = np.einsum("rk,kq->rq", self.inverse[j], self.overtone[j].astype(self.dtype))
            background[j], modulation[j], fraction[j] = _to_phase(a, c, s, overtone)
            weight[j] = modulation[j] ** 2 * self.information[j] * scale
            if odd is not None and len(odd):
                own = each[:, odd].astype(np.float64)
                background[j, odd], modulation[j, odd], fraction[j, odd], weight[j, odd] = self._weighted(
                    j, own, weights[j][:, odd].astype(np.float64)
                )
        fraction *= 1 / (2 * np.pi)
        return background, modulation, fraction, weight

    def _weighted(self, j: int, frames: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, ...]:
        """The same of the pixels [K, n] whose samples weigh differently: 3 x 3 normal equations each, float64."""
        model = self.model[j]
        outer = (model[:, :, None] * model[:, None, :]).reshape(-1, 9)
        covariance, known = _inverse(np.einsum("kq,kn->qn", outer, weights))
        solve = np.einsum("qrn,kr,kn->qkn", covariance, model, weights)
        a, c, s = np.einsum("qkn,kn->qn", solve, frames)
        overtone = None if self.overtone is None else np.einsum("qkn,kr->qrn", solve, self.overtone[j])
        background, modulation, phase = _to_phase(a, c, s, overtone)
        along_c, along_s = np.cos(phase), np.sin(phase)
        variance = (
            along_s**2 * covariance[1, 1] - 2 * along_s * along_c * covariance[1, 2] + along_c**2 * covariance[2, 2]
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            weight = np.where(known, modulation**2 * self.per_radian[j] / variance, 0)
        return np.where(known, background, 0), np.where(known, modulation, 0), np.where(known, phase, 0), weight

    def levels(self, background: np.ndarray, modulation: np.ndarray, fraction: np.ndarray) -> np.ndarray:
        """The frames [J, K, n] that the model gives for what `demodulate` found."""
        psi = 2 * np.pi * fraction
        basis = np.stack([background, modulation * np.cos(psi), modulation * np.sin(psi)], axis=1)
        frames = np.einsum("jkq,jqn->jkn", self.model.astype(self.dtype), basis)
        if self.overtone is not None:
            basis = np.stack([modulation * np.cos(2 * psi), modulation * np.sin(2 * psi)], axis=1)
            frames += np.einsum("jkq,jqn->jkn", self.overtone.astype(self.dtype), basis)
        return frames


def _waves(phase: np.ndarray) -> tuple[np.ndarray, ...]:
    """cos phi, sin phi, cos 2 phi, sin 2 phi."""
    cos, sin = np.cos(phase), np.sin(phase)
    return cos, sin, 1 - 2 * sin * sin, 2 * sin * cos


def _to_phase(a: np.ndarray, c: np.ndarray, s: np.ndarray, overtone: np.ndarray | None) -> tuple[np.ndarray, ...]:
    """Background, modulation, phase [n] from the least-squares answers (A, B cos phi, B sin phi) [n].

    A second harmonic adds `overtone` (cos 2 phi, sin 2 phi) [3, 2(, n)] times B to those answers: Newton's method finds
    the phase whose sum points where (c, s) does.
    """
    phase = np.arctan2(s, c)
    if overtone is None:
        return a, np.hypot(c, s), phase
    (a_c, a_s), (c_c, c_s), (s_c, s_s) = overtone
    floor = np.finfo(phase.dtype).tiny
    reach = np.hypot(c, s)
    for _ in range(NEWTON):
        cos, sin, cos2, sin2 = _waves(phase)
        x, y = cos + c_c * cos2 + c_s * sin2, sin + s_c * cos2 + s_s * sin2
        dx, dy = -sin + 2 * (c_s * cos2 - c_c * sin2), cos + 2 * (s_s * cos2 - s_c * sin2)
        slope = np.maximum(c * dy - s * dx, 0.2 * reach)  # a strong harmonic is approached by shorter steps
        phase -= (c * y - s * x) / np.maximum(slope, floor)
    cos, sin, cos2, sin2 = _waves(phase)
    x, y = cos + c_c * cos2 + c_s * sin2, sin + s_c * cos2 + s_s * sin2
    modulation = (c * x + s * y) / (x * x + y * y)
    # Wrapped again: what a Newton step may have carried beyond pi.
    return a - modulation * (a_c * cos2 + a_s * sin2), modulation, np.arctan2(sin, cos)


def _inverse(normal: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inverses [3, 3, n] of symmetric 3 x 3 matrices [9, n] by cofactors, and which of them are regular [n]."""
    a, b, c, _, d, e, _, _, f = normal
    cofactors = np.stack([d * f - e * e, c * e - b * f, b * e - c * d, a * f - c * c, b * c - a * e, a * d - b * b])
    determinant = a * cofactors[0] + b * cofactors[1] + c * cofactors[2]
    known = determinant > SINGULAR**2 * a**3
    cofactors /= np.where(known, determinant, 1)
    xx, xy, xz, yy, yz, zz = cofactors
    return np.stack([xx, xy, xz, xy, yy, yz, xz, yz, zz]).reshape(3, 3, -1), known


def _least_squares(j: int, model: np.ndarray) -> tuple[np.ndarray, float]:
    """Matrix [3, K] from frames to (A, B cos phi, B sin phi), and the mean variance of the last two for unit noise."""
    if np.linalg.matrix_rank(model, tol=SINGULAR) < 3:
        raise UserError(f"phase_steps_rad: the steps of wavelength {j} do not determine a phase; use 3 different ones")
    covariance = np.linalg.inv(model.T @ model)
    return covariance @ model.T, 0.5 * float(covariance[1, 1] + covariance[2, 2])
