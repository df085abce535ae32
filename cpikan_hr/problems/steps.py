"""Phase steps and second harmonics from the frames themselves: one Gauss-Newton over a sample of the whole frame.

Frame model I_jk = A_j + B_j [cos(psi) + r_j cos(2 psi + beta_j)], psi = 4 pi h / lambda_j + delta_jk. The steps
delta_jk and harmonics r_j exp(i beta_j) are common to all pixels; A_j, B_j and the height h of a pixel are eliminated
(variable projection, Golub and Pereyra 1973). Wavelengths that share h determine even three steps each. Pixels whose
frames fit badly (a wrong order, an edge) weigh less (Huber) or nothing.

The first step of every wavelength stays as it was: nothing in the frames tells it from the height.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import expit

from cpikan_hr.errors import UserError
from cpikan_hr.problems.orders import OrderSearch
from cpikan_hr.problems.phases import Demodulator, without_carrier
from cpikan_hr.problems.sample import Sample

FEW = 20_000  # pixels on which the unknowns converge first
CHUNK = 8192  # pixels whose derivatives are held at a time
ROUNDS, ITERATIONS = 12, 6  # decodes of the sample, and Gauss-Newton iterations after each
CONVERGED = 1e-6  # rad: largest change of a step
STRAY = 4.0  # times the scatter: pixels with a larger rms residual do not fit
HUBER, TRIM = 2.0, 5.0  # times the median misfit: from here a pixel weighs less, from there nothing
DIM = 0.25  # pixels below this part of the median modulation are left out: their phases are too noisy to be linear
LARGEST = 0.5  # rad: of one change
UNCERTAIN = 0.05  # rad: a step with a larger standard error was not determined
UNDETERMINED = (
    "steps: these frames do not determine their phase steps or harmonics (one wavelength needs at least five frames, "
    "and fringes that cross the frame); use nominal steps"
)


@dataclass(frozen=True)
class Shared:
    """What all pixels of a stack have in common besides the wavelengths."""

    steps: np.ndarray  # [J, K] in rad, NaN where a wavelength has no such frame
    harmonic: np.ndarray | None = None  # complex [J]: r exp(i beta)
    misfit: "Misfit | None" = None  # how badly they explain the frames, where that was looked at
    piled: tuple[float, float] | None = None  # a level that samples pile up at, and the part that does


def refine(
    sample: Sample,
    wavelengths_um: Sequence[float],
    height_range_um: tuple[float, float],
    start: Shared,
    *,
    steps: bool = True,
    harmonic: bool = False,
) -> Shared:
    """The steps (if `steps`) and second harmonics (if `harmonic`) that fit the sample best.

    UserError: the frames do not determine them.
    """
    known = wavelengths_um, height_range_um
    few = sample.fewer(FEW)
    if harmonic:  # by itself first: beside a strong harmonic, steps fitted too would follow pixels of wrong order
        start = _converge(few, *known, start, False, True)
    if steps:
        start = _converge(few, *known, start, True, harmonic)
    return _converge(sample, *known, start, steps, harmonic)


def _converge(sample, wavelengths_um, height_range_um, start: Shared, steps: bool, harmonic: bool) -> Shared:
    fit = _Fit(sample, wavelengths_um, height_range_um, start, steps, harmonic)
    if fit.freedom < 1 or fit.frames.shape[-1] <= fit.unknown.sum():
        raise UserError(UNDETERMINED)
    for _ in range(ROUNDS):
        fit.decode()
        before = fit.free.copy()
        for _ in range(ITERATIONS):
            if fit.iterate() < CONVERGED:
                break
        if np.abs(fit.free - before).max() < 10 * CONVERGED:
            break
    fit.check()
    return fit.shared


class Misfit(NamedTuple):
    """How badly the model explains a sample of pixels; zeros where nothing is left to tell."""

    ratio: float  # the median pixel's rms residual over the median modulation
    scatter: float  # standard deviation of a frame's samples about the model, in grey levels
    wrong: float  # part of the pixels whose order such a scatter is expected to get wrong
    stray: float  # part of the pixels that fit far worse than most
    level: float  # the median sample, in grey levels
    freedom: int  # of a pixel: samples less unknowns


def misfit(
    sample: Sample, wavelengths_um: Sequence[float], height_range_um: tuple[float, float], shared: Shared
) -> Misfit:
    """How badly `shared` explains the sample."""
    fit = _Fit(sample, wavelengths_um, height_range_um, shared, False, False)
    nothing = Misfit(0.0, 0.0, 0.0, 0.0, 0.0, max(0, int(fit.freedom)))
    if fit.freedom < 1 or not fit.frames.shape[-1]:
        return nothing
    fit.decode()
    squares = fit._misfits(slice(None))[fit.bright]
    if not len(squares):
        return nothing
    median = float(np.median(squares))
    scatter = float(median / (1 - 2 / (9 * fit.freedom)) ** 3) ** 0.5  # median of chi-square (Wilson and Hilferty 1931)
    wrong = expit(-0.5 * fit.margin[fit.bright] / max(scatter, 1e-9) ** 2)  # of two orders, given both chi-squares
    level = float(np.median(fit.frames[fit.present]))
    ratio, stray = median**0.5 / max(fit.modulation, 1e-300), float((squares > (STRAY * scatter) ** 2).mean())
    return Misfit(ratio, scatter, float(wrong.mean()), stray, level, int(fit.freedom))


class _Fit:
    """The sample, the shared unknowns `free`, and each pixel's height, the carrier's included."""

    def __init__(self, sample, wavelengths_um, height_range_um, start, steps, harmonic):
        self.wavelengths_um, self.height_range_um = wavelengths_um, height_range_um
        self.present = np.isfinite(start.steps)
        self.frames, self.carrier_nm = sample
        self.wavenumber = 4e-3 * np.pi / np.asarray(wavelengths_um, np.float64)  # rad per nm
        wavelengths, most = start.steps.shape
        # Unknowns of a wavelength: its K steps, then real and imaginary part of its harmonic.
        self.unknown = np.zeros((wavelengths, most + 2), bool)
        self.unknown[:, 1:most] = self.present[:, 1:] & steps
        self.unknown[:, most:] = harmonic
        self.values = np.zeros((wavelengths, most + 2))
        self.values[:, :most] = np.where(self.present, start.steps, 0)
        if start.harmonic is not None:
            self.values[:, most], self.values[:, most + 1] = start.harmonic.real, start.harmonic.imag
        self.second = harmonic or start.harmonic is not None
        self.freedom = self.present.sum() - 2 * wavelengths - 1

    @property
    def free(self) -> np.ndarray:
        return self.values[self.unknown]

    @property
    def steps(self) -> np.ndarray:
        return np.where(self.present, self.values[:, :-2], np.nan)

    @property
    def harmonic(self) -> np.ndarray | None:
        return self.values[:, -2] + 1j * self.values[:, -1] if self.second else None

    @property
    def shared(self) -> Shared:
        return Shared(self.steps, self.harmonic)

    def decode(self) -> None:
        """Heights of the sample, their orders included, and which pixels are bright enough to count."""
        demodulator = Demodulator(self.wavelengths_um, self.steps, self.harmonic)
        _, modulation, fraction, weight = demodulator.demodulate(torch.from_numpy(self.frames))
        carrier = torch.zeros(fraction.shape[1]) if self.carrier_nm is None else torch.from_numpy(self.carrier_nm)
        fraction = without_carrier(fraction, carrier.double(), self.wavelengths_um)
        if len(fraction) == 1:
            height, margin = fraction[0] * 500 * self.wavelengths_um[0], torch.full_like(fraction[0], torch.inf)
        else:
            orders = OrderSearch(self.wavelengths_um, self.height_range_um)
            total = weight.sum(0).clamp_min(torch.finfo(weight.dtype).tiny)
            height, _, margin = orders.search(fraction, weight / total)
            margin = margin * total
        self.margin = margin.numpy()  # chi-square by which the best order beats the next, for noise of one grey level
        self.height, modulation = (height + carrier).numpy(), modulation.numpy()
        self.modulation = float(np.median(modulation))
        self.bright = (modulation >= DIM * np.median(modulation, axis=1, keepdims=True)).all(axis=0)

    def iterate(self) -> float:
        """One Gauss-Newton step of shared unknowns and heights; the largest change of a shared unknown."""
        chunks = [slice(i, i + CHUNK) for i in range(0, self.frames.shape[-1], CHUNK)]
        weight = self._weights(np.concatenate([self._misfits(chunk) for chunk in chunks]))
        flat = self.unknown.ravel()
        normal, right, kept = np.zeros((flat.size, flat.size)), np.zeros(flat.size), []
        for chunk in chunks:
            kept.append((chunk, *self._linearise(chunk, weight[chunk], normal, right)))
        self.normal = normal[np.ix_(flat, flat)]
        change = np.zeros(flat.size)
        change[flat] = np.linalg.lstsq(self.normal, right[flat], rcond=1e-12)[0]
        change *= min(1.0, LARGEST / max(np.abs(change).max(), 1e-300))
        self.values += change.reshape(self.values.shape)
        for chunk, along, pull, rigidity in kept:
            self.height[chunk] += (pull - along @ change) / rigidity
        return float(np.abs(change).max())

    def _weights(self, squares: np.ndarray) -> np.ndarray:
        """Of pixels [n] with such mean squared residuals."""
        good = self.bright if self.bright.any() else ~self.bright
        self.scale = float(np.sqrt(np.median(squares[good])))
        ratio = np.sqrt(squares) / max(self.scale, 1e-300)
        return np.where(good & (ratio < TRIM), 1 / np.maximum(ratio / HUBER, 1), 0)

    def _profile(self, chunk: slice, j: int) -> tuple[np.ndarray, ...]:
        """What wavelength j sees in the pixels, [k, n] each: wave exp(i psi), centred profile, and the residual's
        projection.

        Returns (wave, profile, modulation [n], residual).
        """
        there = self.present[j]
        height = self.wavenumber[j] * self.height[chunk]
        # The angle of a step is added by a product: sines and cosines of each pixel once, not once a step.
        wave = (np.cos(height) + 1j * np.sin(height)) * np.exp(1j * self.values[j, :-2][there])[:, None]
        profile = wave.real.copy()
        if self.second:
            u, v = self.values[j, -2:]
            profile += (wave * wave * complex(u, v)).real
        profile -= profile.mean(axis=0)
        residual = self.frames[j][:, chunk][there]
        residual = residual - residual.mean(axis=0)
        modulation = (profile * residual).sum(axis=0) / np.maximum((profile * profile).sum(axis=0), 1e-12)
        return wave, profile, modulation, residual - modulation * profile

    def _misfits(self, chunk: slice) -> np.ndarray:
        """Mean squared residual of the pixels at their present heights, A and B eliminated."""
        return sum((self._profile(chunk, j)[3] ** 2).sum(axis=0) for j in range(len(self.present))) / self.freedom

    def _linearise(self, chunk: slice, weight: np.ndarray, normal: np.ndarray, right: np.ndarray):
        """Adds the pixels to the normal equations; returns what their heights follow the unknowns with."""
        wavelengths, unknowns = self.values.shape
        count = len(weight)
        along, pull, rigidity = np.zeros((count, wavelengths, unknowns)), np.zeros(count), np.zeros(count)
        for j in range(wavelengths):
            wave, profile, modulation, residual = self._profile(chunk, j)
            slope, second = -wave.imag, wave * wave
            if self.second:
                u, v = self.values[j, -2:]
                slope -= 2 * (second * complex(u, v)).imag
            slope *= modulation
            there = np.flatnonzero(self.present[j])
            columns = np.zeros((unknowns, *wave.shape))
            columns[there, np.arange(len(there))] = slope
            if self.unknown[j, -1]:
                columns[-2], columns[-1] = modulation * second.real, -modulation * second.imag
            columns -= columns.mean(axis=1, keepdims=True)
            along_profile = np.einsum("akn,kn->an", columns, profile) / np.maximum((profile**2).sum(axis=0), 1e-12)
            columns -= along_profile[:, None] * profile
            tilt = self.wavenumber[j] * columns[there].sum(axis=0)  # the height moves all steps of a wavelength
            rows = slice(j * unknowns, (j + 1) * unknowns)
            weighted = columns * weight
            normal[rows, rows] += np.tensordot(weighted, columns, axes=((1, 2), (1, 2)))
            right[rows] += np.tensordot(weighted, residual, axes=((1, 2), (0, 1)))
            along[:, j] = np.einsum("akn,kn->na", columns, tilt)
            pull += (tilt * residual).sum(axis=0)
            rigidity += (tilt**2).sum(axis=0)
        rigidity = np.sqrt(np.maximum(rigidity, 1e-300))
        along = along.reshape(count, -1) / rigidity[:, None]
        pull /= rigidity
        normal -= (along * weight[:, None]).T @ along
        right -= along.T @ (pull * weight)
        return along, pull, rigidity

    def check(self) -> None:
        """UserError where the equations leave a shared unknown open."""
        values, vectors = np.linalg.eigh(self.normal)
        if not len(values):
            return
        error = np.sqrt(np.maximum((vectors**2 / np.maximum(values, 1e-300)).sum(axis=1), 0)) * self.scale
        if values[0] < 1e-9 * values[-1] or error.max() > UNCERTAIN:
            raise UserError(UNDETERMINED)
