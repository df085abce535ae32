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


UPDATES = (
    "optimizer", "lr", "betas", "weight_decay", "schedule", "warmup", "final_lr", "clip", "ema", "sweep_every",
    "settle_rmse", "settle_every",
)  # fmt: skip


def idle(recipe: Recipe) -> list[str]:
    """One line for options that were given and do nothing beside the others."""
    lines = []

    def given(section: str, keys) -> str:
        options = getattr(recipe, section)
        found = [key for key in keys if key in options.model_fields_set and getattr(options, key) is not None]
        return ", ".join(f"{section}.{key}" for key in found)

    if not recipe.training.steps and (names := given("training", UPDATES)):
        lines.append(f"note: {names}: without effect, training.steps is 0")
    adapts = any(level.grow or getattr(level.network, "sparse", False) for level in recipe.field.levels)
    if recipe.problem.kind != "pde" and not (adapts and recipe.start.enabled):
        if names := given("target", ("psnr", "rmse", "params_per_px")):
            lines.append(f"note: {names}: without effect, no level adapts (`sparse: true` or `grow: true`, started)")
    others = [key for key in type(recipe.start).model_fields if key != "enabled"]
    if not recipe.start.enabled and (names := given("start", others)):
        lines.append(f"note: {names}: without effect, start.enabled is false")
    return lines


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
