"""The whole recipe of a run, and which of its sections go together."""

from typing import Annotated

from pydantic import Field, model_validator

from cpikan_hr.recipe.equations import PDEProblem, SolveOptions
from cpikan_hr.recipe.fields import FieldOptions
from cpikan_hr.recipe.problems import ImageProblem, InterferometryProblem
from cpikan_hr.recipe.section import Section
from cpikan_hr.recipe.training import BatchOptions, StartOptions, TargetOptions, TrainingOptions

Problem = Annotated[ImageProblem | InterferometryProblem | PDEProblem, Field(discriminator="kind")]


class Recipe(Section):
    """A run: what is learned, by which field, and how it is trained."""

    output: str = Field(description="run folder, created")
    resume: str = Field("auto", description="auto: newest checkpoint if there is one; never; or a checkpoint folder")
    problem: Problem
    field: FieldOptions
    start: StartOptions = StartOptions()
    target: TargetOptions = TargetOptions()
    batch: BatchOptions = BatchOptions()
    training: TrainingOptions = TrainingOptions()
    solve: SolveOptions = SolveOptions()

    @model_validator(mode="after")
    def _fits_together(self) -> "Recipe":
        if not self.swept_levels:
            for key, given in (
                ("start.sweeps", self.start.sweeps),
                ("training.sweep_every", self.training.sweep_every),
            ):
                if given:
                    raise ValueError(
                        f"'{key}': sweeps are over tiles that Gauss-Newton solves, and no level has `grow: true`, nor "
                        "are there `start.iterations` for its hidden layers"
                    )
        if self.problem.kind == "interferometry" and self.target.psnr is not None:
            raise ValueError("'target.psnr': heights have no full range: give target.rmse in nm")
        if self.problem.kind == "interferometry" and self.target.range is not None:
            raise ValueError("'target.range': is for pictures; leave it out")
        self._fits_equation() if self.problem.kind == "pde" else self._fits_pixels()
        return self

    def _fits_pixels(self) -> None:
        if self.solve.method != "none":
            raise ValueError("'solve': minimises an equation's residuals; pixels have `start` and `training`")
        if self.start.iterations and all(self.field.levels[k].grow for k in self.swept_levels):
            raise ValueError("'start.iterations': no level has hidden layers that do not grow; leave it out")
        for k, level in enumerate(self.field.levels):
            if level.grid is not None and len(level.grid) != 2:
                raise ValueError(f"'field.levels.{k}.grid': two numbers, [rows, columns]")
            if not level.scaled:
                raise ValueError(f"'field.levels.{k}.scaled': pixels are always scaled; leave it out")
        if self.field.precision == "double":
            raise ValueError("'field.precision': pixels are fitted in single precision; leave it out")

    def _fits_equation(self) -> None:
        if self.problem.attention and self.solve.redraw_every is not None:
            raise ValueError("'solve.redraw_every': `problem.attention` needs the same points throughout; leave it out")
        for k, level in enumerate(self.field.levels):
            if level.grid is None:
                raise ValueError(f"'field.levels.{k}': an equation's box has no px: give `grid`, tiles along each axis")
        for key in ("settle_rmse", "sweep_every"):
            if getattr(self.training, key) is not None:
                raise ValueError(f"'training.{key}': is for fields of pixels; leave it out")
        for key in ("psnr", "range", "rmse", "params_per_px"):
            if getattr(self.target, key) is not None:
                raise ValueError(f"'target.{key}': is for fields of pixels; leave it out")
        for key, given, default in (("start", self.start, StartOptions()), ("batch", self.batch, BatchOptions())):
            if given != default:
                raise ValueError(f"'{key}': is for fields of pixels; an equation has `problem.points`; leave it out")

    @property
    def swept_levels(self) -> list[int]:
        """Numbers of the levels whose hidden layers local solves iterate."""
        return [
            k for k, level in enumerate(self.field.levels)
            if level.grow or self.start.iterations and getattr(level.network, "hidden", None)
        ]  # fmt: skip

    @property
    def full_precision(self) -> bool:
        """Whether the loss sees phases or derivatives: 8 bits of a height are many wavelengths off."""
        if self.problem.kind != "image":
            return True
        return self.problem.laplacian > 0 or self.problem.variation > 0
