"""The program's commands in processes of their own."""

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import NamedTemporaryFile

import forks

SECONDS = 120
CALL = "{prepare}\nimport sys\nfrom {module} import {name}\nsys.exit({name}({words!r}))"


def captured(words: list[str], folder: Path = forks.ROOT) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the Python program `words` (a script, `-m module` or `-c code`) in `folder`."""
    forks.ensure_server()
    with NamedTemporaryFile() as out, NamedTemporaryFile() as err, open(os.devnull) as nothing:
        streams = nothing.fileno(), out.fileno(), err.fileno()
        code = forks.run(words, streams, forks.environment(), str(folder), SECONDS)
        return code, Path(out.name).read_text(), Path(err.name).read_text()


def own_process(main: Callable, words: list[str], prepare: str = "") -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `main(words)` in a new process, after some lines of Python there."""
    code = CALL.format(prepare=prepare, module=main.__module__, name=main.__name__, words=list(words))
    return captured(["-c", code])
