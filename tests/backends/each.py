"""Runs several programs, one after the other, in each process of one launch: starting one takes longer than its work.

    each.py PROGRAMS.yaml

A list of {name, kind, words}; `kind` is a key of `PROGRAMS`. Rank 0 says when each begins and writes the exit codes
beside the list as codes.yaml; the process ends with the last of them.
"""

import os
import sys
import time
from pathlib import Path
from unittest import mock

import torch
import yaml
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState

from cpikan_hr import train
from cpikan_hr.errors import UserError
from cpikan_hr.training import checkpoints
from cpikan_hr.training.update import Updater

sys.path.insert(0, str(Path(__file__).parent))
import toy  # noqa: E402
from pretended import pretend_accelerators  # noqa: E402

STOP = 12  # updates


def stopped_run_of_a_late_rank(words: list[str]) -> int:
    """`cpikan_hr.train` whose second rank writes into each checkpoint's folder long after the first has done so, and
    that fails in all processes after some updates.
    """
    save, step = checkpoints.save_state, Updater.step

    def late(updater: Updater, folder: Path) -> None:
        save(updater, folder)
        if os.environ["RANK"] == "1":
            time.sleep(2)
            (folder / "late").write_text("whole")

    def failing(self: Updater) -> float:
        if self.steps == STOP:
            raise UserError("stopped here by the test")
        return step(self)

    with mock.patch.object(checkpoints, "save_state", late), mock.patch.object(Updater, "step", failing):
        return train.main(words)


PROGRAMS = {"train": train.main, "toy": toy.main, "stopped": stopped_run_of_a_late_rank}


def main() -> int:
    if os.environ.get("ACCELERATE_USE_FSDP", "false") == "true" and not torch.cuda.is_available():
        pretend_accelerators()
    path, first = Path(sys.argv[1]), os.environ.get("RANK", "0") == "0"
    codes = []
    # Ending would take the process group away that the next program needs.
    with mock.patch.object(Accelerator, "end_training", lambda self: None):
        for program in yaml.safe_load(path.read_text()):
            if first:
                print(f"program {program['name']}", flush=True)
            codes.append(PROGRAMS[program["kind"]](program["words"]))
            AcceleratorState._reset_state()  # the next one makes its own accelerator
            GradientState._reset_state()
    if first:
        path.with_name("codes.yaml").write_text(yaml.safe_dump(codes))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return codes[-1]


if __name__ == "__main__":
    sys.exit(main())
