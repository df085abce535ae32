"""Units of length: every name that files and options use for one, and what it is in nm."""

from cpikan_hr.errors import UserError

UNITS = {  # in nm; the first name is the one that is written
    1e-3: ("pm", "picometer", "picometre", "picometers", "picometres"),
    0.1: ("Å", "å", "angstrom", "angstroms", "ångström", "ångstrom", "ang"),
    1.0: ("nm", "nanometer", "nanometre", "nanometers", "nanometres"),
    25.4: ("uin", "microinch", "microinches"),
    1e3: ("um", "micron", "microns", "micrometer", "micrometre", "micrometers", "micrometres"),
    25.4e3: ("mil", "mils", "thou"),
    1e6: ("mm", "millimeter", "millimetre", "millimeters", "millimetres"),
    1e7: ("cm", "centimeter", "centimetre", "centimeters", "centimetres"),
    25.4e6: ("in", "inch", "inches", '"'),
    1e9: ("m", "meter", "metre", "meters", "metres"),
    1e12: ("km", "kilometer", "kilometre", "kilometers", "kilometres"),
}
_NM = {name: nm for nm, names in UNITS.items() for name in names}
_SIGNS = {"\u00b5": "u", "\u03bc": "u", "\\u00b5": "u", "\\u00B5": "u", "\\u03bc": "u", "\\u03BC": "u", "\\u00c5": "å",
          "\\u00C5": "å", "\u212b": "å"}  # fmt: skip
NO_UNIT = ("", "pixel", "pixels", "px", "gray value", "grey value", "none", "null", "1", "-")  # ImageJ's, for none
NAMES = ", ".join(names[0] for names in UNITS.values())


def canonical(nm: float) -> str:
    """How the unit of so many nm is written."""
    return UNITS[nm][0]


def nm_per(unit: str, where: str) -> float:
    """How many nm one `unit` is: 1000 for µm, um and micron. UserError, which begins with `where`, for no length."""
    name = " ".join(str(unit).split())
    for sign, plain in _SIGNS.items():
        name = name.replace(sign, plain)
    found = _NM.get(name) or (_NM.get(name.casefold()) if len(name) > 1 else None)  # M is no metre, but NM and Mm are
    if found is None:
        raise UserError(f"{where}: {unit!r} is no unit of length that is known; one of {NAMES}")
    return found
