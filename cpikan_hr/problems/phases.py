"""From frames to background, modulation and phase, each wavelength and pixel by itself: least squares in closed form.

Frame model I_jk = A_j + B_j [cos(psi) + r_j cos(2 psi + beta_j)] with psi = phi_j + delta_jk; r_j is 0 unless told.
Source: least-squares phase with general steps, J. E. Greivenkamp, Opt. Eng. 23 (1984) 350.

Invariant: pixels are computed by whole vectors of the processor (`VECTOR`), which round otherwise than one number does.
So a pixel's numbers do not depend on those that are computed with it, as long as one thread does.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cpikan_hr.errors import UserError

NEWTON = 6  # iterations that take a phase from a second harmonic of 0.3 to rounding
SINGULAR = 1e-3  # smallest singular value of the normalised model that counts as three independent columns
VECTOR = 64  # numbers: a multiple of what any processor computes together


def whole_vectors(index: Tensor) -> Tensor:
    """The numbers of some pixels [n], the last one repeated until they fill whole vectors."""
    return torch.cat([index, index[-1:].expand(-len(index) % VECTOR)])


class Demodulator:
    """What is the same for all pixels. UserError: steps that do not determine a phase.

    `phase_steps_rad` [J, K], NaN where a wavelength has no such frame. `harmonic` complex [J]: r exp(i beta).
    """

    def __init__(
        self, wavelengths_um: Sequence[float], phase_steps_rad: np.ndarray, harmonic: np.ndarray | None = None
    ):
        steps = np.atleast_2d(np.asarray(phase_steps_rad, np.float64))
        self.present = np.isfinite(steps)
        self.steps = np.where(self.present, steps, 0)
        wave = np.exp(1j * self.steps)
        model = np.stack([np.ones_like(steps), wave.real, -wave.imag], axis=-1) * self.present[..., None]
        inverse, variance = zip(*(_least_squares(j, each) for j, each in enumerate(model)), strict=True)
        self.model, self.inverse = model, np.stack(inverse)  # [J, K, 3], [J, 3, K]
        half = np.asarray(wavelengths_um, np.float64) * 500.0
        # Height variance per squared grey level is (half / 2 pi)^2 variance / B^2; the weight is its inverse.
        self.per_radian = (2 * np.pi / half) ** 2
        self.information = self.per_radian / variance
        self.overtone = None
        if harmonic is not None:
            second = np.asarray(harmonic)[:, None] * wave**2
            self.overtone = np.stack([second.real, -second.imag], axis=-1) * self.present[..., None]  # [J, K, 2]

    def demodulate(self, frames: Tensor, weights: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Frames [J, K, n] -> background, modulation [J, n] in grey levels, phase / 2 pi, weight [J, n].

        `weights` [J, K, n]: inverse variance of each sample, 0 where it tells nothing; None: 1 everywhere. The weight
        handed out is the inverse variance of the wavelength's height (nm^-2) for that noise; it is 0, like the
        modulation, where the samples do not determine a phase.
        """
        found = frames.new_empty(4, len(frames), frames.shape[-1])
        for j, each in enumerate(frames):
            a, c, s = (_combined(row, each) for row in self.inverse[j].tolist())
            overtone = None if self.overtone is None else (self.inverse[j] @ self.overtone[j]).tolist()
            background, modulation, phase = found[:3, j] = _to_phase(a, c, s, overtone)
            found[3, j] = modulation * modulation * float(self.information[j])
            if weights is None:
                continue
            own = weights[j, torch.from_numpy(self.present[j])]
            found[3, j] *= own[0]
            odd = torch.nonzero((own != own[0]).any(0) | (own[0] == 0))[:, 0]
            if len(odd):
                odd = whole_vectors(odd)
                found[:, j, odd] = self._weighted(j, each[:, odd].double(), weights[j][:, odd].double()).to(found)
        background, modulation, fraction, weight = found
        fraction *= 1 / (2 * np.pi)
        return background, modulation, fraction, weight

    def _weighted(self, j: int, frames: Tensor, weights: Tensor) -> Tensor:
        """The same [4, n] of the pixels [K, n] whose samples weigh differently: 3 x 3 normal equations, float64."""
        model = self.model[j]  # [K, 3]
        normal = [[_combined(model[:, q] * model[:, r], weights) for r in range(3)] for q in range(3)]
        covariance, known = _inverse(normal)
        # What each sample moves each answer by: for every answer [K, n].
        solve = [weights * _each_combined(model, torch.stack(row)) for row in covariance]
        a, c, s = ((each * frames).sum(0) for each in solve)
        overtone = None
        if self.overtone is not None:
            overtone = [_each_combined(self.overtone[j].T, each) for each in solve]
        background, modulation, phase = _to_phase(a, c, s, overtone)
        cos, sin = phase.cos(), phase.sin()
        variance = sin * sin * covariance[1][1] - 2 * sin * cos * covariance[1][2] + cos * cos * covariance[2][2]
        weight = modulation * modulation * float(self.per_radian[j]) / variance
        return torch.where(known, torch.stack([background, modulation, phase, weight]), 0)

    def levels(self, background: Tensor, modulation: Tensor, fraction: Tensor) -> Tensor:
        """The frames [J, K, n] that the model gives for what `demodulate` found."""
        psi = 2 * np.pi * fraction
        waves, model = [background, modulation * psi.cos(), modulation * psi.sin()], self.model
        if self.overtone is not None:
            waves += [modulation * (2 * psi).cos(), modulation * (2 * psi).sin()]
            model = np.concatenate([model, self.overtone], axis=2)
        waves = torch.stack(waves, dim=1)
        return torch.stack([_each_combined(rows, wave) for rows, wave in zip(model, waves, strict=True)])


def _each_combined(factors: np.ndarray, rows: Tensor) -> Tensor:
    """Sums [m, n] of rows [K, n] with each of the factors [m, K]."""
    return torch.stack([_combined(each, rows) for each in factors])


def without_carrier(fraction: Tensor, carrier_nm: Tensor, wavelengths_um: Sequence[float]) -> Tensor:
    """Phases / 2 pi [J, n] less those of the carrier's height (float64 [n]), wrapped to [-1/2, 1/2]."""
    fraction = fraction - carrier_cycles(carrier_nm, wavelengths_um).to(fraction)
    return fraction - fraction.round()


def carrier_cycles(carrier_nm: Tensor, wavelengths_um: Sequence[float]) -> Tensor:
    """The carrier's phase / 2 pi at each wavelength, [J, n], float64, wrapped: it may be thousands of fringes."""
    half = torch.tensor(wavelengths_um, dtype=torch.float64, device=carrier_nm.device)[:, None] * 500
    cycles = carrier_nm / half
    return cycles - cycles.round()


def _combined(factors: Sequence[float], rows: Tensor) -> Tensor:
    """Sum of factors times rows [K, n], in their order."""
    total = rows[0] * float(factors[0])
    for factor, row in zip(factors[1:], rows[1:], strict=True):
        total.add_(row, alpha=float(factor))
    return total


def _waves(phase: Tensor) -> tuple[Tensor, ...]:
    """cos phi, sin phi, cos 2 phi, sin 2 phi."""
    cos, sin = phase.cos(), phase.sin()
    return cos, sin, 1 - 2 * sin * sin, 2 * sin * cos


def _to_phase(a: Tensor, c: Tensor, s: Tensor, overtone: list | None) -> Tensor:
    """Background, modulation, phase [3, n] from the least-squares answers (A, B cos phi, B sin phi) [n].

    A second harmonic adds `overtone` (cos 2 phi, sin 2 phi) [3][2] times B to those answers: Newton's method finds
    the phase whose sum points where (c, s) does.
    """
    reach, phase = (c * c + s * s).sqrt(), torch.atan2(s, c)
    if overtone is None:
        return torch.stack([a, reach, phase])
    (a_c, a_s), (c_c, c_s), (s_c, s_s) = overtone
    floor = torch.finfo(phase.dtype).tiny
    for _ in range(NEWTON):
        cos, sin, cos2, sin2 = _waves(phase)
        x, y = cos + c_c * cos2 + c_s * sin2, sin + s_c * cos2 + s_s * sin2
        dx, dy = -sin + 2 * (c_s * cos2 - c_c * sin2), cos + 2 * (s_s * cos2 - s_c * sin2)
        slope = (c * dy - s * dx).maximum(0.2 * reach)  # a strong harmonic is approached by shorter steps
        phase = phase - (c * y - s * x) / slope.clamp_min(floor)
    cos, sin, cos2, sin2 = _waves(phase)
    x, y = cos + c_c * cos2 + c_s * sin2, sin + s_c * cos2 + s_s * sin2
    modulation = (c * x + s * y) / (x * x + y * y)
    # Wrapped again: what a Newton step may have carried beyond pi.
    return torch.stack([a - modulation * (a_c * cos2 + a_s * sin2), modulation, torch.atan2(sin, cos)])


def _inverse(normal: list[list[Tensor]]) -> tuple[list[list[Tensor]], Tensor]:
    """Inverses of symmetric 3 x 3 matrices of tensors [n] by cofactors, and which of them are regular [n]."""
    (a, b, c), (_, d, e), (_, _, f) = normal
    xx, xy, xz, yy, yz, zz = d * f - e * e, c * e - b * f, b * e - c * d, a * f - c * c, b * c - a * e, a * d - b * b
    determinant = a * xx + b * xy + c * xz
    known = determinant > SINGULAR**2 * a**3
    xx, xy, xz, yy, yz, zz = (each / torch.where(known, determinant, 1) for each in (xx, xy, xz, yy, yz, zz))
    return [[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]], known


def _least_squares(j: int, model: np.ndarray) -> tuple[np.ndarray, float]:
    """Matrix [3, K] from frames to (A, B cos phi, B sin phi), and the mean variance of the last two for unit noise."""
    if np.linalg.matrix_rank(model, tol=SINGULAR) < 3:
        raise UserError(f"phase_steps_rad: the steps of wavelength {j} do not determine a phase; use 3 different ones")
    covariance = np.linalg.inv(model.T @ model)
    return covariance @ model.T, 0.5 * float(covariance[1, 1] + covariance[2, 2])
