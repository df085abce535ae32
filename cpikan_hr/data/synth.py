"""Writing a synthetic stack: a scene seen by a `Camera`, as frames, `stack.yaml` and the truth beside them.

Invariants
* `stack.yaml` says what a real instrument's would: nominal steps, the frames that are there. What only the truth knows
  stands beside it (`height_true.npy`; `steps_true.yaml` where the steps are wrong).
* Memory depends on the number of threads, not on the size of the image: it is rendered window by window.
* The folder appears by one rename when it is whole; a failure leaves nothing, and foreign folders are never replaced.
"""

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path

import numpy as np
import yaml

from cpikan_hr.data.camera import BLOCK, PERFECT, Camera, Imperfections
from cpikan_hr.data.glints import MOST
from cpikan_hr.data.measured import MeasuredSurface
from cpikan_hr.data.plausible import check_wavelengths
from cpikan_hr.data.scene import HEIGHT_RANGE_UM, Wafer
from cpikan_hr.data.stack import MIN_STEPS, STACK_FILE
from cpikan_hr.data.threads import each_in_threads
from cpikan_hr.data.writers import MapWriter, check_space
from cpikan_hr.errors import UserError
from cpikan_hr.files import created_folder, writing
from cpikan_hr.owned import sole_writer

WINDOW = BLOCK[0], 2 * BLOCK[1]  # px that a thread makes at a time
MARKER = "# written by cpikan-hr synth"
PIXEL_PITCH_UM = 3.2
_LOCK = "lock"  # in the folder while it is written
_WRITTEN = re.compile(  # its own files, also where a killed process left them
    r"(lock|stack\.yaml|steps_true\.yaml|height_true\.npy|frames\.zarr|bucket_\d\d+\.(bmp|png|tif|npy))(\.whole)?(\.part)?"
)
_SUFFIXES = {"bmp": ".bmp", "png": ".png", "tiff": ".tif", "npy": ".npy", "zarr": ".zarr"}


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
    height: str | os.PathLike | None = None,
    height_unit: str | None = None,
    scale: float = 1.0,
    flaws: Imperfections = PERFECT,
    carrier_nm_per_px: tuple[float, float] | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Writes the stack folder `out_dir` (`stack.yaml`, frames, `height_true.npy` in nm) and returns its path.

    `size`: (H, W) px. `noise`: standard deviation in grey levels of an 8-bit camera; scaled with the full range.
    `bit_depth`: 8, 10, 12 or 16. `format`: bmp, png, tiff, npy (one file per frame) or zarr (one array); default bmp
    for 8 bits, tiff otherwise. `height`: the surface is `scale` times this map (.npy or TIFF), mirrored where it ends,
    in place of the wafer's own; `height_unit`: of the map, where it does not say it. `flaws`: what the instrument does
    not know about itself. `carrier_nm_per_px`: tilt of the reference along rows and columns, which the fringes show
    beside the height.
    `progress(done, total)` counts windows. A stack written here before is replaced.
    UserError: what is asked for cannot be, the folder holds something else, the disk is too small.
    """
    out_dir = Path(out_dir)
    format = format or ("bmp" if bit_depth == 8 else "tiff")
    _check(out_dir, size, wavelengths_um, steps, noise, seed, bit_depth, format, scale, flaws)
    surface = Wafer(size, seed) if height is None else MeasuredSurface(size, seed, height, scale, height_unit)
    lengths = tuple(float(w) for w in wavelengths_um)
    camera = Camera(surface, lengths, steps, noise, bit_depth, flaws, carrier_nm_per_px)
    part = out_dir.with_name(out_dir.name + ".part")
    n_frames = camera.kept.size
    scratch = 2 if format in ("png", "tiff") else 1  # their rows are collected in a raw file first
    needed = size[0] * size[1] * (4 + n_frames * camera.dtype.itemsize * scratch)
    with created_folder(out_dir.parent), writing(out_dir):
        check_space(out_dir.parent, needed)
        with _emptied(part):
            _write_frames(part, camera, format, threads, progress)
            _write_yaml(part, camera, format, "wafer" if height is None else "measured surface")
            _put_in_place(part, out_dir)
    return out_dir


@contextmanager
def _emptied(part: Path) -> Iterator[None]:
    """`part` as a folder, empty but for its lock, that no other process writes to; gone afterwards."""
    part.mkdir(exist_ok=True)
    lock = part / _LOCK
    with sole_writer(lock, "another process is writing this stack"):
        strangers = _strangers(part)
        if strangers:
            raise UserError(f"{part}: has to be empty, but synth did not write {strangers[0]}; move it elsewhere")
        try:
            for left in part.iterdir():
                if left.is_dir():
                    shutil.rmtree(left)
                elif left != lock:
                    left.unlink()
            yield
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _put_in_place(whole: Path, out_dir: Path) -> None:
    """Renames `whole` to `out_dir`; what stood there is removed only then."""
    (whole / _LOCK).unlink()
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
    height, width = camera.scene.shape
    n_frames, suffix = camera.kept.size, _SUFFIXES[format]
    with ExitStack() as stack:
        truth = stack.enter_context(MapWriter(folder / "height_true.npy", (height, width), np.float32))
        writers, array = [], None
        if format == "zarr":
            import zarr

            chunk = 4 * WINDOW[0], min(WINDOW[1] // 2, width)
            layout = dict(shape=(n_frames, height, width), chunks=(1, *chunk), dtype=camera.dtype)
            array = zarr.create_array(folder / "frames.zarr", **layout)
        else:
            # A missing frame leaves a gap in the numbers.
            numbers = [j * camera.steps + k for j, row in enumerate(camera.kept) for k in row]
            names = [folder / f"bucket_{i:02d}{suffix}" for i in numbers]
            writers = [stack.enter_context(MapWriter(n, (height, width), camera.dtype)) for n in names]

        # A Zarr chunk must not be written by two threads, so there a window holds whole chunks.
        down, across = (4 * WINDOW[0] if array is not None else WINDOW[0]), WINDOW[1]

        def render(corner: tuple[int, int]) -> None:
            y0, x0 = corner
            y1, x1 = min(y0 + down, height), min(x0 + across, width)
            height_nm = camera.scene.height_nm(y0, y1, x0, x1)
            frames = camera.frames(y0, y1, x0, x1, height_nm)
            truth.write(y0, x0, height_nm)
            if array is not None:
                array[:, y0:y1, x0:x1] = frames
            for writer, frame in zip(writers, frames, strict=False):
                writer.write(y0, x0, frame)

        corners = product(range(0, height, down), range(0, width, across))
        each_in_threads(render, corners, threads, progress)
        each_in_threads(MapWriter.finish, [truth, *writers], threads)


def _write_yaml(folder: Path, camera: Camera, format: str, scene: str) -> None:
    steps = camera.phase_steps_rad.tolist()
    content = {
        "frames": "frames.zarr" if format == "zarr" else f"bucket_*{_SUFFIXES[format]}",
        "wavelengths_um": list(camera.wavelengths_um),
        "phase_steps_rad": steps if camera.flaws.missing else steps[0],
        "pixel_pitch_um": PIXEL_PITCH_UM,
        "height_range_um": list(HEIGHT_RANGE_UM),
        "bit_depth": camera.bit_depth,
        "reference": "height_true.npy",
        "reference_unit": "nm",
    }
    if camera.carrier_nm_per_px is not None:
        content["carrier_nm_per_px"] = list(camera.carrier_nm_per_px)
    about = f"{MARKER}: {scene}, seed {camera.scene.seed}, noise {camera.noise:g} levels of 8 bits\n"
    (folder / STACK_FILE).write_text(about + yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    if camera.flaws.step_error:
        truth = {"phase_steps_rad": camera.true_steps_rad.tolist()}
        (folder / "steps_true.yaml").write_text(yaml.safe_dump(truth), encoding="utf-8")


def _check(out_dir, size, wavelengths_um, steps, noise, seed, bit_depth, format, scale, flaws) -> None:
    if min(size) < 1:
        raise UserError(f"size: {size[0]} x {size[1]}: give rows and columns of at least one pixel")
    if steps < MIN_STEPS:
        raise UserError(f"steps: too few phase steps: {steps} per wavelength; take at least {MIN_STEPS}")
    if not wavelengths_um or not all(0 < w < np.inf for w in wavelengths_um) or not 0 <= noise < np.inf or seed < 0:
        raise UserError("wavelengths are positive micrometres; noise and seed are finite and not negative")
    check_wavelengths("wavelengths", wavelengths_um, HEIGHT_RANGE_UM, "in um")
    if bit_depth not in (8, 10, 12, 16):
        raise UserError(f"bit_depth: unsupported bit depth {bit_depth}; use 8, 10, 12 or 16")
    if format not in _SUFFIXES:
        raise UserError(f"format: {format!r} is unknown; use one of {', '.join(_SUFFIXES)}")
    if not 0 < scale < np.inf:
        raise UserError(f"scale: {scale:g}: heights are multiplied by a positive number")
    _check_flaws(flaws, steps)
    if format == "bmp" and bit_depth > 8:
        raise UserError(f"format: bmp holds 8 bits, not {bit_depth}; use tiff, png, npy or zarr")
    _refuse_foreign(out_dir)


def _refuse_foreign(out_dir: Path) -> None:
    """UserError where the stack would replace what synth has not written."""
    if not out_dir.exists() or out_dir.is_dir() and not any(out_dir.iterdir()):
        return
    written = out_dir / STACK_FILE
    if not written.is_file() or not written.read_text(encoding="utf-8", errors="replace").startswith(MARKER):
        raise UserError(f"{out_dir}: exists and is not a stack written by synth; choose another folder")
    strangers = _strangers(out_dir)
    if strangers:
        raise UserError(f"{out_dir}: synth replaces the folder, but did not write {strangers[0]}; move it elsewhere")


def _check_flaws(flaws: Imperfections, steps: int) -> None:
    if not 0 <= flaws.step_error < np.inf:
        raise UserError(f"step_error: {flaws.step_error:g}: an rms error in rad is finite and not negative")
    if not 0 <= flaws.missing <= steps - MIN_STEPS:
        raise UserError(
            f"missing: {flaws.missing} of {steps} frames: at least {MIN_STEPS} of each wavelength have to be there"
        )
    if not 0 <= flaws.saturated <= MOST:
        raise UserError(f"saturated: {flaws.saturated:g}: a part of the pixels is from 0 to {MOST:g}")
    if not 0 <= flaws.gain < np.inf:
        raise UserError(f"gain: {flaws.gain:g}: a variance per grey level is finite and not negative")


def _strangers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not _WRITTEN.fullmatch(path.name))
