"""When a run ends before its last step: Ctrl-C, or the time that `target.seconds` gives it.

Invariant: the first Ctrl-C only asks; the run stops at the next place where the field is whole, and keeps it. A second
one ends the process at once, as everywhere else.
"""

import signal
import threading
import time
from types import FrameType

import torch

from cpikan_hr.processes import Processes


class Stopped(Exception):
    """Raised inside the start where the run is to stop; what is solved so far is kept."""


class Stop:
    """Asked by a signal or by the clock. Use as a context manager around the run."""

    def __init__(self, seconds: float | None, began: float):
        self.signalled = False  # this process, by Ctrl-C
        self.interrupted = False  # any process, as far as all have agreed
        self._deadline = None if seconds is None else began + seconds
        self._previous = None

    @property
    def asked(self) -> bool:
        """On this process."""
        return self.signalled or (self._deadline is not None and time.perf_counter() > self._deadline)

    def agreed(self, processes: Processes) -> bool:
        """Collective. Whether any process is asked to stop; `interrupted` then says whether by Ctrl-C, on all alike."""
        flag = torch.tensor(2 if self.signalled else int(self.asked), device=processes.device)
        if processes.ranks > 1:
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        self.interrupted = int(flag) == 2
        return bool(flag)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.signalled:
            raise KeyboardInterrupt
        self.signalled = True

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
