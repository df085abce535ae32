"""Measurements of u at scattered points, from a file."""

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cpikan_hr.errors import UserError

OUTSIDE = 1e-9  # of the extent of an axis: how far beyond the box a point may be by rounding


def read_table(path: Path, columns: int) -> Tensor:
    """float64 [M, columns], of an npy file, or of a csv file with or without a line of names. UserError for others."""
    where = f"problem.measurements.path: {path}"
    try:
        table = np.load(path) if path.suffix == ".npy" else _read_text(path)
    except (OSError, ValueError, EOFError) as error:
        told = " ".join(str(error).split())
        raise UserError(f"{where}: cannot be read as a table of numbers ({told}); give a csv or npy file") from None
    if not isinstance(table, np.ndarray) or table.dtype.kind not in "fiub":
        raise UserError(f"{where}: holds no real numbers; give a csv or npy file")
    if table.ndim != 2 or table.shape[1] != columns or not len(table):
        raise UserError(f"{where}: shape {table.shape}; give rows of {columns} columns, axes first")
    bad = np.nonzero(~np.isfinite(table).all(1))[0]
    if len(bad):
        raise UserError(f"{where}: row {bad[0] + 1} has numbers that are not finite; leave it out")
    return torch.from_numpy(np.asarray(table, dtype=np.float64))


def _read_text(path: Path) -> np.ndarray:
    with path.open() as lines:
        named = any(not _is_number(cell) for cell in next(lines, "").split(","))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*contained no data")  # the shape says it
        return np.loadtxt(path, delimiter=",", skiprows=int(named), ndmin=2)


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def check_inside(points: Tensor, low: Tensor, high: Tensor, where: str) -> None:
    """UserError for points [M, D] outside the box: a field is not defined there."""
    slack = OUTSIDE * (high - low)
    outside = torch.nonzero(((points < low - slack) | (points > high + slack)).any(1))[:, 0]
    if len(outside):
        row = int(outside[0])
        raise UserError(f"{where}: row {row + 1} at {points[row].tolist()} is outside the box; leave it out")
