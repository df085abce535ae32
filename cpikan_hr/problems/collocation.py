"""Collocation points: where an equation, its conditions and its measurements are asked for.

Points are a function of the seed and of the draw alone. A group is what one term of the loss is the mean of; a group of
pairs compares u at two points, which then follow each other in the list.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cpikan_hr.errors import UserError
from cpikan_hr.problems.equations.base import Condition, Equation, FaceResidual, Given, Periodic, coordinates
from cpikan_hr.problems.equations.conditions import face_points, functions_of, values_of
from cpikan_hr.problems.equations.constraints import Ansatz
from cpikan_hr.recipe import PointOptions

KEPT = 6  # draws by the residual that are remembered
BESIDE = 1e-9  # of the extent: how far from an interface its two sides are looked at


@dataclass(frozen=True)
class Group:
    """One term of the loss. `kind`: residual, condition, face_residual, periodic, measurements or interface."""

    name: str
    kind: str
    count: int  # residuals, or pairs
    condition: Given | None = None
    axis: int = 0  # of a face or a pair

    @property
    def per(self) -> int:
        """Points per residual."""
        return 2 if self.kind in ("periodic", "interface") else 1


@dataclass(frozen=True)
class Placed:
    """A group's points [count * per, D], float64, and what u is compared with there [count * per, C]."""

    points: Tensor
    values: Tensor


def condition_group(condition: Given, axes: tuple[str, ...], count: int) -> Group:
    """The term of a condition."""
    kinds = {Condition: "condition", FaceResidual: "face_residual", Periodic: "periodic"}
    return Group(condition.name, kinds[type(condition)], count, condition, axes.index(condition.axis))


def share_of(count: int, share: int, shares: int) -> Tensor:
    """Numbers below `count` of one share, none where there are more shares than numbers."""
    return torch.arange(min(share, count), count, shares)


class Collocation:
    """The groups of an equation and their points.

    `edges[a]`: where along axis a tiles meet without overlap (XPINN). `measured`: points [M, D] and values [M, C].
    """

    def __init__(
        self,
        equation: Equation,
        options: PointOptions,
        order: str,
        seed: int,
        ansatz: Ansatz | None,
        soft: list[Given],
        edges: list[list[float]],
        measured: tuple[Tensor, Tensor] | None,
    ):
        self.equation, self.options, self.order, self.seed, self.ansatz = equation, options, order, seed, ansatz
        self.edges, self.measured = edges, measured
        ends = list(equation.domain().values())
        self.low, self.high = (torch.tensor([end[k] for end in ends], dtype=torch.float64) for k in (0, 1))
        self.axes = equation.axes
        self.groups = [Group("residual", "residual", options.interior)]
        for condition in soft:
            self.groups.append(condition_group(condition, self.axes, options.condition if len(self.axes) > 1 else 1))
        if measured is not None:
            self.groups.append(Group("measurements", "measurements", len(measured[0])))
        if options.interface:
            met = [axis for axis, places in enumerate(edges) if places]
            self.groups += [Group(f"interface_{self.axes[a]}", "interface", options.interface, axis=a) for a in met]
        self.interior: Tensor | None = None  # once points were drawn by the residual
        self.drawn: list[tuple[int, Tensor]] = []  # the last of them, and the updates they were drawn before
        self._placed: dict[tuple[int, int], list] = {}  # by draw and by how often the interior was chosen anew
        self._chosen = 0

    # ------------------------------------------------------------------------------------------------- what is read

    @property
    def total(self) -> int:
        """Points of all groups."""
        return sum(group.count * group.per for group in self.groups)

    def read(self, step: int, share: int, shares: int) -> dict[str, Tensor]:
        """A share of every group: `points`, `values`, with an ansatz `lift` and `factor`.

        Beside them `counts` [G] of residuals, and the numbers `index` of the interior ones.
        """
        placed = self.placed(self.draw_of(step))
        parts: dict[str, list[Tensor]] = {"points": [], "values": []}
        if self.ansatz is not None:
            parts |= {"lift": [], "factor": []}
        counts = []
        for group, (here, lift, factor) in zip(self.groups, placed, strict=True):
            number = share_of(group.count, share, shares)
            counts.append(len(number))
            number = (number[:, None] * group.per + torch.arange(group.per)).flatten()
            found = {"points": here.points, "values": here.values, "lift": lift, "factor": factor}
            for name, some in parts.items():
                some.append(found[name][number])
        data = {name: torch.cat(values) for name, values in parts.items()}
        return data | {"counts": torch.tensor(counts), "index": share_of(self.groups[0].count, share, shares)}

    def draw_of(self, step: int) -> int:
        """Which draw of the points an update sees."""
        return step // self.options.redraw_every if self.options.redraw_every else 0

    def placed(self, draw: int = 0) -> list[tuple[Placed, Tensor | None, Tensor | None]]:
        """The groups' points of a draw; their lift [n, R, C] and factor [n, R, 1], where there is an ansatz."""
        key = draw, self._chosen
        found = self._placed.get(key)
        if found is None:  # two threads may both find it missing: they compute the same
            found = [self._with_ansatz(self._place(group, k, draw)) for k, group in enumerate(self.groups)]
            kept = [(k, v) for k, v in self._placed.items() if k[1] == key[1] and k[0] >= draw - 1]
            self._placed = dict(kept) | {key: found}
        return found

    def _with_ansatz(self, placed: Placed) -> tuple[Placed, Tensor | None, Tensor | None]:
        if self.ansatz is None:
            return placed, None, None
        return placed, *self.ansatz.rows(placed.points, self.order)

    def _place(self, group: Group, number: int, draw: int) -> Placed:
        channels, dim = self.equation.channels, len(self.axes)
        if group.kind == "measurements":
            return Placed(*self.measured)
        if group.kind in ("condition", "face_residual"):
            points = face_points(
                group.condition, self.equation.domain(), group.count, lambda n: self.uniform(n, dim, number, draw)
            )
            values = self.values_on(group, points)
            bad = torch.nonzero(~values.isfinite().all(1))[:, 0]
            if len(bad):
                at = ", ".join(f"{axis} = {x:g}" for axis, x in zip(self.axes, points[bad[0]].tolist(), strict=True))
                raise UserError(f"condition {group.name!r}: its value is not finite at {at}; correct the equation")
            return Placed(points, values)
        points = self.low + (self.high - self.low) * self.uniform(group.count, dim, number, draw)
        if group.kind == "residual" and self.interior is not None:
            points = self.interior
        values = points.new_zeros(len(points), channels)
        if group.kind in ("periodic", "interface"):
            points = points.repeat_interleave(2, dim=0)
            if group.kind == "periodic":
                ends = torch.stack([self.low[group.axis], self.high[group.axis]])
                points[:, group.axis] = ends.repeat(group.count)
            else:
                places = torch.tensor(self.edges[group.axis], dtype=torch.float64)
                # Each a stretch of the sequence of its own: every n-th Sobol point lies in the same part of an edge.
                which = places[torch.arange(group.count) * len(places) // group.count]
                beside = BESIDE * float(self.high[group.axis] - self.low[group.axis])
                points[0::2, group.axis], points[1::2, group.axis] = which - beside, which + beside
                order = np.random.default_rng([self.seed, number, draw]).permutation(group.count)  # any first ones do
                points = points.unflatten(0, (-1, 2))[torch.from_numpy(order)].flatten(0, 1)
            values = points.new_zeros(len(points), channels)
        return Placed(points, values)

    def values_on(self, group: Group, points: Tensor) -> Tensor:
        """What a condition compares u with at points [n, D] of its face, [n, C]; 0 of functions that it is not for."""
        values = points.new_zeros(len(points), self.equation.channels)
        if isinstance(group.condition, Condition):
            found = values_of(group.condition, self.equation, coordinates(points, self.axes))
            values[:, functions_of(group.condition, self.equation)] = found
        return values

    def uniform(self, count: int, dim: int, *stream: int) -> Tensor:
        """Points in the unit cube, float64 [count, dim], by the recipe's pattern."""
        rng = np.random.default_rng([self.seed, *stream])
        if self.options.pattern == "random":
            return torch.from_numpy(rng.random((count, dim)))
        engine = torch.quasirandom.SobolEngine(dim, scramble=True, seed=int(rng.integers(2**31)))
        return engine.draw(count, dtype=torch.float64)

    # ------------------------------------------------------------------------------------- points by the residual

    def pool(self, step: int, count: int) -> Tensor:
        """Points among which the interior ones are chosen anew before an update."""
        rng = np.random.default_rng([self.seed, 1_000_003, step])
        return self.low + (self.high - self.low) * torch.from_numpy(rng.random((count, len(self.axes))))

    def refine(self, step: int, pool: Tensor, size: Tensor, power: float, floor: float) -> None:
        """RAD (Wu et al. 2023, eq. 2): interior points drawn from the pool with p ~ |r|^k / mean + c; size [n]: |r|."""
        rng = np.random.default_rng([self.seed, 1_000_033, step])
        weight = size.double() ** power
        weight = weight / weight.mean().clamp_min(1e-300) + floor
        chances = (weight / weight.sum()).cpu().numpy()
        count = self.groups[0].count
        chosen = rng.choice(len(pool), count, replace=count > len(pool), p=chances / chances.sum())
        self._choose(pool[torch.from_numpy(chosen)])
        self.drawn = [*self.drawn, (step, self.interior)][-KEPT:]

    def _choose(self, interior: Tensor | None) -> None:
        self.interior = interior
        self._chosen += 1

    def state(self) -> dict[str, Tensor]:
        """`interior` [n, D]; `drawn` [k, n, D] and `drawn_at` [k], their updates; {} unless drawn by the residual."""
        state = {} if self.interior is None else {"interior": self.interior}
        if self.drawn:
            steps, points = zip(*self.drawn, strict=True)
            state |= {"drawn": torch.stack(points), "drawn_at": torch.tensor(steps)}
        return state

    def restore(self, state: dict[str, Tensor]) -> None:
        self._choose(state.get("interior"))
        if "drawn" in state:
            self.drawn = list(zip(state["drawn_at"].tolist(), state["drawn"], strict=True))

    def seen(self, draw: int) -> dict[str, Tensor]:
        """Where the interior points of a draw are, `interior` [n, D], and what `state` says of those before."""
        return self.state() | {"interior": self.placed(draw)[0][0].points}
