"""A sample of a stack's pixels, spread evenly over the frame, for what all pixels share: steps, harmonics, order.

Invariant: a pure function of the stack; read window by window, so its memory does not depend on the frame's size.
"""

from collections.abc import Iterator

import numpy as np

from cpikan_hr.data.stack import Stack
from cpikan_hr.problems.noise import usable

CELLS = 12  # the frame is cut in 12 x 12 cells, with one window in each
WIDER = (1, 3, 9)  # windows grow so many times where most of the frame is masked or clipped


def read_sample(stack: Stack, pixels: int) -> np.ndarray:
    """Frames [J, K, n], float64, of about so many pixels (at most all) that are valid and never clipped.

    There may be fewer, or none.
    """
    for wider in WIDER:
        side = wider * int(np.ceil(np.sqrt(pixels) / CELLS))
        found = np.concatenate([_good(stack, window) for window in _windows(stack.shape, side)], axis=-1)
        if found.shape[-1] >= pixels / 4:
            break
    return found[..., :: max(1, round(found.shape[-1] / pixels))].astype(np.float64)


def _windows(shape: tuple[int, int], side: int) -> Iterator[tuple[int, int, int, int]]:
    rng = np.random.default_rng(0)  # where in its cell a window lies is drawn, so that no grating in the data beats
    edges = [np.linspace(0, size, min(CELLS, size) + 1).astype(int).tolist() for size in shape]
    for top, bottom in zip(edges[0], edges[0][1:], strict=False):
        for left, right in zip(edges[1], edges[1][1:], strict=False):
            y = top + int(rng.random() * max(bottom - top - side, 0))
            x = left + int(rng.random() * max(right - left - side, 0))
            yield y, min(y + side, bottom), x, min(x + side, right)


def _good(stack: Stack, window: tuple[int, int, int, int]) -> np.ndarray:
    valid, present = stack.mask(*window), stack.present
    if not valid.any():
        return np.empty((*present.shape, 0), stack.dtype)
    frames = stack.read(*window)[:, :, valid]
    unclipped = usable(frames, stack.bit_depth, present)
    return frames if unclipped is None else frames[:, :, unclipped.all(axis=(0, 1))]
