"""What a map can show: the field and its derivatives at any point, or what the data say of it at their pixels.

`value`, `gradient`, `laplacian` are the field's own. `sigma` is its standard deviation (`solvers/uncertainty.py`); the
others are the problem's (`Problem.maps`). These are known at the data's pixels only, so a map of another scale shows
the nearest one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cpikan_hr.data.orientation import OrientedStack
from cpikan_hr.data.stack import open_stack
from cpikan_hr.errors import UserError
from cpikan_hr.fields import Field
from cpikan_hr.problems import Image, Interferometry, build_problem
from cpikan_hr.quantities_pde import equation_quantity
from cpikan_hr.recipe import Recipe
from cpikan_hr.solvers.texture import learn
from cpikan_hr.solvers.uncertainty import calibrate, standard_deviation
from cpikan_hr.training.weights import Trained

Mask = Callable[[Tensor, Tensor], np.ndarray]  # ascending float64 coordinates -> bool [h, w]
ORDERS = {"value": ("value", ""), "gradient": ("gradient", " / px"), "laplacian": ("laplacian", " / px^2")}
STARTED = "sigma is of the field as it was started; it does not know of the updates since"
NAMES = (*ORDERS, "sigma", *Interferometry.maps, "error")


@dataclass(frozen=True)
class Quantity:
    """`block(ys, xs)` gives float32 [h, w, channels] in `unit` at ascending float64 coordinates.

    `dtype`: what a map of it is written in.
    """

    unit: str
    channels: int
    block: Callable[[Tensor, Tensor], np.ndarray]
    dtype: type = np.float32


def quantity_of(trained: Trained, name: str) -> Quantity:
    """The quantity `name` of a trained field. UserError where its problem does not have it."""
    field, recipe, about = trained
    if recipe.problem.kind == "pde":
        return Quantity(*equation_quantity(trained, name))
    if name == "error":
        raise UserError("--quantity error: is for equations with a known answer; evaluate compares with a reference")
    if name in ORDERS:
        order, per = ORDERS[name]
        channels = about["channels"] * (2 if name == "gradient" else 1)
        return Quantity(about["unit"] + per, channels, lambda ys, xs: evaluate_field(field, ys, xs, order))
    if recipe.problem.kind != "interferometry":
        raise UserError(f"--quantity {name}: is for heights from frames; this problem is of kind {recipe.problem.kind}")
    problem = build_problem(recipe)
    shape = tuple(about["shape"])
    if name == "sigma":
        if not knows_sigma(recipe):
            raise UserError("--quantity sigma: comes from averaged quadtrees; train with start.shifts, e.g. 16")
        known = field, _sparse(recipe)[-1], problem.target, shape
        texture = learn(*known, recipe.start)
        factor = calibrate(*known, recipe.start, texture)

        def window_of(window):
            return standard_deviation(*known, window, recipe.start, factor, texture)[..., None]

        return Quantity(about["unit"], 1, _nearest(window_of, shape))

    def data_of(window):
        return problem.map(name, window, field.pixels(*window).permute(1, 2, 0).cpu().numpy())

    channels = problem.stack.J if name in ("background", "modulation") else 1
    return Quantity(problem.maps[name], channels, _nearest(data_of, shape), np.uint8 if name == "valid" else np.float32)


def evaluate_field(field: Field, ys: Tensor, xs: Tensor, quantity: str) -> np.ndarray:
    """float32 [h, w, C']: value (C), gradient (2 C: all d/dy, then all d/dx) or Laplacian (C), per source px."""
    rows = field.lattice(ys.to(field.device), xs.to(field.device), quantity)
    planes = torch.cat([rows[1], rows[2]]) if quantity == "gradient" else rows[0 if quantity == "value" else 3]
    return planes.permute(1, 2, 0).cpu().numpy()


def known_pixels(trained: Trained) -> Mask:
    """Where the frames tell the height, at the pixels nearest to output coordinates."""
    known = quantity_of(trained, "valid").block
    return lambda ys, xs: known(ys, xs)[..., 0] > 0


def data_mask(recipe: Recipe, about: dict) -> Mask | None:
    """The mask of a stack, or of a picture whose every pixel does not hold data, at the pixels nearest to output
    coordinates; None where there is none, or where it is gone with its data."""
    options = recipe.problem
    if options.kind == "image" and about.get("masked") and Image.is_there(options):
        picture = build_problem(recipe)
        return _nearest(lambda window: picture.mask(*window), picture.shape)
    if options.kind != "interferometry" or not Path(options.stack).exists():
        return None
    stack = OrientedStack(open_stack(options.stack), options.rotate, options.flip)
    return _nearest(lambda window: stack.mask(*window), stack.shape)


def full_range(about: dict) -> float | None:
    """What PSNRs of a picture refer to; None of heights, and of floats in runs that do not say it."""
    kind = np.dtype(about.get("dtype", "float32"))
    return about.get("range") or (float(np.iinfo(kind).max) if kind.kind == "u" else None)


def knows_sigma(recipe: Recipe) -> bool:
    """Whether the recipe's fields know their standard deviation: it comes from averaged quadtrees."""
    return recipe.problem.kind == "interferometry" and recipe.start.shifts > 0 and bool(_sparse(recipe))


def _sparse(recipe: Recipe) -> list[int]:
    return [k for k, level in enumerate(recipe.field.levels) if getattr(level.network, "sparse", False)]


def _nearest(window_of: Callable, shape: tuple[int, int]) -> Callable[[Tensor, Tensor], np.ndarray]:
    """Takes what is known at the pixels of a window to any coordinates inside the frame."""

    def block(ys: Tensor, xs: Tensor) -> np.ndarray:
        iy, ix = (axis.long().clamp(0, size - 1).numpy() for axis, size in zip((ys, xs), shape, strict=True))
        window = int(iy[0]), int(iy[-1]) + 1, int(ix[0]), int(ix[-1]) + 1
        return window_of(window)[iy - iy[0]][:, ix - ix[0]]

    return block
