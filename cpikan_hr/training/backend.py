"""The backend: from what `accelerate launch` left in the environment to an `Accelerator` that is what it says.

The launch file chooses the backend (one device, DDP, FSDP2, DeepSpeed ZeRO); the recipe chooses precision, accumulation
and clipping. Both meet here and nowhere else: for DeepSpeed the recipe's values are written into its configuration, so
that the two places cannot differ.

Invariants, checked before anything is trained:
  - every process of the launch is a rank of one process group, and Accelerate knows it (`_check_ranks`);
  - parameters and coordinates keep their own dtype: lower precision is autocast, never a cast of the module;
  - nothing here imports deepspeed before `DS_ACCELERATOR` and `TORCH_EXTENSIONS_DIR` are set.
"""

import atexit
import copy
import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType, InitProcessGroupKwargs

from cpikan_hr.errors import UserError
from cpikan_hr.processes import compute_device, flagged
from cpikan_hr.training import operators

PRECISIONS = ("no", "bf16", "fp16")
_AUTOCAST_DTYPE = {"bf16": "bfloat16", "fp16": "float16"}
# gloo's worker threads let go of the last collective's tensors a moment after it has returned. That takes the
# interpreter's lock, and CPython before 3.14 ends a thread that asks for it while shutting down: SIGABRT at the exit of
# one ZeRO-3 run in six. DeepSpeed keeps the groups alive, so the threads cannot be joined; they are given a moment.
_GLOO_GRACE_SECONDS = 0.2


def make_accelerator(
    *,
    precision: str | None = None,
    accumulate: int = 1,
    clip: float | None = None,
    offload_folder: Path | None = None,
    **accelerator_options: Any,
) -> Accelerator:
    """The one `Accelerator` of this process. Works under `accelerate launch` and, as one process, without it.

    Args:
        precision: "no", "bf16" or "fp16"; None takes what the launch file says.
        accumulate: micro-batches per optimizer step; their losses are averaged.
        clip: largest global gradient norm, None or 0 for no clipping (DeepSpeed clips by itself and is told so here).
        offload_folder: a relative nvme_path of the DeepSpeed file is taken from here (None: the current folder).
        accelerator_options: passed on to `Accelerator` (project_dir, log_with, ...).

    Raises: UserError for a combination this machine cannot run, and where processes do not form one group.
    """
    if precision not in (None, *PRECISIONS):
        raise UserError(f"precision {precision!r} is not one of {', '.join(PRECISIONS)}")
    gpu = compute_device().type == "cuda"
    deepspeed = flagged("ACCELERATE_USE_DEEPSPEED")
    if flagged("ACCELERATE_USE_FSDP") and not gpu:
        raise UserError(
            "FSDP2 needs a GPU (Accelerate offers it only beside an accelerator); "
            "on CPUs launch with accelerate_configs/zero3.yaml or ddp_cpu.yaml"
        )

    launched_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if deepspeed:
        config = _read_deepspeed_config()
        precision = precision or _precision_of_config(config, launched_precision)
    else:
        precision = precision or launched_precision
    if precision == "fp16" and (not gpu or deepspeed):
        where = "under DeepSpeed" if gpu else "on a CPU"
        raise UserError(f"precision fp16 is not offered {where}; use bf16, which needs no loss scaling")

    options: dict[str, Any] = {"gradient_accumulation_steps": accumulate, **accelerator_options}
    if not gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # Accelerate imports deepspeed, which asks for this, under every backend
    if deepspeed:
        # DeepSpeed calls these by their old names, once a step.
        warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
        if not gpu:
            # Without the backend's name Accelerate takes every rank for the only one when no GPU is present.
            options["kwargs_handlers"] = [*options.get("kwargs_handlers", ()), InitProcessGroupKwargs(backend="gloo")]
        operators.set_environment()
        operators.refuse_stale_locks()
        operators.ask_the_processor_once()
        _refuse_missing_libaio(config)
        plugin = DeepSpeedPlugin(hf_ds_config=_complete(config, precision, accumulate, clip, offload_folder))
        accelerator = Accelerator(mixed_precision="no", deepspeed_plugin=plugin, **options)
    else:
        # cpu=True gives DDP over gloo under torchrun; the backend's name alone would give unsynchronised models.
        accelerator = Accelerator(mixed_precision=precision, cpu=not gpu, **options)
    if accelerator.is_fsdp2:
        from torch.distributed.fsdp import MixedPrecisionPolicy  # takes time to import

        # Its own policy casts parameters and coordinates to 8 bits of mantissa; `Updater` autocasts, as others do.
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()
    accelerator.gradient_accumulation_steps = accumulate  # a launcher's option may have set another value
    _check_ranks(accelerator)
    if accelerator.num_processes > 1 and not gpu:
        atexit.register(time.sleep, _GLOO_GRACE_SECONDS)
    return accelerator


def precision_of(accelerator: Accelerator) -> str:
    """The autocast precision in use: "no", "bf16" or "fp16"; `accelerator.mixed_precision` is "no" under DeepSpeed."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return accelerator.mixed_precision
    return _precision_of_config(accelerator.deepspeed_plugin.deepspeed_config, "no")


def check_optimizer(accelerator: Accelerator, optimizer: torch.optim.Optimizer) -> None:
    """Under optimizer offload Accelerate replaces *any* optimizer by DeepSpeedCPUAdam, silently; only Adam may pass.

    Raises: UserError for another optimizer, or for AMSGrad/maximize, which DeepSpeedCPUAdam has not; and for one that
    needs the parameters' shapes where the backend shards them.
    """
    sharding = (DistributedType.DEEPSPEED, DistributedType.FSDP)
    if getattr(optimizer, "needs_shapes", False) and accelerator.distributed_type in sharding:
        raise UserError(
            f"optimizer {type(optimizer).__name__} needs whole parameters, DeepSpeed and FSDP2 would give it flat "
            "shards; use adam, or a launch file without sharding (ddp, ddp_cpu)"
        )
    if offload_device(accelerator, "offload_optimizer") == "none":
        return
    name = type(optimizer).__name__
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        raise UserError(
            f"optimizer {name} cannot be offloaded, DeepSpeed would train with Adam instead; "
            "use adam or adamw, or a launch file without offload"
        )
    if any(group.get("amsgrad") or group.get("maximize") for group in optimizer.param_groups):
        raise UserError(f"optimizer {name}: DeepSpeed's Adam on the host has no amsgrad or maximize; leave them out")


def offload_device(accelerator: Accelerator, section: str) -> str:
    """Where DeepSpeed keeps `section` ("offload_optimizer" or "offload_param"): "none", "cpu" or "nvme"."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return "none"
    zero = accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]
    return zero.get(section, {}).get("device", "none")


def full_state_dict(accelerator: Accelerator, model: torch.nn.Module) -> dict[str, torch.Tensor] | None:
    """The whole model's weights, in their own dtype (fp32), on the CPU of the main process; None on the others.

    Collective: every rank calls it, since ZeRO-3 and FSDP2 gather the shards. Names are those of the bare module.
    """
    state = accelerator.get_state_dict(model)
    if not accelerator.is_main_process:
        return None
    return {name.replace("_orig_mod.", ""): value.detach().to("cpu", copy=True) for name, value in state.items()}


# --- DeepSpeed's configuration ---


def _read_deepspeed_config() -> dict[str, Any]:
    name = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if name == "none":
        raise UserError("the launch file names no deepspeed_config_file; start from accelerate_configs/zero2.yaml")
    # Accelerate takes a relative path from the current folder; the checkout's own files should work from anywhere.
    candidates = (Path(name), Path(__file__).resolve().parents[2] / name)
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise UserError(f"deepspeed_config_file {name}: no such file; a relative path is taken from the current folder")
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(path)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: line {error.lineno} is not JSON: {error.msg}") from None
    if not isinstance(config, dict) or "zero_optimization" not in config:
        raise UserError(f"{path}: has no zero_optimization section; see ds_configs/zero2.json")
    for section in ("bf16", "fp16"):
        if config.get(section, {}).get("enabled"):
            raise UserError(
                f"{path}: {section}.enabled casts parameters and coordinates; "
                "remove it and set the recipe's precision, which autocasts"
            )
    if config["zero_optimization"].get("offload_param", {}).get("device") == "nvme":
        # Without fp16 hardware DeepSpeed 0.19.8 ignores the parameters' dtype and swaps them as bf16.
        raise UserError(f"{path}: offload_param.device nvme would round parameters to bf16; use cpu there")
    for section in ("optimizer", "scheduler"):
        if section in config:
            raise UserError(f"{path}: remove the {section} section; the recipe defines it for every backend")
    return config


def _precision_of_config(config: dict[str, Any], launched: str) -> str:
    if launched != "no":
        return launched
    autocast = config.get("torch_autocast", {})
    if not autocast.get("enabled"):
        return "no"
    return {dtype: name for name, dtype in _AUTOCAST_DTYPE.items()}.get(autocast.get("dtype"), "bf16")


def _complete(
    config: dict[str, Any], precision: str, accumulate: int, clip: float | None, offload_folder: Path | None
) -> dict[str, Any]:
    """The file's configuration with the recipe's values written in. `config` is left as it is."""
    config = copy.deepcopy(config)
    config["gradient_accumulation_steps"] = accumulate
    config["gradient_clipping"] = float(clip or 0.0)
    # Only bookkeeping in DeepSpeed (samples drawn are the sampler's affair), but it must fit the number of ranks.
    config["train_micro_batch_size_per_gpu"] = 1
    config.pop("train_batch_size", None)
    # An empty list of "safe" modules keeps the reduction of gradients in fp32; only the forward pass is autocast.
    config["torch_autocast"] = {
        "enabled": precision != "no",
        "dtype": _AUTOCAST_DTYPE.get(precision, "bfloat16"),
        "lower_precision_safe_modules": [],
    }
    offload = config["zero_optimization"].get("offload_optimizer", {})
    if offload.get("device") == "nvme" and not Path(offload.get("nvme_path", "")).is_absolute():
        folder = (offload_folder or Path()) / offload.get("nvme_path", "nvme")
        offload["nvme_path"] = str(folder.resolve())
    return config


def _refuse_missing_libaio(config: dict[str, Any]) -> None:
    if config["zero_optimization"].get("offload_optimizer", {}).get("device") == "nvme":
        if not operators.is_built("async_io") and not operators.libaio_headers():
            raise UserError("NVMe offload needs the async_io operator: apt-get install libaio-dev; make install")


# --- ranks ---


def _check_ranks(accelerator: Accelerator) -> None:
    """Launched, grouped and counted processes are the same number; else data would not be split and all would write."""
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    grouped = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    counted = accelerator.num_processes
    if not launched == grouped == counted:
        raise UserError(
            f"{launched} processes were launched, torch.distributed joins {grouped} and Accelerate counts {counted}: "
            "each would train alone; launch with a file of accelerate_configs/ and without --cpu"
        )
