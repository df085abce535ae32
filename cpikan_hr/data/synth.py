"""Writing a synthetic stack: a `Wafer` seen by a camera, as frames, `stack.yaml` and the true height beside them.

Invariants
* `Camera.frames` is a pure function of (seed, window): noise is drawn per block of the pixel grid and per frame.
* Memory depends on the width of the image and the number of threads, not on its height: it is rendered in strips.
* The folder appears by one rename when it is whole; a failure leaves nothing, and foreign folders are never replaced.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
import zarr

from cpikan_hr.data.scene import HEIGHT_RANGE_UM, Wafer
from cpikan_hr.data.stack import MIN_STEPS, STACK_FILE
from cpikan_hr.data.threads import each_in_threads
from cpikan_hr.data.writers import MapWriter, check_space
from cpikan_hr.errors import UserError
from cpikan_hr.files import created_folder, writing

BLOCK = (64, 1024)  # rows and columns of a noise block; a block's arrays fit the cache
STRIP = BLOCK[0]
MEAN_LEVEL, MODULATION = 0.45, 0.32  # A and B of a perfect mirror, as parts of full scale: no frame saturates
MARKER = "# written by cpikan-hr synth"
PIXEL_PITCH_UM = 3.2
_NOISE = 200  # kind number of noise in the seeds; features and dies use lower ones
_SUFFIXES = {"bmp": ".bmp", "png": ".png", "tiff": ".tif", "npy": ".npy", "zarr": ".zarr"}


@dataclass(frozen=True)
class Camera:
    """J wavelengths x `steps` equal phase steps over a full turn; `noise` is the standard deviation in 8-bit levels."""

    wafer: Wafer
    wavelengths_um: Sequence[float]
    steps: int
    noise: float
    bit_depth: int

    @property
    def phase_steps_rad(self) -> np.ndarray:
        return 2 * np.pi * np.arange(self.steps) / self.steps

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8 if self.bit_depth == 8 else np.uint16)

    def frames(self, y0: int, y1: int, x0: int, x1: int, height_nm: np.ndarray | None = None) -> np.ndarray:
        """Quantised frames [J * K, y1 - y0, x1 - x0], wavelength-major. `height_nm`: the window's height, if known."""
        height_nm = self.wafer.height_nm(y0, y1, x0, x1) if height_nm is None else height_nm
        brightness = self.wafer.brightness(y0, y1, x0, x1)
        out = np.empty((len(self.wavelengths_um) * self.steps, y1 - y0, x1 - x0), self.dtype)
        for by in range(y0 // BLOCK[0], -(-y1 // BLOCK[0])):
            for bx in range(x0 // BLOCK[1], -(-x1 // BLOCK[1])):
                top, left = max(y0, by * BLOCK[0]), max(x0, bx * BLOCK[1])
                bottom, right = min(y1, (by + 1) * BLOCK[0]), min(x1, (bx + 1) * BLOCK[1])
                part = slice(top - y0, bottom - y0), slice(left - x0, right - x0)
                y, x = by * BLOCK[0], bx * BLOCK[1]
                inside = slice(top - y, bottom - y), slice(left - x, right - x)
                self._expose(out[:, *part], height_nm[part], brightness[part], (by, bx), inside)
        return out

    def _expose(self, out, height_nm, brightness, block, inside) -> None:
        """Frames of the part `inside` of noise block `block`."""
        top = 2**self.bit_depth - 1
        scale = np.ascontiguousarray(brightness) * np.float32(top)
        background, modulation = scale * np.float32(MEAN_LEVEL), scale * np.float32(MODULATION)
        sigma = np.float32(self.noise * top / 255)
        for j, wavelength in enumerate(self.wavelengths_um):
            # 4 pi h / lambda, with lambda in nm; the steps follow from cos(a + b) = cos a cos b - sin a sin b.
            phase = height_nm * np.float32(4e-3 * np.pi / wavelength)
            in_phase, quadrature = modulation * np.cos(phase), modulation * np.sin(phase)
            for k, step in enumerate(self.phase_steps_rad):
                index = j * self.steps + k
                level = in_phase * np.float32(np.cos(step))
                level -= quadrature * np.float32(np.sin(step))
                level += background
                if self.noise:
                    rng = np.random.Generator(np.random.SFC64([self.wafer.seed, _NOISE, index, *block]))
                    level += sigma * rng.standard_normal(BLOCK, np.float32)[inside]
                np.rint(level, out=level)
                out[index] = np.clip(level, 0, top, out=level)


def synth(
    out_dir: str | os.PathLike,
    *,
    size: tuple[int, int],
    wavelengths_um: Sequence[float] = (5.0, 5.5, 6.05, 6.655),
    steps: int = 4,
    noise: float = 2.0,
    seed: int = 0,
    bit_depth: int = 8,
    format: str | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes the stack folder `out_dir` (`stack.yaml`, frames, `height_true.npy` in nm) and returns its path.

    `size`: (H, W) px. `noise`: standard deviation in grey levels of an 8-bit camera; scaled with the full range.
    `bit_depth`: 8, 10, 12 or 16. `format`: bmp, png, tiff, npy (one file per frame) or zarr (one array); default bmp
    for 8 bits, tiff otherwise. `progress(done, total)` counts strips. A stack written here before is replaced.
    UserError: what is asked for cannot be, the folder holds something else, the disk is too small.
    """
    out_dir = Path(out_dir)
    format = format or ("bmp" if bit_depth == 8 else "tiff")
    _check(out_dir, size, wavelengths_um, steps, noise, seed, bit_depth, format)
    camera = Camera(Wafer(size, seed), tuple(float(w) for w in wavelengths_um), steps, noise, bit_depth)
    part = out_dir.with_name(out_dir.name + ".part")
    n_frames = len(camera.wavelengths_um) * steps
    scratch = 2 if format in ("png", "tiff") else 1  # their rows are collected in a raw file first
    needed = size[0] * size[1] * (4 + n_frames * camera.dtype.itemsize * scratch)
    with created_folder(out_dir.parent), writing(out_dir):
        check_space(out_dir.parent, needed)
        shutil.rmtree(part, ignore_errors=True)
        try:
            part.mkdir()
            _write_frames(part, camera, format, threads, progress)
            _write_yaml(part, camera, format)
            _put_in_place(part, out_dir)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return out_dir


def _put_in_place(whole: Path, out_dir: Path) -> None:
    """Renames `whole` to `out_dir`; what stood there is removed only then."""
    if not out_dir.exists():
        os.replace(whole, out_dir)
        return
    old = out_dir.with_name(out_dir.name + ".old.part")
    shutil.rmtree(old, ignore_errors=True)
    os.replace(out_dir, old)
    try:
        os.replace(whole, out_dir)
    except BaseException:
        os.replace(old, out_dir)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_frames(folder: Path, camera: Camera, format: str, threads: int | None, progress) -> None:
    height, width = camera.wafer.shape
    n_frames, suffix = len(camera.wavelengths_um) * camera.steps, _SUFFIXES[format]
    with ExitStack() as stack:
        truth = stack.enter_context(MapWriter(folder / "height_true.npy", (height, width), np.float32))
        writers, array = [], None
        if format == "zarr":
            layout = dict(shape=(n_frames, height, width), chunks=(1, 4 * STRIP, min(1024, width)), dtype=camera.dtype)
            array = zarr.create_array(folder / "frames.zarr", **layout)
        else:
            names = [folder / f"bucket_{i:02d}{suffix}" for i in range(n_frames)]
            writers = [stack.enter_context(MapWriter(n, (height, width), camera.dtype)) for n in names]

        # A Zarr chunk must not be written by two threads, so there a strip is a row of chunks.
        strip = 4 * STRIP if array is not None else STRIP

        def render(y0: int) -> None:
            y1 = min(y0 + strip, height)
            height_nm = camera.wafer.height_nm(y0, y1, 0, width)
            frames = camera.frames(y0, y1, 0, width, height_nm)
            truth.write(y0, 0, height_nm)
            if array is not None:
                array[:, y0:y1] = frames
            for writer, frame in zip(writers, frames, strict=False):
                writer.write(y0, 0, frame)

        each_in_threads(render, range(0, height, strip), threads, progress)
        each_in_threads(MapWriter.finish, [truth, *writers], threads)


def _write_yaml(folder: Path, camera: Camera, format: str) -> None:
    content = {
        "frames": "frames.zarr" if format == "zarr" else f"bucket_*{_SUFFIXES[format]}",
        "wavelengths_um": list(camera.wavelengths_um),
        "phase_steps_rad": [float(step) for step in camera.phase_steps_rad],
        "pixel_pitch_um": PIXEL_PITCH_UM,
        "height_range_um": list(HEIGHT_RANGE_UM),
        "bit_depth": camera.bit_depth,
        "reference": "height_true.npy",
    }
    about = f"{MARKER}: wafer, seed {camera.wafer.seed}, noise {camera.noise:g} levels of 8 bits\n"
    (folder / STACK_FILE).write_text(about + yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def _check(out_dir, size, wavelengths_um, steps, noise, seed, bit_depth, format) -> None:
    if min(size) < 1:
        raise UserError(f"size: {size[0]} x {size[1]}: give rows and columns of at least one pixel")
    if steps < MIN_STEPS:
        raise UserError(f"steps: too few phase steps: {steps} per wavelength; take at least {MIN_STEPS}")
    if not wavelengths_um or not all(0 < w < np.inf for w in wavelengths_um) or not 0 <= noise < np.inf or seed < 0:
        raise UserError("wavelengths are positive micrometres; noise and seed are finite and not negative")
    if bit_depth not in (8, 10, 12, 16):
        raise UserError(f"bit_depth: unsupported bit depth {bit_depth}; use 8, 10, 12 or 16")
    if format not in _SUFFIXES:
        raise UserError(f"format: {format!r} is unknown; use one of {', '.join(_SUFFIXES)}")
    if format == "bmp" and bit_depth > 8:
        raise UserError(f"format: bmp holds 8 bits, not {bit_depth}; use tiff, png, npy or zarr")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        written = out_dir / STACK_FILE
        if not written.is_file() or not written.read_text(encoding="utf-8", errors="replace").startswith(MARKER):
            raise UserError(f"{out_dir}: exists and is not a stack written by synth; choose another folder")
