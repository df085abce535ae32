"""What a recipe asks of the backend that the launch file chose, told before anything is written."""

from accelerate import Accelerator
from accelerate.utils import DistributedType

from cpikan_hr.errors import UserError
from cpikan_hr.recipe import Recipe
from cpikan_hr.training.backend import offload_device


def whole_weights(accelerator: Accelerator) -> bool:
    """Whether every process holds the very parameters that are trained: single process and DDP."""
    return accelerator.distributed_type not in (DistributedType.DEEPSPEED, DistributedType.FSDP)


def check_backend(recipe: Recipe, accelerator: Accelerator) -> None:
    """UserError for what needs whole, plain weights on every process where they are sharded or offloaded."""
    if whole_weights(accelerator):
        return
    needs = "needs whole weights on every process: launch with cpu, single_gpu or ddp,"
    fixed = (
        accelerator.distributed_type == DistributedType.FSDP
        or offload_device(accelerator, "offload_optimizer") == "nvme"
    )
    for key in ("sweep_every", "settle_rmse"):
        if fixed and getattr(recipe.training, key):
            raise UserError(
                f"training.{key}: FSDP2 and an optimizer on NVMe do not hand out what they hold; launch with another "
                "file, as zero3 or ddp, or leave it out"
            )
    if recipe.solve.method != "none":
        raise UserError(f"solve.method {recipe.solve.method} {needs} or train with adam")
    if getattr(recipe.problem, "balance", None):
        raise UserError(f"problem.balance {needs} or give problem.weights")
    if recipe.field.precision == "double":
        raise UserError("field.precision double: DeepSpeed and FSDP2 train in single: launch with cpu, single_gpu or "
                        "ddp, or give single")  # fmt: skip
