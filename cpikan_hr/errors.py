"""The one exception for what a user can mend: bad input, a bad recipe, a full disk.

Invariant: the message is one line that says what is wrong, where, and what to do. Entry points print it on stderr
and exit with code 2, without a traceback; everything else is a bug and keeps its traceback.
"""

import os
import sys
import threading
from collections.abc import Callable
from functools import wraps

INTERRUPTED = 128 + 2  # what shells report for SIGINT


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
        except (UserError, OSError) as error:
            if not getattr(error, "agreed", False) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
                from cpikan_hr.processes import speaks_for_launch  # imports torch

                if not speaks_for_launch():
                    return 2
            return _tell(error if isinstance(error, UserError) else _of_the_system(error), 2)
        except KeyboardInterrupt as stop:
            return _tell(str(stop) or "interrupted", INTERRUPTED)

    return wrapped


def _of_the_system(error: OSError) -> str:
    """Disk full, no permission: the operating system's own words name the file."""
    where = f": {error.filename}" if error.filename else ""
    return f"{error.strerror or error}{where}"


def _tell(message: object, code: int) -> int:
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    return code


def _report_bugs_only(failure: threading.ExceptHookArgs) -> None:
    """A thread that cannot write (TensorBoard's) keeps its OSError for the next call, which raises and reports it."""
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)
