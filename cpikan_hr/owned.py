"""What this program wrote itself, which it may write again, and what it alone writes to at the moment.

Invariant: nothing else is ever replaced or removed. Files say who wrote them where their format has a place for it
(TIFF, PNG, HTML, safetensors), others in an attribute of the file system where that has some; a lock is held by a
process and ends with it, so a crash leaves none behind.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cpikan_hr.errors import UserError

MARK = "written by cpikan_hr"  # a mention of the name alone is no mark
_ATTRIBUTE = "user.cpikan_hr"
_LOOKED_AT = 2**16  # bytes at either end of a file


def refuse_foreign(path: Path) -> None:
    """UserError where a file that does not say that this program wrote it stands in the place of `path`."""
    if path.is_dir():  # a rename at the end would fail, after all the work
        raise UserError(f"{path}: is a folder; name a file")
    if not path.exists() or not path.is_file():  # /dev/null takes what is written
        return
    with open(path, "rb") as file:
        ends = file.read(_LOOKED_AT)
        file.seek(max(0, path.stat().st_size - _LOOKED_AT))
        ends += file.read()
    if ends and MARK.encode() not in ends and not _marked(path):
        told = "does not say that this program wrote it" if path.suffix in (".npy", ".bmp") else "was not written here"
        raise UserError(f"{path}: exists and {told}; name another file, or remove that one")


def mark(file: int) -> None:
    """Says of an open file of a format without a place for it who wrote it."""
    with suppress(OSError):  # not every file system can
        os.setxattr(file, _ATTRIBUTE, b"")


def _marked(path: Path) -> bool:
    try:
        return os.getxattr(path, _ATTRIBUTE) is not None
    except OSError:
        return False


@contextmanager
def sole_writer(path: Path, what: str) -> Iterator[None]:
    """Creates `path` where it is missing and holds its lock for the block.

    UserError where another process holds it: `what` says what it would then be doing. File systems without locks are
    written to without one.
    """
    while True:
        with open(path, "a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"{path}: {what}; wait for it, or choose another place") from None
            except OSError:
                pass
            # Who held it may just have renamed it: then it is another file by now.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                yield
                return
