"""How far something is, on stderr: a bar on a terminal, a plain line now and then elsewhere (a log, a batch system)."""

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

PAUSE = 10.0  # seconds between plain lines


class Progress:
    """Called with (done, total). `unit`: empty for shares of the whole; `leave`: the bar stays when it is closed.

    `log` is given the plain lines too, on terminals as well.
    """

    def __init__(self, name: str, unit: str = "", leave: bool = False, log: Callable[[str], None] | None = None):
        self.name, self.unit, self.leave, self.log = name, unit, leave, log
        self.bar: tqdm | None = None
        self.done = self.total = 0
        self.figures, self.told, self._spoken = "", time.perf_counter(), False
        self.terminal = sys.stderr.isatty()

    def __call__(self, done: int, total: int) -> None:
        first, self.done, self.total = self.bar is None, done, total
        if first:
            count = f" {{n_fmt}}/{{total_fmt}} {self.unit}" if self.unit else ""
            form = f"{{desc}}: {{percentage:3.0f}}%|{{bar}}|{count} [{{elapsed}}<{{remaining}}{{postfix}}]"
            self.bar = tqdm(
                total=total, initial=done, desc=self.name, bar_format=form, dynamic_ncols=True, leave=self.leave,
                disable=not self.terminal,
            )  # fmt: skip
        if self.terminal:
            self.bar.update(done - self.bar.n)
        if time.perf_counter() - self.told > PAUSE:
            self._tell()
        if done >= total and not self.leave:
            self.close()

    def show(self, figures: str) -> None:
        """Figures of what is reached so far, behind the bar."""
        self.figures = figures
        if self.bar is not None and self.terminal:
            self.bar.set_postfix_str(figures)

    def say(self, line: str) -> None:
        """A line on stdout, above the bar."""
        tqdm.write(line) if self.bar is not None and self.terminal else print(line, flush=True)

    def _tell(self) -> None:
        share = f"{self.done} of {self.total} {self.unit}" if self.unit else f"{100 * self.done / self.total:.0f} %"
        line = f"{self.name}: {share}" + (f", {self.figures}" if self.figures else "")
        if not self.terminal:
            print(line, file=sys.stderr, flush=True)
        if self.log:
            self.log(line)
        self.told, self._spoken = time.perf_counter(), True

    def close(self) -> None:
        if self.bar is None:
            return
        if self._spoken and self.done >= self.total:  # else it was over before anyone had to be told
            self._tell()
        self.bar.close()
        self.bar = None
