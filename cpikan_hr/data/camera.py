"""What a camera sees of a scene: quantised frames with its noise, its wrong phase steps and its missing frames.

Invariants
* `Camera.frames` is a pure function of (seed, window): noise is drawn per block of the pixel grid and per frame.
* An imperfection changes nothing else: the frames that remain where some are missing are those of the whole stack.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from cpikan_hr.data.glints import Glints

BLOCK = (64, 1024)  # rows and columns of a noise block; a block's arrays fit the cache
MEAN_LEVEL, MODULATION = (
    0.45,
    0.32,
)  # A and B of a perfect mirror, as parts of full scale: without glints none saturates
_NOISE, _STEPS, _MISSING = 200, 400, 401  # kind numbers in the seeds; scenes use lower ones, glints 300


class Scene(Protocol):
    """Height in nm and brightness (1: a perfect mirror) of any window, float32 [y1 - y0, x1 - x0]."""

    shape: tuple[int, int]
    seed: int

    def height_nm(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray: ...

    def brightness(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray: ...


@dataclass(frozen=True)
class Imperfections:
    """Where a real instrument differs from its description; zeros: nowhere."""

    step_error: float = 0.0  # rms error of the phase steps, rad
    missing: int = 0  # frames of each wavelength that are not there
    saturated: float = 0.0  # part of the pixels that are glints, 0 to 1
    gain: float = 0.0  # variance of the shot noise per grey level, in 8-bit levels


PERFECT = Imperfections()


@dataclass(frozen=True)
class Camera:
    """J wavelengths x `steps` equal phase steps over a full turn; `noise` is the standard deviation in 8-bit levels."""

    scene: Scene
    wavelengths_um: Sequence[float]
    steps: int
    noise: float
    bit_depth: int
    flaws: Imperfections = PERFECT
    carrier_nm_per_px: tuple[float, float] | None = None  # tilt of the reference, along rows and columns

    @cached_property
    def kept(self) -> np.ndarray:
        """Numbers of the steps whose frames are there, [J, K], ascending."""
        rng = np.random.default_rng([self.scene.seed, _MISSING])
        wavelengths, keep = len(self.wavelengths_um), self.steps - self.flaws.missing
        return np.stack([np.sort(rng.permutation(self.steps)[:keep]) for _ in range(wavelengths)])

    @property
    def phase_steps_rad(self) -> np.ndarray:
        """Nominal steps of the frames that are there, [J, K]."""
        return 2 * np.pi * self.kept / self.steps

    @cached_property
    def true_steps_rad(self) -> np.ndarray:
        """True steps, [J, K]. The first of each wavelength has no error: it defines where the phase is zero."""
        rng = np.random.default_rng([self.scene.seed, _STEPS])
        error = self.flaws.step_error * rng.standard_normal((len(self.wavelengths_um), self.steps))
        error = np.take_along_axis(error, self.kept, axis=1)
        error[:, 0] = 0
        return self.phase_steps_rad + error

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8 if self.bit_depth == 8 else np.uint16)

    def frames(self, y0: int, y1: int, x0: int, x1: int, height_nm: np.ndarray | None = None) -> np.ndarray:
        """Quantised frames [J * K, y1 - y0, x1 - x0], wavelength-major. `height_nm`: the window's height, if known."""
        height_nm = self.scene.height_nm(y0, y1, x0, x1) if height_nm is None else height_nm
        brightness = self.scene.brightness(y0, y1, x0, x1)
        if self.flaws.saturated:
            Glints(self.flaws.saturated, self.scene.seed).add(brightness, y0, x0)
        out = np.empty((self.kept.size, y1 - y0, x1 - x0), self.dtype)
        for by in range(y0 // BLOCK[0], -(-y1 // BLOCK[0])):
            for bx in range(x0 // BLOCK[1], -(-x1 // BLOCK[1])):
                top, left = max(y0, by * BLOCK[0]), max(x0, bx * BLOCK[1])
                bottom, right = min(y1, (by + 1) * BLOCK[0]), min(x1, (bx + 1) * BLOCK[1])
                part = slice(top - y0, bottom - y0), slice(left - x0, right - x0)
                y, x = by * BLOCK[0], bx * BLOCK[1]
                inside = slice(top - y, bottom - y), slice(left - x, right - x)
                self._expose(out[:, *part], height_nm[part], brightness[part], (by, bx), inside)
        return out

    def _carrier_nm(self, block: tuple[int, int], inside: tuple[slice, slice]) -> np.ndarray:
        """What the tilt adds to the height, float64 [h, w]: zero at the centre of the frame."""
        centres = [b * n + np.arange(n)[part] + 0.5 for b, n, part in zip(block, BLOCK, inside, strict=True)]
        y, x = (c - size / 2 for c, size in zip(centres, self.scene.shape, strict=True))
        return self.carrier_nm_per_px[0] * y[:, None] + self.carrier_nm_per_px[1] * x

    def _expose(self, out, height_nm, brightness, block, inside) -> None:
        """Frames of the part `inside` of noise block `block`."""
        top = 2**self.bit_depth - 1
        scale = np.ascontiguousarray(brightness) * np.float32(top)
        background, modulation = scale * np.float32(MEAN_LEVEL), scale * np.float32(MODULATION)
        targets = iter(out)
        for j, wavelength in enumerate(self.wavelengths_um):
            # 4 pi h / lambda, with lambda in nm; the steps follow from cos(a + b) = cos a cos b - sin a sin b.
            phase = height_nm * np.float32(4e-3 * np.pi / wavelength)
            if self.carrier_nm_per_px is not None:
                cycles = self._carrier_nm(block, inside) / (500 * wavelength)
                phase += (2 * np.pi * (cycles - np.rint(cycles))).astype(np.float32)
            in_phase, quadrature = modulation * np.cos(phase), modulation * np.sin(phase)
            for number, step in zip(self.kept[j], self.true_steps_rad[j], strict=True):
                level = in_phase * np.float32(np.cos(step))
                level -= quadrature * np.float32(np.sin(step))
                level += background
                self._add_noise(level, (j * self.steps + number, *block), inside)
                np.rint(level, out=level)
                next(targets)[...] = np.clip(level, 0, top, out=level)

    def _add_noise(self, level: np.ndarray, place: tuple[int, int, int], inside) -> None:
        """Read noise, and shot noise (normal, of variance `gain` x level), on the part `inside` of frame and block."""
        unit = (2**self.bit_depth - 1) / 255  # an 8-bit grey level
        if self.flaws.gain:
            variance = level * np.float32(self.flaws.gain * unit)
            variance += np.float32((self.noise * unit) ** 2)
            sigma = np.sqrt(variance, out=variance)
        elif self.noise:
            sigma = np.float32(self.noise * unit)
        else:
            return
        rng = np.random.Generator(np.random.SFC64([self.scene.seed, _NOISE, *place]))
        level += sigma * rng.standard_normal(BLOCK, np.float32)[inside]
