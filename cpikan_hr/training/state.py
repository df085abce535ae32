"""Saving and loading what a run needs to go on exactly: parameters and optimizer state, in the backend's shards.

Invariant: after `load_state` the next update gives the same numbers as if the run had not been stopped, whatever the
backend. Accelerate's own `save_state` does that but for fields in files (`in_files.py`), which it would make whole
copies of in memory, and for optimizer state on NVMe: DeepSpeed 0.19.8 copies the swap files but restores neither
parameters nor the groups too small to be swapped, without a word. There each rank writes its own partition of fp32
weights and Adam moments instead, through DeepSpeed's tensor interface.

The folder is the caller's to name, complete and rename: nothing here is atomic. On NVMe only tensors are unpickled
(`weights_only`); Accelerate and DeepSpeed unpickle their files freely, so load only checkpoints you trust.
"""

from pathlib import Path

import torch
from accelerate import Accelerator

from cpikan_hr.errors import UserError
from cpikan_hr.solvers.file_adam import MOMENTS, FileAdam
from cpikan_hr.training.backend import offload_device
from cpikan_hr.training.in_files import ADAM, load_files, save_files
from cpikan_hr.training.update import Updater


def save_state(updater: Updater, folder: Path) -> None:
    """Writes the state into `folder`. Collective: every rank calls it.

    Raises: OSError (disk full, no permission).
    """
    if offload_device(updater.accelerator, "offload_optimizer") == "nvme":
        _save_partitions(updater, folder)
    elif isinstance(updater.optimizer.optimizer, FileAdam):
        save_files(updater.model, updater.optimizer.optimizer, folder)  # one process: it is not wrapped
    else:
        updater.accelerator.save_state(str(folder))
    if updater.average and updater.accelerator.is_main_process:
        updater.average.save(folder)


def load_state(updater: Updater, folder: Path) -> None:
    """Restores what `save_state` wrote, under the same backend and number of processes. Collective.

    Learning rate and step are the caller's: set `updater.steps`.

    Raises: UserError where the folder was written by another number of processes or another backend.
    """
    if offload_device(updater.accelerator, "offload_optimizer") == "nvme":
        _load_partitions(updater, folder)
    elif (folder / ADAM).is_file():
        load_files(updater.accelerator.unwrap_model(updater.model), updater.optimizer.optimizer, folder)
    else:
        updater.accelerator.load_state(str(folder))
    if updater.average:
        updater.average.load(folder)


def _partition_file(accelerator: Accelerator, folder: Path) -> Path:
    return folder / f"partition_{accelerator.process_index}_of_{accelerator.num_processes}.pt"


def _save_partitions(updater: Updater, folder: Path) -> None:
    from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_optimizer_state

    parameters = {}
    for name, parameter in updater.model.module.named_parameters():
        if not parameter.requires_grad:  # of tiles that have settled: it has no fp32 copy, nor moments
            parameters[name] = {"fp32": parameter.ds_tensor.clone()}
            continue
        # Views of swap buffers that the next call overwrites: copied at once.
        values = {"fp32": safe_get_local_fp32_param(parameter).clone()}
        for key in MOMENTS:
            values[key] = safe_get_local_optimizer_state(parameter, key).clone()
        parameters[name] = values
    counts = [state["step"] for state in _adam_states(updater)]
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"parameters": parameters, "adam_steps": counts}, _partition_file(updater.accelerator, folder))
    updater.accelerator.wait_for_everyone()


def _load_partitions(updater: Updater, folder: Path) -> None:
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    file = _partition_file(updater.accelerator, folder)
    if not file.is_file():
        raise UserError(f"{file}: not there; resume with the launch file and number of processes that wrote {folder}")
    saved = torch.load(file, weights_only=True)
    _create_moments(updater)
    for name, parameter in updater.model.module.named_parameters():
        values = saved["parameters"][name]
        if parameter.requires_grad:
            safe_set_local_fp32_param(parameter, values["fp32"])
            for key in MOMENTS:
                safe_set_local_optimizer_state(parameter, values[key], key)
        parameter.ds_tensor.data.copy_(values["fp32"].view_as(parameter.ds_tensor))  # what forward gathers
    for state, count in zip(_adam_states(updater), saved["adam_steps"], strict=True):
        state["step"] = count
    updater.accelerator.wait_for_everyone()


def _create_moments(updater: Updater) -> None:
    """Gives a fresh optimizer the moments that Adam would only create in its first step."""
    zero = updater.model.optimizer
    for index, group in enumerate(zero.fp32_partitioned_groups_flat):
        swapped = zero._swappable_optimizer_subgroup(index)
        if swapped:
            zero._optimizer_states_and_gradient_swap_in(index)
        state = zero.optimizer.state[group]
        for key in MOMENTS:
            state.setdefault(key, torch.zeros_like(group.data))
        if swapped:
            zero._optimizer_states_and_gradient_swap_out(index)


def _adam_states(updater: Updater) -> list[dict]:
    """DeepSpeedCPUAdam's state, one per sub-group of parameters, in the order of the sub-groups."""
    zero = updater.model.optimizer
    return [zero.optimizer.state[group] for group in zero.fp32_partitioned_groups_flat]
