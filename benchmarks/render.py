"""How fast fields are rendered: megapixels per second of a 9344 px wide picture, per kind of field.

    python benchmarks/render.py [--threads 2] [--rows 896] [--device cuda]

Evaluates strips as `cpikan-hr render` does, without writing them. Per kind of field one entry with megapixels per
second of wall time and per second of CPU time (all threads), and `over_limit`, the former over what is asked for:
20 Mpx/s for Chebyshev tiles alone, 4 Mpx/s for fields with Scaled-cPIKAN levels. Prints one JSON line.
"""

import argparse
import time

from device import add_device

from cpikan_hr import strict_json

WIDTH = 9344
SPARSE = {"tile": 16, "overlap": 0.125, "network": {"kind": "chebyshev2d", "degree": None, "sparse": True}}
TILES = {"tile": 16, "overlap": 0.125, "network": {"kind": "cpikan", "hidden": [6], "degree": [4, 2]}}
GLOBAL = {"grid": [1, 1], "network": {"kind": "cpikan", "hidden": [8, 8], "degree": 5}}
QUADTREE = {**SPARSE, "tile": [32, 16, 8, 4, 2], "overlap": 1.0}
AREA = [0.15, 0.34, 0.26, 0.16, 0.09]  # that leaves of each size cover, as on the demo's wafer
FIELDS = {
    "chebyshev2d": ([SPARSE], 20.0),
    "quadtree": ([QUADTREE], 20.0),
    "cpikan": ([TILES], 4.0),
    "global_cpikan_and_chebyshev2d": ([GLOBAL, SPARSE], 4.0),
    "cpikan_and_chebyshev2d": ([TILES, SPARSE], 4.0),
}
TERMS, LEAF_TERMS = 30, 5  # of 324 per tile: 0.12 parameters per pixel; of each leaf: 0.18


def grow_leaves(field, rows: int) -> None:
    """Leaves of random sizes, each square of the coarsest size cut into those of one."""
    import torch

    from cpikan_hr.networks import Chebyshev2D

    coarsest = QUADTREE["tile"][0]
    kind = torch.multinomial(torch.tensor(AREA), -(-rows // coarsest) * -(-WIDTH // coarsest), replacement=True)
    kind = kind.view(-(-rows // coarsest), -1)
    for number, (level, stride) in enumerate(zip(field.levels, QUADTREE["tile"], strict=True)):
        leaves = (kind == number).repeat_interleave(coarsest // stride, 0).repeat_interleave(coarsest // stride, 1)
        count = level.tile_grid.shape
        active = torch.nonzero(leaves[: count[0], : count[1]].flatten())[:, 0]
        size = round(2 * level.tile_grid.axes[0].half)
        network = Chebyshev2D(len(active), 2, 1, degree=size - 1, sparse=True)
        index = torch.arange(LEAF_TERMS).repeat(len(active))
        network.set_terms(torch.full((len(active),), LEAF_TERMS), index, torch.randn(len(index)))
        level.set_tiles(active, network, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=896)
    add_device(parser)
    args = parser.parse_args()
    import torch

    from cpikan_hr.fields import Field
    from cpikan_hr.parallel import at_once, in_threads
    from cpikan_hr.recipe import FieldOptions
    from cpikan_hr.render import STRIP
    from cpikan_hr.runtime import prepare_process

    prepare_process()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    xs = torch.arange(WIDTH, dtype=torch.float64, device=args.device) + 0.5
    height = max(1, at_once(STRIP, args.device) // WIDTH)
    wait = torch.cuda.synchronize if args.device == "cuda" else lambda: None
    result = {"benchmark": "render", "device": args.device, "threads": args.threads, "width": WIDTH, "rows": args.rows}
    for name, (levels, limit) in FIELDS.items():
        field = Field.build(FieldOptions(levels=levels), (args.rows, WIDTH), 1)
        if len(field.levels) == len(AREA):
            grow_leaves(field, args.rows)
        for level in field.levels:
            network = level.network
            if getattr(network, "sparse", False) and levels[-1] is SPARSE:
                size = network.shape[0] * network.shape[1]
                index = torch.rand(network.tiles, size).topk(TERMS).indices.sort().values.flatten()
                network.set_terms(torch.full((network.tiles,), TERMS), index, torch.zeros(len(index)))
            for parameter in level.parameters():
                parameter.data.normal_()
        field.to(args.device)

        def strip(y: int, field: Field = field) -> None:
            ys = torch.arange(y, min(y + height, args.rows), dtype=torch.float64, device=args.device) + 0.5
            field.lattice(ys, xs)

        strip(0)
        wait()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in in_threads(strip, range(0, args.rows, height), args.device):
            pass
        wait()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        pixels = args.rows * WIDTH / 1e6
        speed = {"mpx_per_s": round(pixels / wall, 2), "mpx_per_cpu_s": round(pixels / cpu, 2)}
        result[name] = {**speed, "over_limit": round(pixels / wall / limit, 2)}
    print(strict_json.dumps(result))


if __name__ == "__main__":
    main()
