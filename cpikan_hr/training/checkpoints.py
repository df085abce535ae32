"""Sharded checkpoints of a run: `RUN/checkpoints/step_00000100`, complete once its folder has its name.

Every rank writes its shards into `NAME.part`; when all have, the main process renames the folder and then removes the
oldest. A run that is killed while it saves leaves the earlier checkpoints as they were.
"""

import os
import shutil
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from cpikan_hr.errors import UserError
from cpikan_hr.fields import Field
from cpikan_hr.files import writing
from cpikan_hr.processes import Processes
from cpikan_hr.training.best import link_best
from cpikan_hr.training.state import load_state, save_state
from cpikan_hr.training.tensors import load_tensors, save_tensors
from cpikan_hr.training.update import Updater

LAYOUT = "layout.safetensors"  # in a checkpoint's folder, where tiles have settled
SOLVE = "solve.safetensors"  # what a second-order solver resumes from
BATCHES = "batches.safetensors"  # where points and weights follow from earlier updates


def save(updater: Updater, run: Path, keep: int, batches: dict[str, torch.Tensor]) -> None:
    """Collective. Writes the checkpoint of `updater.steps` and keeps the newest `keep`.

    `batches`: what updates to come need beside the step.
    """
    final = run / "checkpoints" / f"step_{updater.steps:08d}"
    part = final.with_name(final.name + ".part")
    accelerator = updater.accelerator
    if final.exists():
        return
    ranks = processes_of(accelerator)
    try:
        with ranks.together(), writing(final):
            if accelerator.is_main_process:
                shutil.rmtree(part, ignore_errors=True)
                part.mkdir(parents=True)
        # DeepSpeed and FSDP wait for each other inside: a rank that fails there ends, and the launcher ends the others.
        sharded = accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP)
        with nullcontext() if sharded else ranks.together(), writing(final):
            save_state(updater, part)
            field = accelerator.unwrap_model(updater.model)
            if accelerator.is_main_process and getattr(field, "settled", None):
                save_tensors(part / LAYOUT, field.layout())
            if accelerator.is_main_process:
                link_best(run, part)
            if accelerator.is_main_process and batches:
                save_tensors(part / BATCHES, batches)
        with ranks.together():
            pass  # all have written: DeepSpeed lets the main process go before the others are done
        with ranks.together(), writing(final):
            if accelerator.is_main_process:
                _complete(part, run, keep)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def layout_of(run: Path, checkpoint: Path) -> dict[str, torch.Tensor]:
    """What `Field.layout` was when the checkpoint was written: that of the start, until tiles had settled."""
    path = checkpoint / LAYOUT
    return load_tensors(path if path.is_file() else run / "start.safetensors")


def step_of(checkpoint: Path) -> int:
    """The update or iteration that a checkpoint was written after."""
    return int(checkpoint.name[5:])


def is_second_order(checkpoint: Path) -> bool:
    """Whether it was written after the updates, by a second-order solver."""
    return (checkpoint / SOLVE).is_file()


def save_second_order(
    run: Path,
    step: int,
    state: dict[str, torch.Tensor],
    batches: dict[str, torch.Tensor],
    field: Field,
    processes: Processes,
    keep: int,
) -> None:
    """Collective. The same for a second-order solver, whose state and field are alike on all processes."""
    final = run / "checkpoints" / f"step_{step:08d}"
    part = final.with_name(final.name + ".part")
    with processes.together(), writing(final):
        if processes.rank:
            return
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save_tensors(part / SOLVE, state)
        link_best(run, part)
        if batches:
            save_tensors(part / BATCHES, batches)
        save_tensors(part / "model.safetensors", field.state_dict())  # for `export`
        _complete(part, run, keep)


def _complete(part: Path, run: Path, keep: int) -> None:
    """Gives a whole checkpoint its name, in place of one that a run resumed before it left, and removes the oldest."""
    os.sync()
    final, former = part.with_suffix(""), part.with_suffix(".former.part")
    if final.exists():
        final.rename(former)
    part.rename(final)
    shutil.rmtree(former, ignore_errors=True)
    for old in complete(run)[:-keep]:
        shutil.rmtree(old)


def batches_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """What a checkpoint was given as `batches`."""
    path = checkpoint / BATCHES
    return load_tensors(path) if path.is_file() else {}


def processes_of(accelerator: Accelerator) -> Processes:
    return Processes(accelerator.process_index, accelerator.num_processes, accelerator.device)


def complete(run: Path) -> list[Path]:
    """The run's whole checkpoints, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step_*") if path.name[5:].isdigit())


def choose(run: Path, resume: str) -> Path | None:
    """The checkpoint `--resume auto|never|PATH` asks for. Raises UserError for a path that is none."""
    if resume == "never":
        return None
    if resume == "auto":
        return (complete(run) or [None])[-1]
    path = Path(resume)
    if not path.is_dir() or not path.name.startswith("step_"):
        raise UserError(f"resume: {path} is not a checkpoint; give auto, never or a folder RUN/checkpoints/step_...")
    return path


def load(updater: Updater, checkpoint: Path) -> None:
    """Collective. Restores weights, optimizer state and step."""
    model = updater.accelerator.unwrap_model(updater.model)
    completed = model.register_load_state_dict_pre_hook(_with_empty_buffers)
    try:
        load_state(updater, checkpoint)
    except UserError:
        raise
    except Exception as error:  # safetensors, torch, pickle and DeepSpeed each have their own words for a damaged file
        told = str(error).strip() or type(error).__name__
        raise UserError(
            f"{checkpoint}: cannot be resumed from ({told[:200]}); remove it, or give another --resume"
        ) from error
    finally:
        completed.remove()
    updater.steps = step_of(checkpoint)


def _with_empty_buffers(model: torch.nn.Module, state: dict, prefix: str, *_) -> None:
    """Accelerate takes empty tensors (leaf sizes without a tile) for shared ones, and saves only the first."""
    for name, buffer in model.named_buffers():
        if not buffer.numel():
            state.setdefault(prefix + name, buffer)
