"""Running one function over many windows with threads (numpy and `pread` release the interpreter lock), without torch.

Invariant: when `each_in_threads` returns or raises, no thread of it is running any more, so files may be closed.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from cpikan_hr.runtime import cores


def each_in_threads(
    function: Callable[..., object],
    items: Iterable,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Calls `function(item)` for every item, `threads` at a time (default: one per processor).

    `progress(done, total)` is called in this thread. The first exception cancels what has not begun, and is raised.
    """
    items = list(items)
    pool = ThreadPoolExecutor(threads or cores())
    try:
        for done, _ in enumerate(pool.map(function, items), start=1):
            if progress:
                progress(done, len(items))
    finally:
        pool.shutdown(cancel_futures=True)
