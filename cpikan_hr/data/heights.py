"""Maps of heights: in nm, whatever unit their file says, and NaN outside a mask."""

import os
from collections.abc import Callable

import numpy as np

from cpikan_hr.data.source import open_source
from cpikan_hr.data.tiff import tiff_unit
from cpikan_hr.data.windows import Source

PER_NM = {"nm": 1.0, "um": 1e-3, "m": 1e-9}  # units a height can be written in

WindowMask = Callable[[int, int, int, int], np.ndarray]  # of rows y0:y1 and columns x0:x1, bool [h, w]


class Heights(Source):
    """Heights of `source` divided by `per_nm`, NaN where `mask` is off."""

    def __init__(self, source: Source, per_nm: float = 1.0, mask: WindowMask | None = None):
        super().__init__(source.name, source.shape, source.dtype if source.dtype.kind == "f" else np.dtype(np.float32))
        self._source, self._per_nm, self._mask = source, per_nm, mask

    def _read(self, *window: int) -> np.ndarray:
        heights = self._source.read(*window).astype(self.dtype, copy=False)
        if self._per_nm != 1.0:
            heights = heights / self.dtype.type(self._per_nm)
        return heights if self._mask is None else np.where(self._mask(*window)[..., None], heights, np.nan)


def open_heights(path: str | os.PathLike) -> Source:
    """The map `path` in nm. A TIFF may say another unit, as those that `render` writes do."""
    source = open_source(path)
    per_nm = PER_NM.get(tiff_unit(path) or "nm", 1.0)
    return source if per_nm == 1.0 else Heights(source, per_nm)
