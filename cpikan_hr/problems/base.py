"""What the loop asks of a problem.

Invariant: everything is read window by window, and a batch is a pure function of the pixels it is asked for.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cpikan_hr.jets import Jet

Window = tuple[int, int, int, int]  # y0, y1, x0, x1: rows and columns of the frame


class Target(NamedTuple):
    """A direct estimate of the field on the pixels of a window, for the closed-form start."""

    values: np.ndarray  # float32 [h, w, C], in the field's unit
    weight: np.ndarray  # float32 [h, w]: 0 where nothing is known
    noise: np.ndarray | None  # float32 [h, w]: standard deviation of `values`, where a noise model gives one


class Problem(ABC):
    """A domain [0, H] x [0, W] in px, `channels` outputs in `unit`, and a loss on samples."""

    shape: tuple[int, int]
    channels: int
    unit: str
    order: str  # the jet the loss needs: value, gradient, laplacian or hessian
    pixel_pitch_um: float | None = None
    dtype: str = "float32"  # of a rendered map
    full_range: float = 1.0  # what a PSNR refers to
    maps: Mapping[str, str] = {}  # further maps that the data give once the field is known, and their units

    @abstractmethod
    def target(self, y0: int, y1: int, x0: int, x1: int, stride: int = 1) -> Target:
        """A direct estimate on every stride-th pixel of the window, from (y0, x0) on."""

    @abstractmethod
    def samples(self, y0: int, y1: int, x0: int, x1: int, iy: np.ndarray, ix: np.ndarray) -> dict[str, np.ndarray]:
        """The data at pixels (iy, ix) [n] of the frame, all inside the window, which is read as a whole.

        Returns arrays with leading dimension n.
        """

    @abstractmethod
    def loss(self, jet: Jet, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The loss of each point [n] and the squared error [n] that `figure` turns into the number shown.

        jet: rows [R, n, C]. Points that carry no information have zero in both.
        """

    @abstractmethod
    def figure(self, mean_squared_error: float) -> tuple[str, float]:
        """Name and value of the figure of merit on the progress bar."""

    def about(self) -> dict:
        """What was found out about the data, as plain values that are kept with the run."""
        return {}

    def note(self) -> str | None:
        """The same for the user, told once; None where there is nothing to say."""
        return None

    def map(self, name: str, window: Window, values: np.ndarray) -> np.ndarray:
        """One of `maps` at the pixels of a window, float32 [h, w, C']; NaN where unknown. values: the field there."""
        raise KeyError(name)

    def reference(self):
        """The true answer as a `Source`, None where it is not known."""
        return None


def smoothness(jet: Jet, weight: float) -> Tensor | float:
    """weight * mean over channels of the squared Laplacian, per point [n] (units of the field per px^2)."""
    return weight * jet.laplacian.square().mean(-1) if weight else 0.0


def pixel_centres(iy: np.ndarray, ix: np.ndarray) -> Tensor:
    """Domain coordinates float64 [n, 2] of pixel centres."""
    return torch.from_numpy(np.stack([iy, ix], axis=-1) + 0.5)
