"""Measurements of u at scattered points, from a file: text in columns, npy or npz.

Columns that have names are found by them, in any order; without names they stand in the documented order, the axes of
the equation first. Invariant: what could be read in two ways is refused.
"""

import codecs
import io
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cpikan_hr.errors import UserError

OUTSIDE = 1e-9  # of the extent of an axis: how far beyond the box a point may be by rounding
# Several functions are called one of these, in any order
FUNCTIONS = (tuple("uvwpqrs"), tuple(f"u{k}" for k in range(10)), tuple(f"u{k}" for k in range(1, 11)))
FORMATS = ((",", "."), (";", "."), (";", ","), ("\t", "."), ("\t", ","), (None, "."), (None, ","))  # None: blanks
_BINARY = (b"\x93NUMPY", b"PK\x03\x04")
# UTF-32 before UTF-16, whose mark it begins with
_MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32",
          codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}  # fmt: skip
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE | re.ASCII)

Table = tuple[list[str] | None, np.ndarray]  # names of the columns, where the file has any, and rows [M, columns]


def read_table(path: Path, axes: Sequence[str], channels: int, components: Sequence[str] = ()) -> Tensor:
    """float64 [M, D + C]: a column per axis, then one per function, whatever their order in the file.

    components: the functions' names, where the equation gives them some.
    UserError for a file that is no such table, or could be another one.
    """
    where = f"problem.measurements.path: {path}"
    wanted, functions = len(axes) + channels, (tuple(components),) if components else FUNCTIONS
    try:
        data = path.read_bytes()
        if data.startswith(_BINARY) or path.suffix.lower() in (".npy", ".npz"):
            names, table = _read_arrays(data)
        else:
            names, table = _read_text(_decoded(data), axes, wanted, functions)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        told = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise UserError(
            f"{where}: cannot be read as a table of numbers ({told}); give a csv, npy or npz file"
        ) from None
    if table.dtype.kind not in "fiub":
        raise UserError(f"{where}: holds no real numbers; give a csv, npy or npz file")
    if names is not None:
        table = table[:, _places(names, axes, functions, channels, where)]
    if table.ndim != 2 or table.shape[1] != wanted or not len(table):
        order = ", ".join([*axes, *_called(channels, functions)])
        raise UserError(f"{where}: shape {table.shape}; give rows of {wanted} columns, {order}")
    bad = np.nonzero(~np.isfinite(table).all(1))[0]
    if len(bad):
        raise UserError(f"{where}: row {bad[0] + 1} has numbers that are not finite; leave it out")
    return torch.from_numpy(np.ascontiguousarray(table, dtype=np.float64))


def _called(channels: int, functions: Sequence[Sequence[str]]) -> list[str]:
    return ["u"] if channels == 1 else list(functions[0][:channels])


def _places(
    names: list[str], axes: Sequence[str], functions: Sequence[Sequence[str]], channels: int, where: str
) -> list[int]:
    """Which columns are the axes', then the functions'. Letters' case counts only where it tells two names apart."""
    plain = names if all(axis in names for axis in axes) else [name.lower() for name in names]
    keys = list(axes) if plain is names else [axis.lower() for axis in axes]
    rest = [name for name in plain if name not in keys]
    if channels == 1 and len(rest) == 1:
        called: Sequence[str] = rest  # beside the axes there is one column: whatever it is called, it is u
    else:
        named = [f if plain is names else [name.lower() for name in f] for f in functions]
        called = next((f[:channels] for f in named if set(f[:channels]) == set(rest)), ())
    if sorted([*keys, *called]) != sorted(plain) or len(set(plain)) != len(plain) or not called:
        raise UserError(
            f"{where}: its columns are called {', '.join(names)}; "
            f"call them {', '.join([*axes, *_called(channels, functions)])}, in any order, and leave out others"
        )
    return [plain.index(name) for name in (*keys, *called)]


# ---------------------------------------------------------------------------------------------------------------------
# npy and npz


def _read_arrays(data: bytes) -> Table:
    """An array of rows, one with named fields, or arrays with names. ValueError for others, and for pickled ones."""
    loaded = np.load(io.BytesIO(data), allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        if loaded.dtype.names is None:
            return None, loaded
        return list(loaded.dtype.names), _side_by_side([loaded[name] for name in loaded.dtype.names])
    arrays = {name: np.asarray(loaded[name]) for name in loaded.files}
    if len(arrays) == 1:
        (only,) = arrays.values()
        return None, only
    return list(arrays), _side_by_side(list(arrays.values()))


def _side_by_side(columns: list[np.ndarray]) -> np.ndarray:
    if len({column.size for column in columns}) != 1:
        raise ValueError(f"its arrays have {', '.join(str(column.size) for column in columns)} numbers")
    return np.stack([column.reshape(-1) for column in columns], axis=1)


# ---------------------------------------------------------------------------------------------------------------------
# Text


def _decoded(data: bytes) -> str:
    """By its byte-order mark, else UTF-8, else one byte per letter: digits are the same in all of these."""
    encoding = next((name for mark, name in _MARKS.items() if data.startswith(mark)), None)
    if encoding is None and b"\0" in data:
        raise ValueError("it is no text")
    try:
        return data.decode(encoding or "utf-8")
    except UnicodeDecodeError:
        if encoding:
            raise ValueError(f"it is damaged {encoding}") from None
        return data.decode("latin-1")


def _read_text(text: str, axes: Sequence[str], wanted: int, functions: Sequence[Sequence[str]]) -> Table:
    """Rows of numbers below a line of names, which may be a comment, or without one. ValueError names the line."""
    lines, named = [], None
    for number, line in enumerate(text.splitlines(), start=1):
        content, mark, comment = line.partition("#")
        if content.strip():
            lines.append((number, content.strip(" \r\n")))
        elif mark and not lines and _is_header(names := _names(comment.rpartition(":")[2]), axes, wanted, functions):
            named = number, names
    if lines and not any(_is_number(cell) or _is_number(cell, ",") for cell in _names(lines[0][1])):
        number, first = lines.pop(0)
        named = number, _names(first)
    if named and len(named[1]) != wanted:
        raise ValueError(f"line {named[0]} names {len(named[1])} instead of {wanted} columns")
    return named and named[1], _numbers(lines, wanted)


def _names(line: str) -> list[str]:
    """The words of a line of names, without quotation marks and what stands in brackets."""
    line = re.sub(r"\s*(\[[^\]]*\]|\([^)]*\))", "", line).strip()
    separator = next((mark for mark in (";", "\t", ",") if mark in line), None)
    return [name.strip().strip("\"'").strip() for name in line.split(separator)]


def _is_header(names: list[str], axes: Sequence[str], wanted: int, functions: Sequence[Sequence[str]]) -> bool:
    """Whether the words of a comment are names of columns, an axis among them, and not just a remark."""
    lower, known = {name.lower() for name in names}, {axis.lower() for axis in axes}
    if not all(name.isidentifier() for name in names) or not lower & known:
        return False
    return len(names) == wanted or lower <= known.union(name.lower() for called in functions for name in called)


def _numbers(lines: list[tuple[int, str]], wanted: int) -> np.ndarray:
    """Rows of so many numbers, in the one format that all lines have."""
    found, failures = [], []
    for separator, decimal in FORMATS:
        rows: list[list[float]] = []
        try:
            for number, line in lines:
                rows.append(_row(number, line.split(separator), decimal, wanted))
        except ValueError as error:
            failures.append((len(rows), wanted == len(line.split(separator)), str(error)))
            continue
        if rows not in found:
            found.append(rows)
    if not found:  # the reading that gets furthest says what is wrong
        raise ValueError(max(failures, key=lambda failure: failure[:2])[2])
    if len(found) > 1 and not any(value != value for rows in found for row in rows for value in row):
        raise ValueError("it is not clear which commas separate numbers; use a point for decimals")
    return np.array(found[0], dtype=np.float64).reshape(len(lines), wanted)


def _row(number: int, cells: list[str], decimal: str, wanted: int) -> list[float]:
    if len(cells) != wanted:
        raise ValueError(f"line {number} has {len(cells)} instead of {wanted} columns")
    cells = [cell.strip().strip("\"'") for cell in cells]
    for cell in cells:
        if not _is_number(cell, decimal):
            raise ValueError(f"line {number}: {cell!r} is no number")
    return [float(cell.replace(decimal, ".")) for cell in cells]


def _is_number(cell: str, decimal: str = ".") -> bool:
    if decimal != "." and "." in cell:
        return False
    return _NUMBER.fullmatch(cell.replace(decimal, ".")) is not None


def check_inside(points: Tensor, low: Tensor, high: Tensor, where: str) -> None:
    """UserError for points [M, D] outside the box: a field is not defined there."""
    slack = OUTSIDE * (high - low)
    outside = torch.nonzero(((points < low - slack) | (points > high + slack)).any(1))[:, 0]
    if len(outside):
        row = int(outside[0])
        raise UserError(f"{where}: row {row + 1} at {points[row].tolist()} is outside the box; leave it out")
