"""A picture as a field: u(x, y) is the sample value, in units of the file (0..255 for 8-bit pictures)."""

import math
from contextlib import closing
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from cpikan_hr.data.heights import WindowMask
from cpikan_hr.data.known import Known
from cpikan_hr.data.masks import Mask
from cpikan_hr.data.orientation import Oriented
from cpikan_hr.data.pages import split_page
from cpikan_hr.data.source import open_source
from cpikan_hr.errors import UserError
from cpikan_hr.jets import Jet
from cpikan_hr.parallel import in_threads
from cpikan_hr.problems.base import PixelProblem, Prior, Target
from cpikan_hr.recipe import ImageProblem

STRIP = 2**19  # pixels read at once where few of them, or none, are kept
DEPTHS = (8, 10, 12, 14, 16)  # bits of the samples that 16-bit files hold


def strip_rows(height: int, width: int, stride: int) -> int:
    """Rows of a window to read at a time, a multiple of its stride; all of them where every pixel is kept."""
    return height if stride == 1 else stride * max(1, STRIP // (stride * width))


def _opened(options: ImageProblem):
    """The picture as its recipe sees its orientation tag; where that is not said, with a warning."""
    return open_source(options.path, upright=True if options.orientation == "file" else None)


class Image(PixelProblem):
    """Mean squared error of the samples, over the squared range of the picture; pixels without data count nowhere."""

    def __init__(self, options: ImageProblem, range: float | None = None):
        """`range`: what a PSNR refers to; None: see `full_range`."""
        self.options, self._given = options, range
        self.stored = _opened(options)
        self.nodata = self.stored.nodata if options.nodata is None else options.nodata
        self.source = Oriented(Known(self.stored, self.nodata, self._mask_file()), options.rotate, options.flip)
        height, width, self.channels = self.source.shape
        self.shape = (height, width)
        self.unit = "grey levels" if self.stored.dtype.kind == "u" else "1"
        self.dtype = self.stored.dtype.name
        self.prior = Prior(options.laplacian, options.variation)
        self.order = self.prior.order
        self.may_lack = self.stored.dtype.kind != "u" or self.nodata is not None or options.mask is not None

    @staticmethod
    def is_there(options: ImageProblem) -> bool:
        """Whether the picture and its mask still are."""
        return all(path is None or split_page(path)[0].exists() for path in (options.path, options.mask))

    def _mask_file(self) -> WindowMask | None:
        return None if self.options.mask is None else Mask(Path(self.options.mask), self.stored.shape[:2]).read

    @cached_property
    def limits(self) -> tuple[float, float, int]:
        """Least and largest value of the pixels with data, and their number, by one pass over the picture."""
        height, width = self.shape
        rows = max(1, STRIP // width)

        def strip(y: int) -> tuple[float, float, int]:
            values = self.source.read(y, min(y + rows, height), 0, width)
            known = values[np.isfinite(values[..., 0])]
            return float(known.min(initial=math.inf)), float(known.max(initial=-math.inf)), len(known)

        with closing(in_threads(strip, range(0, height, rows))) as strips:
            low, high, count = zip(*strips, strict=True)
        if not sum(count):
            raise UserError(f"{self.options.path}: no pixel holds data; give another picture, or another no-data value")
        return min(low), max(high), sum(count)

    @cached_property
    def full_range(self) -> float:
        """As given; else as the file says; 255 for 8 bits; the least of so many bits that the values of 16 bits keep
        to; the range of floats.
        """
        said, eight = self.stored.range, self.dtype == "uint8"
        low, high, _ = (0.0, 0.0, 1) if eight and not self.may_lack else self.limits  # refuses a picture without data
        integers = self.stored.dtype.kind == "u"
        extent = high if integers else high - low
        if self._given is not None:
            return self._given
        if said is not None and said >= extent:
            return said
        if integers:
            return 255.0 if eight else float(min(2**n - 1 for n in DEPTHS if 2**n - 1 >= high))
        return extent or abs(high) or 1.0

    @cached_property
    def masked(self) -> bool:
        """Whether any pixel holds no data."""
        return self.may_lack and self.limits[2] < self.shape[0] * self.shape[1]

    def target(self, y0: int, y1: int, x0: int, x1: int, stride: int = 1) -> Target:
        rows = strip_rows(y1 - y0, x1 - x0, stride)
        strips = [self.source.read(y, min(y + rows, y1), x0, x1)[::stride, ::stride] for y in range(y0, y1, rows)]
        values, known = _known(strips[0] if len(strips) == 1 else np.concatenate(strips))
        return Target(values, known, None)

    def samples(self, y0, y1, x0, x1, iy, ix) -> dict[str, np.ndarray]:
        values, known = _known(self.source.read(y0, y1, x0, x1)[iy - y0, ix - x0])
        return {"values": values, "known": known}

    def mask(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        """Which pixels of the window hold data, bool [h, w]."""
        rows = max(1, STRIP // (x1 - x0))
        strips = [self.source.read(y, min(y + rows, y1), x0, x1)[..., 0] for y in range(y0, y1, rows)]
        return np.concatenate([np.isfinite(strip) for strip in strips])

    def loss(self, jet: Jet, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        known = batch["known"]
        error = known * ((jet.value - batch["values"]) / self.full_range).square().mean(-1)
        return error + known * self.prior.penalty(jet, self.full_range), error

    def figure(self, mean_squared_error: float) -> tuple[str, float]:
        return "psnr_db", -10 * math.log10(max(mean_squared_error, 1e-20))

    def about(self) -> dict:
        """What PSNRs refer to, whether pixels lack data, the value of those in a picture of integers."""
        integers, value = self.stored.dtype.kind == "u", self.nodata
        holds = integers and value is not None and value in range(np.iinfo(self.stored.dtype).max + 1)
        return {"range": self.full_range, "masked": self.masked, "nodata": int(value) if holds else None}

    def note(self) -> str:
        said = [f"psnr: of a range of {self.full_range:g}"]
        if self.masked:
            height, width = self.shape
            said.append(f"{height * width - self.limits[2]} of {height * width} pixels hold no data, and count nowhere")
        return "\n".join(said)

    def reference(self):
        return self.source


def _known(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values [..., C], 0 where they are NaN, and float32 [...]: 1 where they are known."""
    known = np.isfinite(values[..., 0])
    return np.where(known[..., None], values, np.float32(0)), known.astype(np.float32)
