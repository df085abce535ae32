"""What a TIFF says of its values: their unit and a calibration (value = offset + slope * sample).

Where it stands
* `MapWriter`, tifffile: JSON, `unit`; OME-XML of `MapWriter`: the annotation `ValueUnit`.
* ImageJ: `vunit`, and `c0`, `c1` of a straight line. `unit`, `xunit`, `zunit` are of the pixels' sides, as OME's
  `PhysicalSizeX`, `Y` and `Z` are; they tell nothing of the values.
* GDAL: `UNITTYPE`, `OFFSET` and `SCALE` of the first band in the tag 42112.
"""

import json
import math
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from xml.etree import ElementTree

import tifffile

from cpikan_hr.data.pages import split_page
from cpikan_hr.data.units import NO_UNIT
from cpikan_hr.errors import UserError

_GDAL_METADATA = 42112
_VALUE_UNIT = re.compile(r'K="ValueUnit"[^>]*>([^<]+)<')
_SIDE = re.compile(r'PhysicalSize[XYZ]Unit="([^"]+)"')
_LINE = "0"  # ImageJ's number of a straight line
_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@dataclass(frozen=True)
class Values:
    """What is said of a map's values; `side`: the unit of its pixels' sides, which is none of the values."""

    unit: str | None = None
    slope: float = 1.0
    offset: float = 0.0
    side: str | None = None


def tiff_values(path: str | os.PathLike) -> Values:
    """Of the first page of `path`; all as by default for other files. UserError: a calibration that is no number."""
    path, _ = split_page(path)
    if not path.is_file() or path.open("rb").read(4) not in _MAGIC:
        return Values()
    try:
        with tifffile.TiffFile(path) as tif:
            page = tif.pages[0]
            said, gdal = page.description or "", page.tags.valueof(_GDAL_METADATA)
    except (tifffile.TiffFileError, ValueError, OSError, IndexError) as error:
        raise UserError(f"{path}: broken or truncated TIFF ({error}); copy the file again") from None
    try:
        found = _described(said) | (_gdal(gdal) if gdal else {})
        values = Values(**found)
        if not (math.isfinite(values.offset) and math.isfinite(values.slope) and values.slope):
            raise ValueError(f"{values.offset} + {values.slope} x sample")
    except ValueError as error:
        raise UserError(f"{path}: the calibration of its values makes no sense ({error}); save it without") from None
    return values


def _described(said: str) -> dict:
    """Of an ImageDescription."""
    if said.startswith("{"):
        with suppress(ValueError):
            unit = json.loads(said).get("unit")
            return {"unit": unit} if isinstance(unit, str) and not _none(unit) else {}
    if said.startswith("ImageJ="):
        return _imagej(dict(line.split("=", 1) for line in said.splitlines() if "=" in line))
    value, side = _VALUE_UNIT.search(said), _SIDE.search(said)
    return {"unit": value and value[1], "side": side and side[1]}


def _imagej(keys: dict[str, str]) -> dict:
    found = {"unit": keys.get("vunit"), "side": keys.get("unit")}
    if "cf" in keys:
        if keys["cf"] != _LINE:
            raise ValueError(f"ImageJ's function {keys['cf']}, not a straight line")
        found |= {"offset": float(keys.get("c0", 0)), "slope": float(keys.get("c1", 1))}
    return {key: None if isinstance(value, str) and _none(value) else value for key, value in found.items()}


def _gdal(xml: str) -> dict:
    with suppress(ElementTree.ParseError):
        roles = {item.get("role", ""): (item.text or "").strip() for item in ElementTree.fromstring(xml.strip("\0"))
                 if item.get("sample", "0") == "0"}  # fmt: skip
        numbers = {key: float(roles[role]) for role, key in (("scale", "slope"), ("offset", "offset")) if role in roles}
        return numbers | ({"unit": roles["unittype"]} if not _none(roles.get("unittype", "")) else {})
    return {}


def _none(unit: str) -> bool:
    return unit.strip().casefold() in NO_UNIT
