"""What the functions of an equation give, as columns [n, K]: what could be meant in two ways is refused.

Torch would broadcast it: [n] beside [n, 1] to [n, n], one column to all functions.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpikan_hr.errors import UserError

MANY, FEWER = 251, 127  # points of the two looks at a function: no shape of the one is a shape of the other
ALIKE = 1e-6  # how well rows have to agree in both, over the largest value: vectorised functions round otherwise


def columns(found: Any, count: int, width: int | None, where: str) -> Tensor:
    """What a function gave at `count` points, [count, width]; None: as many columns as there are. Keeps the graph.

    Taken for it are [count] for one column, a number or [width] for constants, and a list of one entry per column;
    whole numbers and truth values as floats. UserError, `where` first, for others.
    """
    if isinstance(found, list | tuple):
        parts = [columns(part, count, 1, f"{where}, entry {k + 1} of {len(found)}") for k, part in enumerate(found)]
        if not parts or (width is not None and len(parts) != width):
            raise UserError(f"{where} gives a list of {len(parts)}; {_wanted(width)}")
        return torch.cat(parts, dim=1)
    if isinstance(found, bool | int | float):
        found = torch.tensor(found, dtype=torch.float64)
    if isinstance(found, np.ndarray | np.generic) and found.dtype.kind in "fiubc":
        found = torch.as_tensor(found)
    if not isinstance(found, Tensor):
        raise UserError(f"{where} gives {type(found).__name__}; {_wanted(width)}")
    if found.is_complex() or (found.is_floating_point() and found.element_size() < 4):
        raise UserError(f"{where} gives {str(found.dtype).removeprefix('torch.')}; give real float64 numbers")
    if not found.is_floating_point():
        found = found.double()
    shape = tuple(found.shape)
    if shape == (count,) and width in (1, None):
        return found[:, None]
    constant = width is not None and shape in {(width,), (1, width), () if width == 1 else (width,)}
    if constant:
        return found.reshape(1, -1).expand(count, width)
    if found.ndim != 2 or shape[0] != count or (width or shape[1]) != shape[1] or not shape[1]:
        raise UserError(f"{where} gives shape {shape} at {count} points; {_wanted(width)}{_hint(shape, count, width)}")
    return found


def _wanted(width: int | None) -> str:
    return f"give a tensor [n, {'K] of K equations' if width is None else f'{width}]'}"


def _hint(shape: tuple[int, ...], count: int, width: int | None) -> str:
    if shape == (count, count):
        return ": where [n] meets [n, 1], torch makes [n, n]"
    if width is not None and width > 1 and shape in ((), (1,), (count,), (count, 1), (1, 1)):
        return f", one column for each of {width} functions; a condition of one says component=..."
    return ""


def checked(function: Callable[[int], Any], width: int | None, where: str) -> Tensor:
    """What a function gives at `MANY` points, [MANY, K]; `function(count)`: at the first `count` of them.

    Asked with two numbers of points, so that no shape passes by chance. UserError also where a row depends on more than
    its point.
    """
    found, fewer = (columns(function(count), count, width, where) for count in (MANY, FEWER))
    if found.shape[1] != fewer.shape[1]:
        shapes = f"{tuple(fewer.shape)} at {FEWER} points and {tuple(found.shape)} at {MANY}"
        hint = _hint(tuple(found.shape), MANY, width)
        raise UserError(f"{where} gives shape {shapes}; {_wanted(width)}{hint}")
    some, fewer = found[:FEWER].detach().double(), fewer.detach().double()
    size = float(some[some.isfinite()].abs().max()) if bool(some.isfinite().any()) else 0.0
    if not torch.allclose(some, fewer, rtol=ALIKE, atol=ALIKE * size, equal_nan=True):
        raise UserError(f"{where}: a row changes with the other points, or from call to call; use its own point alone")
    return found
