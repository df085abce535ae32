"""Writing that leaves nothing half-done: one line for a full disk, whole files or none, temporary files without a name,
folders taken back on failure.

Invariant: a failure in here leaves what stood there before, and nothing else.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from cpikan_hr.errors import UserError
from cpikan_hr.owned import sole_writer

# How safetensors and torch.save (C++) say that the operating system would not write; neither raises OSError.
_WRITE_FAILURES = ("I/O error", "PytorchStreamWriter", "inline_container", "iostream", "cannot be opened")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around whatever writes `path`: a full disk or a forbidden place becomes one line that names it."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); {_advice(error)}") from None
    except Exception as error:
        if isinstance(error, UserError) or not any(words in str(error) for words in _WRITE_FAILURES):
            raise
        told = str(error).splitlines()[0]
        raise UserError(f"{path}: cannot be written whole ({told}); free some space or choose another place") from None


def _advice(error: OSError) -> str:
    refused = isinstance(error, PermissionError | FileNotFoundError | NotADirectoryError | IsADirectoryError)
    return "choose another place" if refused else "free some space or choose another place"


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A name to write to: what stands there when the block ends becomes `path` by one rename.

    UserError where another process is writing `path`.
    """
    part = path.with_name(path.name + ".part")
    with writing(path), sole_writer(part, "another process is writing it"):
        try:
            yield part
            os.replace(part, path)
        except BaseException:
            with suppress(OSError):
                part.unlink(missing_ok=True)
            raise


def write_text(path: Path, text: str) -> None:
    """The file holds `text`, or what it held before."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def temporary_file(size: int = 0, name: str = "") -> BinaryIO:
    """A file without a name in the folder for temporary files (TMPDIR), gone when its last reader is.

    UserError where there is no room for the `size` bytes that `name` needs.
    """
    folder = tempfile.gettempdir()
    with writing_temporary():
        free = shutil.disk_usage(folder).free
        if size > free:
            raise UserError(
                f"{name}: needs {size} bytes in {folder} to be unpacked, {free} are free; set TMPDIR elsewhere"
            )
        return tempfile.TemporaryFile()


def writing_temporary() -> AbstractContextManager[None]:
    """Around whatever writes a temporary file."""
    return writing(Path(tempfile.gettempdir()))


@contextmanager
def created_folder(folder: Path, keep: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Creates `folder` and its parents; what was created is removed where the block fails, unless `keep()` then."""
    missing: list[Path] = []
    try:
        with writing(folder):
            missing = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        if missing and not keep():
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # somebody else may have put something there meanwhile
                for path in missing[1:]:
                    path.rmdir()
        raise
