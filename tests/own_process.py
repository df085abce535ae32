"""The program's commands in processes of their own, forked from a server that has imported it once."""

import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from tempfile import NamedTemporaryFile
from unittest import mock

ROOT = Path(__file__).parents[1]
SECONDS = 120
IMPORTED = ["cpikan_hr.evaluate", "cpikan_hr.render", "cpikan_hr.report.page", "cpikan_hr.training.loop"]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def child(main: Callable, words: list[str], prepare: str, out: str, err: str) -> None:
    for number, path in ((1, out), (2, err)):
        with open(path, "wb", buffering=0) as file:
            os.dup2(file.fileno(), number)
    os.chdir(ROOT)
    exec(prepare, {})
    sys.exit(main(words))


def own_process(main: Callable, words: list[str], prepare: str = "") -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `main(words)` in a new process, after some lines of Python there."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with mock.patch.dict(os.environ, environment()):
        forkserver.ensure_running()
    with NamedTemporaryFile() as out, NamedTemporaryFile() as err:
        process = context.Process(target=child, args=(main, words, prepare, out.name, err.name))
        process.start()
        process.join(SECONDS)
        if process.is_alive():
            process.kill()
            process.join()
        return process.exitcode, Path(out.name).read_text(), Path(err.name).read_text()
