"""Pixels whose fringe order is wrong in the classical decode, plain and repaired, on synthetic wafers of known height.

    python benchmarks/orders.py [--size 2336x1750] [--noises 0 2 5 10] [--seeds 0 1 2]

An order is wrong where the height is off by more than 1000 nm: two orders are 2500 nm and more apart, and noise of 10
grey levels moves a height of the right order by 300 nm at most. Prints one JSON line per noise and seed: wrong pixels
of the plain and of the repaired map, `added` (wrong only in the latter), `undecided` (NaN there), `changed` (by more
than rounding), the RMSE (nm) of the pixels with a height, and the CPU seconds of both. The repair is
told the noise, or that of rounding to whole grey levels where there is none.
"""

import argparse
import tempfile
import time
from pathlib import Path

from cpikan_hr import strict_json

FAR, ROUNDING = 1000.0, 0.01  # nm


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="2336x1750", help="WIDTHxHEIGHT in px")
    parser.add_argument("--noises", type=float, nargs="+", default=[0, 2, 5, 10], help="in grey levels")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    from cpikan_hr.cli import size

    for noise in args.noises:
        for seed in args.seeds:
            with tempfile.TemporaryDirectory() as folder:
                counts = measure(Path(folder), size(args.size), noise, seed)
            print(strict_json.dumps({"benchmark": "orders", "noise": noise, "seed": seed, **counts}), flush=True)


def measure(folder: Path, size: tuple[int, int], noise: float, seed: int) -> dict:
    import numpy as np

    from cpikan_hr.data.source import open_source
    from cpikan_hr.data.stack import open_stack
    from cpikan_hr.data.synth import synth
    from cpikan_hr.problems.decode import decode_stack
    from cpikan_hr.problems.noise import Noise

    stack = open_stack(synth(folder / "stack", size=size, noise=noise, seed=seed))
    truth = open_source(stack.reference).read(0, size[0], 0, size[1])[..., 0]
    maps, seconds = [], []
    for repair in (None, Noise(noise)):
        began = time.process_time()
        maps.append(np.load(decode_stack(stack, folder / "height.npy", repair=repair)[0]))
        seconds.append(round(time.process_time() - began, 2))
    plain, repaired = maps
    wrong, still = (np.abs(each - truth) > FAR for each in maps)
    return {
        "wrong": int(wrong.sum()),
        "repaired": int(still.sum()),
        "added": int((still & ~wrong).sum()),
        "undecided": int(np.isnan(repaired).sum()),
        "changed": int((np.abs(repaired - plain) > ROUNDING).sum()),
        "rmse": [round(float(np.sqrt(np.nanmean((each - truth) ** 2.0))), 2) for each in maps],
        "cpu_s": seconds,
    }


if __name__ == "__main__":
    main()
