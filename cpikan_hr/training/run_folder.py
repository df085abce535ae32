"""The folder of a run: made or recognised, and held by one training at a time.

A folder is a run's where it holds the lock file, or describes a field (`about.json`): anything else that is not empty
is somebody's, and refused. The lock belongs to the main process and ends with it, however it ends.
"""

import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cpikan_hr import strict_json
from cpikan_hr.errors import UserError
from cpikan_hr.files import created_folder, write_text, writing
from cpikan_hr.owned import sole_writer
from cpikan_hr.recipe import Recipe, dump_recipe
from cpikan_hr.training import checkpoints
from cpikan_hr.training.tensors import save_tensors

LOCK = "run.lock"


@contextmanager
def held_run(run: Path) -> Iterator[None]:
    """The main process's: creates the folder, which goes again where the block fails before anything was learned.

    UserError: it is a file or somebody else's folder, or another training is at work in it.
    """
    refuse_foreign_folder(run)
    with created_folder(run, keep=lambda: holds_training(run)), writing(run / LOCK):
        with sole_writer(run / LOCK, f"a training is at work here{_by(run)}"):
            yield


def _by(run: Path) -> str:
    told = (run / LOCK).read_text(errors="replace").strip() if (run / LOCK).is_file() else ""
    return f" ({told})" if told else ""


def refuse_foreign_folder(run: Path) -> None:
    """UserError where a run in this folder would be mixed with what no run has written."""
    if not run.exists() or run.is_dir() and not any(run.iterdir()):
        return
    if not run.is_dir():
        raise UserError(f"{run}: is a file; give a folder for the run as --output")
    if not (run / LOCK).is_file() and not _describes_a_field(run / "about.json"):
        raise UserError(f"{run}: holds files, but no earlier run; give another --output, or an empty folder")


def _describes_a_field(about: Path) -> bool:
    try:
        return {"params", "levels"} <= json.loads(about.read_text()).keys()
    except (OSError, ValueError, AttributeError):
        return False


def holds_training(run: Path) -> bool:
    """Whether a run has come further than its start."""
    metrics = run / "metrics.jsonl"
    return metrics.exists() and '"loss"' in metrics.read_text() or bool(checkpoints.complete(run))


def begin_run(run: Path, recipe: Recipe, about: dict, start: dict[str, torch.Tensor] | None) -> None:
    """Writes what describes the run, and `start` where it is not resumed: the first change to an existing folder.

    What the start leaves in buffers is kept because checkpoints of some backends hold parameters only.
    """
    for left in (run / "checkpoints").glob("step_*.part"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    if start is not None:
        for replaced in checkpoints.complete(run):
            shutil.rmtree(replaced, ignore_errors=True)
        save_tensors(run / "start.safetensors", start)
        for name in ("metrics.jsonl", "looks.jsonl"):
            (run / name).unlink(missing_ok=True)
    (run / LOCK).write_text(f"process {os.getpid()} on {socket.gethostname()}\n")  # for who finds it locked
    write_text(run / "recipe.yaml", dump_recipe(recipe))
    write_text(run / "about.json", strict_json.dumps(about))  # what `export` needs where the run does not end
