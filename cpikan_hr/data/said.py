"""What is said of data that were not refused: one line each, once a process, however often a file is opened."""

import logging
import os
from functools import cache

_log = logging.getLogger(__name__)


@cache
def say_once(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # one of the processes of a launch
        _log.warning(line)
