"""What the tests of bad input share: small data, and the check that a command refused it and left everything alone."""

import shutil
from collections.abc import Callable
from pathlib import Path

from cpikan_hr.cli import main as cli
from cpikan_hr.data.synth import synth
from cpikan_hr.train import main as train
from cpikan_hr.training.weights import ABOUT

__all__ = ["ABOUT", "ROOT", "command", "damaged_copy", "make_run", "make_stack", "refused", "snapshot", "train_words"]

ROOT = Path(__file__).parents[1]
OPTIONS = ["--batch.blocks", "2", "--batch.size", "32", "--training.log_every", "1", "--training.checkpoint_steps", "2"]


def make_stack(folder: Path, size: tuple[int, int] = (64, 96)) -> Path:
    return synth(folder, size=size, noise=2.0, seed=1)


def train_words(stack: Path, run: Path, steps: int = 2) -> list[str]:
    where = ["--problem.stack", str(stack), "--output", str(run)]
    return ["--config", "recipes/wafer.yaml", *where, *OPTIONS, "--training.steps", str(steps)]


def make_run(stack: Path, run: Path, steps: int = 2, *more: str) -> Path:
    assert train([*train_words(stack, run, steps), *more]) == 0
    return run


def command(name: str, stack: Path, run: Path, out: Path) -> tuple[Callable, list[str]]:
    """The entry point and the words that make `name` write `out`."""
    words = {
        "synth": ["synth", str(out), "--size", "96x64"],
        "decode": ["decode", str(stack), "--out", f"{out}.tif"],
        "render": ["render", str(run), "--out", f"{out}.tif"],
        "report": ["report", str(run), "--out", f"{out}.html"],
        "export": ["export", str(run), "--out", f"{out}.safetensors"],
        "train": train_words(stack, out),
    }[name]
    return (train if name == "train" else cli), words


def damaged_copy(folder: Path, to: Path, damage: Callable[[Path], object] = lambda folder: None) -> Path:
    shutil.copytree(folder, to)
    damage(to)
    return to


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every path below `folder` and what its file holds."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def refused(main: Callable, words: list[str], folder: Path, capfd) -> str:
    """The one line with which the command refuses `words`; `folder` is as it was before."""
    before = snapshot(folder)
    capfd.readouterr()
    code = main(words)
    said = capfd.readouterr()
    assert code == 2, said
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and said.err.endswith("\n"), said.err
    assert said.out == ""
    assert snapshot(folder) == before
    return said.err
