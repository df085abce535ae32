"""Pictures, readers and processes that the solvers' tests share."""

import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import skimage.data
import torch
import yaml

from cpikan_hr.fields import Field
from cpikan_hr.processes import Processes
from cpikan_hr.recipe import FieldOptions, Recipe, parse_recipe

ROOT = Path(__file__).parents[2]
SPARSE = {"kind": "chebyshev2d", "degree": None, "sparse": True}
GROWN = {"kind": "cpikan", "hidden": [4], "degree": [3, 3], "input_map": "sine", "first_input_map": "sine"}
GROWN_SIREN = {"kind": "siren", "hidden": [4], "first_omega": 2.0}


def natural(name: str, top: int = 128, left: int = 160, side: int = 128) -> np.ndarray:
    """A square crop [side, side, C] of a scikit-image picture, float32 grey levels."""
    picture = np.atleast_3d(getattr(skimage.data, name)())
    return picture[top : top + side, left : left + side].astype(np.float32)


def reader(picture: np.ndarray, weight: np.ndarray | None = None, noise: np.ndarray | None = None) -> Callable:
    """What `Problem.target` would be of a picture [H, W, C] in memory; refuses windows that leave the frame."""

    def read(y0: int, y1: int, x0: int, x1: int, stride: int):
        assert 0 <= y0 < y1 <= picture.shape[0] and 0 <= x0 < x1 <= picture.shape[1]
        part = (slice(y0, y1, stride), slice(x0, x1, stride))
        known = np.ones(picture.shape[:2], np.float32) if weight is None else weight
        return picture[part], known[part], None if noise is None else noise[part]

    return read


def field_of(levels: list[dict], picture: np.ndarray, **options) -> Field:
    """A fresh field over a picture [H, W, C]."""
    return Field.build(FieldOptions(levels=levels, **options), picture.shape[:2], picture.shape[2])


def recipe_of(levels: list[dict], path: str = "unused", **sections) -> Recipe:
    """A recipe of levels; sections are those of the recipe's file."""
    tree = {"output": "unused", "problem": {"kind": "image", "path": path}, "training": {"steps": 0}}
    field = {"levels": levels} | sections.pop("field", {})
    return parse_recipe(tree | {"field": field} | sections, "test")


def write_recipe(path: Path, recipe: Recipe) -> Path:
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    return path


def rendered(field: Field, shape: tuple[int, int], groups: int | None = None) -> np.ndarray:
    """The first levels (None: all) at the pixel centres, float64 [H, W, C]: scattered, as no solver reads it."""
    iy, ix = np.mgrid[: shape[0], : shape[1]]
    points = torch.from_numpy(np.stack([iy.ravel(), ix.ravel()], -1) + 0.5)
    with torch.no_grad():
        return field(points, active=groups).value.double().numpy().reshape(*shape, -1)


def mean_square(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.mean((a.astype(np.float64) - b) ** 2))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return -10 * np.log10(mean_square(a, b) / 255**2)


class Thread(Processes):
    """A rank that is a thread: collectives meet at a barrier."""

    def meet(self, barrier: threading.Barrier, board: list) -> "Thread":
        object.__setattr__(self, "barrier", barrier)
        object.__setattr__(self, "board", board)
        return self

    def gather(self, value):
        self.board[self.rank] = value
        self.barrier.wait()
        values = list(self.board)
        self.barrier.wait()
        return values

    def sum(self, tensor: torch.Tensor) -> None:
        tensor.copy_(torch.stack(self.gather(tensor.clone())).sum(0))


def on_ranks(function: Callable[[Processes], object], ranks: int = 2) -> list:
    """`function(processes)` on several ranks at once; what each returned."""
    barrier, board, results, failures = threading.Barrier(ranks, timeout=120), [None] * ranks, [None] * ranks, []

    def work(rank: int) -> None:
        try:
            results[rank] = function(Thread(rank, ranks).meet(barrier, board))
        except BaseException as failure:
            failures.append(failure)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results
