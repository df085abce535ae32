"""Whole turns of a wrapped phase map of any size: unwrapped tile by tile, and the tiles joined.

Inside a tile: M. A. Herraez et al., Appl. Opt. 41 (2002) 7437, through scikit-image. Every tile reaches over into its
right and its lower neighbour. Where both know a pixel, their turns differ by a whole number, the same wherever two
connected parts meet; these numbers, along a spanning tree of the parts (most agreeing pixels first), join them all.

Invariants
* Memory depends on the tile, the threads and the width of the map; the turns lie in a temporary file.
* Where the unwrapping is unique, the result is that of the whole map at once, up to whole turns.
* Regions that no path of valid pixels connects are not compared. Each has turns of its own, chosen so that its mean
  phase is within half a turn of zero.
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np
import scipy  # whose parts load when they are first used, and skimage's
import skimage

from cpikan_hr.data.spool import SpooledMap
from cpikan_hr.parallel import in_threads

TILE = 512  # px; unwrapping takes some 100 bytes for each pixel
OVERLAP = 16  # px that a tile reaches into the next

Reader = Callable[[int, int, int, int], np.ndarray]  # window y0, y1, x0, x1 -> [h, w]


class Strip(NamedTuple):
    """Pixels that two tiles share, as one of them knows them: turns, and the number of the part (0: not valid)."""

    turns: np.ndarray
    part: np.ndarray


class Tile(NamedTuple):
    """What is kept of a tile: of every connected part its size and the sum of its phase, and the shared strips."""

    pixels: np.ndarray  # [parts]
    phase: np.ndarray  # [parts], turns
    top: Strip
    left: Strip
    below: Strip  # the `top` of the tile below
    right: Strip  # the `left` of the tile to the right


class Unwrapping:
    """A phase map of `shape` (H, W) in turns, wrapped to one, where `valid`; both are read by windows.

    `name` stands in messages. UserError: no room for the temporary file of 4 bytes per pixel.
    """

    def __init__(self, name: str, shape: tuple[int, int], phase: Reader, valid: Reader, tile=TILE, overlap=OVERLAP):
        self.phase, self.valid, self.overlap = phase, valid, overlap
        self.rows, self.columns = (_edges(size, tile) for size in shape)
        self.turns = SpooledMap(name, (*shape, 1), np.float32)

    def solve(self, threads: int | None = None) -> tuple[SpooledMap, int]:
        """Whole turns to add to the phase [H, W, 1], NaN where nothing is valid; and how many regions there are."""
        rows, columns = range(len(self.rows) - 1), range(len(self.columns) - 1)
        first = np.zeros((len(rows), len(columns)), int)  # number of each tile's first part
        pixels, phase, links, above, parts = [], [], [], [], 0
        for i in rows:
            row = list(in_threads(partial(self._tile, i), columns, threads=threads))
            for j, this in enumerate(row):
                first[i, j] = parts
                parts += len(this.pixels)
                pixels.append(this.pixels)
                phase.append(this.phase)
                if j:
                    links.append(_links(row[j - 1].right, this.left, first[i, j - 1], first[i, j]))
                if i:
                    links.append(_links(above[j].below, this.top, first[i - 1, j], first[i, j]))
            above = row
        links = np.concatenate([np.empty((0, 4), int), *links])
        offsets, regions = _joined(links, np.concatenate(pixels), np.concatenate(phase))

        def add(place: tuple[int, int]) -> None:
            self._add(*place, offsets[first[place] :])

        for _ in in_threads(add, product(rows, columns), threads=threads):
            pass
        return self.turns, regions

    def _window(self, i: int, j: int) -> tuple[int, int, int, int]:
        """Tile (i, j) with what it shares with the next ones, never more than those."""
        (y0, y1), (x0, x1) = self.rows[i : i + 2], self.columns[j : j + 2]
        below, right = self.rows[i + 1 : i + 3][-1], self.columns[j + 1 : j + 3][-1]
        return y0, min(y1 + self.overlap, below), x0, min(x1 + self.overlap, right)

    def _parts(self, i: int, j: int) -> tuple[np.ndarray, int]:
        """Number of the connected part of every pixel of a tile (0: not valid), and how many there are."""
        valid = self.valid(*self._window(i, j)).copy()
        valid[self.rows[i + 1] - self.rows[i] :, self.columns[j + 1] - self.columns[j] :] = False  # shared with none
        return scipy.ndimage.label(valid)

    def _tile(self, i: int, j: int) -> Tile:
        window = self._window(i, j)
        h, w = self.rows[i + 1] - self.rows[i], self.columns[j + 1] - self.columns[j]
        phase = self.phase(*window).astype(np.float64)
        part, parts = self._parts(i, j)
        valid = part > 0
        turns = np.zeros(valid.shape)
        if parts:
            turning = np.ma.array(2 * np.pi * phase, mask=~valid)
            turns = np.rint(np.ma.getdata(skimage.restoration.unwrap_phase(turning, rng=0)) / (2 * np.pi) - phase)
        self.turns.write(window[0], window[2], np.where(valid, turns, np.nan)[:h, :w, None])
        inside, numbers = part[:h, :w], np.arange(1, parts + 1)
        n = self.overlap
        shared = [np.s_[:n, :w], np.s_[:h, :n], np.s_[h:, :w], np.s_[:h, w:]]
        strips = [Strip(turns[at].astype(np.int32), part[at].copy()) for at in shared]
        total = scipy.ndimage.sum_labels((phase + turns)[:h, :w], inside, numbers)
        return Tile(np.bincount(inside.ravel(), minlength=parts + 1)[1:], total, *strips)

    def _add(self, i: int, j: int, offsets: np.ndarray) -> None:
        """Adds to a tile's turns the offsets of its parts, which have the numbers they had before."""
        y0, y1, x0, x1 = *self.rows[i : i + 2], *self.columns[j : j + 2]
        part, parts = self._parts(i, j)
        offsets = np.concatenate([[0], offsets[:parts]])
        self.turns.write(y0, x0, self.turns.read(y0, y1, x0, x1) + offsets[part[: y1 - y0, : x1 - x0, None]])


def _edges(size: int, tile: int) -> list[int]:
    """Where tiles of nearly equal size begin, and the end: none is a sliver."""
    return np.linspace(0, size, -(-size // tile) + 1).round().astype(int).tolist()


def _links(one: Strip, two: Strip, first_one: int, first_two: int) -> np.ndarray:
    """Rows (part, part, turns of the one less turns of the other, pixels that agree on it) of parts that meet."""
    h, w = one.turns.shape
    two = Strip(*(plane[:h, :w] for plane in two))
    both = (one.part > 0) & (two.part > 0)
    found = [one.part[both] - 1 + first_one, two.part[both] - 1 + first_two, (one.turns - two.turns)[both]]
    found, agree = np.unique(np.stack(found, axis=1), axis=0, return_counts=True)
    found = np.concatenate([found, agree[:, None]], axis=1)[np.argsort(-agree, kind="stable")]
    _, most = np.unique(found[:, :2], axis=0, return_index=True)  # the first of a pair has the most pixels
    return found[most]


def _joined(links: np.ndarray, pixels: np.ndarray, phase: np.ndarray) -> tuple[np.ndarray, int]:
    """Turns to add to each part, and the number of regions that the links leave; pixels, phase [parts] as in `Tile`."""
    parts = len(pixels)
    if not parts:
        return np.zeros(0), 0
    one, two, turns, agree = links.T
    graphs, links_of = scipy.sparse.csgraph, scipy.sparse.coo_array((1 / agree, (one, two)), (parts, parts))
    tree = graphs.minimum_spanning_tree(links_of.tocsr())
    regions, region = graphs.connected_components(tree, directed=False)
    # A part more, at the root of all: one walk along the tree reaches every region.
    roots = np.unique(region, return_index=True)[1]
    tree = tree.tocoo()
    grown = scipy.sparse.coo_array(
        (np.ones(tree.nnz + regions), (np.r_[tree.row, np.full(regions, parts)], np.r_[tree.col, roots])),
        (parts + 1, parts + 1),
    )
    order, before = graphs.breadth_first_order(grown.tocsr(), parts, directed=False)
    step = {(a, b): t for a, b, t in zip(one.tolist(), two.tolist(), turns.tolist(), strict=True)}
    offset = np.zeros(parts + 1)
    for this in order[1:].tolist():
        last = int(before[this])
        offset[this] = offset[last] + step.get((last, this), 0) - step.get((this, last), 0)
    offset = offset[:parts]
    mean = np.bincount(region, phase + offset * pixels) / np.bincount(region, pixels)
    return offset - np.rint(mean)[region], regions
