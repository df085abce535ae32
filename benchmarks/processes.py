"""A command in a process of its own, and what it took: for the benchmarks that measure the program as users run it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def run(words: list[str], environment: dict[str, str] = ENVIRONMENT) -> tuple[str, float, float]:
    """Output, CPU seconds and peak RSS (MB) of `python WORDS`; its failure ends the benchmark."""
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    out, err = process.stdout.read(), process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(err)
    return out, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e6
