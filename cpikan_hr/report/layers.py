"""One pass over the field, strip by strip: its values, and their error, residual and uncertainty over blocks of pixels.

Invariant: memory depends on the width of the map and on the side of the block maps, not on the number of pixels.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from cpikan_hr.data.once import Once
from cpikan_hr.data.source import Source
from cpikan_hr.fields import pixel_axis
from cpikan_hr.parallel import in_threads
from cpikan_hr.problems import Interferometry, Problem, build_problem
from cpikan_hr.quantities import data_mask, knows_sigma, quantity_of
from cpikan_hr.recipe import Recipe
from cpikan_hr.report.pyramid import shrink
from cpikan_hr.training.weights import Trained

SIDE = 1000  # pixels of a block map
STRIP = 2**19  # pixels of one strip


class Strip(NamedTuple):
    """Rows of the map from `y0` on, and the block maps' rows that belong to them (None where not available)."""

    y0: int
    value: np.ndarray  # float32 [h, W, C], NaN outside the mask
    small: np.ndarray  # float32 [h', w', C]: means over the blocks, as all below
    error: np.ndarray | None  # [h', w', 1]: value - reference, mean over the channels
    residual: np.ndarray | None  # [h', w', 1]: root mean square of the frames' residuals, in units of the noise
    sigma: np.ndarray | None  # [h', w', 1]: standard deviation of the value


def data_of(recipe: Recipe) -> Problem | None:
    """The run's data, None where they are no longer there. UserError where they are damaged."""
    options = recipe.problem
    place = getattr(options, "stack", None) or getattr(options, "path", None)
    return None if place is not None and not Path(place).exists() else build_problem(recipe)


def has_frames(problem: Problem | None) -> bool:
    """Whether there are frames to compare the field with."""
    return isinstance(problem, Interferometry)


def block_of(shape: tuple[int, int]) -> int:
    """Side of a block in px."""
    return -(-max(shape) // SIDE)


def strip_rows(shape: tuple[int, int]) -> int:
    """Rows of a strip: whole blocks."""
    block = block_of(shape)
    return block * max(1, STRIP // (shape[1] * block))


def strips(trained: Trained, problem: Problem | None, reference: Source | None, rendered: Once) -> Iterator[Strip]:
    """The strips from top to bottom."""
    field, recipe, about = trained
    height, width = about["shape"]
    block = block_of((height, width))
    rows = strip_rows((height, width))
    xs = pixel_axis(0, width)
    valid = data_mask(recipe, about)
    framed = has_frames(problem)
    deviation = quantity_of(trained, "sigma").block if framed and knows_sigma(recipe) else None

    def strip(y0: int) -> Strip:
        ys = pixel_axis(y0, min(y0 + rows, height))
        value = rendered.read(y0, y0 + len(ys), 0, width)
        outside = None if valid is None else ~valid(ys, xs)
        sigma = None if deviation is None else deviation(ys, xs)
        error = residual = None
        if reference is not None:
            truth = reference.read(y0, y0 + len(ys), 0, width).astype(np.float32)
            error = shrink((value - truth).mean(axis=2, keepdims=True), block)
        if framed:
            window = y0, y0 + len(ys), 0, width
            squared = np.square(problem.map("residual", window, value) / np.float32(recipe.problem.noise))
            if outside is not None:
                squared[outside] = np.nan
            residual = np.sqrt(shrink(squared, block))
        if outside is not None:
            value = np.where(outside[..., None], np.float32(np.nan), value)
        return Strip(y0, value, shrink(value, block), error, residual, None if sigma is None else shrink(sigma, block))

    yield from in_threads(strip, range(0, height, rows), field.device)


def precision(trained: Trained) -> float:
    """The step in which a map's values are stored: 1, 2 or 5 times a power of ten.

    At most a quarter of what the start left of the data, which is mostly their noise; without a start 1/4096 of the
    range.
    """
    field, _, about = trained
    levels = about.get("levels") or []
    if levels:
        fine = levels[-1]["rmse"] / 4
    else:
        lines = [torch.linspace(0.5, n - 0.5, 64, dtype=torch.float64, device=field.device) for n in field.extent]
        values = field.lattice(*lines)[0]
        fine = float(values.max() - values.min()) / 4096
    if not 0 < fine < math.inf:
        return 0.0
    power = 10.0 ** math.floor(math.log10(fine))
    return power * max(factor for factor in (1, 2, 5) if factor * power <= fine * (1 + 1e-9))
