"""`cpikan_hr.train` of which one rank meets a fault in one tile: `faulty.py WHERE RANK STEP TILE --config ...`.

WHERE: `data` (the samples of that step inside the tile's core are NaN) or `weight` (the tile's first coefficient is,
from that step on). Writes `fault_RANK.json`, what each rank did, beside the recipe.
"""

import json
import math
import os
import sys
from pathlib import Path

import torch

from cpikan_hr.problems.batches import PixelBatches
from cpikan_hr.train import main
from cpikan_hr.training import loop
from cpikan_hr.training.update import NonFinite, Updater

where, rank, step, tile = sys.argv[1], *map(int, sys.argv[2:5])
here = int(os.environ["RANK"])
told = {}
read = PixelBatches.read


class FaultyUpdater(Updater):
    def __init__(self, accelerator, model, *arguments, **options):
        self.level = model.levels[0]
        super().__init__(accelerator, model, *arguments, **options)

    def step(self) -> float:
        before = [parameter.detach().clone() for parameter in self.model.parameters()]
        try:
            norm = super().step()
        except NonFinite as fault:
            after = [parameter.detach() for parameter in self.model.parameters()]
            alike = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(after, before, strict=True))
            told.update(step=fault.step, tile=fault.tile, rank=fault.rank, what=fault.what, unchanged=alike)
            raise
        if where == "weight" and (here, self.steps) == (rank, step):
            with torch.no_grad():
                self.level.network.coefficients[tile].view(-1)[0] = math.nan
        return norm


def faulty_read(batches, number, share, shares, region=None):
    data = read(batches, number, share, shares, region)
    if where == "data" and (here, number) == (rank, step):
        row, column = divmod(tile, -(-batches.problem.shape[1] // 16))
        y, x = data["points"].unbind(1)
        inside = (y // 16 == row) & (x // 16 == column)
        assert inside.any()
        data["values"][inside] = math.nan
    return data


loop.Updater, PixelBatches.read = FaultyUpdater, faulty_read
code = main(sys.argv[5:])
told["code"] = code
(Path(sys.argv[6]).parent / f"fault_{here}.json").write_text(json.dumps(told))
sys.exit(code)
