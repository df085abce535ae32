"""Heights: what a field makes of a stack, against the classical decode and against denoisers of it.

    python benchmarks/heights.py [--cases PATTERN] [--seeds 3] [--size 2336x1750] [--needed] [--folder DIR]
    python benchmarks/heights.py --maps FOLDER       surfaces that were measured, in place of the wafer
    python benchmarks/heights.py --sizes             RMSE against stored size, sigma 2
    python benchmarks/heights.py --scaling           time, memory and RMSE from 1 to 65 megapixels, sigma 2

The field is the program as users run it: `cpikan-hr synth`, `python -m cpikan_hr.train --config recipes/wafer.yaml`
(`surface.yaml` for measured maps) and `cpikan-hr render`, each a process. One JSON line per case with the medians over
the seeds, and a table at the end; exits with 1 where a limit of `height_cases.py` is missed. `cpu_s`, `wall_s` and
`peak_rss_mb` are those of the training process, imports included. The other estimates, all from the same decode:

    decode          with the steps that stack.yaml gives
    gaussian, total_variation, wavelet, nl_means    of the decode less its smooth part, tuned by the truth
    tile_dct        16 shifted tilings of 8 or 16 px, thresholded at 3 sigma of the predicted noise
    tile_dct_flat   the same of the decode less its smooth part, 64 tilings: the strongest known
    oracle          Wiener filters that are told the truth's power spectrum, of the whole map or block by block: how
                    near a filter can come that does not know the truth itself
"""

import argparse
import fnmatch
import math
import shutil
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from denoisers import STANDARD, best_tile_dct, oracle, rmse, smooth_part, tuned
from height_cases import WAFER, Case, of_measured_maps
from processes import run
from scipy.ndimage import maximum_filter

from cpikan_hr import strict_json
from cpikan_hr.cli import size
from cpikan_hr.data.difference import difference
from cpikan_hr.data.source import open_source
from cpikan_hr.data.stack import Stack, open_stack
from cpikan_hr.problems.decode import decode_window
from cpikan_hr.training.weights import load_field

JUMP_NM, REACH = 15.0, 3  # what a step is, and how many pixels around it count as near
STRIP = 256
FIGURES = ("rmse", "near_steps", "wrong_orders")


def near_steps(truth: np.ndarray) -> np.ndarray:
    """Pixels within `REACH` (Chebyshev) of a jump: a difference `JUMP_NM` off from those before and after it."""
    jump = np.zeros(truth.shape, bool)
    for axis in (0, 1):
        z, found = np.moveaxis(truth, axis, 0), np.moveaxis(jump, axis, 0)
        d = np.diff(z, axis=0)
        bend = np.abs(np.diff(d, axis=0))
        here = np.minimum(bend[:-1], bend[1:]) > JUMP_NM  # a smooth slope, however steep, has no bend
        found[1:-2] |= here
        found[2:-1] |= here
    return maximum_filter(jump, 2 * REACH + 1)


def figures(estimate: np.ndarray, truth: np.ndarray, near: np.ndarray, quarter_nm: float) -> dict[str, float]:
    error = estimate - truth
    return {
        "rmse": rmse(estimate, truth),
        "near_steps": float(np.sqrt(np.mean(np.square(error[near], dtype=np.float64)))) if near.any() else 0.0,
        "wrong_orders": int((np.abs(error) > quarter_nm).sum()),
    }


def decoded(stack: Stack) -> tuple[np.ndarray, np.ndarray]:
    """Height and its standard deviation for noise of one grey level, [H, W] in nm."""
    rows, columns = stack.shape
    height, sigma = np.empty((2, rows, columns), np.float32)
    for y in range(0, rows, STRIP):
        frames = stack.read(y, min(y + STRIP, rows), 0, columns)
        found = decode_window(frames, stack.wavelengths_um, stack.phase_steps_rad, stack.height_range_um)
        height[y : y + STRIP], sigma[y : y + STRIP] = found.height_nm, found.sigma_nm
    return height, sigma


def others(stack: Stack, truth: np.ndarray, noise: float, needed: bool):
    """Yields (name, estimate [H, W]) of everything the field is compared with; `needed`: those that limits are over."""
    height, sigma = decoded(stack)
    yield "decode", height
    if needed:
        yield "tile_dct", best_tile_dct(height, sigma * noise, truth, 16)
        return
    smooth = smooth_part(height)
    sigma *= noise
    typical = float(np.median(sigma))
    for name in STANDARD:
        yield name, tuned(name, height - smooth, truth - smooth, typical)[0] + smooth
    yield "tile_dct", best_tile_dct(height, sigma, truth, 16)
    yield "tile_dct_flat", best_tile_dct(height - smooth, sigma, truth - smooth, 64) + smooth
    yield "oracle", oracle(height - smooth, truth - smooth) + smooth


def make_stack(case: Case, seed: int, shape: tuple[int, int], folder: Path) -> Path:
    stack = folder / "stack"
    words = ["-m", "cpikan_hr", "synth", str(stack), "--size", f"{shape[1]}x{shape[0]}", "--seed", str(seed)]
    for key, value in {"noise": case.noise, **case.synth}.items():
        words += [f"--{key}", str(value)]
    run(words)
    return stack


def train(case: Case, stack: Path, folder: Path) -> tuple[np.ndarray, dict[str, float]]:
    """The field's map [H, W], and what it took."""
    target, out = folder / "run", folder / "map.npy"
    shutil.rmtree(target, ignore_errors=True)
    words = ["-m", "cpikan_hr.train", "--config", case.base]
    words += ["--problem.stack", str(stack), "--output", str(target)]
    for key, value in case.overrides.items():
        words += [f"--{key}", strict_json.dumps(value)]
    began = time.perf_counter()
    _, cpu, rss = run(words)
    took = {"cpu_s": cpu, "wall_s": time.perf_counter() - began, "peak_rss_mb": rss}
    run(["-m", "cpikan_hr", "render", str(target), "--out", str(out)])
    height = np.load(out, mmap_mode="r")
    return height, {"params_per_px": load_field(target).about["params"] / height.size, **took}


def measure(case: Case, seed: int, shape: tuple[int, int], folder: Path, needed: bool) -> tuple[dict, dict]:
    """Estimate -> figures, and what the field took, for one seed."""
    path = make_stack(case, seed, shape, folder)
    stack, truth = open_stack(path), np.load(path / "height_true.npy")
    near, quarter = near_steps(truth), 250 * min(stack.wavelengths_um)
    found = {
        name: figures(map_, truth, near, quarter)
        for name, map_ in others(stack, truth, case.overrides["problem.noise"], needed)
    }
    height, took = train(case, path, folder)
    found["field"] = figures(height, truth, near, quarter)
    run(["-m", "cpikan_hr", "render", str(folder / "run"), "--out", str(folder / "sigma.npy"), "--quantity", "sigma"])
    sigma = np.load(folder / "sigma.npy")
    known = np.isfinite(sigma)
    took["within_sigma"] = float((np.abs(height - truth)[known] < sigma[known]).mean())
    return found, took


def row_of(case: Case, shape: tuple[int, int], seeds: int, folder: Path, needed: bool) -> dict:
    """The case's JSON line: medians over the seeds, ratios (medians of each seed's) against the limits."""
    measured = [measure(case, seed, shape, folder, needed) for seed in range(seeds)]
    row: dict = {"benchmark": "heights", "case": case.name, "seeds": seeds, "size": [shape[1], shape[0]]}
    for figure in FIGURES:
        names = measured[0][0]
        row[figure] = {n: round(float(np.median([found[n][figure] for found, _ in measured])), 3) for n in names}
    row |= {k: round(float(np.median([took[k] for _, took in measured])), 3) for k in measured[0][1]}
    row["limits"] = []
    for (figure, other), limit in case.limits.items():
        pairs = [(found["field"][figure], found[other][figure]) for found, _ in measured]
        ratio = float(np.median([ours / max(theirs, 1e-9) for ours, theirs in pairs]))
        line = {"of": figure, "over": other, "ratio": round(ratio, 4), "limit": limit, "met": ratio <= limit}
        row["limits"].append(line)
    return row


def table(rows: list[dict]) -> str:
    """RMSE (nm) of every estimate and the ratios against their limits, one case a line."""
    heads = f"{'tile_dct':>9}{'flat':>8}{'oracle':>8}{'field':>9}{'ppx':>7}"
    lines = [f"{'case':42}{'decode':>9}{'denoiser':>25}{heads}  ratios"]
    for row in rows:
        r = dict.fromkeys(("tile_dct_flat", "oracle", *STANDARD), math.nan) | row["rmse"]
        value, name = min((r[name], name) for name in STANDARD)
        ratios = ", ".join(
            f"{e['of']}/{e['over']} {e['ratio']:.3g} ({'met' if e['met'] else 'missed'}: {e['limit']:g})"
            for e in row["limits"]
        )
        lines.append(
            f"{row['case']:42}{r['decode']:9.2f}{name:>17}{value:8.2f}{r['tile_dct']:9.2f}{r['tile_dct_flat']:8.2f}"
            f"{r['oracle']:8.2f}{r['field']:9.2f}{row['params_per_px']:7.3f}  {ratios}"
        )
    return "\n".join(lines)


def sizes(shape: tuple[int, int], folder: Path) -> None:
    """RMSE (nm) of a sigma 2 wafer against the parameters that may be stored (the threshold may leave fewer)."""
    stack = make_stack(Case("sizes", 2), 0, shape, folder)
    truth = np.load(stack / "height_true.npy")
    for most in (0.1, 0.13, 0.16, 0.2, 0.3, 0.5, 1.0):
        height, took = train(Case("sizes", 2, recipe={"target.params_per_px": most}), stack, folder)
        field = {"rmse": round(rmse(height, truth), 3), **{k: round(v, 3) for k, v in took.items()}}
        print(strict_json.dumps({"benchmark": "heights", "case": "sizes", "most": most, **field}), flush=True)


def scaling(megapixels: list[float], folder: Path) -> None:
    """The sigma 2 wafer in four sizes: time, memory and RMSE of the whole job's training."""
    case = next(c for c in WAFER if c.name == "4 steps, sigma 2")
    for mp in megapixels:
        rows = round((mp * 1e6 * 7000 / 9344) ** 0.5)
        shape = rows, round(rows * 9344 / 7000)
        path = make_stack(case, 0, shape, folder)
        _, took = train(case, path, folder)
        found = difference(open_source(folder / "map.npy"), open_source(path / "height_true.npy"))
        field = {"rmse": round(found.rms, 3), **{k: round(v, 3) for k, v in took.items()}}
        print(strict_json.dumps({"benchmark": "heights", "case": "scaling", "megapixels": mp, **field}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="*", help="which, e.g. '*sigma 5*' (default: all)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", type=size, default=(1750, 2336), help="WIDTHxHEIGHT in px")
    parser.add_argument("--maps", type=Path, default=None, help="folder of measured maps")
    parser.add_argument("--needed", action="store_true", help="compare only with what limits are over")
    parser.add_argument("--sizes", action="store_true")
    parser.add_argument("--scaling", type=float, nargs="*", default=None, help="megapixels (default: 1 4 16 65)")
    parser.add_argument("--folder", type=Path, default=None, help="where stacks are made (default: temporary)")
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="heights-"))
    folder.mkdir(parents=True, exist_ok=True)
    try:
        if args.sizes:
            return sizes(args.size, folder)
        if args.scaling is not None:
            return scaling(args.scaling or [1, 4, 16, 65], folder)
        rows = []
        for case in of_measured_maps(args.maps, folder) if args.maps else WAFER:
            if fnmatch.fnmatch(case.name, args.cases):
                rows.append(row_of(case, args.size, args.seeds, folder, args.needed))
                print(strict_json.dumps(rows[-1]), flush=True)
        print(table(rows))
        sys.exit(not all(e["met"] for row in rows for e in row["limits"]))
    finally:
        if args.folder is None:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
