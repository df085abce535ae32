"""One function over many pieces of work on a CPU's threads, in order, with bounded look-ahead.

Pieces side by side, each on one core, and not the cores inside every operation: operations here are small, and their
threads would mostly wait for each other (with one core busy elsewhere, strips were rendered 30 times slower). Reading
files overlaps with computing for free.

Invariant: when the generator ends, or is left, no thread of it runs any more, and torch's threads are as before.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item, Result = TypeVar("Item"), TypeVar("Result")

ON_A_GPU = 16  # times as many elements at once: starting an operator there takes longer than its work
HELPERS = 4  # threads that prepare what a GPU computes


def at_once(elements: int, device: torch.device | str) -> int:
    """How many elements are worked on at once where `elements` of them suit a core's cache."""
    return elements if torch.device(device).type == "cpu" else ON_A_GPU * elements


@contextmanager
def one_thread() -> Iterator[None]:
    """Operations of this thread of Python do not share their work among others: small ones would wait for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], device: torch.device | str = "cpu",
    threads: int | None = None,
) -> Iterator[Result]:  # fmt: skip
    """Yields `function(item)` in the order of the items; as many at once as torch would use threads for one of them,
    or `threads`.

    On another device than the CPU some prepare, on theirs, what it computes. The first exception is raised when its
    turn comes; what has not begun by then is dropped.
    """
    before = torch.get_num_threads()
    threads = threads or (before if torch.device(device).type == "cpu" else min(before, HELPERS))
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    waiting: deque[Future] = deque()
    with one_thread():
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
