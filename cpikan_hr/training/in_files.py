"""Fields larger than memory: while one process trains them, weights and Adam's moments lie in temporary files.

An update needs the tiles of its batch: their weights are read, their gradients are sparse, and `FileAdam` passes over
all weights and moments piece by piece. So what updates keep resident grows neither with the field nor with the
picture (a field that is resumed, or has no start from data, is made in memory first). Several processes share the
moments by ZeRO, and put them on NVMe by its own files (`accelerate_configs/zero3_nvme.yaml`).

A checkpoint holds the weights as Accelerate's does, and the moments by the parameters' names in ADAM.
"""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor

from cpikan_hr.fields import Field
from cpikan_hr.mapped import release
from cpikan_hr.recipe import Recipe
from cpikan_hr.solvers.file_adam import MOMENTS, FileAdam
from cpikan_hr.solvers.optimizers import states_of
from cpikan_hr.training.tensors import CHUNK, map_tensors, save_tensors

MODEL, ADAM = "model.safetensors", "adam.safetensors"
_KEYS = ("step", *MOMENTS)
HELD = 4  # numbers per parameter: weight, gradient and two moments


def goes_into_files(field: Field, recipe: Recipe, accelerator: Accelerator) -> bool:
    """Whether a field of pixels is to be trained in files: it takes more than `training.memory_mb`, and nothing of the
    recipe needs it as a whole.
    """
    options = recipe.training
    held = HELD * sum(value.nbytes for value in field.parameters())
    alone = accelerator.distributed_type == DistributedType.NO and accelerator.device.type == "cpu"
    plain = options.optimizer in ("adam", "adamw") and not (options.ema or options.settle_rmse or options.sweep_every)
    return alone and plain and field.box is None and options.memory_mb is not None and held > 1e6 * options.memory_mb


def save_files(field: Field, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Writes weights and moments, chunk by chunk."""
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(folder / MODEL, field.state_dict())
    states = states_of(optimizer, field)
    save_tensors(folder / ADAM, {f"{key}.{name}": state[key] for name, state in states.items() for key in _KEYS})


def load_files(field: Field, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Restores what `save_files` wrote, into any of torch's Adams."""
    weights, saved = (map_tensors(folder / name)[0] for name in (MODEL, ADAM))
    for name, value in field.state_dict().items():
        _copy(weights[name], value)
    copied = isinstance(optimizer, FileAdam)
    names = {parameter: name for name, parameter in field.named_parameters()}
    state = {}
    for number, parameter in enumerate(value for group in optimizer.param_groups for value in group["params"]):
        kept = {key: saved.get(f"{key}.{names[parameter]}") for key in _KEYS}
        if kept["step"] is not None:
            state[number] = kept if copied else {key: value.clone() for key, value in kept.items()}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    release()


def _copy(source: Tensor, target: Tensor) -> None:
    if source.shape != target.shape:
        raise RuntimeError(f"a tensor of {list(source.shape)} in the place of {list(target.shape)}")
    pieces = (tensor.detach().reshape(-1).split(CHUNK) for tensor in (source, target))
    for read, written in zip(*pieces, strict=True):
        written.copy_(read)
        release()
