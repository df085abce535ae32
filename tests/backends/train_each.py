"""Trains every recipe of a YAML file of several, one after the other, in each process of one launch."""

import sys

import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from cpikan_hr.errors import exit_on_user_error
from cpikan_hr.recipe import parse_recipe


@exit_on_user_error
def main() -> None:
    from cpikan_hr.training.loop import train

    Accelerator.end_training = lambda self: None  # which takes the process group away that the next run needs
    with open(sys.argv[1]) as file:
        trees = list(yaml.safe_load_all(file))
    for number, tree in enumerate(trees):
        train(parse_recipe(tree, f"recipe {number}"))
        AcceleratorState._reset_state()  # the next run prepares a model of its own
        GradientState._reset_state()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
