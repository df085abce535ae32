"""What every equation asks of its parameters, and what its conditions have to be."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cpikan_hr.errors import UserError, explained, mistake_in_file
from cpikan_hr.jets import Jet, row_count
from cpikan_hr.problems.equations.base import Condition, Equation, FaceResidual, Given, Periodic, coordinates
from cpikan_hr.problems.equations.columns import FEWER, MANY, checked, columns
from cpikan_hr.problems.equations.conditions import face_points, functions_of, holds_at

RESERVED = ("residual", "measurements")  # names of the loss's other terms
THOROUGH = 4001  # points at which a residual that seems to be free of u is looked at again


def check_positive(equation: Any, *names: str) -> None:
    """UserError unless each of these parameters is larger than zero. An unknown (a tensor) may be what it likes."""
    for name in names:
        value = getattr(equation, name)
        if not isinstance(value, Tensor) and not value > 0:
            what = "a domain with no extent" if name == "half_width" else "nothing to solve"
            raise UserError(f"{type(equation).__name__}: {name} = {value} leaves {what}; give a number above 0")


def check_functions(equation: Equation, name: str) -> None:
    """UserError unless the numbers and the names of the equation's functions make sense."""
    channels, components = equation.channels, equation.components
    if not isinstance(channels, int) or isinstance(channels, bool) or channels < 1:
        raise UserError(f"{name}: channels = {channels!r}; give the number of functions, from 1")
    if not isinstance(components, tuple | list) or not all(isinstance(c, str) for c in components):
        raise UserError(f"{name}: components = {components!r}; give names, such as ('u', 'v')")
    if components and len(components) != channels:
        raise UserError(f"{name}: {len(components)} names in components for {channels} channels; give one for each")
    for component in components:
        derivative = len(component) <= 2 and all(letter in equation.axes for letter in component)
        if not component.isidentifier() or component.startswith("_") or component == "value" or derivative:
            raise UserError(f"{name}: a component cannot be called {component!r}, which is no name or a derivative's")
        if list(components).count(component) > 1:
            raise UserError(f"{name}: two components are called {component!r}; give each a name of its own")


def checked_conditions(equation: Equation, name: str) -> list[Given]:
    """The conditions, their values tried on their faces. UserError for one that is no condition of this box."""
    ends = equation.domain()
    conditions = asked(f"{name}: conditions()", lambda: list(equation.conditions()))
    names: set[str] = set()
    for condition in conditions:
        if not isinstance(condition, Given):
            raise UserError(f"{name}: conditions() holds {condition!r}; unpack lists: [*initial(...), *dirichlet(...)]")
        where = f"{name}: condition {condition.name!r}"
        if not isinstance(condition.name, str) or condition.name in RESERVED or condition.name.startswith("interface_"):
            raise UserError(f"{where} cannot be called so; give it another name than the loss's other terms have")
        if condition.name in names:
            raise UserError(f"{where} is there twice; give each a name of its own")
        names.add(condition.name)
        if condition.axis not in ends:
            raise UserError(f"{where} is on axis {condition.axis!r}; the axes are {', '.join(ends)}")
        if not isinstance(condition, Periodic):
            if condition.side not in ("low", "high") or getattr(condition, "derivative", 0) not in (0, 1):
                raise UserError(f"{where}: its side is 'low' or 'high', its derivative 0 or 1")
            wanted = condition.value if isinstance(condition, Condition) else condition.residual
            if not callable(wanted) or not (condition.where is None or callable(condition.where)):
                raise UserError(f"{where}: what holds, and where, are functions: lambda {', '.join(ends)}: ...")
        _try(condition, equation, name)
    _check_overlaps(conditions, equation, name)
    return conditions


def _try(condition: Given, equation: Equation, name: str) -> None:
    """UserError unless its function exists, its part of the face too, and its values are one finite row per point."""
    part = _named(name, lambda: functions_of(condition, equation)) if not isinstance(condition, FaceResidual) else None
    if isinstance(condition, Periodic):
        return
    where, axes = f"{name}: condition {condition.name!r}", ", ".join(equation.axes)
    points = some_points(equation, condition, name)
    if condition.where is not None:
        inside = asked(f"{where}: its where({axes})", lambda: holds_at(condition, points, equation.axes))
        checked(lambda count: holds_at(condition, points[:count], equation.axes), 1, f"{where}: where")
        assert bool(inside.all())
    if isinstance(condition, FaceResidual):
        return
    at = lambda count: coordinates(points[:count], equation.axes)  # noqa: E731
    told = f"{where}: its value({axes})"
    found = checked(lambda count: asked(told, lambda: condition.value(**at(count))), part.stop - part.start, told)
    wrong = ~found.isfinite().all(dim=1)
    if bool(wrong.any()):
        k = int(wrong.nonzero()[0])
        there = ", ".join(f"{axis} = {float(points[k, i]):.4g}" for i, axis in enumerate(equation.axes))
        raise UserError(f"{where}: its value is not finite at {there}: {found[k].tolist()}; correct the equation")


def _check_overlaps(conditions: list[Given], equation: Equation, name: str) -> None:
    """UserError for two values, or two slopes, of one function on one whole face."""
    seen: dict[tuple, str] = {}
    for condition in conditions:
        if isinstance(condition, Condition) and condition.where is None:
            part = functions_of(condition, equation)
            for k in range(part.start, part.stop):
                key = condition.axis, condition.side, condition.derivative, k
                if key in seen:
                    both = f"{seen[key]!r} and {condition.name!r}"
                    raise UserError(f"{name}: conditions {both} give the same on one face; keep one, or say `where`")
                seen[key] = condition.name


def check_solution(equation: Equation, name: str) -> None:
    """UserError unless the equation's answer, where it has one, is one row of all functions per point."""
    points, where = some_points(equation), f"{name}: solution({', '.join(equation.axes)})"
    some = asked(where, lambda: equation.solution(**coordinates(points[:FEWER], equation.axes)))
    if some is not None:
        at = lambda count: coordinates(points[:count], equation.axes)  # noqa: E731
        checked(lambda count: asked(where, lambda: equation.solution(**at(count))), equation.channels, where)


def some_points(
    equation: Equation, condition: Condition | FaceResidual | None = None, name: str = "", count: int = MANY
) -> Tensor:
    """Points [count, D] inside the box, or where a condition holds; always the same."""
    ends, generator = equation.domain(), torch.Generator().manual_seed(0)

    def draw(number: int) -> Tensor:
        return torch.rand(number, len(ends), generator=generator, dtype=torch.float64)

    if condition is not None:
        where = f"{name}: condition {condition.name!r}: its where({', '.join(ends)})"
        return asked(where, lambda: _named(name, lambda: face_points(condition, ends, count, draw)))
    low, high = (torch.tensor([float(end[k]) for end in ends.values()], dtype=torch.float64) for k in (0, 1))
    return low + (high - low) * draw(count)


def examined(evaluate: Callable[[Jet, Tensor], Any], equation: Equation, points: Callable[[int], Tensor],
             unknown: list[float], where: str) -> int:  # fmt: skip
    """How many columns a residual has, tried with random jets of u; `evaluate(jet, points)`: what its function gives.

    UserError unless it is one row per point and every column follows from u, and through operations of torch.
    """
    dim, channels = len(equation.axes), equation.channels

    def jets(count: int) -> list[Jet]:
        generator, found = torch.Generator().manual_seed(1), []
        for k in range(2):
            rows = torch.randn(row_count("hessian", dim), count, channels, generator=generator, dtype=torch.float64)
            constants = rows.new_zeros(len(rows), count, len(unknown))
            constants[0] = torch.tensor(unknown, dtype=torch.float64) * (1 + k / 8) + k / 8
            found.append(Jet(torch.cat([rows * (1 + k), constants], dim=-1).requires_grad_(), "hessian", dim))
        return found

    def at(jet: Jet, here: Tensor) -> Any:
        return asked(where, lambda: evaluate(jet, here))

    here, (first, _) = points(MANY), jets(MANY)
    width = checked(lambda n: at(first._replace(rows=first.rows[:, :n]), here[:n]), None, where).shape[1]
    for count in (MANY, THOROUGH):
        here, tried = points(count), jets(count)
        found = [columns(at(jet, here), count, width, where) for jet in tried]
        free = [k for k in range(width) if torch.equal(found[0][:, k], found[1][:, k])]
        if not free:
            break
    else:
        raise UserError(f"{where}{_which(free, width)} does not depend on u; write what is zero by u.value, u.x, ...")
    slopes = [_moves(part, jet) for part, jet in zip(found, tried, strict=True)]
    still = [k for k in range(width) if not any(moves[k] for moves in slopes)]
    if still:
        raise UserError(
            f"{where}{_which(still, width)} has no derivative by u; leave out detach, item, numpy and rounding"
        )
    return width


def _moves(found: Tensor, jet: Jet) -> list[bool]:
    """Whether each column [n, K] has a derivative by the jet that is not zero."""
    if not found.requires_grad:
        return [False] * found.shape[1]
    return [
        bool((torch.autograd.grad(found[:, k].sum(), jet.rows, retain_graph=True)[0] != 0).any())
        for k in range(found.shape[1])
    ]


def _which(numbers: list[int], width: int) -> str:
    return f": equation {', '.join(str(k + 1) for k in numbers)} of {width}" if width > 1 else ""


def asked(where: str, function: Callable[[], Any]) -> Any:
    """What a function of the equation gives; what it raises as a UserError of one line."""
    try:
        return function()
    except UserError:
        raise
    except Exception as error:  # an equation is a user's file
        told = mistake_in_file(error) or f"{where} raised {explained(error)}; correct the equation"
        raise UserError(told) from None


def _named(name: str, function: Callable[[], Any]) -> Any:
    """Says in which equation it is what cannot be."""
    try:
        return function()
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
