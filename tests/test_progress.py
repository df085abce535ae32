"""Bars on terminals, plain lines elsewhere; both are right at the end."""

import fcntl
import os
import pty
import re
import struct
import termios

import pytest

from cpikan_hr import progress
from cpikan_hr.progress import Progress


def test_without_a_terminal_plain_lines_say_how_far_it_is(monkeypatch, capfd):
    monkeypatch.setattr(progress, "PAUSE", 0.0)
    logged = []
    told = Progress("training", "steps", log=logged.append)
    for done in range(1, 4):
        told.show(f"loss {1 / done:.2g}")
        told(done, 3)
    out, err = capfd.readouterr()
    lines = [f"training: {k} of 3 steps, loss {1 / k:.2g}" for k in (1, 2, 3)]
    assert out == "" and list(dict.fromkeys(err.splitlines())) == lines and list(dict.fromkeys(logged)) == lines


def test_what_ends_before_a_line_is_due_says_nothing(capfd):
    told = Progress("render")
    for done in range(1, 4):
        told(done, 3)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("unit", ["", "steps"])
def test_on_a_terminal_the_bar_is_full_at_the_end(unit, monkeypatch):
    main, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    with os.fdopen(side, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        told = Progress("training", unit, leave=True)
        for done in range(1, 8):
            told(done, 7)
        told.show("loss 0.5")
        told.close()
        terminal.flush()
        shown = os.read(main, 2**16).decode()
    os.close(main)
    last = [part for part in re.split(r"[\r\n]+", shown) if part.strip()][-1]
    assert last.startswith("training: 100%|") and last.rstrip().endswith("loss 0.5]")
    assert ("7/7 steps" in last) == bool(unit)
