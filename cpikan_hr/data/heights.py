"""Maps of heights: in nm, whatever unit their file says, and NaN outside a mask and where the file marks no data."""

import os
from collections.abc import Callable

import numpy as np

from cpikan_hr.data.said import say_once
from cpikan_hr.data.source import open_source
from cpikan_hr.data.tiff_values import Values, tiff_values
from cpikan_hr.data.units import nm_per
from cpikan_hr.data.windows import Source, holds
from cpikan_hr.errors import UserError

OPTION = "--reference-unit"  # of the commands that take a reference
WindowMask = Callable[[int, int, int, int], np.ndarray]  # of rows y0:y1 and columns x0:x1, bool [h, w]


class Heights(Source):
    """`values.offset + values.slope * source`, each of `nm` nanometres; NaN where `mask` is off, or for no data."""

    def __init__(self, source: Source, nm: float = 1.0, mask: WindowMask | None = None, values: Values | None = None):
        super().__init__(source.name, source.shape, source.dtype if source.dtype.kind == "f" else np.dtype(np.float32))
        values = values or Values()
        self._source, self._mask = source, mask
        self._slope, self._offset = values.slope * nm, values.offset * nm

    def _read(self, *window: int) -> np.ndarray:
        stored = self._source.read(*window)
        heights = stored.astype(self.dtype, copy=False)
        if (self._slope, self._offset) != (1.0, 0.0):
            heights = (heights.astype(np.float64) * self._slope + self._offset).astype(self.dtype)
        if self._source.nodata is not None:
            heights = np.where(holds(stored, self._source.nodata), np.nan, heights)
        return heights if self._mask is None else np.where(self._mask(*window)[..., None], heights, np.nan)


def open_heights(path: str | os.PathLike, unit: str | None = None, option: str = OPTION) -> Source:
    """The map `path` in nm: its file says the unit, or `unit` does, which `option` gave. What no one says is nm, and a
    line tells so. UserError: a unit that is no length, file and `unit` that differ."""
    source, values = open_source(path), tiff_values(path)
    if unit is not None:
        nm = nm_per(unit, option)
        if values.unit is not None and nm_per(values.unit, str(path)) != nm:
            raise UserError(f"{option} {unit}: {path} says that its values are in {values.unit}; leave the option out")
    elif values.unit is not None:
        nm = nm_per(values.unit, f"{path}: the unit of its values")
    else:
        side = f" (only that its pixels' sides are in {values.side})" if values.side else ""
        say_once(f"{path}: does not say the unit of its heights{side}: taken as nm; {option} UNIT says another")
        nm = 1.0
    plain = (values.slope * nm, values.offset, source.nodata) == (1.0, 0.0, None)
    return source if plain else Heights(source, nm, values=values)
