"""The classical height decode: N-step phase per wavelength (`phases.py`), order search (`orders.py`), weighted average.

The baseline every field is measured against, and its start. numpy only.

Invariants
* Frame model I_jk = A_j + B_j cos(4 pi h / lambda_j + delta_jk); one wavelength alone gives h modulo lambda_j / 2.
* Heights are in nm. Float64 frames are decoded in float64, everything else in float32 (rounding below 0.01 nm).
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
from cpikan_hr.problems.calibration import calibrate
from cpikan_hr.problems.noise import Noise, Weighing
from cpikan_hr.problems.orders import OrderSearch, unambiguous_range_um
from cpikan_hr.problems.phases import Demodulator
from cpikan_hr.problems.steps import Shared

CHUNK = 16384  # pixels decoded at a time: the arrays of one chunk fit the second-level cache
WINDOW = (256, 2048)  # rows, columns that a thread reads and decodes at a time


@dataclass(frozen=True)
class Decoded:
    """Maps over a window [h, w] (background and modulation: [J, h, w], in grey levels)."""

    height_nm: np.ndarray
    sigma_nm: np.ndarray  # standard deviation of the height
    quality: np.ndarray  # 0 (order arbitrary, or no fringes) to 1 (fractions agree perfectly, full contrast)
    background: np.ndarray
    modulation: np.ndarray


def decode_window(
    frames: np.ndarray,
    wavelengths_um: Sequence[float],
    phase_steps_rad: np.ndarray,
    height_range_um: tuple[float, float] | None = None,
    *,
    harmonic: np.ndarray | None = None,
    noise: Noise | None = None,
    bit_depth: int | None = None,
) -> Decoded:
    """Decodes `frames` [J, K, h, w] with `phase_steps_rad` [J, K] into maps [h, w].

    `height_range_um`: where heights can be; default `unambiguous_range_um`. `harmonic` complex [J]: second harmonic of
    the fringes. `noise`: of a sample; default one grey level. `bit_depth`: of integer frames whose clipped samples are
    left out; a wavelength with fewer than three others drops out at that pixel, and quality falls in proportion.
    `sigma_nm` is first-order propagation of the noise; it is infinite where nothing is modulated.
    UserError: phase steps that do not determine a phase.
    """
    J, K, h, w = frames.shape
    dtype = np.float64 if frames.dtype == np.float64 else np.float32
    height_range_um = height_range_um or unambiguous_range_um(wavelengths_um)
    demodulator = Demodulator(wavelengths_um, phase_steps_rad, dtype, harmonic)
    solver = _Solver(wavelengths_um, height_range_um, Weighing(demodulator, noise, bit_depth), dtype)
    flat = frames.reshape(J, K, h * w)
    maps, per_wavelength = np.empty((3, h * w), dtype), np.empty((2, J, h * w), dtype)
    for start in range(0, h * w, CHUNK):
        part = slice(start, start + CHUNK)
        solver.decode(flat[:, :, part], maps[:, part], per_wavelength[:, :, part])
    height_nm, sigma_nm, quality = maps.reshape(3, h, w)
    return Decoded(height_nm, sigma_nm, quality, *per_wavelength.reshape(2, J, h, w))


class _Solver:
    """What is the same for all pixels."""

    def __init__(self, wavelengths_um, height_range_um, weighing: "Weighing", dtype):
        self.wavelengths_um, self.height_range_um, self.dtype = wavelengths_um, height_range_um, dtype
        self.weighing = weighing
        self.orders = OrderSearch(wavelengths_um, height_range_um, dtype)

    def decode(self, frames: np.ndarray, maps: np.ndarray, per_wavelength: np.ndarray) -> None:
        """Frames [J, K, n] -> in place: `maps` (height, sigma, quality) [3, n], `per_wavelength` (A, B) [2, J, n]."""
        background, modulation, fraction, weight = self.weighing.demodulate(frames)
        per_wavelength[:] = background, modulation
        tiny = np.finfo(self.dtype).tiny
        total = weight.sum(axis=0)
        with np.errstate(divide="ignore"):
            maps[1] = 1 / np.sqrt(total)
        weight /= np.maximum(total, tiny)
        maps[0], agreement = self.orders.search(fraction, weight)
        contrast = modulation / np.maximum(np.maximum(background, modulation), tiny)
        maps[2] = agreement * contrast.min(axis=0)
        dropped = weight == 0
        if dropped.any():
            self._without(dropped, fraction, weight, contrast, maps)

    def _without(self, dropped, fraction, weight, contrast, maps) -> None:
        """Searches again where wavelengths dropped out, among those that are left."""
        pattern = np.packbits(dropped, axis=0)
        for each in np.unique(pattern[:, dropped.any(axis=0)], axis=1).T:
            here = np.flatnonzero((pattern == each[:, None]).all(axis=0))
            left = np.flatnonzero(~dropped[:, here[0]])
            if not len(left):
                continue
            search = OrderSearch([self.wavelengths_um[j] for j in left], self.height_range_um, self.dtype)
            pick = np.ix_(left, here)
            maps[0, here], agreement = search.search(fraction[pick], weight[pick])
            if len(left) == 1:
                agreement = agreement * (len(search.orders) == 1)  # its order is arbitrary
            maps[2, here] = agreement * contrast[pick].min(axis=0) * (len(left) / len(dropped))


def decode_single(stack: Stack, shared: Shared | None = None, noise: Noise | None = None) -> Decoded:
    """Heights [H, W] from one wavelength: wrapped phase, 2-D unwrapping inside the mask, phase * lambda / (4 pi).

    `shared`: what `calibrate` found; by default the steps are the stack's. The order is unknown: it is chosen so that
    the mean over the valid pixels is within a quarter wave of zero. Parts of the mask that do not touch each have a
    piston of their own. Pixels outside the mask, or clipped in all but two frames, are NaN. Unwrapping (M. A. Herraez
    et al., Appl. Opt. 41 (2002) 7437, through scikit-image) needs the whole frame in memory, unlike all else here.
    UserError: more than one wavelength, nothing valid.
    """
    if stack.J != 1:
        raise UserError(f"{stack.path}: {stack.J} wavelengths: unwrapping is for one; decode the stack instead")
    rows, columns = stack.shape
    shared, whole = shared or calibrate(stack), (0, rows, 0, columns)
    known = dict(harmonic=shared.harmonic, noise=noise, bit_depth=stack.bit_depth)
    wrapped = decode_window(stack.read(*whole), stack.wavelengths_um, shared.steps, **known)
    valid = stack.mask(*whole) & np.isfinite(wrapped.sigma_nm)
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
    shared: Shared | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Path, Path | None]:
    """Decodes `stack` into the height map `out` (float32, nm; .tif or .npy) and, if asked, the map `quality`.

    Window by window in threads; pixels outside the mask become NaN (quality 0). `shared`: what `calibrate` found; by
    default the steps are the stack's. `progress(done, total)` counts windows.
    UserError: what `calibrate` refuses, damaged frames, no room; nothing is left behind then.
    """
    shared = shared or calibrate(stack)
    if quality and Path(quality).resolve() == Path(out).resolve():
        raise UserError(f"{quality}: heights and quality cannot be one file; name another")
    rows, columns = stack.shape
    about = dict(pixel_pitch_um=stack.pixel_pitch_um, description=f"classical decode of {stack.path.parent.name}")
    with ExitStack() as opened:
        heights = opened.enter_context(MapWriter(out, stack.shape, np.float32, unit="nm", **about))
        qualities = opened.enter_context(MapWriter(quality, stack.shape, np.float32, **about)) if quality else None
        if stack.J == 1:
            decoded = decode_single(stack, shared)
            heights.write(0, 0, decoded.height_nm)
            if qualities:
                qualities.write(0, 0, decoded.quality)
        else:

            def decode(corner: tuple[int, int]) -> None:
                y0, x0 = corner
                window = y0, min(y0 + WINDOW[0], rows), x0, min(x0 + WINDOW[1], columns)
                frames, known = stack.read(*window), dict(harmonic=shared.harmonic, bit_depth=stack.bit_depth)
                decoded = decode_window(frames, stack.wavelengths_um, shared.steps, stack.height_range_um, **known)
                valid = stack.mask(*window)
                heights.write(y0, x0, np.where(valid, decoded.height_nm, np.float32(np.nan)))
                if qualities:
                    qualities.write(y0, x0, np.where(valid, decoded.quality, np.float32(0)))

            corners = [(y, x) for y in range(0, rows, WINDOW[0]) for x in range(0, columns, WINDOW[1])]
            each_in_threads(decode, corners, threads, progress)
        for writer in filter(None, (heights, qualities)):
            writer.convert()
        return heights.finish(), qualities.finish() if qualities else None
