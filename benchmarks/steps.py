"""What wrong phase steps and a second harmonic cost the classical decode, and what finding them from the frames saves.

    python benchmarks/steps.py [--data ../shared/data]

A wafer of 1000 x 800 px, 4 wavelengths, steps off by 0.1 rad rms but the first of each: RMSE in nm of the decode with
nominal, refined and exact steps, and the rms error of the refined ones in mrad. Then, where the recordings are at hand,
real fringe projection with 3 of 12 steps (0, 4, 8): rms in projector px against the 12-step decode inside the lit area,
with and without the second harmonic that the 9 frames themselves show, and the part of the pixels more than 20 px off,
which `rms` leaves out. One JSON line each.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from cpikan_hr import strict_json
from cpikan_hr.data.scene import HEIGHT_RANGE_UM, Wafer
from cpikan_hr.data.stack import Stack, open_stack
from cpikan_hr.problems.calibration import calibrate
from cpikan_hr.problems.decode import decode_window
from cpikan_hr.problems.steps import Shared

WAVELENGTHS = np.array([5.0, 5.5, 6.05, 6.655])
SHAPE = (800, 1000)
PERIODS = np.array([42, 45, 48])  # projector px


def stack_of(folder: Path, frames: np.ndarray, wavelengths_um, steps: np.ndarray, height_range_um) -> Stack:
    np.save(folder / "frames.npy", frames.reshape(-1, *frames.shape[2:]))
    keys = {"frames": "frames.npy", "wavelengths_um": list(map(float, wavelengths_um)), "pixel_pitch_um": 1.0}
    keys |= {"phase_steps_rad": steps.tolist(), "height_range_um": list(height_range_um)}
    (folder / "stack.yaml").write_text(yaml.safe_dump(keys))
    return open_stack(folder)


def heights(stack: Stack, shared: Shared) -> np.ndarray:
    known = dict(harmonic=shared.harmonic, bit_depth=stack.bit_depth)
    window = (0, stack.shape[0], 0, stack.shape[1])
    return decode_window(stack.read(*window), stack.wavelengths_um, shared.steps, stack.height_range_um, **known)


def wafer(steps: int, noise: float, seed: int) -> dict:
    rng = np.random.default_rng(seed)
    nominal = np.tile(2 * np.pi * np.arange(steps) / steps, (4, 1))
    true = nominal.copy()
    error = rng.normal(size=(4, steps - 1))
    true[:, 1:] += 0.1 * error / np.sqrt(np.mean(error**2))
    scene = Wafer(SHAPE, seed)
    height, bright = (each(0, SHAPE[0], 0, SHAPE[1]).astype(float) for each in (scene.height_nm, scene.brightness))
    psi = 4e-3 * np.pi * height / WAVELENGTHS[:, None, None, None] + true[..., None, None]
    level = 255 * bright * (0.45 + 0.32 * np.cos(psi)) + noise * rng.standard_normal(psi.shape)
    frames = np.clip(np.rint(level), 0, 255).astype(np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        stack = stack_of(Path(folder), frames, WAVELENGTHS, nominal, HEIGHT_RANGE_UM)
        began = time.process_time()
        refined = calibrate(stack, "refine")
        seconds = time.process_time() - began
        line = {"steps": steps, "noise": noise, "cpu_s": round(seconds, 1)}
        line["mrad"] = round(1e3 * float(np.sqrt(np.mean((refined.steps - true)[:, 1:] ** 2))), 3)
        for name, shared in (("nominal", Shared(nominal)), ("refined", refined), ("exact", Shared(true))):
            error = heights(stack, shared).height_nm - height
            line[name] = round(float(np.sqrt(np.mean(error**2))), 2)
    return line


def fringes(data: Path, case: str) -> dict:
    pixels = np.stack([np.asarray(Image.open(data / f"{case}{i:02d}h.png")) for i in range(36)])
    frames, steps = pixels.reshape(3, 12, *pixels.shape[1:]), np.tile(2 * np.pi * np.arange(12) / 12, (3, 1))
    with tempfile.TemporaryDirectory() as folder:
        folders = [Path(folder) / name for name in ("12", "3")]
        for each in folders:
            each.mkdir()
        known = PERIODS * 2e-3, [0.0, 1.6]  # a height of 1 nm is a projector px
        whole = stack_of(folders[0], frames, known[0], steps, known[1])
        few = stack_of(folders[1], frames[:, ::4], known[0], steps[:, ::4], known[1])
        reference = heights(whole, calibrate(whole))
        lit = (reference.modulation.min(axis=0) > 10) & (reference.quality > 0.2)
        line = {"case": case, "lit": int(lit.sum())}
        for name, harmonic in (("plain", False), ("harmonic", True)):
            shared = calibrate(few, harmonic=harmonic)
            error = (heights(few, shared).height_nm - reference.height_nm)[lit]
            right = np.abs(error) <= 20
            line[name] = {"rms": round(float(np.sqrt(np.mean(error[right] ** 2))), 3)}
            line[name]["gross"] = round(float(1 - right.mean()), 4)
        line["r"] = np.abs(shared.harmonic).round(3).tolist()
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(__file__).parents[2] / "shared" / "data")
    data = parser.parse_args().data / "cfpe_multifreq_psp"
    for steps in (4, 3):
        for noise in (0.0, 2.0, 5.0):
            print(strict_json.dumps(wafer(steps, noise, seed=6)), flush=True)
    for case in sorted({path.name[:2] for path in data.glob("[0-9]*h.png")}):
        print(strict_json.dumps(fringes(data, case)), flush=True)


if __name__ == "__main__":
    main()
