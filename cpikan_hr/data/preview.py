"""Small pictures of large maps: reading them decimated, and drawing map, truth and difference side by side.

Invariant: a map is read strip by strip, so memory depends on the size of the preview and the width of the map.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cpikan_hr.data.windows import Source
from cpikan_hr.files import whole_file
from cpikan_hr.owned import MARK


def read_decimated(source: Source, max_side: int = 1000) -> np.ndarray:
    """The mean over square blocks of `source` ([H, W, C]), as float32 [h, w, C] with h, w <= max_side.

    A block with a NaN is NaN; rows and columns that do not fill a block are left out.
    """
    height, width, channels = source.shape
    step = -(-max(height, width) // max_side)
    down, across = min(step, height), min(step, width)
    rows, columns = height // down, width // across
    out = np.empty((rows, columns, channels), np.float32)
    for i in range(rows):
        strip = source.read(i * down, (i + 1) * down, 0, columns * across)
        out[i] = strip.reshape(down, columns, across, channels).mean(axis=(0, 2), dtype=np.float64)
    return out


def save_preview(
    path: str | os.PathLike, arrays: Sequence[np.ndarray], titles: Sequence[str], unit: str = "nm", dpi: int = 120
) -> Path:
    """Draws maps [h, w] (grey or heights; of one row as a line) or pictures [h, w, 3] side by side into the PNG `path`.

    Maps share one colour scale and have a colour bar in `unit`; a title that starts with "difference" gets a symmetric
    scale of its own, from the 1st to the 99th percentile.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second that only who draws waits for
    from matplotlib.figure import Figure

    path = Path(path)
    height, width = arrays[0].shape[:2]
    panel, aspect = 5.0, min(max(height / width, 0.3), 2.0)  # inches; very long maps still get a readable panel
    figure = Figure(figsize=(panel * len(arrays), panel * aspect + 0.6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    shared = _percentiles([a for a, t in zip(arrays, titles, strict=True) if not _is_difference(t)])
    for index, (array, title) in enumerate(zip(arrays, titles, strict=True)):
        axes = figure.add_subplot(1, len(arrays), index + 1)
        axes.set_axis_off()
        axes.set_title(title)
        array = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
        if array.ndim == 2 and len(array) == 1:
            axes.set_axis_on()
            axes.plot(array[0])
            axes.set_ylabel(unit)
            continue
        if array.ndim == 3:
            axes.imshow(np.clip(array / (255 if array.max() > 1 else 1), 0, 1))
            continue
        low, high = shared
        if _is_difference(title):
            high = max(abs(v) for v in _percentiles([array]))
            low = -high
        colours = "RdBu_r" if _is_difference(title) else "viridis"
        drawn = axes.imshow(array, vmin=low, vmax=high, cmap=colours, interpolation="nearest")
        figure.colorbar(drawn, ax=axes, label=unit, shrink=0.8)
    with whole_file(path) as part:
        canvas.print_figure(part, format="png", dpi=dpi, metadata={"Software": MARK})
    return path


def _is_difference(title: str) -> bool:
    return title.lower().startswith("difference")


def _percentiles(arrays: Sequence[np.ndarray]) -> tuple[float, float]:
    values = np.concatenate([a[np.isfinite(a)].ravel() for a in arrays]) if arrays else np.zeros(1)
    return tuple(float(v) for v in np.percentile(values, [1, 99])) if values.size else (0.0, 1.0)
