"""Sharded checkpoints of a run: `RUN/checkpoints/step_00000100`, complete once its folder has its name.

Every rank writes its shards into `NAME.part`; when all have, the main process renames the folder and then removes the
oldest. A run that is killed while it saves leaves the earlier checkpoints as they were.
"""

import os
import shutil
from pathlib import Path

from cpikan_hr.errors import UserError
from cpikan_hr.training.state import load_state, save_state
from cpikan_hr.training.update import Updater


def save(updater: Updater, run: Path, keep: int) -> None:
    """Collective. Writes the checkpoint of `updater.steps` and keeps the newest `keep`."""
    final = run / "checkpoints" / f"step_{updater.steps:08d}"
    part = final.with_name(final.name + ".part")
    accelerator = updater.accelerator
    if final.exists():
        return
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    accelerator.wait_for_everyone()
    save_state(updater, part)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        os.sync()
        part.rename(final)
        for old in complete(run)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def complete(run: Path) -> list[Path]:
    """The run's whole checkpoints, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step_*") if path.name[5:].isdigit())


def choose(run: Path, resume: str) -> Path | None:
    """The checkpoint `--resume auto|never|PATH` asks for. Raises UserError for a path that is none."""
    if resume == "never":
        return None
    if resume == "auto":
        return (complete(run) or [None])[-1]
    path = Path(resume)
    if not path.is_dir() or not path.name.startswith("step_"):
        raise UserError(f"resume: {path} is not a checkpoint; give auto, never or a folder RUN/checkpoints/step_...")
    return path


def load(updater: Updater, checkpoint: Path) -> None:
    """Collective. Restores weights, optimizer state and step."""
    load_state(updater, checkpoint)
    updater.steps = int(checkpoint.name[5:])
