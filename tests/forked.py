"""`forked.py PROGRAM...` is PROGRAM, as a fork of the tests' server; signals are handed on to it."""

import os
import signal
import sys
from contextlib import suppress

import forks


def hand_on(child: int) -> None:
    def tell(number: int, _) -> None:
        with suppress(ProcessLookupError):  # it has just ended: its exit code is on its way
            os.kill(child, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, tell)


code = forks.run(sys.argv[1:], (0, 1, 2), dict(os.environ), os.getcwd(), began=hand_on)
os._exit(code & 0xFF)  # at once: an interpreter that ends can be killed by the signals that its program ignored
