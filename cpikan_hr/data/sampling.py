"""Which pixels an update sees: a pure function of (seed, step) and of the share asked for.

The picture is cut into blocks. An update takes the next `blocks` of an endless sequence of random permutations of them,
and one pixel from each stride x stride square of a block. Invariant: the union of the shares of a step does not depend
on how many shares there are, so the same global batch is seen by one process, by many, and with any accumulation.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Draw:
    """The pixels (iy, ix) drawn from one window of the frame."""

    window: tuple[int, int, int, int]  # y0, y1, x0, x1
    iy: np.ndarray
    ix: np.ndarray

    def only(self, kept: np.ndarray) -> "Draw":
        """Some of the pixels, at least one, and the smallest window that has them; `kept`: bool or numbers."""
        iy, ix = self.iy[kept], self.ix[kept]
        return Draw((int(iy.min()), int(iy.max()) + 1, int(ix.min()), int(ix.max()) + 1), iy, ix)


class PixelSampler:
    """Stateless and stratified: see the file's docstring."""

    def __init__(self, shape: tuple[int, int], blocks: int, size: int, stride: int, seed: int):
        self.shape, self.blocks, self.size, self.stride, self.seed = shape, blocks, size, stride, seed
        self.rows, self.columns = -(-shape[0] // size), -(-shape[1] // size)

    def draws(self, step: int, share: int = 0, shares: int = 1) -> list[Draw]:
        """This share of the step's blocks."""
        return [self._draw(step, number) for number in range(share, self.blocks, shares)]

    def points(self, step: int) -> int:
        """Number of pixels of the step over all shares."""
        total = 0
        for number in range(self.blocks):
            y0, y1, x0, x1 = self._window(step, number)
            total += -(-(y1 - y0) // self.stride) * -(-(x1 - x0) // self.stride)
        return total

    def _window(self, step: int, number: int) -> tuple[int, int, int, int]:
        count = self.rows * self.columns
        epoch, position = divmod(step * self.blocks + number, count)
        block = int(np.random.default_rng([self.seed, 0, epoch]).permutation(count)[position])
        y0, x0 = block // self.columns * self.size, block % self.columns * self.size
        return y0, min(y0 + self.size, self.shape[0]), x0, min(x0 + self.size, self.shape[1])

    def _draw(self, step: int, number: int) -> Draw:
        window = y0, y1, x0, x1 = self._window(step, number)
        rng = np.random.default_rng([self.seed, 1, step, number])
        corner_y = np.arange(y0, y1, self.stride)
        corner_x = np.arange(x0, x1, self.stride)
        squares = (len(corner_y), len(corner_x))
        # Squares cut by the block's edge are smaller: draw inside what is left of them.
        iy = corner_y[:, None] + (rng.random(squares) * np.minimum(self.stride, y1 - corner_y)[:, None]).astype(
            np.int64
        )
        ix = corner_x[None] + (rng.random(squares) * np.minimum(self.stride, x1 - corner_x)[None]).astype(np.int64)
        return Draw(window, iy.ravel(), ix.ravel())
