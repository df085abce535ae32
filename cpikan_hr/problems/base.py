"""What the loop asks of a problem.

Invariant: everything is read window by window, and a batch is a pure function of the pixels it is asked for.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpikan_hr.fields import Box, Field
from cpikan_hr.jets import Jet, pairs
from cpikan_hr.problems.batches import Batches, PixelBatches
from cpikan_hr.recipe import Recipe

SEEN = 2**22  # pixels whose tiles are evaluated together for a preview
SMOOTH = 1e-3  # per px^2: a Hessian below it counts by its square

Window = tuple[int, int, int, int]  # y0, y1, x0, x1: rows and columns of the frame


class Target(NamedTuple):
    """A direct estimate of the field on the pixels of a window, for the closed-form start."""

    values: np.ndarray  # float32 [h, w, C], in the field's unit
    weight: np.ndarray  # float32 [h, w]: 0 where nothing is known
    noise: np.ndarray | None  # float32 [h, w]: standard deviation of `values`, where a noise model gives one


class Problem(ABC):
    """`channels` outputs in `unit` on a domain, and a loss on what an update sees of it."""

    shape: tuple[int, int]  # of a rendered map
    channels: int
    unit: str
    order: str  # the jet the loss needs: value, gradient, laplacian or hessian
    box: Box | None = None  # the domain where it is not [0, H] x [0, W] in px
    pixel_pitch_um: float | None = None
    dtype: str = "float32"  # of a rendered map
    full_range: float = 1.0  # what a PSNR refers to
    maps: Mapping[str, str] = {}  # further maps that the data give once the field is known, and their units

    @property
    def extent(self) -> tuple[float, ...]:
        """Length of the domain along each axis."""
        return self.shape if self.box is None else self.box.extent

    @abstractmethod
    def batches(self, recipe: Recipe) -> Batches:
        """What the updates of a run see."""

    @abstractmethod
    def loss(self, jet: Jet, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The loss of each point [n] and the squared error [n] that `figure` turns into the number shown.

        jet: rows [R, n, C]. Points that carry no information have zero in both.
        """

    def misfit(self, jet: Jet, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """`loss` by which states of a run are compared: free of weights that the training itself changes."""
        return self.loss(jet, batch)

    @property
    def judged(self) -> bool:
        """Whether `misfit` is what the training lowers, so that it tells which of two states is the better one."""
        return True

    @abstractmethod
    def figure(self, mean_squared_error: float) -> tuple[str, float]:
        """Name and value of the figure of merit on the progress bar."""

    @abstractmethod
    def picture(self, field: Field, side: int) -> np.ndarray:
        """A preview of the field [h, w, C], float32, with at most `side` points along an axis."""

    def about(self) -> dict:
        """What was found out about the data, as plain values that are kept with the run."""
        return {}

    def told(self, field: Field) -> dict[str, float]:
        """Further numbers for the log, by a field that holds whole weights."""
        return {}

    def note(self) -> str | None:
        """The same for the user, told once; None where there is nothing to say."""
        return None

    def fault(self, jet: Jet, batch: dict[str, Tensor]) -> str | None:
        """Where and why the loss of a jet is not finite, in words; None where the problem cannot say."""
        return None

    def reference(self):
        """The true answer as a `Source`, None where it is not known."""
        return None


class PixelProblem(Problem):
    """What is known at the pixels of a frame, [0, H] x [0, W] in px."""

    def batches(self, recipe: Recipe) -> Batches:
        return PixelBatches(self, recipe.batch, recipe.training.seed)

    def picture(self, field: Field, side: int) -> np.ndarray:
        # Tiles of a power of two see every pixel of such a stride alike, which is many times as fast as any other.
        stride = 2 ** max(0, math.ceil(math.log2(max(self.shape) / side)))
        height, width = self.shape
        rows = max(1, SEEN // (width * stride)) * stride
        strips = [field.pixels(y, min(y + rows, height), 0, width, stride=stride) for y in range(0, height, rows)]
        return torch.cat(strips, dim=1).permute(1, 2, 0).cpu().numpy()

    @abstractmethod
    def target(self, y0: int, y1: int, x0: int, x1: int, stride: int = 1) -> Target:
        """A direct estimate on every stride-th pixel of the window, from (y0, x0) on."""

    def kept_target(self) -> Callable[..., Target]:
        """`target` for many passes over the frame; not reckoned anew in each where that takes long."""
        return self.target

    @abstractmethod
    def samples(self, y0: int, y1: int, x0: int, x1: int, iy: np.ndarray, ix: np.ndarray) -> dict[str, np.ndarray]:
        """The data at pixels (iy, ix) [n] of the frame, all inside the window, which is read as a whole.

        Returns arrays with leading dimension n.
        """

    def map(self, name: str, window: Window, values: np.ndarray) -> np.ndarray:
        """One of `maps` at the pixels of a window, float32 [h, w, C']; NaN where unknown. values: the field there."""
        raise KeyError(name)


class Prior(NamedTuple):
    """Weights of the regularisers on the field's derivatives, per px; both zero: none."""

    laplacian: float = 0.0
    variation: float = 0.0

    @property
    def order(self) -> str:
        """The jet that it needs."""
        return "hessian" if self.variation else "laplacian" if self.laplacian else "value"

    def penalty(self, jet: Jet, unit: float = 1.0) -> Tensor | float:
        """Mean over channels per point [n]: weights times the squared Laplacian and the norm of the Hessian.

        The norm is the integrand of the gradient's total variation (Chambolle and Lions 1997): linear in a kink's
        angle, so that edges are not rounded off as the square would; smooth below `SMOOTH`. unit: what counts as one.
        """
        out = 0.0
        if self.laplacian:
            out = out + self.laplacian * (jet.laplacian / unit).square().mean(-1)
        if self.variation:
            weights = [1.0 if i == j else 2.0 for i, j in pairs(jet.dim)]
            squares = (jet.hessian / unit).square() * jet.rows.new_tensor(weights)[:, None, None]
            out = out + self.variation * ((squares.sum(-3) + SMOOTH**2).sqrt() - SMOOTH).mean(-1)
        return out
