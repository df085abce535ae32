"""Time and peak memory of a physics training step: jets against nested autograd.

    python benchmarks/jets.py [--points 65536] [--repeats 3] [--device cuda]

One step is the forward pass of a [2, 16, 16, 1] network of degree 5 with its Laplacian, a loss of both, and the
backward pass. Four ways of taking it:

* `jets_eager`, `jets_compiled`: `cpikan_hr`'s layers;
* `nested`: the same layers' value (tanh, recurrence, one GEMM) differentiated by nested `torch.autograd.grad`;
* `acos`: the original ChebyKAN formula, cos(n acos(tanh v)) and an einsum, differentiated the same way.

Each measurement is a process of its own, the ways taken in turn, and medians over the repeats are reported: CPU time of
a step over all threads, and the peak of resident memory during a step minus what was resident before it; on a GPU the
wall time of a step and the peak of its allocated memory. A short
warm-up on other points comes first, so neither imports nor compilation count. glibc's thresholds for returning memory
to the system are raised for all ways alike. Prints one JSON line; ratios are (this way) / (the other way).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from device import add_device

from cpikan_hr import strict_json

WAYS = ("jets_eager", "jets_compiled", "nested", "acos")
WIDTHS, DEGREE = (2, 16, 16, 1), 5
WARM_UP_POINTS = 2048
MALLOC = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33), "MALLOC_TOP_PAD_": str(2**26)}


def resident_bytes(key: str) -> int:
    """`VmRSS` (now) or `VmHWM` (peak since the last reset) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}: this benchmark needs Linux")


def nested_step(value: Callable, parameters: list) -> Callable:
    """A step that takes the Laplacian of `value: [P, 2] -> [P, 1]` by nested autograd."""
    import torch

    def step(points):
        x = points.clone().requires_grad_()
        u = value(x)
        (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        second = [torch.autograd.grad(first[:, d].sum(), x, create_graph=True)[0][:, d] for d in range(2)]
        loss = (u.squeeze(1) + sum(second)).square().mean()
        return loss, torch.autograd.grad(loss, parameters)

    return step


def build_step(way: str, device: str) -> Callable:
    """`points [P, 2] -> (loss, parameter gradients)`; every way has the same parameters."""
    import torch

    from cpikan_hr import jets
    from cpikan_hr.networks import ScaledCPIKAN
    from cpikan_hr.networks.chebyshev_kernels import chebyshev_expand

    generator = torch.Generator().manual_seed(0)
    network = ScaledCPIKAN(1, WIDTHS[0], WIDTHS[-1], hidden=WIDTHS[1:-1], degree=DEGREE, generator=generator)
    network.to(device)
    parameters = list(network.parameters())

    if way.startswith("jets"):
        jets.compile_kernels(way == "jets_compiled")

        def step(points):
            jet = network(jets.seed(points.unsqueeze(0), "laplacian"))
            loss = (jet.value + jet.laplacian).square().mean()
            return loss, torch.autograd.grad(loss, parameters)

        return step

    def same_layers(x):
        for coefficients in parameters:
            basis = chebyshev_expand(x.unsqueeze(0), "value", 2, DEGREE, "tanh").flatten(0, 1)
            weight = coefficients[0, ..., 1:].permute(2, 0, 1).flatten(0, 1)
            x = torch.addmm(coefficients[0, ..., 0].sum(0), basis, weight)
        return x

    orders = torch.arange(DEGREE + 1, device=device)

    def original_layers(x):
        for coefficients in parameters:
            basis = torch.cos(orders * torch.acos(torch.tanh(x)).unsqueeze(-1))
            x = torch.einsum("bid,iod->bo", basis, coefficients[0])
        return x

    return nested_step(same_layers if way == "nested" else original_layers, parameters)


def measure(way: str, points: int, steps: int, device: str) -> dict[str, float]:
    """Seconds of a step and the memory it adds, in this process."""
    import torch

    generator = torch.Generator().manual_seed(1)
    step = build_step(way, device)

    def draw(count: int) -> torch.Tensor:
        return (torch.rand(count, 2, generator=generator) * 2 - 1).to(device)

    for count in (WARM_UP_POINTS, WARM_UP_POINTS + 1):
        step(draw(count))
    x = draw(points)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        before = resident_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    loss, gradients = step(x)
    memory = (torch.cuda.max_memory_allocated() if device == "cuda" else resident_bytes("VmHWM")) - before
    norm = sum(float(g.square().sum()) for g in gradients) ** 0.5
    seconds = []
    for _ in range(steps):
        start = clock(device)
        step(x)
        seconds.append(clock(device) - start)
    return {"seconds": statistics.median(seconds), "bytes": memory, "loss": loss.item(), "gradient_norm": norm}


def clock(device: str) -> float:
    """CPU seconds of this process; on a GPU seconds of wall time, when it has done what it was given."""
    if device == "cpu":
        return time.process_time()
    import torch

    torch.cuda.synchronize()
    return time.perf_counter()


def run_alone(way: str, points: int, steps: int, device: str) -> dict[str, float]:
    """`measure` in a fresh process."""
    command = [sys.executable, __file__, "--way", way, "--points", str(points), "--steps", str(steps)]
    command += ["--device", device]
    done = subprocess.run(command, env=os.environ | MALLOC, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=65536, help="points of one step (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="processes per way (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps per process (default: %(default)s)")
    parser.add_argument("--way", choices=WAYS, help="measure one way in this process and stop")
    add_device(parser)
    args = parser.parse_args()
    if args.way:
        print(strict_json.dumps(measure(args.way, args.points, args.steps, args.device)))
        return

    runs: dict[str, list[dict]] = {way: [] for way in WAYS}
    for _ in range(args.repeats):
        for way in WAYS:
            runs[way].append(run_alone(way, args.points, args.steps, args.device))

    def median(way: str, key: str) -> float:
        return statistics.median(run[key] for run in runs[way])

    result = {
        "device": args.device,
        "points": args.points,
        "network": list(WIDTHS),
        "degree": DEGREE,
        "repeats": args.repeats,
    }
    for way in WAYS:
        ms, peak_mb = 1e3 * median(way, "seconds"), median(way, "bytes") / 1e6
        result[way] = {"ms": round(ms, 1), "peak_mb": round(peak_mb, 1)}
    for way in ("jets_eager", "jets_compiled"):
        for other in ("nested", "acos"):
            result[f"{way}_over_{other}"] = {
                "time": round(median(way, "seconds") / median(other, "seconds"), 3),
                "memory": round(median(way, "bytes") / median(other, "bytes"), 3),
            }
    norms = [median(way, "gradient_norm") for way in WAYS]
    result["gradient_norm_spread"] = (max(norms) - min(norms)) / max(norms)
    print(strict_json.dumps(result))


if __name__ == "__main__":
    main()
