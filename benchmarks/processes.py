"""A command in a process of its own, and what it took: for the benchmarks that measure the program as users run it."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


# What the system calls a process's peak begins with that of the one it was started from: a small one lies between.
BETWEEN = """
import os, sys
child = os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, *sys.argv[2:]])
_, status, usage = os.wait4(child, 0)
os.write(int(sys.argv[1]), f"{usage.ru_utime + usage.ru_stime} {usage.ru_maxrss}".encode())
sys.exit(os.waitstatus_to_exitcode(status))
"""


def run(words: list[str], environment: dict[str, str] = ENVIRONMENT) -> tuple[str, float, float]:
    """Output, CPU seconds and peak RSS (MB) of `python WORDS`; its failure ends the benchmark."""
    reading, writing = os.pipe()
    with os.fdopen(reading) as told:
        done = subprocess.run(
            [sys.executable, "-c", BETWEEN, str(writing), *words],
            cwd=ROOT,
            env=os.environ | environment,
            capture_output=True,
            pass_fds=[writing],
            text=True,
        )
        os.close(writing)
        if done.returncode:
            sys.exit(done.stderr)
        seconds, kilobytes = told.read().split()
    return done.stdout, float(seconds), int(kilobytes) * 1024 / 1e6
