"""First-order optimisers and learning-rate schedules: torch's, and SOAP."""

import math
from copy import deepcopy

import torch
from torch import Tensor
from torch.optim import Optimizer

from cpikan_hr.fields import Field
from cpikan_hr.recipe import FieldOptions, TrainingOptions
from cpikan_hr.solvers.file_adam import FileAdam

_CLASSES = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adamax": torch.optim.Adamax,
    "rmsprop": torch.optim.RMSprop,
    "sgd": torch.optim.SGD,
}
_FUSED = ("adam", "adamw", "sgd")  # one pass over the weights, without temporaries as large as they are


def build_optimizer(
    field: Field, options: TrainingOptions, levels: FieldOptions, in_files: bool = False
) -> Optimizer:
    """One parameter group per level of the recipe that trains, with the level's share of the learning rate.

    in_files: for parameters in files (`mapped.in_files`); adam and adamw alone.
    """
    groups = [
        {"params": [p for k in numbers for p in field.levels[k].parameters()], "lr": options.lr * choice.lr_scale}
        for numbers, choice in zip(field.groups, levels.levels, strict=True)
    ]
    groups = [group for group in groups if group["params"]]  # DeepSpeed drops those of levels that have settled
    if field.constants is not None:
        groups.append({"params": list(field.constants.parameters()), "lr": options.lr})
    if options.optimizer == "soap":
        from cpikan_hr.solvers.soap import TileSOAP  # its library takes seconds to import

        return TileSOAP(groups, options.lr, options.betas, options.weight_decay)
    if in_files:
        return FileAdam(groups, options.lr, options.betas, options.weight_decay, options.optimizer == "adamw")
    extra = {} if options.optimizer in ("rmsprop", "sgd") else {"betas": options.betas}
    if options.optimizer in _FUSED:
        extra["fused"] = True
    return _CLASSES[options.optimizer](groups, lr=options.lr, weight_decay=options.weight_decay, **extra)


def states_of(optimizer: Optimizer, field: Field) -> dict[str, dict]:
    """What an optimizer keeps for each of a field's parameters that it has updated, by their names."""
    return {name: optimizer.state[value] for name, value in field.named_parameters() if value in optimizer.state}


@torch.no_grad()
def carry_state(
    old: Optimizer, states: dict[str, dict], before: Field, new: Optimizer, after: Field, rows: dict[str, Tensor]
) -> None:
    """Gives a new optimizer the state of the old one for parameters that are rows of the old ones, see `Field.settle`.

    `states`: the old one's, by the parameters' names. What is as large as its parameter (moments) keeps the rows, all
    else (counts of updates) is taken over.
    """
    earlier = dict(before.named_parameters())
    for name, parameter in after.named_parameters():
        if name in rows and name in states:
            shape = earlier[name].shape
            new.state[parameter] = {
                key: value[rows[name]] if torch.is_tensor(value) and value.shape == shape else deepcopy(value)
                for key, value in states[name].items()
            }
    for group in new.param_groups:
        if "step" in old.param_groups[0]:  # SOAP counts its updates there, alike in all groups
            group["step"] = old.param_groups[0]["step"]


def rate(step: int, options: TrainingOptions) -> float:
    """The learning rate of an update over its peak."""
    if step < options.warmup:
        return (step + 1) / (options.warmup + 1)
    through = (step - options.warmup) / max(1, options.steps - options.warmup)
    through = min(through, 1.0)
    if options.schedule == "cosine":
        half = math.cos(math.pi * through)
        return options.final_lr + (1 - options.final_lr) * (1 + half) / 2
    if options.schedule == "exponential":
        return options.final_lr**through
    return 1.0
