"""What a process took is its own, whatever the process that started it holds."""

import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks"))
from processes import ENVIRONMENT, run  # noqa: E402

HELD = 400_000_000  # bytes
PEAK = "from cpikan_hr.runtime import peak_rss_mb; print(peak_rss_mb())"


def test_a_measured_process_does_not_begin_with_its_parents_peak():
    held = np.ones(HELD, np.uint8)
    _, seconds, small = run(["-c", "pass"])
    _, _, large = run(["-c", f"held = bytearray(b'1' * {HELD // 2})"])
    assert 0 < small < 100 < HELD / 2e6 < large < held.nbytes / 1e6 + HELD / 2e6 and seconds > 0


def test_nor_does_what_a_run_says_of_itself():
    held = np.ones(HELD, np.uint8)
    for more in (0, HELD // 2):
        code = f"held = bytearray(b'1' * {more}); {PEAK}"
        told = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
        assert more / 1e6 < float(told.stdout) < more * 2 / 1e6 + 150 < held.nbytes / 1e6 + 200
