"""All residuals of an equation at fixed points as a function of the field's parameters, with their Jacobian.

theta is one flat vector: level after level, and in a level tile after tile, then the constants. The loss is the sum of
squares of the rows: every residual times the root of its weight over the number of its group.

A Jacobian's row belongs to one residual, its columns to the few tiles whose windows see its points. So it is kept as
blocks [tiles, points of a tile, parameters of a tile] (`jacobian.py`).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from cpikan_hr.fields import Field, Level
from cpikan_hr.fields.level import Dispatch
from cpikan_hr.jets import Jet
from cpikan_hr.problems.collocation import Group, share_of
from cpikan_hr.problems.pde import PDE
from cpikan_hr.solvers.jacobian import Linearised
from cpikan_hr.solvers.time_window import Window

ELEMENTS = 2**22  # of the Jacobian that are computed at once


@dataclass(frozen=True)
class Term:
    """A group at its points, and which tiles see them."""

    group: Group
    order: str
    points: Tensor
    values: Tensor
    lift: Tensor | None
    factor: Tensor | None
    weight: Tensor  # [N] root of what multiplies the squared residuals
    dispatches: list[Dispatch]
    varying: list[Dispatch]  # those of tiles whose parameters vary


@dataclass(frozen=True)
class Block:
    """Jacobian rows of one term with respect to the tiles of one level: `values` [t, P, n], zero where padded.

    A residual has at most one row per tile in all blocks of a term, so that squares of rows add up to those of columns.
    `slots` [t]: which of the level's networks; `rows` [t, P]: which residual, at its end one more for the padding.
    """

    level: int
    slots: Tensor
    rows: Tensor
    values: Tensor


class Residuals:
    """Residual rows of `problem` for a `field`, on share `share` of `shares` of the points of a draw."""

    def __init__(
        self,
        field: Field,
        problem: PDE,
        draw: int = 0,
        share: int = 0,
        shares: int = 1,
        most: int | None = None,
        piece: int | None = None,
        window: Window | None = None,
    ):
        """`most`: at most so many residuals of each group (None: all). `piece`: terms come in pieces of so many, which
        lie beside each other.
        `window`: of time, outside of which residuals do not count and tiles keep their parameters.
        """
        self.field, self.problem = field, problem
        self.levels: list[Level] = [level for level in field.levels if level.network is not None]
        self.parameters = [[p for p in level.network.parameters() if p.requires_grad] for level in self.levels]
        self.sizes = [sum(p[0].numel() for p in group) for group in self.parameters]
        self.window = window
        self.varying = [None if window is None else window.varying(level) for level in self.levels]
        self.terms = list(self._terms(draw, share, shares, most, piece))

    def _terms(self, draw: int, share: int, shares: int, most: int | None, piece: int | None) -> Iterator[Term]:
        problem, device, dtype = self.problem, self.field.device, self.field.mix.dtype
        for group, (placed, lift, factor) in zip(problem.groups, problem.collocation.placed(draw), strict=True):
            whole = share_of(group.count, share, shares)[:most]
            if self.window is not None:
                at = placed.points.unflatten(0, (-1, group.per))[whole]
                whole = whole[self.window.counts(at, self.levels)]
            total = group.count if most is None else min(most, group.count)
            if piece and len(whole) > piece:
                whole = whole[self._place_of(placed.points[whole * group.per]).argsort(stable=True)]
            order = problem.order_of(group)
            for number in whole.split(piece or len(whole) or 1):
                if not len(number):
                    continue
                points = (number[:, None] * group.per + torch.arange(group.per)).flatten()
                weight = torch.full((len(number),), problem.weighting.balance[group.name] / total, dtype=torch.float64)
                if group.kind == "residual" and problem.weighting.watches:
                    slices = problem.slices(placed.points[points]) if problem.options.causal else None
                    weight *= problem.weighting.factors(number, slices)
                here = placed.points[points].to(device)
                seen = [level.dispatch(here, order) for level in self.levels]
                yield Term(
                    group, order, here, placed.values[points].to(device, dtype),
                    *(None if part is None else part[points].to(device, dtype) for part in (lift, factor)),
                    weight.sqrt().to(device, dtype), seen, list(map(those_of, seen, self.varying)),
                )  # fmt: skip

    def _place_of(self, points: Tensor) -> Tensor:
        """Number of the tile of the finest level whose core holds each point [n, D]."""
        grid = max((level.tile_grid for level in self.levels), key=lambda grid: grid.tiles)
        flat = torch.zeros(len(points), dtype=torch.long)
        for a, axis in enumerate(grid.axes):
            flat = flat * axis.count + ((points[:, a] - axis.origin) / axis.stride).long().clamp(0, axis.count - 1)
        return flat

    # ---------------------------------------------------------------------------------------------------- parameters

    @property
    def count(self) -> int:
        """Length of theta."""
        return sum(len(p[0]) * n for p, n in zip(self.parameters, self.sizes, strict=True)) + self._constants

    @property
    def _constants(self) -> int:
        return 0 if self.field.constants is None else self.field.constants.values.numel()

    @cached_property
    def offsets(self) -> list[int]:
        """Where each level begins in theta; then the constants."""
        found = [0]
        for group, size in zip(self.parameters, self.sizes, strict=True):
            found.append(found[-1] + len(group[0]) * size)
        return found

    def theta(self) -> Tensor:
        """The field's parameters."""
        return self._flat([[p.detach() for p in group] for group in self.parameters],
                          None if self.field.constants is None else self.field.constants.values.detach())

    def _flat(self, levels: list[list[Tensor]], constants: Tensor | None) -> Tensor:
        parts = [torch.cat([t.reshape(len(t), -1) for t in group], dim=1).flatten() for group in levels]
        return torch.cat(parts if constants is None else [*parts, constants])

    @torch.no_grad()
    def assign(self, theta: Tensor) -> None:
        """Gives the field these parameters."""
        for group, size, begin in zip(self.parameters, self.sizes, self.offsets, strict=False):
            table = theta[begin : begin + len(group[0]) * size].view(len(group[0]), size)
            for p, values in zip(group, table.split([p[0].numel() for p in group], dim=1), strict=True):
                p.copy_(values.reshape(p.shape))
        if self.field.constants is not None:
            self.field.constants.values.copy_(theta[self.offsets[-1] :])

    @cached_property
    def blocks(self) -> list[Tensor]:
        """Sub-problems of theta: the tiles that vary of levels that have several, the layers of levels of one tile;
        constants go with the last.
        """
        found, everything = [], torch.arange(self.count, device=self.field.device)
        for group, size, begin, varies in zip(self.parameters, self.sizes, self.offsets, self.varying, strict=False):
            numbers = everything[begin : begin + len(group[0]) * size].view(len(group[0]), size)
            if len(group[0]) > 1:
                found += list(numbers if varies is None else numbers[varies])
            else:
                found += list(numbers[0].split([p[0].numel() for p in group]))
        found[-1] = torch.cat([found[-1], everything[self.offsets[-1] :]])
        return found

    # ------------------------------------------------------------------------------------------------------- values

    def rows(self, term: Term) -> Tensor:
        """Jet rows [R, P, C + K] of the field at a term's points."""
        seen = zip(self.levels, term.dispatches, strict=True)
        total = sum(level.evaluate(term.points, term.order, dispatch) for level, dispatch in seen) @ self.field.mix
        if self.field.constants is not None:
            total = torch.cat([total, self.field.constants(total)], dim=-1)
        return total

    def bare(self, term: Term, rows: Tensor) -> Tensor:
        """Residuals [N, K] of a term from its jet rows, each column times the root of its weight."""
        jet = Jet(rows, term.order, term.points.shape[1])
        jet = self.problem.solved(jet, term.lift, term.factor)
        return self.problem.residuals(term.group, jet, term.points, term.values)

    def residual(self, term: Term, rows: Tensor) -> Tensor:
        """The same, each row times its weight: what the loss is the sum of squares of."""
        return term.weight[:, None] * self.bare(term, rows)

    def vector(self) -> Tensor:
        """All residual rows [m] at the field's parameters."""
        with torch.no_grad():
            found = [self.residual(term, self.rows(term)).flatten() for term in self.terms]
            return torch.cat([self.theta()[:0], *found])  # a share of a window may have no residual

    def loss_and_gradient(self) -> tuple[float, Tensor]:
        """Sum of squares and its gradient [n] by one ordinary backward."""
        constants = [] if self.field.constants is None else [self.field.constants.values]
        flat = [p for group in self.parameters for p in group] + constants
        with torch.enable_grad():
            loss = 0 * sum(p.sum() for p in flat)
            loss = loss + sum(self.residual(term, self.rows(term)).square().sum() for term in self.terms)
            found = iter(torch.autograd.grad(loss, flat))
        levels = [[next(found) for _ in group] for group in self.parameters]
        for group, varies in zip(levels, self.varying, strict=True):
            if varies is not None:
                group[:] = [part * varies.view(-1, *[1] * (part.ndim - 1)) for part in group]
        return float(loss.detach()), self._flat(levels, next(found, None))

    def linearised(self) -> Iterator[tuple[Term, Tensor, list[Block], Tensor | None]]:
        """Per term and equation: residuals [N], Jacobian blocks, and columns [N, K] of the constants.

        Large terms come in pieces.
        """
        for term in self.terms:
            with torch.no_grad():
                rows = self.rows(term)
            rows.requires_grad_()
            with torch.enable_grad():
                found = self.residual(term, rows)
                width = found.shape[1]
                for k in range(width):
                    (cotangent,) = torch.autograd.grad(found[:, k].sum(), rows, retain_graph=k + 1 < width)
                    columns = self._constant_columns(cotangent, term)
                    inner = cotangent[..., : self.problem.channels] @ self.field.mix.T
                    blocks = []
                    for number, (level, dispatch) in enumerate(zip(self.levels, term.varying, strict=True)):
                        part = list(self._level_blocks(number, level, dispatch, term, inner))
                        blocks += part if term.group.per == 1 or not part else [joined(part, len(term.weight))]
                    yield term, found[:, k].detach(), blocks, columns

    def _constant_columns(self, cotangent: Tensor, term: Term) -> Tensor | None:
        if self.field.constants is None:
            return None
        direct = cotangent[0, :, self.problem.channels :]
        return direct.unflatten(0, (-1, term.group.per)).sum(1)

    def _level_blocks(
        self, number: int, level: Level, dispatch: Dispatch, term: Term, cotangent: Tensor
    ) -> Iterator[Block]:
        """One row per point and tile that sees it: d (cotangent . windowed jet) / d (the tile's parameters)."""
        padded = torch.cat([cotangent, cotangent.new_zeros(cotangent.shape[0], 1, cotangent.shape[2])], dim=1)
        points = torch.cat([term.points, term.points.new_zeros(1, term.points.shape[1])])
        count = len(term.weight)
        step = max(1, ELEMENTS // (self.sizes[number] * dispatch.points.shape[1]))
        for start in range(0, len(dispatch.tiles), step):
            part = slice(start, start + step)
            numbers, slots = dispatch.points[part], dispatch.slots[part]
            here = Linearised(
                level.network.pick(slots), level.inputs(points[numbers], dispatch.tiles[part], term.order)
            )
            seen = level.windowed(here.output, slots, dispatch.windows[part])
            against = padded[:, numbers].transpose(0, 1)
            rows = torch.where(numbers < len(term.points), numbers // term.group.per, count)
            yield Block(number, slots, rows, here.rows((seen * against).sum()).transpose(1, 2).contiguous())


def those_of(dispatch: Dispatch, varies: Tensor | None) -> Dispatch:
    """A dispatch of the networks that vary [t], of all where None."""
    if varies is None:
        return dispatch
    kept = varies[dispatch.slots]
    return Dispatch(*(part[kept] for part in vars(dispatch).values()))


def joined(blocks: list[Block], count: int) -> Block:
    """The same of one level with one row for each of the `count` residuals and tile: both points of a pair add up."""
    rows = torch.cat([block.rows.flatten() for block in blocks])
    slots = torch.cat([block.slots[:, None].expand_as(block.rows).flatten() for block in blocks])
    values = torch.cat([block.values.flatten(0, 1) for block in blocks])
    here = rows < count
    key, place = torch.unique(slots[here] * count + rows[here], return_inverse=True)
    sums = values.new_zeros(len(key), values.shape[1]).index_add(0, place, values[here])
    slots, counts = torch.unique_consecutive(key // count, return_counts=True)
    tile = torch.repeat_interleave(torch.arange(len(slots), device=key.device), counts)
    column = torch.arange(len(key), device=key.device) - (counts.cumsum(0) - counts)[tile]
    table = torch.full((len(slots), int(counts.max())), count, device=key.device)
    padded = values.new_zeros(*table.shape, values.shape[1])
    table[tile, column], padded[tile, column] = key % count, sums
    return Block(blocks[0].level, slots, table, padded)
