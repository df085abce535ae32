"""Makes one file of a run, without the processes that wrote it: its newest checkpoint joined, or its field packed."""

import json
import tempfile
from pathlib import Path

import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from cpikan_hr.errors import UserError
from cpikan_hr.owned import refuse_foreign
from cpikan_hr.problems import keep_data
from cpikan_hr.recipe import Recipe, load_recipe
from cpikan_hr.training import checkpoints, ema
from cpikan_hr.training.tensors import load_tensors
from cpikan_hr.training.weights import (
    Trained,
    build_field,
    check_about,
    joined_state,
    load_field,
    save_field,
    save_packed,
)

PACKED = "field.packed.safetensors"
FSDP = "pytorch_model_fsdp_0"  # the folder of torch's sharded weights in a checkpoint


def export(run: Path, out: Path | None = None, bits: int | None = None, step: float | None = None) -> Path:
    """Writes `out` and returns it: with `bits` or `step` packed (see `codec.py`), else with exact weights.

    `run`: a folder, whose newest checkpoint is joined, or a field's file, which is packed or unpacked. By default `out`
    is RUN/field.safetensors, or field.packed.safetensors beside the field.
    Raises UserError where there is no field, no checkpoint can be joined, or nothing can be quantised.
    """
    folder = run if run.is_dir() else run.parent
    if bits is not None or step is not None:
        return pack(newest(run), out or folder / PACKED, bits, step)
    if run.is_file():
        if out is None:
            raise UserError(f"{run}: is one file already; give --bits or --step to pack it, or --out FILE to unpack it")
        field, recipe, about = load_field(run)
        state = field.state_dict()
    elif better := _handed_out(run):
        field, recipe, about = better
        state = field.state_dict()
    else:
        state, recipe, about = joined(run)
    out = out or run / "field.safetensors"
    keep_data(recipe, out)
    refuse_foreign(out)
    save_field(out, state, recipe, about)
    return out


def pack(trained: Trained, out: Path, bits: int | None, step: float | None) -> Path:
    """Writes `out` with quantised weights: the terms of sparse levels by `step`, everything else by `bits` (16)."""
    keep_data(trained.recipe, out)
    refuse_foreign(out)
    if "quantised" in trained.about:
        raise UserError(f"{out}: the field to pack is quantised already; give the exact one, a run's field.safetensors")
    save_packed(out, trained, bits or 16, step)
    return out


def newest(run: Path) -> Trained:
    """A file's field; of a run the one it ended with, or its newest checkpoint where it went on after that."""
    whole = checkpoints.complete(run) if run.is_dir() else []
    if not whole:
        return load_field(run)
    try:
        ended = load_field(run)
    except UserError:  # not there, or damaged
        ended = None
    if ended and ended.about.get("steps", -1) >= steps_of(whole[-1]) and _trained_by(run, ended.recipe):
        return ended
    state, recipe, about = joined(run)
    return build_field(whole[-1], state, recipe, about)


def _handed_out(run: Path) -> Trained | None:
    """The run's field where that is a better state than the one it ended with, which its checkpoint holds."""
    whole = checkpoints.complete(run)
    if not whole or not (run / "field.safetensors").is_file():
        return None
    ended = newest(run)
    checked = ended.about.get("checked", {})
    return ended if "field" in checked and checked["field"] != checked["end"] else None


def _trained_by(run: Path, recipe: Recipe) -> bool:
    """Whether the run's present recipe is the one of its field: another one may have begun in the same folder."""
    what = {"problem", "field", "start", "target", "batch"}
    return load_recipe(run / "recipe.yaml").model_dump(include=what) == recipe.model_dump(include=what)


def steps_of(checkpoint: Path) -> int:
    return int(checkpoint.name[5:])


def _joined_shards(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint written under FSDP2."""
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole.pt"
        try:
            dcp_to_torch_save(checkpoint / FSDP, whole)
            return torch.load(whole, weights_only=True)["model"]
        except Exception as error:  # each damaged or missing shard has an exception of its own
            raise _damaged(checkpoint, error) from None


def _damaged(checkpoint: Path, error: Exception) -> UserError:
    return UserError(f"{checkpoint}: its shards cannot be joined ({error}); remove it and export again")


def joined(run: Path) -> tuple[dict[str, torch.Tensor], Recipe, dict]:
    """The newest checkpoint's weights, the recipe and what describes the field."""
    whole = checkpoints.complete(run)
    if not whole:
        raise UserError(f"{run}: no checkpoint to export; set training.checkpoint_steps, or train to the end")
    newest = whole[-1]
    state = checkpoints.layout_of(run, newest)  # means, scales and chosen terms: not in every backend's shards
    if (newest / "model.safetensors").is_file():
        state |= load_tensors(newest / "model.safetensors")
    elif (newest / "latest").is_file():
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        try:
            state |= get_fp32_state_dict_from_zero_checkpoint(str(newest))
        except Exception as error:  # each damaged or missing shard has an exception of its own
            raise _damaged(newest, error) from None
    elif (newest / FSDP).is_dir():
        state |= _joined_shards(newest)
    else:
        raise UserError(f"{newest}: its shards can only be joined by resuming; train on with --resume auto")
    if (newest / ema.FILE).is_file():
        state |= load_tensors(newest / ema.FILE)
    try:
        about = check_about(json.loads((run / "about.json").read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{run / 'about.json'}: cannot be read ({error}); resume the training") from None
    about["steps"] = steps_of(newest)
    about.pop("checked", None)  # of other states
    recipe = load_recipe(run / "recipe.yaml")
    return joined_state(state, recipe, about), recipe, about
