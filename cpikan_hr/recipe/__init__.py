"""The recipe: every option of a run, typed once. YAML, command line and `docs/recipes.md` come from these classes.

Invariant: a recipe that loads is complete and of the right types; everything else is one `UserError` line that names
the key, the file and the nearest key that exists. This package imports nothing of the program but its errors, so that
every layer may name these types.
"""

from cpikan_hr.recipe.equations import (
    AttentionOptions,
    BalanceOptions,
    CausalOptions,
    MarchOptions,
    MeasurementOptions,
    PDEProblem,
    PointOptions,
    RefineOptions,
    SolveOptions,
)
from cpikan_hr.recipe.fields import (
    Chebyshev2DNetwork,
    CPIKANNetwork,
    FieldOptions,
    FourierMLPNetwork,
    LevelOptions,
    SIRENNetwork,
)
from cpikan_hr.recipe.loading import dump_recipe, load_recipe, parse_recipe
from cpikan_hr.recipe.problems import ImageProblem, InterferometryProblem
from cpikan_hr.recipe.section import Section
from cpikan_hr.recipe.training import BatchOptions, StartOptions, TargetOptions, TrainingOptions
from cpikan_hr.recipe.whole import Recipe

__all__ = [
    "AttentionOptions",
    "BalanceOptions",
    "BatchOptions",
    "CausalOptions",
    "CPIKANNetwork",
    "Chebyshev2DNetwork",
    "FieldOptions",
    "FourierMLPNetwork",
    "ImageProblem",
    "InterferometryProblem",
    "LevelOptions",
    "MarchOptions",
    "MeasurementOptions",
    "PDEProblem",
    "PointOptions",
    "Recipe",
    "RefineOptions",
    "SIRENNetwork",
    "Section",
    "SolveOptions",
    "StartOptions",
    "TargetOptions",
    "TrainingOptions",
    "dump_recipe",
    "load_recipe",
    "parse_recipe",
]
