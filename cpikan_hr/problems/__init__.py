"""What is known and what is asked: the loss terms, metrics and classical answer of each kind of problem."""

from pathlib import Path

from cpikan_hr.data.known import Known
from cpikan_hr.data.pages import split_page
from cpikan_hr.data.source import Source, open_source
from cpikan_hr.data.stack import keep_stack, open_stack
from cpikan_hr.errors import UserError
from cpikan_hr.problems.base import PixelProblem, Problem, Target
from cpikan_hr.problems.image import Image
from cpikan_hr.problems.interferometry import Interferometry, true_height
from cpikan_hr.problems.pde import PDE
from cpikan_hr.recipe import ImageProblem, InterferometryProblem, PDEProblem, Recipe

__all__ = [
    "PDE", "Image", "Interferometry", "PixelProblem", "Problem", "Target", "build_problem", "keep_data", "reference_of",
    "refuse_unit",
]  # fmt: skip


def build_problem(recipe: Recipe) -> Problem:
    """Opens the recipe's data; raises UserError where it cannot be used."""
    options = recipe.problem
    if isinstance(options, PDEProblem):
        return PDE(recipe)
    return Image(options, recipe.target.range) if isinstance(options, ImageProblem) else Interferometry(options)


def reference_of(recipe: Recipe, path: Path | None = None, unit: str | None = None) -> Source | None:
    """What a picture or height map is compared with: the map `path`, or the true answer of the recipe's data; None
    where that is not known. `unit`: of the heights, where the map does not say it. Nothing is decoded for it."""
    options = recipe.problem
    if isinstance(options, ImageProblem):
        refuse_unit(unit, "a picture")
        return _picture(recipe, path) if path else build_problem(recipe).reference()
    return true_height(options, path, unit)


def refuse_unit(unit: str | None, what: str) -> None:
    """UserError where a unit of heights is given for something else."""
    if unit is not None:
        raise UserError(f"--reference-unit {unit}: is for heights; the reference of {what} has none, leave it out")


def _picture(recipe: Recipe, path: Path) -> Source:
    """The picture `path`, NaN where it has no data, or where the run's own has none, if that is there."""
    source, mask = open_source(path), None
    if Image.is_there(recipe.problem):
        own = build_problem(recipe)
        mask = own.mask if own.may_lack and own.shape == source.shape[:2] else None
    return Known(source, source.nodata, mask)


def keep_data(recipe: Recipe, out: Path) -> None:
    """UserError where `out` would replace a file that the field was fitted to."""
    options = recipe.problem
    if isinstance(options, InterferometryProblem) and Path(options.stack).exists():
        keep_stack(open_stack(options.stack), out)
    elif isinstance(options, ImageProblem):
        for path, what in ((options.path, "picture"), (options.mask, "mask of the picture")):
            if path is not None and out.resolve() == split_page(path)[0].resolve():
                raise UserError(f"{out}: is the {what} that the field was fitted to; name another file")
