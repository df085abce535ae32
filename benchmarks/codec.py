"""Bytes against PSNR of packed fields, beside JPEG, WebP and JPEG 2000.

    python benchmarks/codec.py [--picture FILE] [--targets 32 34 ...] [--factor 4]

For every target recipes/image.yaml is trained to that PSNR and packed with a step of `factor` times the target's rmse.
The other codecs are Pillow's, JPEG with and without subsampled colours. Each point is {setting, psnr (dB of the 8-bit
picture), bytes (whole file), encode_s, decode_s (CPU time of this process)}. `at` gives for round PSNRs the bytes
between a codec's own points (straight lines in log bytes), and how many times its bytes a packed field takes. Prints
one JSON line.
"""

import argparse
import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from cpikan_hr import strict_json
from cpikan_hr.recipe import load_recipe
from cpikan_hr.render import render
from cpikan_hr.training.export import export
from cpikan_hr.training.loop import train
from cpikan_hr.training.weights import load_field

ROOT = Path(__file__).resolve().parents[1]
QUALITIES = (20, 30, 40, 50, 60, 70, 80, 85, 90, 93, 95, 97, 99, 100)
PILLOW: dict[str, tuple[str, list[dict]]] = {
    "jpeg 4:4:4": ("JPEG", [{"quality": q, "optimize": True, "subsampling": 0} for q in QUALITIES]),
    "jpeg 4:2:0": ("JPEG", [{"quality": q, "optimize": True, "subsampling": 2} for q in QUALITIES]),
    "webp": ("WEBP", [{"quality": q, "method": 6} for q in QUALITIES]),
    "jpeg 2000": (
        "JPEG2000",
        [{"quality_mode": "dB", "quality_layers": [db], "irreversible": True, "mct": 1} for db in range(28, 51, 2)],
    ),
}


def psnr(truth: np.ndarray, picture: np.ndarray) -> float:
    """dB over the range of 8 bits."""
    return float(10 * np.log10(255**2 / np.mean(np.square(truth.astype(np.float64) - picture))))


def timed(function: Callable, *arguments, **options):
    """The result and the CPU seconds it took this process."""
    began = time.process_time()
    result = function(*arguments, **options)
    return result, round(time.process_time() - began, 3)


def packed_field(source: Path, truth: np.ndarray, target: float, factor: float, folder: Path) -> dict:
    """One point: trained to `target` dB, packed, rendered from the packed file."""
    step = round(factor * 255 * 10 ** (-target / 20), 2)
    words = ["--problem.path", str(source), "--output", str(folder / "run"), "--target.psnr", str(target)]
    recipe = load_recipe(ROOT / "recipes" / "image.yaml", words)
    run, training = timed(train, recipe)
    file, packing = timed(export, run, folder / "packed.safetensors", step=step)
    png, decoding = timed(lambda: render(load_field(file), folder / "out.png"))
    figures = {"psnr": round(psnr(truth, np.asarray(Image.open(png))), 2), "bytes": file.stat().st_size}
    seconds = {"encode_s": round(training + packing, 2), "pack_s": packing, "decode_s": decoding}
    return {"setting": f"psnr {target:g} step {step:g}"} | figures | seconds


def pillow(truth: np.ndarray, kind: str, options: dict) -> dict:
    """One point of a codec of Pillow."""
    buffer = io.BytesIO()
    _, encoding = timed(Image.fromarray(truth).save, buffer, kind, **options)
    picture, decoding = timed(lambda: np.asarray(Image.open(io.BytesIO(buffer.getvalue())).convert("RGB")))
    setting = options.get("quality") or options["quality_layers"][0]
    figures = {"setting": setting, "psnr": round(psnr(truth, picture), 2), "bytes": len(buffer.getvalue())}
    return figures | {"encode_s": encoding, "decode_s": decoding}


def bytes_at(points: list[dict], wanted: float) -> int | None:
    """Bytes for a PSNR between two of the points; None outside them."""
    known = sorted((point["psnr"], np.log(point["bytes"])) for point in points)
    dbs, logs = zip(*known, strict=True)
    return round(float(np.exp(np.interp(wanted, dbs, logs)))) if dbs[0] <= wanted <= dbs[-1] else None


def compare(curves: dict[str, list[dict]], wanted: float) -> dict:
    """Bytes of every codec at one PSNR, and a packed field's bytes over each."""
    found = {name: bytes_at(points, wanted) for name, points in curves.items()}
    ours = found["packed field"]
    ratios = {name: round(ours / size, 2) for name, size in found.items() if ours and size and name != "packed field"}
    return {"bytes": found, "packed_over": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, default=None, help="default: scikit-image's astronaut, 512 x 512")
    parser.add_argument("--targets", type=float, nargs="+", default=[31, 33, 35, 37, 39, 41, 43, 45, 47], help="dB")
    parser.add_argument("--factor", type=float, default=4.0, help="step over the target's rmse (default: %(default)s)")
    args = parser.parse_args()
    if args.picture is None:
        from skimage.data import astronaut

        truth = astronaut()
    else:
        truth = np.asarray(Image.open(args.picture).convert("RGB"))
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
        folder = Path(name)
        Image.fromarray(truth).save(folder / "picture.png")
        ours = []
        for target in args.targets:
            (folder / f"{target:g}").mkdir()
            ours.append(packed_field(folder / "picture.png", truth, target, args.factor, folder / f"{target:g}"))
    curves = {"packed field": ours}
    curves |= {name: [pillow(truth, kind, o) for o in options] for name, (kind, options) in PILLOW.items()}
    at = {str(db): compare(curves, db) for db in (32, 34, 36, 38, 40, 42, 44)}
    what = args.picture.name if args.picture else "astronaut"
    about = {"benchmark": "codec", "picture": what, "pixels": list(truth.shape[:2]), "step_over_rmse": args.factor}
    print(strict_json.dumps(about | {"at": at, "points": curves}))


if __name__ == "__main__":
    main()
