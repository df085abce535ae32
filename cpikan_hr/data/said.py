"""What is said of data that were not refused: one line each, once a process, however often a file is opened."""

import logging
from functools import cache

_log = logging.getLogger(__name__)


@cache
def say_once(line: str) -> None:
    _log.warning(line)
