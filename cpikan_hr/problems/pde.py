"""A partial differential equation on a box: its terms at collocation points, forward and inverse."""

import copy
import difflib
import math
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cpikan_hr.errors import UserError
from cpikan_hr.fields import Box, Field
from cpikan_hr.jets import Jet
from cpikan_hr.problems.base import Problem
from cpikan_hr.problems.collocation import Collocation, Group, condition_group
from cpikan_hr.problems.equation_batches import EquationBatches
from cpikan_hr.problems.equations import build
from cpikan_hr.problems.equations.base import Condition, Equation, FaceResidual, Given, Periodic, Solution, coordinates
from cpikan_hr.problems.equations.checks import (
    check_functions,
    check_solution,
    checked_conditions,
    examined,
    some_points,
)
from cpikan_hr.problems.equations.columns import columns
from cpikan_hr.problems.equations.conditions import functions_of, holds_at
from cpikan_hr.problems.equations.constraints import Ansatz, constrained, hard_conditions
from cpikan_hr.problems.measurements import check_inside, read_table
from cpikan_hr.problems.non_finite import first_fault
from cpikan_hr.problems.weighting import Weighting
from cpikan_hr.recipe import PDEProblem, Recipe

LATTICE = 65  # points per axis of the lattice where the logged error is taken, of three axes a quarter
WATCHED = 500  # points of a term that its logged size is taken from
CHUNK = 65536  # points evaluated at once where nothing is trained
ORDERS = ("value", "gradient", "hessian")


class PDE(Problem):
    """Residual, conditions and measurements as terms of one loss: the sum over terms of weight * mean(r^2).

    The field's channels are those of u, then one per unknown coefficient.
    """

    unit = "1"
    dtype = "float32"

    def __init__(self, recipe: Recipe):
        options: PDEProblem = recipe.problem
        self.options = options
        self.equation: Equation = build(options.equation, dict(options.parameters))
        self.name = type(self.equation).__name__
        check_functions(self.equation, options.equation)
        self.axes, self.channels = self.equation.axes, self.equation.channels
        self._ends = self.equation.domain()
        self.conditions = conditions = checked_conditions(self.equation, options.equation)
        if not conditions and not options.measurements:
            raise UserError(f"{options.equation}: no condition on any face; without one the answer is not determined")
        ends = list(self._ends.values())
        hard = hard_conditions(self.equation, conditions, options.constraints)
        periodic = tuple(self.axes.index(c.axis) for c in hard if isinstance(c, Periodic))
        for axis in periodic:
            for k, level in enumerate(recipe.field.levels):
                if level.grid[axis] > 1:
                    raise UserError(
                        f"field.levels.{k}.grid: hard periodicity needs one tile along {self.axes[axis]}; "
                        "or use constraints: values, which leaves it soft"
                    )
        self._true = {name: getattr(self.equation, name, None) for name in options.unknown}
        for name, value in self._true.items():
            if not isinstance(value, float | int):
                raise UserError(_no_such("problem.unknown", name, list(vars(self.equation))))
        self.order, self._face_orders, self.residual_width = self._needs()
        self._check_field(recipe)
        if options.equation.endswith(".py"):  # answers of shipped equations may take half a minute, and are tested
            check_solution(self.equation, options.equation)
        low, high = ([float(end[k]) for end in ends] for k in (0, 1))
        self.box = Box(tuple(low), tuple(high), periodic, tuple(options.unknown.values()))
        self.shape = (options.resolution if len(ends) > 1 else 1, options.resolution)
        soft = [c for c in conditions if c not in hard]
        self.ansatz = Ansatz(self.equation, hard) if any(isinstance(c, Condition) for c in hard) else None
        edges = [self._edges(recipe, axis) for axis in range(len(ends))]
        most = max(map(len, edges))
        if 0 < options.points.interface < most:
            raise UserError(f"problem.points.interface: {most} interfaces along an axis need at least one point each")
        self.collocation = Collocation(
            self.equation, options.points, self.order, recipe.training.seed, self.ansatz, soft, edges,
            self._measured(recipe.training.seed),
        )  # fmt: skip
        self.groups = self.collocation.groups
        self._check_weights()
        self.weighting = Weighting(options, options.points.interior, [group.name for group in self.groups])
        for key, asked in (("problem.causal", options.causal), ("solve.march", recipe.solve.march)):
            if asked and "t" not in self.axes:
                raise UserError(f"{key}: {options.equation} has no time axis t")

    # ------------------------------------------------------------------------------------------------------ set-up

    def _needs(self) -> tuple[str, dict[str, str], int]:
        """The jet orders of the loss and of each residual on a face, found by trying; and how many equations."""
        name, unknown = self.options.equation, [float(value) for value in self.options.unknown.values()]
        faces = {c.name: c for c in self.conditions if isinstance(c, FaceResidual)}
        orders, width = {}, 0
        for face in (None, *faces.values()):
            asked: set[int] = set()
            where = f"{name}: residual" if face is None else f"{name}: condition {face.name!r}: residual"

            def evaluate(jet: Jet, points: Tensor, face=face, asked=asked) -> Any:
                return self._ask(jet, points, face and face.name, asked)

            found = examined(
                evaluate, self.equation, lambda n, face=face: some_points(self.equation, face, name, n), unknown, where
            )
            orders["" if face is None else face.name] = ORDERS[max(asked, default=0)]
            width = width or found
        slopes = any(isinstance(c, Periodic) or getattr(c, "derivative", 0) for c in self.conditions)
        most = max([*orders.values(), "gradient" if slopes else "value"], key=ORDERS.index)
        return most, orders, width

    def order_of(self, group: Group) -> str:
        """The jet that a term's residuals need."""
        if group.kind in ("residual", "interface"):
            return self.order
        if group.kind == "face_residual":
            return self._face_orders[group.name]
        return "gradient" if group.kind == "periodic" or getattr(group.condition, "derivative", 0) else "value"

    def _check_field(self, recipe: Recipe) -> None:
        for k, level in enumerate(recipe.field.levels):
            where, network = f"field.levels.{k}", level.network
            if len(level.grid) != len(self.axes):
                axes = f"{len(self.axes)} axes, {', '.join(self.axes)}"
                raise UserError(f"{where}.grid: {self.options.equation} has {axes}")
            if network.kind == "chebyshev2d" and (len(self.axes) != 2 or network.degree is None or network.sparse):
                raise UserError(f"{where}.network: chebyshev2d here needs two axes and a `degree`")
            if network.kind == "chebyshev2d" and network.input_map == "sine":
                raise UserError(f"{where}.network: input_map sine has no slope at the ends of a tile; use identity")
            blended = level.overlap > 0 and max(level.grid) > 1
            if self.order == "hessian" and blended and recipe.field.window == "cosine":
                raise UserError("field.window: cosine has no second derivative where it ends; use quintic or bump")

    def _check_weights(self) -> None:
        known = [group.name for group in self.groups if group.kind != "interface"]
        if self.options.points.interface:
            known += [f"interface_{part}" for part in ("value", "residual", "flux")]
        for name in self.options.weights:
            if name not in known and name in [condition.name for condition in self.conditions]:
                raise UserError(f"problem.weights: '{name}' holds exactly, by problem.constraints; leave it out")
            if name not in known:
                raise UserError(_no_such("problem.weights", name, known))

    def _edges(self, recipe: Recipe, axis: int) -> list[float]:
        """Where tiles without overlap meet along an axis."""
        low, high = self.equation.domain()[self.axes[axis]]
        counts = {level.grid[axis] for level in recipe.field.levels if level.overlap == 0}
        return sorted({low + (high - low) * k / count for count in counts for k in range(1, count)})

    def _measured(self, seed: int) -> tuple[Tensor, Tensor] | None:
        options = self.options.measurements
        if options is None:
            if self.options.unknown:
                raise UserError("problem.unknown: coefficients are found from data; give problem.measurements")
            return None
        low, high = (torch.tensor(end, dtype=torch.float64) for end in zip(*self._ends.values(), strict=True))
        if options.path:
            table = read_table(Path(options.path), self.axes, self.channels, self.equation.components)
            points = table[:, : len(self.axes)]
            check_inside(points, low, high, f"problem.measurements.path: {options.path}")
            return points, table[:, len(self.axes) :]
        rng = np.random.default_rng([seed, 777])
        points = low + (high - low) * torch.from_numpy(rng.random((options.points, len(self.axes))))
        truth = self.truth(points)
        if truth is None:
            raise UserError(f"problem.measurements: {self.options.equation} knows no answer to measure; give a path")
        error = torch.from_numpy(rng.standard_normal(tuple(truth.shape))) * truth.std(0)
        return points, truth + options.noise * error

    # -------------------------------------------------------------------------------------------------------- terms

    def residuals(self, group: Group, jet: Jet, points: Tensor, values: Tensor) -> Tensor:
        """A term's residuals [N, K], each column times the root of its weight; jet: u and the unknowns there."""
        found = self.unweighted(group, jet, points, values)
        if group.kind != "interface":
            return self._root(group.name) * found
        parts = found.split([self.channels, self.residual_width, self.channels], dim=1)
        roots = [self._root(f"interface_{name}") for name in ("value", "residual", "flux")]
        return torch.cat([root * part for root, part in zip(roots, parts, strict=True)], dim=1)

    def _root(self, name: str) -> float:
        return math.sqrt(self.options.weights.get(name, 1.0))

    def unweighted(self, group: Group, jet: Jet, points: Tensor, values: Tensor) -> Tensor:
        """What a term says is zero, [N, K], without weights: of the functions that its condition is for."""
        if group.kind == "residual":
            return self.residual(jet, points)
        if group.kind == "face_residual":
            return columns(self._ask(jet, points, group.name), len(points), None, f"condition {group.name!r}: residual")
        u = jet._replace(rows=jet.rows[..., : self.channels])
        if group.kind == "measurements":
            return u.value - values
        if group.kind == "condition":
            found = u.gradient[group.axis] if group.condition.derivative else u.value
            return (found - values)[:, functions_of(group.condition, self.equation)]
        low, high = (u._replace(rows=u.rows[:, k::2]) for k in (0, 1))
        step, flux = high.value - low.value, high.gradient[group.axis] - low.gradient[group.axis]
        if group.kind == "periodic":
            part = functions_of(group.condition, self.equation)
            return torch.cat([step[:, part], flux[:, part]], dim=1)
        both = self.residual(jet, points)
        return torch.cat([step, both[1::2] - both[0::2], flux], dim=1)

    def unweighted_on(self, field: Field, condition: Given, lines: list[Tensor]) -> Tensor:
        """What a condition says is zero, float64 [N, K], where it holds on the lattice with these lines."""
        group = condition_group(condition, self.axes, 0)
        ends = torch.tensor([self.box.low[group.axis], self.box.high[group.axis]], dtype=torch.float64)
        faces = [grid_points([*lines[: group.axis], end[None], *lines[group.axis + 1 :]]) for end in ends]
        if isinstance(condition, Periodic):
            points = torch.stack(faces, dim=1).flatten(0, 1)
        else:
            points = faces[condition.side == "high"]
            inside = holds_at(condition, points, self.axes)
            points = points[inside] if inside.any() else some_points(self.equation, condition, self.options.equation)
        jet = self.evaluate(field, points, self.order_of(group))
        jet = jet._replace(rows=jet.rows.double().cpu())
        return self.unweighted(group, jet, points, self.collocation.values_on(group, points))

    def residual(self, jet: Jet, points: Tensor) -> Tensor:
        """The equation's residual [n, K], without weights; jet: u and the unknowns at points [n, D], in `order`."""
        return columns(self._ask(jet, points), len(points), self.residual_width, f"{self.name}: residual")

    def _ask(self, jet: Jet, points: Tensor, face: str | None = None, asked: set[int] | None = None) -> Any:
        """What the residual of the equation, or the one on a face, gives; `asked`: gathers the orders it looks at."""
        equation, points = self.equation, points.to(jet.rows.device)
        if self.options.unknown:
            equation = copy.copy(equation)
            for k, name in enumerate(self.options.unknown):  # a frozen dataclass whose checks want plain numbers
                object.__setattr__(equation, name, jet.value[:, self.channels + k : self.channels + k + 1])
        residual = equation.residual
        if face is not None:  # of a copy anew: its functions know the equation that made them
            given = equation.conditions() if self.options.unknown else self.conditions
            (residual,) = [condition.residual for condition in given if condition.name == face]
        u = Solution(jet._replace(rows=jet.rows[..., : self.channels]), self.axes, tuple(equation.components), asked)
        return residual(u, **coordinates(points, self.axes))

    def solved(self, jet: Jet, lift: Tensor | None, factor: Tensor | None) -> Jet:
        """u and the unknowns from the field's jet: the ansatz, [n, R, C] and [n, R, 1], applied to u."""
        if lift is None:
            return jet
        inner = jet._replace(rows=jet.rows[..., : self.channels])
        rows = [part.to(jet.rows.device).transpose(0, 1)[: jet.rows.shape[0]] for part in (lift, factor)]
        u = constrained(inner, *(jet._replace(rows=part.to(jet.rows.dtype)) for part in rows))
        return jet._replace(rows=torch.cat([u.rows, jet.rows[..., self.channels :]], dim=-1))

    def solved_at(self, jet: Jet, points: Tensor) -> Jet:
        """The same where the ansatz at float64 points [n, D] is not known yet."""
        return self.solved(jet, *self.ansatz.rows(points, jet.order)) if self.ansatz else jet

    @property
    def judged(self) -> bool:
        return not (self.options.balance or self.options.attention or self.options.causal)

    def misfit(self, jet: Jet, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self.loss(jet, batch, plain=True)

    def loss(self, jet: Jet, batch: dict[str, Tensor], plain: bool = False) -> tuple[Tensor, Tensor]:
        """Per point [n]: what the mean over all points of the update turns into the loss, and the squared residual.

        plain: by the recipe's weights alone.
        """
        jet = self.solved(jet, batch.get("lift"), batch.get("factor"))
        total = self.collocation.total
        losses, errors, start = [], [], 0
        for group, count in zip(self.groups, batch["counts"].tolist(), strict=True):
            part = slice(start, start + count * group.per)
            start = part.stop
            here = jet._replace(rows=jet.rows[:, part])
            squared = self.residuals(group, here, batch["points"][part], batch["values"][part]).square().sum(1)
            share = total / (group.count * group.per)
            error = squared.detach() * share / max(self._root("residual") ** 2, 1e-300)
            if group.kind == "residual":
                if self.weighting.watches and not plain:
                    self.weighting.note(batch["index"], squared)
                    squared = squared * self.weighting.factors(batch["index"]).to(squared)
            else:
                squared, error = squared.repeat_interleave(group.per), torch.zeros_like(squared.detach())
                error = error.repeat_interleave(group.per)
            balance = 1.0 if plain else self.weighting.balance[group.name]
            losses.append(squared * share * balance)
            errors.append(error)
        return torch.cat(losses), torch.cat(errors)

    def fault(self, jet: Jet, batch: dict[str, Tensor]) -> str | None:
        start = 0
        for group, count in zip(self.groups, batch["counts"].tolist(), strict=True):
            part = slice(start, start + count * group.per)
            start = part.stop
            here = jet._replace(rows=jet.rows[:, part])
            given = (None if batch.get(k) is None else batch[k][part] for k in ("points", "values", "lift", "factor"))
            found = first_fault(self, group, here, *given) if count else None
            if found:
                return found
        return None

    def slices(self, points: Tensor) -> Tensor:
        """Which slice of time, of the causal weights, interior points [N, D] are in."""
        axis = self.axes.index("t")
        return self.weighting.slices(points[:, axis], self.box.low[axis], self.box.high[axis])

    def figure(self, mean_squared_error: float) -> tuple[str, float]:
        return "residual", math.sqrt(max(mean_squared_error, 0.0))

    def batches(self, recipe: Recipe) -> "EquationBatches":
        return EquationBatches(self)

    def picture(self, field: Field, side: int) -> np.ndarray:
        shape = tuple(min(n, side) for n in self.shape)
        return self.values(field, self.lattice_points(shape)).reshape(*shape, -1).float().cpu().numpy()

    def about(self) -> dict:
        return {
            "equation": self.name, "axes": list(self.axes), "box": self.box.plain(), "constraint": self._constraint(),
        }  # fmt: skip

    def _constraint(self) -> list[float] | None:
        """Lift and factor of the hard conditions at some points of the box, by which a file knows them again."""
        if self.ansatz is None:
            return None
        low, high = (torch.tensor(end, dtype=torch.float64) for end in (self.box.low, self.box.high))
        share = torch.tensor([[0.618, 0.382, 0.146], [0.236, 0.764, 0.528], [0.854, 0.091, 0.673]]).double()
        rows = self.ansatz.rows(low + (high - low) * share[:, : len(low)], "value")
        return torch.cat([part.flatten() for part in rows]).tolist()

    def note(self) -> str | None:
        soft = [group.name for group in self.groups if group.condition is not None]
        if self.options.constraints == "soft" or not soft:
            return None
        return f"constraints: {self.options.constraints} does not hold {', '.join(soft)}; they stay terms of the loss"

    def told(self, field: Field) -> dict[str, float]:
        """The error against a known answer on a coarse lattice; root mean square of each soft condition and of the
        measurements, at some of the first draw's points, without weights; the unknowns' values.
        """
        told = {}
        points, truth = self._watched
        if truth is not None:
            truth = truth.to(field.device)
            known = truth.isfinite()
            told["rel_l2"] = float((self.values(field, points) - truth)[known].norm() / truth[known].norm())
        for group, (placed, _, _) in zip(self.groups, self.collocation.placed(), strict=True):
            if group.kind in ("residual", "interface"):
                continue
            some = slice(WATCHED * group.per)
            jet = self.evaluate(field, placed.points[some], self.order_of(group))
            found = self.unweighted(group, jet, placed.points[some], placed.values[some].to(jet.rows.device))
            told[f"rms_{group.name}"] = float(found.double().square().mean().sqrt())
        return told | {f"coefficient_{name}": value for name, value in self.coefficients(field).items()}

    @cached_property
    def _watched(self) -> tuple[Tensor, Tensor | None]:
        side = min(self.options.resolution, LATTICE if len(self.axes) < 3 else LATTICE // 4)
        ends = zip(self.box.low, self.box.high, strict=True)  # not the map, which of three axes is a face
        points = grid_points([torch.linspace(low, high, side, dtype=torch.float64) for low, high in ends])
        return points, self.truth(points)

    # ------------------------------------------------------------------------------------------------------ answers

    @torch.no_grad()
    def evaluate(self, field: Field, points: Tensor, order: str = "value") -> Jet:
        """u and the unknowns at float64 points [n, D], by a field that holds whole weights."""
        parts = []
        for piece in points.split(CHUNK):
            jet = field(piece, order)
            parts.append((jet if field.constraint else self.solved_at(jet, piece)).rows)
        return Jet(torch.cat(parts, dim=1), order, points.shape[1])

    def values(self, field: Field, points: Tensor) -> Tensor:
        """u [n, C] at float64 points [n, D]."""
        return self.evaluate(field, points).value[:, : self.channels]

    def truth(self, points: Tensor) -> Tensor | None:
        """The known answer [n, C] at float64 points, None where there is none."""
        pieces = points.split(CHUNK)
        parts = [self.equation.solution(**coordinates(piece, self.axes)) for piece in pieces]
        if parts[0] is None:
            return None
        where, counts = f"{self.name}: solution", map(len, pieces)
        found = [columns(part, n, self.channels, where) for part, n in zip(parts, counts, strict=True)]
        return torch.cat(found).detach().double()

    def coefficients(self, field: Field) -> dict[str, float]:
        """The unknowns' present values, by a field that holds whole weights."""
        found = [] if field.constants is None else field.constants.values.tolist()
        return dict(zip(self.options.unknown, found, strict=True))

    def true_coefficients(self) -> dict[str, float]:
        """The unknowns' true values: all where the measurements are made of the answer, else those the recipe gives."""
        made = self.options.measurements is not None and self.options.measurements.path is None
        return {name: float(v) for name, v in self._true.items() if made or name in self.options.parameters}

    def lattice_lines(self, shape: tuple[int, int]) -> list[Tensor]:
        """Coordinates, float64, of a map's lattice along each axis: ends included.

        A line has one row; of three axes the last stands at its end.
        """
        ends = list(zip(self.box.low, self.box.high, strict=True))
        counts = [shape[1]] if len(ends) == 1 else [*shape, 1][: len(ends)]
        return [
            torch.linspace(low if count > 1 else high, high, count, dtype=torch.float64)
            for (low, high), count in zip(ends, counts, strict=True)
        ]

    def lattice_points(self, shape: tuple[int, int]) -> Tensor:
        """The points float64 [h w, D] of a map, the last axis fastest."""
        return grid_points(self.lattice_lines(shape))


def grid_points(lines: list[Tensor]) -> Tensor:
    """The points [n1 n2 .., D] of a lattice with these coordinates along its axes, the last axis fastest."""
    return torch.stack(torch.meshgrid(*lines, indexing="ij"), dim=-1).flatten(0, -2)


def _no_such(where: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sorted(known))}"
    return f"{where}: there is no '{name}'; {hint}"
