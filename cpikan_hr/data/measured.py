"""A surface that was measured, in the place of the synthetic wafer's: its height from a map, its brightness a wafer's.

Invariants
* The map is laid down at one pixel per pixel; where it ends it goes on mirror-wise.
* Heights are finite and centred on zero. Pixels that were not measured are filled smoothly (biharmonic), within the
  range of the measured ones. The map, unlike everything else of a scene, is held whole in memory.
"""

import os

import numpy as np
from skimage.restoration import inpaint_biharmonic

from cpikan_hr.data.heights import open_heights
from cpikan_hr.data.scene import HEIGHT_RANGE_UM, Wafer
from cpikan_hr.data.windows import mirrored
from cpikan_hr.errors import UserError


class MeasuredSurface(Wafer):
    """`scale` times the heights of the map `path` (.npy or TIFF [H, W]), on an image of `shape` (H, W) pixels.

    `unit`: of these heights, where the map does not say it.

    UserError: no map of one channel, nothing finite in it, heights that span more than the instrument's range.
    """

    def __init__(self, shape: tuple[int, int], seed: int, path: str | os.PathLike, scale: float = 1.0, unit=None):
        super().__init__(shape, seed)
        source = open_heights(path, unit, "--height-unit")
        rows, columns, channels = source.shape
        if channels != 1:
            raise UserError(f"{path}: {channels} channels; a height map has one")
        heights = source.read(0, rows, 0, columns)[..., 0] * float(scale)
        known = np.isfinite(heights)
        if not known.any():
            raise UserError(f"{path}: no finite height; name another map")
        low, high = heights[known].min(), heights[known].max()
        room_um = HEIGHT_RANGE_UM[1] - HEIGHT_RANGE_UM[0]
        if high - low > 1000 * room_um:
            span = f"heights span {(high - low) / 1000:.3g} um, more than {room_um:g}"
            raise UserError(f"{path}: {span}; lower --scale, or check --height-unit")
        if not known.all():
            heights = inpaint_biharmonic(np.where(known, heights, 0), ~known).clip(low, high)
        self._map = (heights - (low + high) / 2).astype(np.float32)

    def height_nm(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        rows, columns = mirrored(y0, y1, self._map.shape[0]), mirrored(x0, x1, self._map.shape[1])
        return self._map[rows][:, columns]
