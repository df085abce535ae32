"""A small training run for the backend tests: `accelerate launch --config_file FILE toy.py OUT [options]`.

Batched tile parameters like the real fields', float64 coordinates, fp32 weights. Data are a pure function of
(step, micro-batch), the global batch is split over the ranks, so every backend sees the same optimisation problem.
Writes OUT/result.json (losses, norms; resumed.json where it resumed) and OUT/weights.pt on the main rank.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from torch import nn

from cpikan_hr.errors import exit_on_user_error
from cpikan_hr.training.backend import full_state_dict, make_accelerator, precision_of
from cpikan_hr.training.state import load_state, save_state
from cpikan_hr.training.update import Updater

TILES, POINTS = 4, 64


class Tiled(nn.Module):
    """One affine layer per tile. [tiles, points, in] -> [tiles, points, out]"""

    def __init__(self, tiles: int, fan_in: int, fan_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(tiles, fan_in, fan_out) / fan_in**0.5)
        self.bias = nn.Parameter(torch.zeros(tiles, 1, fan_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class Toy(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.ModuleList([Tiled(TILES, 2, width), Tiled(TILES, width, width), Tiled(TILES, width, 1)])
        self.seen_dtypes: set[str] = set()

    def forward(self, points: torch.Tensor) -> torch.Tensor:
        self.seen_dtypes.add(str(points.dtype))  # the backend must not cast coordinates
        x = points.to(self.layers[0].weight.dtype)
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
            self.seen_dtypes.add("hidden " + str(x.dtype))
        return self.layers[-1](x)


def batch(step: int, micro: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The global micro-batch: float64 points [tiles, POINTS, 2] in [-1, 1] and targets [tiles, POINTS, 1]."""
    generator = torch.Generator().manual_seed(1000 * step + micro)
    points = torch.rand(TILES, POINTS, 2, generator=generator, dtype=torch.float64) * 2 - 1
    target = torch.sin(3 * points[..., :1]) * torch.cos(2 * points[..., 1:])
    return points.to(device), target.to(device)


@exit_on_user_error
def main(words: list[str] | None = None) -> None:
    options = argparse.ArgumentParser()
    options.add_argument("out", type=Path)
    options.add_argument("--steps", type=int, default=20)
    options.add_argument("--width", type=int, default=16)
    options.add_argument("--precision", default=None)
    options.add_argument("--accumulate", type=int, default=1)
    options.add_argument("--clip", type=float, default=None)
    options.add_argument("--optimizer", default="AdamW")
    options.add_argument("--save-at", type=int, default=None, help="save_state after this many updates")
    options.add_argument("--resume", action="store_true", help="load that state and go on from --save-at")
    options.add_argument("--poison", default=None, help="STEP:RANK:TILE whose target becomes NaN on that rank")
    options = options.parse_args(words)

    accelerator = make_accelerator(
        precision=options.precision, accumulate=options.accumulate, clip=options.clip, offload_folder=options.out
    )
    torch.manual_seed(0)
    model = Toy(options.width)
    bare = model
    optimizer = getattr(torch.optim, options.optimizer)(model.parameters(), lr=1e-2)
    updater = Updater(accelerator, model, optimizer, schedule=lambda step: 0.9**step, clip=options.clip)
    rank, ranks = accelerator.process_index, accelerator.num_processes

    first = 0
    if options.resume:
        load_state(updater, options.out / "state")
        updater.steps = first = options.save_at
    losses, norms = [], []
    for step in range(first, options.steps):
        total = torch.zeros((), device=accelerator.device)
        for micro in range(options.accumulate):
            points, target = (part.tensor_split(ranks, dim=1)[rank] for part in batch(step, micro, accelerator.device))
            if options.poison:
                at_step, at_rank, tile = map(int, options.poison.split(":"))
                if (step, rank) == (at_step, at_rank):
                    target[tile] = float("nan")
            with updater.micro_batch():
                loss = ((updater.model(points).float() - target.float()) ** 2).mean()
                updater.backward(loss)
            total += loss.detach() / options.accumulate
        norms.append(updater.step())
        losses.append(accelerator.reduce(total, "mean").item())
        if updater.steps == options.save_at and not options.resume:
            save_state(updater, options.out / "state")

    weights = full_state_dict(accelerator, updater.model)
    if accelerator.is_main_process:
        options.out.mkdir(parents=True, exist_ok=True)
        if not options.resume:
            torch.save(weights, options.out / "weights.pt")
        result = {
            "losses": losses,
            "norms": norms,
            "ranks": ranks,
            "type": str(accelerator.distributed_type),
            "precision": precision_of(accelerator),
            "dtypes": sorted(bare.seen_dtypes),
        }
        (options.out / ("resumed.json" if options.resume else "result.json")).write_text(json.dumps(result))
    accelerator.end_training()


if __name__ == "__main__":
    sys.exit(main())
