"""Exponential moving average of the weights (Polyak and Juditsky 1992; as used with Adam: decay per update).

Invariant: the average lives beside the model and never enters the training itself. Every rank keeps a whole copy, which
needs whole parameters on every rank: single process, DDP, ZeRO-1 and ZeRO-2.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cpikan_hr.errors import UserError

FILE = "ema.safetensors"  # in a checkpoint's folder


class WeightAverage:
    """Averages the trained parameters of the bare `model` with `decay`; `steps` updates have been seen."""

    def __init__(self, accelerator: Accelerator, model: nn.Module, decay: float):
        sharded = accelerator.is_fsdp2 or (
            accelerator.distributed_type == DistributedType.DEEPSPEED and accelerator.deepspeed_plugin.zero_stage == 3
        )
        if sharded:
            raise UserError(
                "training.ema needs whole weights on every process: launch with zero2.yaml or ddp.yaml, or leave it out"
            )
        self._parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self._average = {name: value.detach().clone() for name, value in self._parameters.items()}
        self._step = get_ema_multi_avg_fn(decay)

    def replace(self, model: nn.Module, rows: dict[str, torch.Tensor]) -> None:
        """Goes on with a model whose trained parameters are `rows`, by name, of the present ones."""
        self._average = {name: self._average[name][part] for name, part in rows.items()}
        self._parameters = {name: value for name, value in model.named_parameters() if name in rows}

    @torch.no_grad()
    def update(self) -> None:
        """average <- decay * average + (1 - decay) * parameters."""
        self._step(list(self._average.values()), [p.detach() for p in self._parameters.values()], None)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averages meanwhile."""
        kept = {name: self._parameters[name].detach().clone() for name in self._average}
        try:
            self._fill(self._average)
            yield
        finally:
            self._fill(kept)

    @torch.no_grad()
    def _fill(self, values: dict[str, torch.Tensor]) -> None:
        for name, value in values.items():
            self._parameters[name].data.copy_(value)

    def state(self) -> dict[str, torch.Tensor]:
        """The averages by parameter name, on the CPU."""
        return {name: value.cpu() for name, value in self._average.items()}

    def save(self, folder: Path) -> None:
        save_file(self.state(), folder / FILE)

    def load(self, folder: Path) -> None:
        """UserError where the checkpoint was written without an average."""
        if not (folder / FILE).is_file():
            raise UserError(f"{folder}: holds no average of the weights; resume without training.ema, or start anew")
        for name, value in load_file(folder / FILE).items():
            self._average[name].copy_(value)
