"""Frames that obey the model exactly, or as a camera sees them, for the tests of decoding."""

from pathlib import Path

import numpy as np
import yaml

from cpikan_hr.data.scene import Wafer

WAVELENGTHS = (5.0, 5.5, 6.05, 6.655)
RANGE = (-13.5, 13.5)


def full_turn(J, K):
    return np.tile(2 * np.pi * np.arange(K) / K, (J, 1))


def wrong_steps(J, K, seed, rms=0.1):
    """A full turn with random errors; the first step of every wavelength is exact."""
    steps = full_turn(J, K)
    error = np.random.default_rng(seed).normal(0, 1, (J, K - 1))
    steps[:, 1:] += rms * error / np.sqrt(np.mean(error**2))
    return steps


def expose(height_nm, wavelengths_um, steps, background=120.0, modulation=80.0, harmonic=0j):
    """Unquantised frames [J, K, h, w] of the frame model; `steps` [J, K], `harmonic` r exp(i beta), one or [J]."""
    psi = 4 * np.pi * height_nm / (1000 * np.asarray(wavelengths_um)[:, None, None, None])
    psi = psi + np.asarray(steps)[:, :, None, None]
    harmonic = np.reshape(np.broadcast_to(harmonic, len(wavelengths_um)), (-1, 1, 1, 1))
    return background + modulation * (np.cos(psi) + (harmonic * np.exp(2j * psi)).real)


def camera(frames, noise=0.0, seed=0):
    """What 8 bits keep of them."""
    noisy = frames + noise * np.random.default_rng(seed).standard_normal(frames.shape)
    return np.clip(np.rint(noisy), 0, 255).astype(np.uint8)


def wafer(shape, steps, wavelengths_um=WAVELENGTHS, noise=0.0, seed=0):
    """True height in nm and 8-bit frames of the synthetic wafer, with any steps."""
    scene = Wafer(shape, seed)
    height = scene.height_nm(0, shape[0], 0, shape[1]).astype(np.float64)
    brightness = 255 * scene.brightness(0, shape[0], 0, shape[1]).astype(np.float64)
    frames = expose(height, wavelengths_um, steps, 0.45 * brightness, 0.32 * brightness)
    return height, camera(frames, noise, seed)


def write_stack(folder, frames, wavelengths_um, steps, **keys):
    """The stack folder of `frames` [J, K, h, w], or a list of them."""
    flat = np.concatenate([np.asarray(each) for each in frames])
    np.save(folder / "frames.npy", flat)
    if steps is not None:
        steps = [[float(s) for s in row] for row in steps]
    content = {"frames": "frames.npy", "wavelengths_um": [float(w) for w in wavelengths_um], "phase_steps_rad": steps}
    content |= {"pixel_pitch_um": 1.0} | keys
    (Path(folder) / "stack.yaml").write_text(yaml.safe_dump(content))
    return folder
