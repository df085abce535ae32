"""Peak resident memory of the main job against the size of the frames.

    python benchmarks/memory.py [--megapixels 1 4 16 64] [--steps 3] [--folder DIR]

For every size, each stage (synth, decode, start: the closed-form solve, render, evaluate, and updates by Adam) is a
process of its own on a stack of 4 x 4 frames; its peak RSS is what the kernel accounts for it. `frames_mb` is what one
would need to hold the frames, `field_mb` the field's file.

Neither frames nor fields are held in memory. Updates are measured twice: `train` are some of the shipped recipe, whose
field grows with the picture (parameters, gradients and Adam's moments are four times the field, and lie in temporary
files beyond `training.memory_mb`), `train_in_memory` the same with `memory_mb` null, `train_fixed` some of a field of
equally many tiles at every size.
Prints one JSON line; `growth` is the peak at the largest size over that at 4 MP (or at the first size).
"""

import argparse
import shutil
import tempfile
from pathlib import Path

from processes import run

from cpikan_hr import strict_json

ASPECT = 9344 / 7000
FIXED = {"grid": [32, 32], "overlap": 0.25, "network": {"kind": "cpikan", "hidden": [8], "degree": 4}}


def measure(megapixels: float, steps: int, folder: Path) -> dict[str, float]:
    """Peak of every stage at one size, in MB."""
    height = round((megapixels * 1e6 / ASPECT) ** 0.5)
    width = round(height * ASPECT)
    stack, out, tiff = folder / "stack", folder / "run", folder / "map.tif"
    recipe = ("--config", "recipes/wafer.yaml", "--problem.stack", str(stack), "--output", str(out))
    levels = strict_json.dumps([FIXED])
    fixed = ("--field.levels", levels, "--start.enabled", "false", "--output", str(folder / "fixed"))
    stages = {
        "synth": ("cpikan_hr", "synth", str(stack), "--size", f"{width}x{height}"),
        "decode": ("cpikan_hr", "decode", str(stack), "--out", str(tiff)),
        "train": ("cpikan_hr.train", *recipe, "--training.steps", str(steps)),
        "train_in_memory": (
            "cpikan_hr.train", *recipe, "--training.steps", str(steps), "--training.memory_mb", "null",
            "--resume", "never",
        ),
        "train_fixed": ("cpikan_hr.train", *recipe[:-2], *fixed, "--training.steps", str(steps)),
        "start": ("cpikan_hr.train", *recipe, "--training.steps", "0"),
        "render": ("cpikan_hr", "render", str(out), "--out", str(tiff)),
        "evaluate": ("cpikan_hr", "evaluate", str(out)),
    }  # fmt: skip
    peaks = {name: round(run(["-m", *words], {})[2], 1) for name, words in stages.items()}
    field = (out / "field.safetensors").stat().st_size
    return {**peaks, "field_mb": round(field / 1e6, 1), "frames_mb": round(16 * width * height / 1e6, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megapixels", type=float, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--steps", type=int, default=3, help="updates after the start (default: %(default)s)")
    parser.add_argument("--folder", type=Path, default=None, help="where the stacks are made (default: temporary)")
    args = parser.parse_args()
    result = {}
    for megapixels in args.megapixels:
        folder = Path(tempfile.mkdtemp(prefix="memory-", dir=args.folder))
        try:
            result[f"{megapixels:g}"] = measure(megapixels, args.steps, folder)
        finally:
            shutil.rmtree(folder)
    sizes = list(result.values())
    base, last = result.get("4", sizes[0]), sizes[-1]
    stages = [name for name in base if not name.endswith("_mb")]
    growth = {name: round(last[name] / base[name], 2) for name in stages}
    print(strict_json.dumps({"benchmark": "memory", "unit": "MB of peak RSS", "megapixels": result, "growth": growth}))


if __name__ == "__main__":
    main()
