"""The Poisson equation with a source of many scales."""

import math
from dataclasses import dataclass
from functools import reduce

import torch

from cpikan_hr.errors import UserError
from cpikan_hr.problems.equations.base import dirichlet
from cpikan_hr.problems.equations.closed_form import ClosedForm


@dataclass(frozen=True)
class Poisson(ClosedForm):
    """-laplacian u = d / n sum_i (w_i pi)^2 prod_axes sin(w_i pi x) on [0, 1]^d, w_i = 2^i, i = 1..n; u = 0 around.

    u = 1 / n sum_i prod_axes sin(w_i pi x). d = 2: Dolean, Heinlein, Mishra & Moseley 2024, multilevel FBPINNs
    (arXiv:2306.05486), multi-scale Laplacian problem.
    """

    frequencies: int = 3  # n
    dimensions: int = 2  # d

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.frequencies <= 10:
            raise UserError(f"Poisson: frequencies = {self.frequencies} is out of range; give 1 to 10")
        if not 1 <= self.dimensions <= 3:
            raise UserError(f"Poisson: dimensions = {self.dimensions} is out of range; give 1, 2 or 3")

    def domain(self):
        return {axis: (0.0, 1.0) for axis in "xyz"[: self.dimensions]}

    def source(self, **at):
        """-laplacian u, from the closed form."""
        given = self.given
        scales = [(2**i * math.pi) ** 2 * _product(2**i, at) for i in range(1, given.frequencies + 1)]
        return given.dimensions / given.frequencies * sum(scales)

    def residual(self, u, **at):
        return -sum(getattr(u, axis + axis) for axis in at) - self.source(**at)

    def conditions(self):
        def zero(**at):
            return torch.zeros_like(at["x"])

        return [condition for axis in self.axes for condition in dirichlet(axis, zero)]

    def solution(self, **at):
        given = self.given
        return sum(_product(2**i, at) for i in range(1, given.frequencies + 1)) / given.frequencies


def _product(frequency, at):
    return reduce(torch.mul, (torch.sin(frequency * math.pi * x) for x in at.values()))
