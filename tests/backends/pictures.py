"""Small recipes of pictures for the launches: trees as in a recipe file. Each writes its picture to `folder`."""

import sys
from pathlib import Path

import numpy as np
import yaml
from harness import ROOT

sys.path.append(str(ROOT / "tests" / "training"))
from test_loop import GROWN, SPARSE, write  # noqa: E402
from test_settling import GLOBAL, SETTLE, TILES  # noqa: E402

LINEAR = {"kind": "chebyshev2d", "degree": None, "sparse": True}
STARTS = {  # levels of more than one block of both solvers (2^18 and 2^16 px)
    "quadtree": [
        {"grid": [1, 1], "network": {"kind": "chebyshev2d", "degree": 3}},
        {"tile": [32, 16, 8], "overlap": 0.25, "network": LINEAR},
    ],
    "grown": [{"tile": [64, 32, 16], "overlap": 0.25, "grow": True, "network": GROWN["network"] | {"hidden": [3]}}],
}
JOINING = [
    {"grid": [1, 1], "network": {"kind": "cpikan", "hidden": [4], "degree": 4}},
    {"tile": 24, "network": {"kind": "siren", "hidden": [4], "first_omega": 3.0}},
    {"tile": 8, "network": {"kind": "chebyshev2d", "degree": 2}},
]


def saved(path: Path, picture: np.ndarray) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, picture.astype(np.float32))
    return str(path)


def mixed(folder: Path) -> dict:
    """A loss with second derivatives, a dense level and a sparse quadtree, two micro-batches and clipping."""
    y, x = np.mgrid[0:40, 0:56]
    path = saved(folder / "mixed.npy", np.sin(x / 5) * np.cos(y / 4))
    return {
        "problem": {"kind": "image", "path": path, "laplacian": 1e-3},
        "field": {
            "levels": [
                {"grid": [1, 1], "network": {"kind": "cpikan", "hidden": [5], "degree": 4}},
                {"tile": 12, "overlap": 0.5, "network": {"kind": "chebyshev2d", "degree": 1}},
                {"tile": [16, 8], "overlap": 0.25, "network": LINEAR},
            ]
        },
        "target": {"rmse": 0.1},
        "batch": {"blocks": 4, "size": 24, "stride": 3},
        "training": {"steps": 20, "accumulate": 2, "clip": 0.1, "log_every": 1, "checkpoint_steps": 10, "keep": 9},
    }


def starts(folder: Path) -> dict[str, dict]:
    """The closed-form and the growing start."""
    y, x = np.mgrid[0:530, 0:560]
    picture = np.sin(x / 9) * np.cos(y / 14) + (x > 300) * (y > 200) * np.sin(x * y / 900) / 2
    path = saved(folder / "starts.npy", picture)
    return {
        name: {
            "problem": {"kind": "image", "path": path},
            "field": {"levels": levels},
            "start": {"sweeps": int(name == "grown")},
            "target": {"psnr": 24},
            "training": {"steps": 0},
        }
        for name, levels in STARTS.items()
    }


def coloured(folder: Path, levels: list[dict], psnr: float, **training) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    write(folder, levels, psnr, **training)
    return yaml.safe_load((folder / "recipe.yaml").read_text())


def swept(folder: Path) -> dict:
    return coloured(folder, [GROWN], 28, steps=20, lr=1e-6, sweep_every=10)


def swept_wide(folder: Path) -> dict:
    """With groups of weights beyond the megabyte from which DeepSpeed swaps at all."""
    wide = {"grid": [1, 1], "network": {"kind": "siren", "hidden": [800, 800], "first_omega": 0.1, "hidden_omega": 0.1}}
    levels = [wide, GROWN]
    return coloured(
        folder, levels, 28, steps=6, lr=1e-9, sweep_every=3, settle_every=4, settle_rmse=8.0, checkpoint_steps=4
    )


def settled(folder: Path) -> dict:
    """A level that does not train at all leaves before the first update, and with it its group of the optimizer."""
    return coloured(folder, [GLOBAL | {"lr_scale": 0.0}, TILES], 30, steps=14, checkpoint_steps=10, **SETTLE)


def joining(folder: Path) -> dict:
    """Some levels have no point yet, and of others a process sees no tile: all take part in every collective."""
    tree = coloured(folder, JOINING, 25, steps=6, lr=1e-3)
    tree["field"]["mode"], tree["batch"] = "progressive", {"blocks": 2, "size": 16, "stride": 2}
    return tree


def by_the_clock(folder: Path) -> dict:
    return coloured(folder, [SPARSE], 25, steps=4, checkpoint_minutes=1e-9, keep=9)


def grown(folder: Path) -> dict:
    return coloured(folder, [GROWN], 28, steps=20)
