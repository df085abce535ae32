"""What every report is made of: its head, its script, and numbers that may stand in a page."""

import base64
import importlib.resources
from html import escape

import numpy as np
from matplotlib import colormaps

from cpikan_hr import strict_json
from cpikan_hr.owned import MARK

ASSETS = importlib.resources.files("cpikan_hr.report") / "assets"
# Nothing may be asked of a network: the browser is told so.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"
COLOURS = ("viridis", "RdBu_r", "magma", "gray")


def limits(values: np.ndarray, colours: str) -> tuple[float, float]:
    """The range of the colours: all but the outermost half percent at each end; about zero where they diverge."""
    known = values[np.isfinite(values)]
    if not known.size:
        return 0.0, 1.0
    low, high = (float(value) for value in np.percentile(known, [0.5, 99.5]))
    if colours == "RdBu_r":
        high = max(abs(low), abs(high))
        low = -high
    return (low, high) if high > low else (low - 0.5, low + 0.5)


def head(name: str) -> str:
    style = (ASSETS / "style.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="generator" content="{MARK}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>{escape(name)}</title>
<style>
{style}</style>
</head>
<body>
"""


def script(names: tuple[str, ...]) -> str:
    """The assets of these names as one script of its own scope."""
    parts = [(ASSETS / name).read_text(encoding="utf-8") for name in names]
    return '"use strict";\n(() => {\n' + "".join(parts) + "})();\n"


def colours(name: str) -> str:
    """256 colours of matplotlib, three bytes each."""
    return encoded(np.uint8(255 * colormaps[name](np.arange(256))[:, :3] + 0.5))


def encoded(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()


def embedded(data) -> str:
    """JSON that may stand in a page: no tag can end it, and what is not finite is null."""
    return strict_json.dumps(data).replace("<", "\\u003c")
