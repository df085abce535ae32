"""RUN/log.txt: what a run says on its terminal, with the time, appended to by every run in the folder."""

import time
from pathlib import Path

from cpikan_hr.files import writing

FILE = "log.txt"


class Log:
    """Of the main process alone; the folder exists."""

    def __init__(self, run: Path, enabled: bool):
        self.path, self.enabled = run / FILE, enabled

    def __call__(self, text: str) -> None:
        """Into the file."""
        if self.enabled:
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            with writing(self.path), self.path.open("a", encoding="utf-8") as file:
                file.writelines(f"{now} {line}\n" for line in text.splitlines())

    def say(self, text: str) -> None:
        """And on stdout."""
        if self.enabled:
            print(text, flush=True)
            self(text)
