"""`RUN/field.safetensors`: the trained field in one file, with the recipe and the shape it needs to be built again."""

import json
import os
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cpikan_hr.errors import UserError
from cpikan_hr.fields import Field
from cpikan_hr.recipe import Recipe, dump_recipe, parse_recipe


class Trained(NamedTuple):
    """A field as it was exported, and what describes it."""

    field: Field
    recipe: Recipe
    about: dict  # shape [H, W], channels, unit, pixel_pitch_um, dtype of the source, training figures


def save_field(path: Path, state: dict[str, torch.Tensor], recipe: Recipe, about: dict) -> None:
    """Writes weights and metadata; the file appears whole or not at all."""
    part = path.with_name(path.name + ".part")
    metadata = {"recipe": dump_recipe(recipe), "about": json.dumps(about)}
    try:
        save_file({name: value.contiguous() for name, value in state.items()}, part, metadata=metadata)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def load_field(run: str | Path) -> Trained:
    """Reads a run folder or a safetensors file. Raises UserError where there is no whole field."""
    path = Path(run)
    if path.is_dir():
        path = path / "field.safetensors"
    if not path.is_file():
        raise UserError(f"{path}: no trained field; train the run to its end, or give a field.safetensors")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}
        recipe = parse_recipe(yaml.safe_load(metadata["recipe"]), str(path))
        about = json.loads(metadata["about"])
    except (SafetensorError, KeyError) as error:
        raise UserError(f"{path}: not a field of this program, or cut short ({error}); export it again") from None
    field = Field.build(recipe.field, about["shape"], about["channels"], recipe.training.seed)
    field.load_state_dict(state)
    return Trained(field.eval(), recipe, about)
