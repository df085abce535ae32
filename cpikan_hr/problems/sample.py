"""A sample of a stack's pixels, spread evenly over the frame, for what all pixels share: steps, harmonics, order.

Invariant: a pure function of the stack; read window by window, so its memory does not depend on the frame's size.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch

from cpikan_hr.data.stack import Stack
from cpikan_hr.problems.noise import usable

CELLS = 12  # the frame is cut in 12 x 12 cells, with one window in each
SPREAD = (3, 9, 27)  # windows are so many times wider than their pixels asked for; wider where few can be used


class Sample(NamedTuple):
    """Some pixels: frames [J, K, n], float64, and the carrier's height [n] in nm, None without one."""

    frames: np.ndarray
    carrier_nm: np.ndarray | None = None

    def fewer(self, most: int) -> "Sample":
        """About so many of them, evenly spread."""
        return self.where(slice(None, None, max(1, -(-self.frames.shape[-1] // most))))

    def where(self, which: slice | np.ndarray) -> "Sample":
        return Sample(self.frames[..., which], None if self.carrier_nm is None else self.carrier_nm[which])


def read_sample(stack: Stack, pixels: int) -> Sample:
    """About so many pixels (at most all) that are valid and never clipped. There may be fewer, or none."""
    good = 1.0  # the part of the pixels that can be used, as seen so far
    for spread in SPREAD:
        windows = list(_windows(stack.shape, spread * int(np.ceil(np.sqrt(pixels) / CELLS))))
        area = sum((y1 - y0) * (x1 - x0) for y0, y1, x0, x1 in windows)
        stride = max(1, int(np.sqrt(area * good / pixels)))
        parts = [_good(stack, window, stride) for window in windows]
        found = np.concatenate([frames for frames, _ in parts], axis=-1)
        if 4 * found.shape[-1] >= pixels or area == stack.shape[0] * stack.shape[1] and stride == 1:
            break
        good = max(found.shape[-1] * stride**2 / area, 1e-3)
    carrier = None if parts[0][1] is None else np.concatenate([each for _, each in parts])
    return Sample(found.astype(np.float64), carrier)


def _windows(shape: tuple[int, int], side: int) -> Iterator[tuple[int, int, int, int]]:
    rng = np.random.default_rng(0)  # where in its cell a window lies is drawn, so that no grating in the data beats
    edges = [np.linspace(0, size, min(CELLS, size) + 1).astype(int).tolist() for size in shape]
    for top, bottom in zip(edges[0], edges[0][1:], strict=False):
        for left, right in zip(edges[1], edges[1][1:], strict=False):
            y = top + int(rng.random() * max(bottom - top - side, 0))
            x = left + int(rng.random() * max(right - left - side, 0))
            yield y, min(y + side, bottom), x, min(x + side, right)


def _good(stack: Stack, window: tuple[int, int, int, int], stride: int) -> tuple[np.ndarray, np.ndarray | None]:
    valid, present = stack.mask(*window)[::stride, ::stride], stack.present
    carrier = stack.carrier(*window)
    carrier = None if carrier is None else carrier[::stride, ::stride][valid]
    if not valid.any():
        return np.empty((*present.shape, 0), stack.dtype), carrier
    frames = stack.read(*window)[:, :, ::stride, ::stride][:, :, valid]
    if stack.clips is None:
        return frames, carrier
    unclipped = usable(torch.from_numpy(frames.astype(np.int32)), stack.clips, torch.from_numpy(present))
    if unclipped is None:
        return frames, carrier
    good = unclipped.flatten(0, 1).all(0).numpy()
    return frames[:, :, good], None if carrier is None else carrier[good]
