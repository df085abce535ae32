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
from cpikan_hr.problems.orders import OrderSearch, unambiguous_range_um
from cpikan_hr.problems.phases import Demodulator

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
    """What is the same for all pixels."""

    def __init__(self, wavelengths_um, phase_steps_rad, height_range_um, dtype):
        self.demodulator = Demodulator(wavelengths_um, phase_steps_rad, dtype)
        self.orders = OrderSearch(wavelengths_um, height_range_um, dtype)

    def decode(self, frames: np.ndarray, maps: np.ndarray, per_wavelength: np.ndarray) -> None:
        """Frames [J, K, n] -> in place: `maps` (height, sigma, quality) [3, n], `per_wavelength` (A, B) [2, J, n]."""
        background, modulation, fraction, weight = self.demodulator.demodulate(frames)
        per_wavelength[:] = background, modulation
        tiny = np.finfo(frames.dtype).tiny
        total = weight.sum(axis=0)
        with np.errstate(divide="ignore"):
            maps[1] = 1 / np.sqrt(total)
        weight /= np.maximum(total, tiny)
        maps[0], agreement = self.orders.search(fraction, weight)
        contrast = modulation / np.maximum(np.maximum(background, modulation), tiny)
        maps[2] = agreement * contrast.min(axis=0)


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
