"""Consolidates the newest checkpoint of a run into `field.safetensors`, without the processes that wrote it."""

import json
from pathlib import Path

from cpikan_hr.errors import UserError
from cpikan_hr.recipe import load_recipe
from cpikan_hr.training import checkpoints, ema
from cpikan_hr.training.weights import check_about, load_tensors, save_field


def export(run: Path, out: Path | None = None) -> Path:
    """Writes `out` (default: RUN/field.safetensors). Raises UserError where no checkpoint can be joined."""
    whole = checkpoints.complete(run)
    if not whole:
        raise UserError(f"{run}: no checkpoint to export; set training.checkpoint_steps, or train to the end")
    newest, out = whole[-1], out or run / "field.safetensors"
    state = load_tensors(run / "start.safetensors")  # means, scales and chosen terms: not in every backend's shards
    if (newest / "model.safetensors").is_file():
        state |= load_tensors(newest / "model.safetensors")
    elif (newest / "latest").is_file():
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

        try:
            state |= get_fp32_state_dict_from_zero_checkpoint(str(newest))
        except Exception as error:  # each damaged or missing shard has an exception of its own
            raise UserError(f"{newest}: its shards cannot be joined ({error}); remove it and export again") from None
    else:
        raise UserError(f"{newest}: its shards can only be joined by resuming; train on with --resume auto")
    if (newest / ema.FILE).is_file():
        state |= load_tensors(newest / ema.FILE)
    try:
        about = check_about(json.loads((run / "about.json").read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"{run / 'about.json'}: cannot be read ({error}); resume the training") from None
    about["steps"] = int(newest.name[5:])
    save_field(out, state, load_recipe(run / "recipe.yaml"), about)
    return out
