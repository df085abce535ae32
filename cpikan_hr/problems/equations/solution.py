"""What an equation's functions see: u and its derivatives by name, and one tensor per axis."""

from collections.abc import Callable

import torch
from torch import Tensor

from cpikan_hr.jets import Jet, pairs

Function = Callable[..., Tensor]


class Solution:
    """u and its derivatives at n points by name: `u.value`, `u.x`, `u.t`, `u.xx`, `u.xt`, each [n, C].

    Of several functions with names (`Equation.components`), here u and v of w, each by itself: `w.u.value`, `w.v.xx`,
    [n, 1]. AttributeError for anything else: jets go up to second derivatives. `asked`: gathers the orders of the
    derivatives that were asked for.
    """

    def __init__(
        self, jet: Jet, axes: tuple[str, ...], components: tuple[str, ...] = (), asked: set[int] | None = None
    ):
        self._jet, self._axes, self._components, self._asked = jet, axes, components, asked

    @property
    def value(self) -> Tensor:
        return self._jet.value

    def __getattr__(self, name: str) -> "Tensor | Solution":
        if name.startswith("_"):
            raise AttributeError(name)
        if name in self._components:
            k = self._components.index(name)
            return Solution(self._jet._replace(rows=self._jet.rows[..., k : k + 1]), self._axes, (), self._asked)
        axes = sorted(self._axes.index(axis) if axis in self._axes else -1 for axis in name)
        if axes[0] < 0 or len(axes) > 2:
            raise AttributeError(f"u.{name}: there is u.value and its first and second derivatives, {self._names()}")
        if self._asked is not None:
            self._asked.add(len(axes))
        if len(axes) == 1:
            return self._jet.gradient[..., axes[0], :, :]
        return self._jet.hessian[..., pairs(len(self._axes)).index(tuple(axes)), :, :]

    def _names(self) -> str:
        names = [*self._axes, *(self._axes[i] + self._axes[j] for i, j in pairs(len(self._axes)))]
        several = f", of each of {', '.join(self._components)}" if self._components else ""
        return ", ".join(f"u.{name}" for name in names) + several


def coordinates(points: Tensor, axes: tuple[str, ...]) -> dict[str, Tensor]:
    """Points [n, D] as one tensor [n, 1] per axis."""
    return {axis: points[:, k : k + 1] for k, axis in enumerate(axes)}


def function_jet(function: Function, points: Tensor, axes: tuple[str, ...], order: str, channels: int = 1) -> Jet:
    """The jet [R, n, C] of a function of the coordinates alone, by automatic differentiation; without a graph."""
    with torch.enable_grad():
        points = points.detach().requires_grad_()
        value = function(**coordinates(points, axes))
        value = torch.as_tensor(value, dtype=points.dtype).expand(len(points), channels)
        columns = [_scalar_rows(value[:, c], points, order) for c in range(channels)]
    return Jet(torch.stack(columns, dim=-1).detach(), order, points.shape[1])


def _scalar_rows(value: Tensor, points: Tensor, order: str) -> Tensor:
    """Rows [R, n] of one function [n] of the points."""
    rows = [value]
    if order != "value":
        first = _gradient(value, points)
        rows += list(first.unbind(1))
        if order in ("hessian", "laplacian"):
            second = [_gradient(first[:, i], points) for i in range(points.shape[1])]
            found = [second[i][:, j] for i, j in pairs(points.shape[1])]
            rows += found if order == "hessian" else [sum(second[i][:, i] for i in range(points.shape[1]))]
    return torch.stack(rows)


def _gradient(value: Tensor, points: Tensor) -> Tensor:
    if not value.requires_grad:
        return torch.zeros_like(points)
    (found,) = torch.autograd.grad(value.sum(), points, create_graph=True, allow_unused=True)
    return torch.zeros_like(points) if found is None else found
