"""The one formula: u(x) = sum over levels and tiles of window * (mean + scale * network(local x))."""

from cpikan_hr.fields.box import Box
from cpikan_hr.fields.field import Field, pixel_axis
from cpikan_hr.fields.level import Level
from cpikan_hr.fields.region import Region
from cpikan_hr.fields.tiles import TileGrid

__all__ = ["Box", "Field", "Level", "Region", "TileGrid", "pixel_axis"]
