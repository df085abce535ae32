"""A picture as a field: u(x, y) is the sample value, in units of the file (0..255 for 8-bit pictures)."""

import math

import numpy as np
from torch import Tensor

from cpikan_hr.data.orientation import Oriented
from cpikan_hr.data.source import open_source
from cpikan_hr.errors import UserError
from cpikan_hr.jets import Jet
from cpikan_hr.problems.base import PixelProblem, Prior, Target
from cpikan_hr.recipe import ImageProblem

STRIP = 2**19  # pixels read at once where only every stride-th is kept


def strip_rows(height: int, width: int, stride: int) -> int:
    """Rows of a window to read at a time, a multiple of its stride; all of them where every pixel is kept."""
    return height if stride == 1 else stride * max(1, STRIP // (stride * width))


def _opened(options: ImageProblem):
    """The picture as its recipe sees its orientation tag; where that is not said, with a warning."""
    return open_source(options.path, upright=True if options.orientation == "file" else None)


class Image(PixelProblem):
    """Mean squared error of the samples, over the squared full range of the format."""

    def __init__(self, options: ImageProblem):
        self.options = options
        self.source = Oriented(_opened(options), options.rotate, options.flip)
        height, width, self.channels = self.source.shape
        self.shape = (height, width)
        self.unit = "grey levels" if self.source.dtype.kind == "u" else "1"
        self.dtype = self.source.dtype.name
        self.prior = Prior(options.laplacian, options.variation)
        self.order = self.prior.order
        # Pictures of floats have no full range of their own: 1 by convention.
        self.full_range = float(np.iinfo(self.source.dtype).max) if self.source.dtype.kind == "u" else 1.0

    def target(self, y0: int, y1: int, x0: int, x1: int, stride: int = 1) -> Target:
        rows = strip_rows(y1 - y0, x1 - x0, stride)
        strips = [
            self._read(y, min(y + rows, y1), x0, x1)[::stride, ::stride].astype(np.float32) for y in range(y0, y1, rows)
        ]
        values = strips[0] if len(strips) == 1 else np.concatenate(strips)
        return Target(values, np.ones(values.shape[:2], np.float32), None)

    def samples(self, y0, y1, x0, x1, iy, ix) -> dict[str, np.ndarray]:
        window = self._read(y0, y1, x0, x1)
        return {"values": window[iy - y0, ix - x0].astype(np.float32)}

    def _read(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        """The window [h, w, C]. UserError where a pixel is NaN or Inf."""
        window = self.source.read(y0, y1, x0, x1)
        if self.source.stored.kind in "iu" and window.dtype == np.float64:
            rounded = np.argwhere(window != window.astype(np.float32))
            if len(rounded):
                where = f"pixel ({y0 + rounded[0, 0]}, {x0 + rounded[0, 1]}) as seen"
                raise UserError(
                    f"{self.options.path}: {where} is {window[tuple(rounded[0])]:.0f}, which single precision rounds; "
                    "take an offset off, or save it as float32"
                )
        if window.dtype.kind == "f" and not np.isfinite(window.sum()):  # one pass; a NaN or Inf reaches the sum
            bad = np.argwhere(~np.isfinite(window))
            if len(bad):  # else a sum of finite numbers was too large
                where = f"pixel ({y0 + bad[0, 0]}, {x0 + bad[0, 1]}) as seen"
                raise UserError(f"{self.options.path}: {where} is not a finite number; mend the picture")
        return window

    def loss(self, jet: Jet, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        error = ((jet.value - batch["values"]) / self.full_range).square().mean(-1)
        return error + self.prior.penalty(jet, self.full_range), error

    def figure(self, mean_squared_error: float) -> tuple[str, float]:
        return "psnr_db", -10 * math.log10(max(mean_squared_error, 1e-20))

    def reference(self):
        return self.source
