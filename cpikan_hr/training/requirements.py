"""What a recipe asks of the backend that the launch file chose, told before anything is written."""

from accelerate import Accelerator
from accelerate.utils import DistributedType

from cpikan_hr.errors import UserError
from cpikan_hr.recipe import Recipe


def whole_weights(accelerator: Accelerator) -> bool:
    """Whether every process holds the very parameters that are trained: single process and DDP."""
    return accelerator.distributed_type not in (DistributedType.DEEPSPEED, DistributedType.FSDP)


def hands_out(accelerator: Accelerator) -> bool:
    """Whether sharded weights and optimizer state can be gathered and handed out again (`shards.py`)."""
    if accelerator.distributed_type == DistributedType.FSDP:
        return True
    zero = accelerator.deepspeed_plugin.deepspeed_config["zero_optimization"]
    offload = zero.get("offload_optimizer", {})
    return zero.get("stage", 0) > 0 and offload.get("ratio", 1.0) == 1.0


def check_backend(recipe: Recipe, accelerator: Accelerator) -> None:
    """UserError for what needs whole, plain weights on every process where they are sharded or offloaded."""
    if whole_weights(accelerator):
        return
    needs = "needs whole weights on every process: launch with cpu, single_gpu or ddp,"
    for key in ("sweep_every", "settle_rmse"):
        if getattr(recipe.training, key) and not hands_out(accelerator):
            raise UserError(
                f"training.{key}: an optimizer offloaded in part and ZeRO stage 0 do not hand out what they hold; "
                "launch with another file, as zero3 or ddp, or leave it out"
            )
    if recipe.solve.method != "none":
        raise UserError(f"solve.method {recipe.solve.method} {needs} or train with adam")
    if getattr(recipe.problem, "balance", None):
        raise UserError(f"problem.balance {needs} or give problem.weights")
    if recipe.field.precision == "double":
        raise UserError("field.precision double: DeepSpeed and FSDP2 train in single: launch with cpu, single_gpu or "
                        "ddp, or give single")  # fmt: skip
