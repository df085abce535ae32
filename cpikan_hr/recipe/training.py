"""How a field is started and trained."""

from typing import Literal

from pydantic import Field, model_validator

from cpikan_hr.recipe.section import Section


class StartOptions(Section):
    """Closed-form start: per-tile least squares of each level's linear layer, coarse to fine, before training."""

    enabled: bool = Field(True, description="off: networks start as initialised, tiles normalised by the data range")
    threshold: float = Field(
        3.0, ge=0, description="sparse chebyshev2d: drop terms below so many standard errors of the noise"
    )
    shifts: int = Field(
        0,
        ge=0,
        le=64,
        description="sparse chebyshev2d, noise known: average so many shifted quadtrees before terms are chosen; "
        "`threshold` may then be below 1",
    )
    wiener: int = Field(
        0,
        ge=0,
        le=64,
        description="after `shifts`: a second average, of so many quadtrees whose terms are shrunk by what the first "
        "says they hold (Wiener); it keeps fine texture that `shifted_threshold` drops",
    )
    texture: bool = Field(
        False,
        description="`wiener` also learns what terms hold from the surface itself, which looks alike everywhere: for "
        "measured textures below the noise, not for dies with steps",
    )
    shifted_threshold: float = Field(2.8, gt=0, description="what `threshold` is in each of the shifted quadtrees")
    iterations: int = Field(
        0,
        ge=0,
        description="Gauss-Newton iterations of each tile that neither grows nor is linear, all its layers, after the "
        "least squares of the last one",
    )
    sweeps: int = Field(
        0,
        ge=0,
        description="coloured sweeps over the tiles that Gauss-Newton solved (grown, or by `iterations`) after the "
        "start, so that neighbours see each other",
    )
    ridge: float = Field(1e-6, gt=0, description="relative Tikhonov term of the normal equations")

    @model_validator(mode="after")
    def _averages(self) -> "StartOptions":
        if self.texture and not (self.shifts and self.wiener):
            raise ValueError("`texture`: is learnt for the second average: give `shifts` and `wiener`, e.g. 8 and 12")
        return self


class TargetOptions(Section):
    """What adaptive levels aim at; all null: only the noise limits them (`start.threshold`)."""

    psnr: float | None = Field(None, gt=0, description="dB of a picture, over its `range`")
    range: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="what a PSNR refers to, here and in `evaluate` (null: 255 for 8 bits; else what a TIFF says; for "
        "16 bits 255, 1023, 4095, 16383 or 65535, the least that holds the values; for floats their range)",
    )
    rmse: float | None = Field(None, gt=0, description="in the unit of the field")
    params_per_px: float | None = Field(None, gt=0, description="most parameters per pixel and channel")
    seconds: float | None = Field(
        None,
        gt=0,
        description="wall time of the whole run: passes, sweeps and training end with it; "
        "alone, it allows 0.25 parameters per pixel and channel",
    )


class BatchOptions(Section):
    """One update sees `blocks` windows of the picture and draws one pixel from each stride x stride square of them."""

    blocks: int = Field(16, ge=1, description="windows per update over all processes and accumulation steps")
    size: int = Field(256, ge=8, description="side of a window in px")
    stride: int = Field(4, ge=1, description="side of the squares one pixel is drawn from; 1: every pixel")


class TrainingOptions(Section):
    steps: int = Field(200, ge=0, description="optimizer updates")
    seed: int = Field(0, ge=0, description="of weights, pixels and order")
    optimizer: Literal["adam", "adamw", "nadam", "radam", "adamax", "rmsprop", "sgd", "soap"] = Field(
        "adam", description="torch.optim's; soap: pytorch-optimizer's, not under DeepSpeed or FSDP2"
    )
    lr: float = Field(1e-3, gt=0, description="peak learning rate")
    betas: tuple[float, float] = Field((0.9, 0.99), description="moment decay of the Adam family and of soap")
    weight_decay: float = Field(0.0, ge=0, description="decoupled for adamw and soap, L2 otherwise")
    schedule: Literal["constant", "cosine", "exponential"] = Field("cosine", description="decay after the warm-up")
    warmup: int = Field(10, ge=0, description="updates of linear warm-up")
    final_lr: float = Field(0.01, gt=0, le=1, description="learning rate at the end over the peak")
    accumulate: int = Field(1, ge=1, description="micro-batches per update")
    clip: float | None = Field(None, gt=0, description="largest gradient norm (null: off)")
    ema: float | None = Field(None, gt=0, lt=1, description="decay of the averaged weights that are kept (null: off)")
    precision: Literal["no", "bf16", "fp16"] | None = Field(
        None,
        description="mixed precision (null: as the accelerate file says); interferometry and derivatives stay fp32",
    )
    memory_mb: float | None = Field(
        64.0,
        ge=0,
        description="a field whose weights, gradients and moments take more is trained in temporary files, by one "
        "process with adam or adamw on a CPU, without ema, sweeps or settling (null: always in memory)",
    )
    sweep_every: int | None = Field(
        None, ge=1, description="updates between sweeps of local solves over such tiles as `start.sweeps` (null: off)"
    )
    settle_rmse: float | None = Field(
        None,
        gt=0,
        description="tiles leave the training where the field's error under their window, root mean square in its "
        "unit (grey levels, nm), is at or below this; the run ends when all have (null: off)",
    )
    settle_every: int = Field(
        200, ge=1, description="updates between looks at which tiles may leave, the first before the first update"
    )
    log_every: int = Field(10, ge=1, description="updates between lines of metrics.jsonl")
    checkpoint_steps: int | None = Field(None, ge=1, description="updates between checkpoints (null: off)")
    checkpoint_minutes: float | None = Field(10.0, gt=0, description="minutes between checkpoints (null: off)")
    keep: int = Field(2, ge=1, description="checkpoints kept")
