"""Losses of a flat vector with known minima, for the full-batch solvers."""

import math
from collections.abc import Callable

import torch
from torch import Tensor


class Loss:
    """An objective from a function of theta; `blocks` None: all parameters are one."""

    def __init__(self, function: Callable[[Tensor], Tensor], size: int, blocks: list[Tensor] | None = None):
        self.function = function
        self.blocks = [torch.arange(size)] if blocks is None else blocks

    def gradient(self, theta: Tensor) -> tuple[float, Tensor]:
        theta = theta.detach().clone().requires_grad_()
        loss = self.function(theta)
        return float(loss.detach()), torch.autograd.grad(loss, theta)[0]


def rosenbrock(x: Tensor) -> Tensor:
    """0 where all are 1."""
    return (100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum()


def rosenbrock_start(size: int) -> Tensor:
    start = torch.full((size,), -1.2, dtype=torch.float64)
    start[1::2] = 1.0
    return start


def symmetric(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A matrix with these eigenvalues and random eigenvectors."""
    generator = torch.Generator().manual_seed(seed)
    size = len(eigenvalues)
    q = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))[0]
    matrix = q @ torch.diag(eigenvalues) @ q.T
    return (matrix + matrix.T) / 2


def quadratic(matrix: Tensor, centre: Tensor, blocks: list[Tensor] | None = None) -> Loss:
    """0 at the centre."""
    return Loss(lambda x: 0.5 * (x - centre) @ matrix @ (x - centre), len(centre), blocks)


class Poisson(Loss):
    """-u'' = pi^2 sin(pi x), u(0) = u(1) = 0, by u = tanh(x a + b) c + d at 32 points: 3 x width + 1 parameters.

    The blocks are the hidden and the last layer. Its answer is sin(pi x).
    """

    def __init__(self, width: int = 16):
        self.width = width
        self.x = torch.linspace(0, 1, 32, dtype=torch.float64)[:, None]
        inner = torch.arange(2 * width)
        super().__init__(self.loss, 3 * width + 1, [inner, torch.arange(2 * width, 3 * width + 1)])

    def start(self, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        a, b, c = torch.randn(3, self.width, dtype=torch.float64, generator=generator)
        return torch.cat([3 * a, 2 * b, c / self.width**0.5, torch.zeros(1, dtype=torch.float64)])

    def values(self, theta: Tensor, x: Tensor) -> Tensor:
        a, b, c = theta[:-1].view(3, self.width)
        return torch.tanh(x * a + b) @ c + theta[-1]

    def loss(self, theta: Tensor) -> Tensor:
        a, b, c = theta[:-1].view(3, self.width)
        u = torch.tanh(self.x * a + b)
        residual = (-2 * u * (1 - u * u) * a * a) @ c + math.pi**2 * torch.sin(math.pi * self.x[:, 0])
        ends = self.values(theta, self.x[[0, -1]])
        return 0.5 * (residual.square().mean() / math.pi**4 + ends.square().sum())
