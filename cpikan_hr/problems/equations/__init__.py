"""The shipped equations, one per file, and what an equation says of itself (`base.py`); here they are found by name."""

import difflib
import inspect
import math
import sys
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from cpikan_hr.errors import OWN, UserError, explained
from cpikan_hr.problems.equations.base import Equation

SHIPPED = {
    "allen_cahn": "AllenCahn",
    "burgers": "Burgers",
    "diffusion": "Diffusion",
    "helmholtz": "Helmholtz",
    "poisson": "Poisson",
    "reaction_diffusion": "ReactionDiffusion",
    "wave": "Wave",
}


def find(name: str) -> type[Equation]:
    """The class of a shipped equation, or the one in a file whose name ends in .py.

    UserError for an unknown name, and for a file that is missing, cannot be run or holds no or several equations.
    """
    if name.endswith(".py"):
        return _load(Path(name))
    if name not in SHIPPED:
        raise UserError(f"unknown equation {name!r}; {_hint(name, SHIPPED)}, or a file that ends in .py")
    return getattr(import_module(f"{__name__}.{name}"), SHIPPED[name])


def build(name: str, parameters: dict[str, Any]) -> Equation:
    """The equation with these parameters, its box checked. UserError where one of them or the box makes no sense."""
    kind = find(name)
    known = parameters_of(kind, name)
    types = _call(f"equation {name}: its annotations", lambda: get_type_hints(kind))
    given = {key: _check_parameter(name, key, value, known, types) for key, value in parameters.items()}
    equation = _call(f"equation {name}", lambda: kind(**given))
    box = _call(f"equation {name}: domain()", equation.domain)
    _check_box(name, box)
    for method in ("residual", "lift", "solution"):
        _check_signature(name, getattr(equation, method), list(box), method == "residual")
    return equation


def parameters_of(kind: type[Equation], name: str) -> dict[str, Field]:
    """The fields of an equation that a recipe can set. UserError for one without a default."""
    if "__dataclass_fields__" not in vars(kind):
        raise UserError(f"equation {name}: {kind.__name__} is no dataclass; write @dataclass(frozen=True) above it")
    known = {field.name: field for field in fields(kind) if not field.name.startswith("_")}
    for field in known.values():
        if field.default is MISSING and field.default_factory is MISSING:
            raise UserError(f"equation {name}: parameter {field.name!r} has no default; give it one")
    return known


def _load(path: Path) -> type[Equation]:
    if not path.is_file():
        raise UserError(f"equation {path}: there is no such file; check the path")
    label = f"{OWN}{path.stem}"
    spec = spec_from_file_location(label, path)
    module = module_from_spec(spec)
    sys.modules[label] = module  # dataclasses look their module up there
    try:
        # not exec_module, which would leave a __pycache__ beside the file
        exec(spec.loader.source_to_code(path.read_bytes(), path), vars(module))
    except SyntaxError as error:
        raise UserError(f"equation {path}, line {error.lineno}: {error.msg}; correct the file") from error
    except (Exception, SystemExit) as error:
        raise UserError(f"equation {path}: running the file raised {explained(error)}; correct the file") from error
    own = [
        thing
        for thing in vars(module).values()
        if isinstance(thing, type) and issubclass(thing, Equation) and thing.__module__ == label
    ]
    own = list(dict.fromkeys(own))  # a class may have two names
    if len(own) != 1:
        found = f"several equations, {', '.join(kind.__name__ for kind in own)}" if own else "no equation"
        raise UserError(f"equation {path}: the file holds {found}; keep one class that derives from Equation")
    return own[0]


def _check_parameter(name: str, key: str, value: Any, known: dict[str, Field], types: dict[str, Any]) -> Any:
    if key not in known:
        raise UserError(f"equation {name}: unknown parameter {key!r}; {_hint(str(key), known)}")
    kind = types[key]
    try:
        # Lenient but for plain types, as YAML has no tuples; what pydantic does not know is taken by isinstance
        adapter = TypeAdapter(kind, config={"arbitrary_types_allowed": True})
        value = adapter.validate_python(value, strict=kind in (int, float, str, bool) or None)
    except ValidationError as error:
        wanted = getattr(kind, "__name__", str(kind))
        raise UserError(f"equation {name}: {key} = {value!r} has the wrong type; give a {wanted}") from error
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"equation {name}: {key} = {value} is not finite; give a number")
    return value


def _check_box(name: str, box: Any) -> None:
    where = f"equation {name}: domain()"
    if not isinstance(box, dict) or not 1 <= len(box) <= 3:
        raise UserError(f"{where} gives {box!r}; give a dict of 1 to 3 axes, such as {{'x': (-1.0, 1.0)}}")
    for axis, ends in box.items():
        if not (isinstance(axis, str) and len(axis) == 1 and axis.isalpha()):
            raise UserError(f"{where} names an axis {axis!r}; an axis is a single letter such as 'x' or 't'")
        try:
            low, high = (float(end) for end in ends)
        except (TypeError, ValueError) as error:
            raise UserError(f"{where} gives {ends!r} for {axis}; give its lower and upper end, two numbers") from error
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise UserError(f"{where} gives {axis} from {low} to {high}, no extent; give finite ends, the lower first")


def _check_signature(name: str, function: Any, axes: list[str], takes_u: bool) -> None:
    """UserError for a function of an equation that does not take u, where it is given, and one tensor per axis."""
    try:
        inspect.signature(function).bind(*[None] * takes_u, **dict.fromkeys(axes))
    except TypeError as error:
        line = getattr(getattr(function, "__code__", None), "co_firstlineno", "?")
        wanted = ", ".join(["self", *["u"] * takes_u, *axes])
        raise UserError(
            f"equation {name}, line {line}: {function.__name__}: {error}; write {function.__name__}({wanted})"
        ) from None


def _call(where: str, function: Any) -> Any:
    """What the function gives; what it raises as a UserError of one line."""
    try:
        return function()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{where} raised {explained(error)}; correct the equation") from error


def _hint(wrong: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(wrong, list(known), 1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(known)) or 'none'}"
