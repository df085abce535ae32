"""The one exception for what a user can mend: bad input, a bad recipe, a full disk.

Invariant: the message is one line that says what is wrong, where, and what to do. Entry points print it on stderr
and exit with code 2, without a traceback; everything else is a bug and keeps its traceback. So do mistakes in a file of
the user's own that the program runs (an equation): the line is that of the file.
"""

import os
import sys
import threading
import traceback
from collections.abc import Callable
from functools import wraps

INTERRUPTED = 128 + 2  # what shells report for SIGINT
OWN = "cpikan_hr_equation_"  # how the modules of users' files are called
_POINT_BY_POINT = "choose point by point, torch.where(condition, a, b)"
_HINTS = {  # what torch says, and what helps in an equation
    "Boolean value of Tensor": _POINT_BY_POINT,
    "data-dependent control flow": _POINT_BY_POINT,
    "one element tensors can be converted": "use functions of torch, which take all points at once",
    "cannot be converted to Scalar": "use functions of torch, which take all points at once",
    "Can't call numpy() on Tensor that requires grad": "use functions of torch, which know their derivatives",
}


class UserError(ValueError):
    """A mistake the user can mend. The message is printed as it is, so it is one line."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C, after what was reached so far has been kept; the message says where."""


class OtherRankFailed(UserError):
    """Another process of the launch failed and says why; this one ends with the same code, silently."""

    def __init__(self, rank: int):
        super().__init__(f"process {rank} of this launch failed")


def exit_on_user_error(main: Callable[..., int | None]) -> Callable[..., int]:
    """Turns a `UserError` or an `OSError` into one line on stderr and exit code 2, Ctrl-C into one line and 130."""

    @wraps(main)
    def wrapped(*args, **kwargs) -> int:
        threading.excepthook = _report_bugs_only
        try:
            return main(*args, **kwargs) or 0
        except OtherRankFailed:
            return 2
        except KeyboardInterrupt as stop:
            return _tell(str(stop) or "interrupted", INTERRUPTED)
        except Exception as error:
            told = _for_the_user(error)
            if told is None:
                raise
            return _tell(told, 2) if _speaks(error) else 2

    return wrapped


def _for_the_user(error: Exception) -> str | None:
    """What to say of an exception that the user can mend; None of a bug."""
    if isinstance(error, UserError):
        return str(error)
    if not isinstance(error, OSError):
        return mistake_in_file(error)
    where = f": {error.filename}" if error.filename else ""  # disk full, no permission: in the system's own words
    return mistake_in_file(error) or f"{error.strerror or error}{where}"


def _speaks(error: Exception) -> bool:
    """Whether this process is the one of its launch that says why it fails."""
    if getattr(error, "agreed", False) or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return True
    from cpikan_hr.processes import speaks_for_launch  # imports torch

    return speaks_for_launch()


def explained(error: BaseException) -> str:
    """An exception in one line: its kind, what it says, what helps, and the line of the user's file it came from."""
    text = " ".join(str(error).split())
    hint = next((hint for words, hint in _HINTS.items() if words in text), "")
    text = f"{text.split('. ')[0].rstrip('.')}; {hint}" if hint else text
    place = _place_in_file(error)
    return f"{type(error).__name__}: {text}{f' (line {place[1]})' if place else ''}"


def mistake_in_file(error: BaseException) -> str | None:
    """File, line and message of an exception that a user's file raised; None where the program did, or memory ended."""
    place = _place_in_file(error)
    if place is None or isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return None
    return f"{place[0]}, line {place[1]}: {explained(error).removesuffix(f' (line {place[1]})')}; correct the file"


def _place_in_file(error: BaseException) -> tuple[str, int] | None:
    """File and line in a user's file, where nothing of the program was called from there and failed."""
    place = None
    for frame, line in traceback.walk_tb(error.__traceback__):
        module = frame.f_globals.get("__name__") or ""
        if module.startswith(OWN) and not frame.f_code.co_filename.startswith("<"):  # not what dataclasses generate
            place = frame.f_code.co_filename, line
        elif module.partition(".")[0] == "cpikan_hr" and frame.f_code.co_name != "__getattr__":  # u.NAME is the user's
            place = None
    return place


def _tell(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _report_bugs_only(failure: threading.ExceptHookArgs) -> None:
    """A thread that cannot write (TensorBoard's) keeps its OSError for the next call, which raises and reports it."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)
