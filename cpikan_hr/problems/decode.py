"""The classical height decode: N-step phase per wavelength, order search by excess fractions, weighted average.

The baseline every field is measured against, and its start. numpy only.

Invariants
* Frame model I_jk = A_j + B_j cos(4 pi h / lambda_j + delta_jk); one wavelength alone gives h modulo lambda_j / 2.
* The order search is exhaustive: each candidate order of the longest wavelength in the height range is scored with the
  exact weighted scatter of the heights of all wavelengths, each taken at its order nearest to the candidate.
* Heights are in nm. Float64 frames are decoded in float64, everything else in float32 (rounding below 0.01 nm).

Sources: least-squares phase with general steps, J. E. Greivenkamp, Opt. Eng. 23 (1984) 350; excess fractions,
M. R. Benoit, J. Phys. 7 (1898) 57 and C. E. Towers et al., Opt. Lett. 28 (2003) 887.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from skimage.restoration import unwrap_phase

from cpikan_hr.data.stack import Stack
from cpikan_hr.data.threads import each_in_threads
from cpikan_hr.data.writers import MapWriter
from cpikan_hr.errors import UserError

CHUNK = 16384  # pixels decoded at a time: the arrays of one chunk fit the second-level cache
WINDOW = (256, 2048)  # rows, columns that a thread reads and decodes at a time


@dataclass(frozen=True)
class Decoded:
    """Maps over a window [h, w] (background and modulation: [J, h, w], in grey levels)."""

    height_nm: np.ndarray
    sigma_nm: np.ndarray  # standard deviation of the height for noise of one grey level: multiply by the noise
    quality: np.ndarray  # 0 (order arbitrary, or no fringes) to 1 (fractions agree perfectly, full contrast)
    background: np.ndarray
    modulation: np.ndarray


def unambiguous_range_um(wavelengths_um: Sequence[float]) -> tuple[float, float]:
    """Height range over which two of the wavelengths never repeat, centred on zero.

    A pair repeats after half its synthetic wavelength l1 l2 / |l1 - l2|; the pair with the longest one decides.
    """
    lengths = sorted(wavelengths_um)
    if len(set(lengths)) < 2:
        return -lengths[0] / 4, lengths[0] / 4
    longest = max(a * b / (b - a) for a, b in zip(lengths, lengths[1:], strict=False) if b > a)
    return -longest / 4, longest / 4


def decode_window(
    frames: np.ndarray,
    wavelengths_um: Sequence[float],
    phase_steps_rad: np.ndarray,
    height_range_um: tuple[float, float] | None = None,
) -> Decoded:
    """Decodes `frames` [J, K, h, w] with `phase_steps_rad` [J, K] into maps [h, w].

    `height_range_um`: where heights can be; default `unambiguous_range_um`. `sigma_nm` is first-order propagation of
    equal noise in all frames; it is infinite where nothing is modulated.
    UserError: phase steps that do not determine a phase.
    """
    J, K, h, w = frames.shape
    dtype = np.float64 if frames.dtype == np.float64 else np.float32
    solver = _Solver(wavelengths_um, phase_steps_rad, height_range_um or unambiguous_range_um(wavelengths_um), dtype)
    flat = frames.reshape(J, K, h * w)
    maps, per_wavelength = np.empty((3, h * w), dtype), np.empty((2, J, h * w), dtype)
    for start in range(0, h * w, CHUNK):
        part = slice(start, start + CHUNK)
        solver.decode(flat[:, :, part].astype(dtype), maps[:, part], per_wavelength[:, :, part])
    height_nm, sigma_nm, quality = maps.reshape(3, h, w)
    return Decoded(height_nm, sigma_nm, quality, *per_wavelength.reshape(2, J, h, w))


class _Solver:
    """What is the same for all pixels: normal equations, candidate orders, half wavelengths."""

    def __init__(self, wavelengths_um, phase_steps_rad, height_range_um, dtype):
        steps = np.atleast_2d(np.asarray(phase_steps_rad, np.float64))
        self.dtype = dtype
        self.half = np.asarray(wavelengths_um, np.float64) * 500.0  # half wavelengths in nm: the period of the height
        self.inverse, self.variance = zip(*(_least_squares(j, row) for j, row in enumerate(steps)), strict=True)
        self.base = int(np.argmax(self.half))  # the longest wavelength has the fewest candidates
        self.low, self.high = (1000.0 * end for end in height_range_um)
        period = self.half[self.base]
        self.orders = range(int(np.floor(self.low / period - 0.5)), int(np.ceil(self.high / period + 0.5)) + 1)

    def decode(self, frames: np.ndarray, maps: np.ndarray, per_wavelength: np.ndarray) -> None:
        """Frames [J, K, n] -> in place: `maps` (height, sigma, quality) [3, n], `per_wavelength` (A, B) [2, J, n]."""
        J, n = len(self.half), frames.shape[-1]
        fraction, weight = np.empty((2, J, n), self.dtype)
        for j in range(J):
            # Not `@`: many threads decode at once, and each would wake BLAS's own threads for 50 thousand products.
            a, c, s = np.einsum("rk,kn->rn", self.inverse[j].astype(self.dtype), frames[j])
            per_wavelength[0, j], per_wavelength[1, j] = a, np.hypot(c, s)
            np.arctan2(s, c, out=fraction[j])
            # Height variance per squared grey level is (half / 2 pi)^2 variance / B^2; the weight is its inverse.
            weight[j] = per_wavelength[1, j] ** 2 * ((2 * np.pi / self.half[j]) ** 2 / self.variance[j])
        fraction *= 1 / (2 * np.pi)
        total = weight.sum(axis=0)
        with np.errstate(divide="ignore"):
            maps[1] = 1 / np.sqrt(total)
        np.maximum(total, np.finfo(self.dtype).tiny, out=total)
        weight /= total
        maps[0], agreement = self._search(fraction, weight)
        background, modulation = per_wavelength
        contrast = modulation / np.maximum(np.maximum(background, modulation), np.finfo(self.dtype).tiny)
        maps[2] = agreement * contrast.min(axis=0)

    def _search(self, fraction: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Height [n] of the best candidate order, and how clearly it beats the second best (0 to 1) [n].

        A candidate's cost is the weighted variance of the single-wavelength heights, in nm^2. Taken about their mean
        it does not depend on which wavelength the candidates come from.
        """
        base = self.base
        others = [j for j in range(len(self.half)) if j != base]
        best = np.full(fraction.shape[1], np.inf, self.dtype)
        second, height = best.copy(), np.zeros_like(best)
        deviation, square, mean, better = np.empty_like(best), np.empty_like(best), np.empty_like(best), best > 0
        for order in self.orders:
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
            square += self._outside(candidate, order)
            np.less(square, best, out=better)
            np.minimum(second, np.maximum(square, best), out=second)
            np.copyto(best, square, where=better)
            np.copyto(height, candidate, where=better)
        floor = np.finfo(self.dtype).tiny
        if len(self.orders) == 1 or not others:
            return height, np.ones_like(height)
        np.maximum(best, 0, out=best)  # rounding of a perfect fit
        return height, 1 - np.sqrt(best / np.maximum(second, floor))

    def _outside(self, candidate: np.ndarray, order: int) -> np.ndarray | float:
        """Squared distance of the candidates from the height range; no work where an order lies wholly inside.

        A soft limit: noise may carry a height a little beyond the end, but an equally good height inside wins.
        """
        period = self.half[self.base]
        if (order - 0.5) * period >= self.low and (order + 0.5) * period <= self.high:
            return 0.0
        outside = np.maximum(np.maximum(self.low - candidate, candidate - self.high), 0)
        return outside * outside


def _least_squares(j: int, steps: np.ndarray) -> tuple[np.ndarray, float]:
    """Matrix [3, K] from frames to (A, B cos phi, B sin phi), and the mean variance of the last two for unit noise."""
    model = np.stack([np.ones_like(steps), np.cos(steps), -np.sin(steps)], axis=1)
    if np.linalg.matrix_rank(model, tol=1e-3) < 3:
        raise UserError(f"phase_steps_rad: the steps of wavelength {j} do not determine a phase; use 3 different ones")
    covariance = np.linalg.inv(model.T @ model)
    return covariance @ model.T, 0.5 * float(covariance[1, 1] + covariance[2, 2])


def decode_single(stack: Stack) -> Decoded:
    """Heights [H, W] from one wavelength: wrapped phase, 2-D unwrapping inside the mask, phase * lambda / (4 pi).

    The order is unknown: it is chosen so that the mean over the valid pixels is within a quarter wave of zero. Parts
    of the mask that do not touch each have a piston of their own. Pixels outside the mask are NaN. Unwrapping (M. A.
    Herraez et al., Appl. Opt. 41 (2002) 7437, through scikit-image) needs the whole frame in memory, unlike everything
    else here.
    UserError: more than one wavelength, phase steps unknown, nothing valid.
    """
    if stack.J != 1:
        raise UserError(f"{stack.path}: {stack.J} wavelengths: unwrapping is for one; decode the stack instead")
    rows, columns = stack.shape
    whole, valid = (0, rows, 0, columns), stack.mask(0, rows, 0, columns)
    wrapped = decode_window(stack.read(*whole), stack.wavelengths_um, _known_steps(stack))
    if not valid.any():
        raise UserError(f"{stack.path}: mask: no pixel is valid; check the mask")
    to_nm = stack.wavelengths_um[0] * 1000 / (4 * np.pi)
    phase = unwrap_phase(np.ma.array(wrapped.height_nm.astype(np.float64) / to_nm, mask=~valid), rng=0)
    height_nm = np.where(valid, np.ma.getdata(phase) * to_nm, np.nan)
    half_wave = stack.wavelengths_um[0] * 500  # a whole order: anything else would not fit the frames any more
    height_nm -= half_wave * np.round(height_nm[valid].mean() / half_wave)
    quality = np.where(valid, wrapped.quality, 0)
    return Decoded(height_nm, wrapped.sigma_nm, quality, wrapped.background, wrapped.modulation)


def decode_stack(
    stack: Stack,
    out: str | os.PathLike,
    *,
    threads: int | None = None,
    quality: str | os.PathLike | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Path, Path | None]:
    """Decodes `stack` into the height map `out` (float32, nm; .tif or .npy) and, if asked, the map `quality`.

    Window by window in threads; pixels outside the mask become NaN (quality 0). `progress(done, total)` counts windows.
    UserError: phase steps unknown, damaged frames, no room; nothing is left behind then.
    """
    steps = _known_steps(stack)
    if quality and Path(quality).resolve() == Path(out).resolve():
        raise UserError(f"{quality}: heights and quality cannot be one file; name another")
    rows, columns = stack.shape
    about = dict(pixel_pitch_um=stack.pixel_pitch_um, description=f"classical decode of {stack.path.parent.name}")
    with ExitStack() as opened:
        heights = opened.enter_context(MapWriter(out, stack.shape, np.float32, unit="nm", **about))
        qualities = opened.enter_context(MapWriter(quality, stack.shape, np.float32, **about)) if quality else None
        if stack.J == 1:
            decoded = decode_single(stack)
            heights.write(0, 0, decoded.height_nm)
            if qualities:
                qualities.write(0, 0, decoded.quality)
        else:

            def decode(corner: tuple[int, int]) -> None:
                y0, x0 = corner
                window = y0, min(y0 + WINDOW[0], rows), x0, min(x0 + WINDOW[1], columns)
                decoded = decode_window(stack.read(*window), stack.wavelengths_um, steps, stack.height_range_um)
                valid = stack.mask(*window)
                heights.write(y0, x0, np.where(valid, decoded.height_nm, np.float32(np.nan)))
                if qualities:
                    qualities.write(y0, x0, np.where(valid, decoded.quality, np.float32(0)))

            corners = [(y, x) for y in range(0, rows, WINDOW[0]) for x in range(0, columns, WINDOW[1])]
            each_in_threads(decode, corners, threads, progress)
        for writer in filter(None, (heights, qualities)):
            writer.convert()
        return heights.finish(), qualities.finish() if qualities else None


def _known_steps(stack: Stack) -> np.ndarray:
    if stack.phase_steps_rad is None:
        raise UserError(f"{stack.path}: phase_steps_rad: unknown; the classical decode needs them, so write them there")
    return stack.phase_steps_rad
