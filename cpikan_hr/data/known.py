"""Pictures of which some pixels hold no data: NaN or Inf, a no-data value, or outside a mask."""

import numpy as np

from cpikan_hr.data.heights import WindowMask
from cpikan_hr.data.windows import Source, holds
from cpikan_hr.errors import UserError


class Known(Source):
    """`source` in float32, NaN in all channels of a pixel that holds no data.

    That is one with a channel that is not finite (in float32), one where `mask` is off, and one of the value `nodata`:
    in any channel of floats, in all channels of unsigned integers, whose every single value is a colour as well.
    """

    def __init__(self, source: Source, nodata: float | None = None, mask: WindowMask | None = None):
        super().__init__(source.name, source.shape, np.dtype(np.float32))
        self.source, self.nodata, self._mask = source, nodata, mask

    def _read(self, *window: int) -> np.ndarray:
        stored = self.source.read(*window)
        with np.errstate(over="ignore"):
            values = stored.astype(np.float32)
        known = np.isfinite(values).all(-1) if stored.dtype.kind == "f" else np.ones(values.shape[:2], bool)
        if self.nodata is not None:
            same = holds(stored, self.nodata)
            known &= ~(same.all(-1) if stored.dtype.kind == "u" else same.any(-1))
        if self._mask is not None:
            known &= self._mask(*window)
        if self.source.stored.kind in "iu" and stored.dtype == np.float64:
            self._refuse_rounding(stored, known & (stored != values).any(-1), window)
        values[~known] = np.nan
        return values

    def _refuse_rounding(self, stored: np.ndarray, rounded: np.ndarray, window: tuple[int, ...]) -> None:
        if rounded.any():
            y, x = np.argwhere(rounded)[0]
            raise UserError(
                f"{self.name}: pixel ({window[0] + y}, {window[2] + x}) is {stored[y, x].max():.0f}, which single "
                "precision rounds; take an offset off, or save it as float32"
            )
