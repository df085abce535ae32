"""`RUN/field.safetensors`: the trained field in one file, with the recipe and the shape it needs to be built again."""

import json
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from safetensors import SafetensorError

from cpikan_hr import strict_json
from cpikan_hr.errors import UserError
from cpikan_hr.fields import Box, Field
from cpikan_hr.owned import MARK
from cpikan_hr.problems.constrained import Constrained
from cpikan_hr.recipe import Recipe, dump_recipe, parse_recipe
from cpikan_hr.training import codec
from cpikan_hr.training.tensors import map_tensors, save_tensors

ABOUT = ("shape", "channels", "unit", "pixel_pitch_um", "params", "train_seconds", "peak_rss_mb", "gpu_peak_mb")


class Trained(NamedTuple):
    """A field as it was exported, and what describes it. What `field(points)` gives is u, in `about`'s unit."""

    field: Field
    recipe: Recipe
    about: dict  # shape [H, W], channels, unit, pixel_pitch_um, dtype of the source, training figures


def save_field(path: Path, state: dict[str, torch.Tensor], recipe: Recipe, about: dict) -> None:
    """Writes weights and metadata; the file appears whole or not at all."""
    metadata = {"software": MARK, "recipe": dump_recipe(recipe), "about": strict_json.dumps(about)}
    save_tensors(path, state, metadata)


def save_again(source: Path, path: Path, recipe: Recipe, about: dict) -> None:
    """The weights of one field's file in another, with a description of their own."""
    save_field(path, map_tensors(source)[0], recipe, about)


def save_packed(path: Path, trained: Trained, bits: int, step: float | None) -> None:
    """Writes the field quantised and compressed (see `codec.py`). UserError where it cannot be."""
    field, recipe, about = trained
    state, parameters = field.state_dict(), {name for name, _ in field.named_parameters()}
    sparse = codec.sparse_shapes(field)
    if step is not None and not sparse:
        raise UserError("--step is for sparse chebyshev2d levels, of which this field has none; give --bits")
    about = about | {"quantised": {"bits": bits, "step": step}}
    description = {"recipe": dump_recipe(recipe), "about": strict_json.dumps(about)}
    try:
        tensors, metadata = codec.pack(state, parameters, sparse, bits, step, description)
    except ValueError as error:
        raise UserError(f"{path}: cannot be written ({error}); train again") from None
    save_tensors(path, tensors, {"software": MARK} | metadata)


def joined_state(state: dict[str, torch.Tensor], recipe: Recipe, about: dict) -> dict[str, torch.Tensor]:
    """The state of a field as its recipe lays it out, also where tiles had settled."""
    if not any(name.startswith("settled.") for name in state):
        return state
    return _field_of(state, recipe, about).joined().state_dict()


def _field_of(state: dict[str, torch.Tensor], recipe: Recipe, about: dict) -> Field:
    box = Box.of(about.get("box"))
    extent = about["shape"] if box is None else box.extent
    return Field.from_state(recipe.field, extent, about["channels"], state, box)


def load_field(run: str | Path, device: torch.device | str = "cpu", mapped: bool = False) -> Trained:
    """The field of a run folder or a safetensors file. Raises UserError where there is no whole field.

    Of an equation with hard conditions the field's call gives u = lift + factor * (sum of its levels), also in jets; it
    raises UserError where the equation is gone or has changed. Channels after those of u are unknown coefficients.
    `mapped`: for reading alone. On a CPU its tensors then lie in the file, unless that is packed, and what is written
    to them may be lost (see `mapped.py`).
    """
    path = Path(run)
    if path.is_dir():
        path = path / "field.safetensors"
    if not path.is_file():
        raise UserError(f"{path}: no trained field; train the run to its end, or give a field.safetensors")
    try:
        state, metadata = read_file(path, mapped)
        tree = yaml.safe_load(metadata["recipe"])
        if not isinstance(tree, dict):
            raise KeyError("recipe")
        recipe = parse_recipe(tree, str(path))
        about = check_about(json.loads(metadata["about"]))
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not a field of this program, or cut short ({error}); export it again") from None
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix(f'{path}: ')}; export it again") from None
    return build_field(path, state, recipe, about, device)


def read_file(path: Path, mapped: bool = False) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Weights, and metadata with `recipe` and `about`, of a plain or a packed file."""
    tensors, metadata = map_tensors(path)
    if not mapped:
        tensors = {name: value.clone() for name, value in tensors.items()}
    if metadata.get("format") != codec.FORMAT:
        return tensors, metadata
    version = metadata.get("version", "")
    if version.isdigit() and int(version) > codec.VERSION:
        raise UserError(f"its format {version} is newer than this program's {codec.VERSION}, update the program")
    try:
        state, description = codec.unpack(tensors, metadata)
    except ValueError as error:
        raise UserError(f"its packed weights are damaged ({error})") from None
    return state, description


def build_field(path: Path, state: dict[str, torch.Tensor], recipe: Recipe, about: dict,
                device: torch.device | str = "cpu") -> Trained:
    """The field that a file's tensors are. UserError where they do not fit its recipe."""
    try:
        field = _field_of(state, recipe, about)
    except (RuntimeError, IndexError) as error:
        told = str(error).splitlines()[-1].strip()
        raise UserError(f"{path}: its weights do not fit its recipe ({told}); export it again") from None
    about["params"] = field.count_parameters()  # fewer in a packed file than were trained
    hard = recipe.problem.kind == "pde" and recipe.problem.constraints != "soft"
    if hard and about.get("constraint", ()) is not None:  # None: it was asked for, but nothing could be hard
        field.constraint = Constrained(recipe, about, str(path))
    return Trained(field.to(device).eval(), recipe, about)


def check_about(about) -> dict:
    """`about` as it was written, or UserError."""
    missing = [key for key in ABOUT if not isinstance(about, dict) or key not in about]
    if missing:
        raise UserError(f"its description lacks {', '.join(missing)}")
    whole = isinstance(about["shape"], list) and len(about["shape"]) == 2
    if not whole or not all(isinstance(n, int) and n > 0 for n in (*about["shape"], about["channels"])):
        raise UserError(f"its description gives the shape {about['shape']} and {about['channels']} channels")
    return about
