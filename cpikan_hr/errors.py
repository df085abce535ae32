"""The one exception for what a user can mend: bad input, a bad recipe, a full disk.

Invariant: the message is one line that says what is wrong, where, and what to do. Entry points print it on stderr
and exit with code 2, without a traceback; everything else is a bug and keeps its traceback.
"""

import sys
from collections.abc import Callable
from functools import wraps


class UserError(ValueError):
    """A mistake the user can mend. The message is printed as it is, so it is one line."""


def exit_on_user_error(main: Callable[..., int | None]) -> Callable[..., int]:
    """Turns a `UserError` or an `OSError` of the operating system into one line on stderr and exit code 2."""

    @wraps(main)
    def wrapped(*args, **kwargs) -> int:
        try:
            return main(*args, **kwargs) or 0
        except UserError as error:
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        except OSError as error:  # disk full, no permission: the operating system's own words name the file
            where = f": {error.filename}" if error.filename else ""
            print(f"error: {error.strerror or error}{where}", file=sys.stderr)
        return 2

    return wrapped
