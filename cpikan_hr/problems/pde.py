"""A partial differential equation on a box: its terms at collocation points, forward and inverse."""

import copy
import difflib
import math
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cpikan_hr.errors import UserError
from cpikan_hr.fields import Box, Field
from cpikan_hr.jets import Jet, row_count
from cpikan_hr.problems.base import Problem
from cpikan_hr.problems.collocation import Collocation, Group
from cpikan_hr.problems.equation_batches import EquationBatches
from cpikan_hr.problems.equations import build
from cpikan_hr.problems.equations.base import Condition, Equation, Periodic, Solution, coordinates
from cpikan_hr.problems.equations.checks import checked_conditions
from cpikan_hr.problems.equations.constraints import Ansatz, constrained, hard_conditions
from cpikan_hr.problems.measurements import check_inside, read_table
from cpikan_hr.problems.weighting import Weighting
from cpikan_hr.recipe import PDEProblem, Recipe

LATTICE = 65  # points per axis of the lattice where the logged error is taken, of three axes a quarter
WATCHED = 500  # points of a term that its logged size is taken from
CHUNK = 65536  # points evaluated at once where nothing is trained


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
        self.axes, self.channels = self.equation.axes, self.equation.channels
        self._ends = self.equation.domain()
        self._conditions = conditions = checked_conditions(self.equation, options.equation)
        if not conditions and not options.measurements:
            raise UserError(f"{options.equation}: no condition on any face; without one the answer is not determined")
        self.order, self.residual_width = self._needs()
        self._check_field(recipe)
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

    def _needs(self) -> tuple[str, int]:
        """The jet order of the residual and its conditions, found by asking with zeros; and how many equations."""
        probe, name = Probe(self.axes, self.channels), self.options.equation
        point = {axis: torch.full((1, 1), sum(ends) / 2, dtype=torch.float64) for axis, ends in self._ends.items()}
        try:
            found = self.equation.residual(probe, **point)
        except AttributeError as error:
            raise UserError(f"{name}: residual asks for {error}") from None
        except TypeError as error:
            raise UserError(f"{name}: residual(self, u, {', '.join(self.axes)}): {error}") from None
        except Exception as error:  # an equation is a user's file
            raise UserError(f"{name}: residual raised {type(error).__name__}: {error}; correct the equation") from None
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != 1:
            told = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise UserError(f"{name}: residual gives {told} at one point; give a tensor [n, K] of K equations")
        slopes = any(isinstance(c, Periodic) or c.derivative for c in self._conditions)
        first, second = bool(probe.asked[1]) or slopes, bool(probe.asked[2])
        return "hessian" if second else "gradient" if first else "value", found.shape[-1]

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
        parts = ("value", "residual", "flux")
        groups = [group.name for group in self.groups if group.kind != "interface"]
        known = ["residual", "measurements", *groups, *(f"interface_{p}" for p in parts)]
        for name in self.options.weights:
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
            table = read_table(Path(options.path), len(self.axes) + self.channels)
            points = table[:, : len(self.axes)]
            check_inside(points, low, high, f"problem.measurements.path: {options.path}")
            return points, table[:, len(self.axes) :]
        rng = np.random.default_rng([seed, 777])
        points = low + (high - low) * torch.from_numpy(rng.random((options.points, len(self.axes))))
        truth = self.equation.solution(**coordinates(points, self.axes))
        if truth is None:
            raise UserError(f"problem.measurements: {self.options.equation} knows no answer to measure; give a path")
        truth = truth.detach()
        error = torch.from_numpy(rng.standard_normal(tuple(truth.shape))) * truth.std(0)
        return points, truth + options.noise * error

    # -------------------------------------------------------------------------------------------------------- terms

    def residuals(self, group: Group, jet: Jet, points: Tensor, values: Tensor) -> Tensor:
        """A term's residuals [N, K], each column times the root of its weight; jet: u and the unknowns there."""
        u = jet._replace(rows=jet.rows[..., : self.channels])
        if group.kind == "residual":
            return self._root("residual") * self.residual(jet, points)
        if group.kind == "measurements":
            return self._root("measurements") * (u.value - values)
        if group.kind == "condition":
            found = u.gradient[group.axis] if group.condition.derivative else u.value
            return self._root(group.name) * (found - values)
        low, high = (u._replace(rows=u.rows[:, k::2]) for k in (0, 1))
        step, flux = high.value - low.value, high.gradient[group.axis] - low.gradient[group.axis]
        if group.kind == "periodic":
            return self._root(group.name) * torch.cat([step, flux], dim=1)
        both = self.residual(jet, points)
        parts = {"interface_value": step, "interface_residual": both[1::2] - both[0::2], "interface_flux": flux}
        return torch.cat([self._root(name) * part for name, part in parts.items()], dim=1)

    def _root(self, name: str) -> float:
        return math.sqrt(self.options.weights.get(name, 1.0))

    def residual(self, jet: Jet, points: Tensor) -> Tensor:
        """The equation's residual [n, K], without weights; jet: u and the unknowns at points [n, D], in `order`."""
        equation, points = self.equation, points.to(jet.rows.device)
        if self.options.unknown:
            equation = copy.copy(equation)
            for k, name in enumerate(self.options.unknown):  # a frozen dataclass whose checks want plain numbers
                object.__setattr__(equation, name, jet.value[:, self.channels + k : self.channels + k + 1])
        u = Solution(jet._replace(rows=jet.rows[..., : self.channels]), self.axes)
        found = equation.residual(u, **coordinates(points, self.axes))
        return found.expand(len(points), -1)

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

    def loss(self, jet: Jet, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Per point [n]: what the mean over all points of the update turns into the loss, and the squared residual."""
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
                if self.weighting.watches:
                    self.weighting.note(batch["index"], squared)
                    squared = squared * self.weighting.factors(batch["index"]).to(squared)
            else:
                squared, error = squared.repeat_interleave(group.per), torch.zeros_like(squared.detach())
                error = error.repeat_interleave(group.per)
            losses.append(squared * share * self.weighting.balance[group.name])
            errors.append(error)
        return torch.cat(losses), torch.cat(errors)

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

    def told(self, field: Field) -> dict[str, float]:
        """The error against a known answer on a coarse lattice; root mean square of each soft condition and of the
        measurements, at some of the first draw's points, without weights; the unknowns' values.
        """
        told = {}
        points, truth = self._watched
        if truth is not None:
            truth = truth.to(field.device)
            told["rel_l2"] = float((self.values(field, points) - truth).norm() / truth.norm())
        for group, (placed, _, _) in zip(self.groups, self.collocation.placed(), strict=True):
            root = self._root(group.name)
            if group.kind in ("residual", "interface") or not root:
                continue
            some = slice(WATCHED * group.per)
            sloped = isinstance(group.condition, Periodic) or getattr(group.condition, "derivative", 0)
            jet = self.evaluate(field, placed.points[some], "gradient" if sloped else "value")
            found = self.residuals(group, jet, placed.points[some], placed.values[some].to(jet.rows.device)) / root
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
        parts = [self.equation.solution(**coordinates(piece, self.axes)) for piece in points.split(CHUNK)]
        return None if parts[0] is None else torch.cat([part.detach() for part in parts])

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


class Probe:
    """Stands for u while it is found out which derivatives a residual asks for."""

    def __init__(self, axes: tuple[str, ...], channels: int):
        self._axes, self._zero, self.asked = axes, torch.zeros(1, channels, dtype=torch.float64), {1: set(), 2: set()}
        rows = torch.zeros(row_count("hessian", len(axes)), 1, channels, dtype=torch.float64)
        self._solution = Solution(Jet(rows, "hessian", len(axes)), axes)

    @property
    def value(self) -> Tensor:
        return self._zero

    def __getattr__(self, name: str) -> Tensor:
        found = getattr(self._solution, name)
        self.asked[len(name)].add(name)
        return found


def grid_points(lines: list[Tensor]) -> Tensor:
    """The points [n1 n2 .., D] of a lattice with these coordinates along its axes, the last axis fastest."""
    return torch.stack(torch.meshgrid(*lines, indexing="ij"), dim=-1).flatten(0, -2)


def _no_such(where: str, name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(sorted(known))}"
    return f"{where}: there is no '{name}'; {hint}"
