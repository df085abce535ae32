"""References to about nine digits: ETDRK4 on Fourier or Chebyshev points for Allen-Cahn, Cole-Hopf for Burgers.

Each solver is run once for a set of parameters and gives a function of x [n], t [n] in float64. Near t = 0 the time
steps are graded: data that do not fit the conditions at the ends make u rough there.
"""

import math
from collections.abc import Callable
from functools import cache, lru_cache

import numpy as np
import torch
from scipy.special import erfc
from torch import Tensor

from cpikan_hr.errors import UserError
from cpikan_hr.problems.equations.interpolant import Interpolant

Field = Callable[[np.ndarray, np.ndarray], np.ndarray]


def at_points(function: Field, x: Tensor, t: Tensor) -> Tensor:
    """A numpy function of x [n], t [n] at tensors [n, 1]: float64 [n, 1] on their device."""
    x, t = torch.broadcast_tensors(x, t)
    values = function(*(axis.detach().double().cpu().numpy().ravel() for axis in (x, t)))
    return torch.from_numpy(values).reshape(x.shape).to(x.device)


# ---------------------------------------------------------------------------------------------------------------------
# Time


def graded(step: float, levels: int = 13) -> list[tuple[float, float, int]]:
    """Panels (begin, end, even number of steps) of [0, 1]: `step` from 1/8 on, before that ever shorter panels."""
    edges = [0.0, *(2.0**-k for k in range(3 + levels, 2, -1)), 1.0]
    counts = [2 * math.ceil(max(1 / 16, b - a) / 2 / step) for a, b in zip(edges, edges[1:], strict=False)]
    return list(zip(edges, edges[1:], counts, strict=False))


def etdrk4(start: np.ndarray, eigenvalues: np.ndarray, nonlinear: Callable, panels: list) -> tuple:
    """a' = eigenvalues a + nonlinear(a, t) from a(0) = start [N]: times [T] and samples [T, N], one for every step.

    Kassam & Trefethen 2005 (SIAM J. Sci. Comput. 26), the phi functions by means over a circle. Real eigenvalues.
    """
    times, samples = [panels[0][0]], [start]
    circle = np.exp(1j * np.pi * (np.arange(32) + 0.5) / 32)
    a = start
    for begin, end, steps in panels:
        h = (end - begin) / steps
        whole, half = np.exp(h * eigenvalues), np.exp(h * eigenvalues / 2)
        z = h * eigenvalues[:, None] + circle
        q = h * np.mean((np.exp(z / 2) - 1) / z, 1).real
        f1 = h * np.mean((-4 - z + np.exp(z) * (4 - 3 * z + z**2)) / z**3, 1).real
        f2 = h * np.mean((2 + z + np.exp(z) * (z - 2)) / z**3, 1).real
        f3 = h * np.mean((-4 - 3 * z - z**2 + np.exp(z) * (4 - z)) / z**3, 1).real
        for k in range(steps):
            t = begin + k * h
            na = nonlinear(a, t)
            b = half * a + q * na
            nb = nonlinear(b, t + h / 2)
            c = half * a + q * nb
            nc = nonlinear(c, t + h / 2)
            d = half * b + q * (2 * nc - na)
            nd = nonlinear(d, t + h)
            a = whole * a + f1 * na + 2 * f2 * (nb + nc) + f3 * nd
            times.append(begin + (k + 1) * h)
            samples.append(a)
    return np.array(times), np.array(samples)


# ---------------------------------------------------------------------------------------------------------------------
# Allen-Cahn


def _start(x: np.ndarray) -> np.ndarray:
    return x**2 * np.cos(np.pi * x)


def _points(diffusivity: float, rate: float, per_width: float, most: int) -> int:
    """An even number that puts `per_width` points into the width sqrt(2 D / rate) of a front on [-1, 1].

    UserError where that is more than `most`.
    """
    needed = 2 * per_width / math.sqrt(2 * diffusivity / rate)
    if needed > most:
        raise UserError(
            f"AllenCahn: diffusivity = {diffusivity:g} makes fronts too thin for the reference solver; "
            f"give {2 * rate * (per_width / most) ** 2:.1g} or more"
        )
    return 32 * math.ceil(needed / 32)


def corner(x: np.ndarray, t: np.ndarray, diffusivity: float, rate: float) -> np.ndarray:
    """S: the part of the periodic Allen-Cahn solution that is rough at x = -1 and 1, t = 0; x within [-1, 1].

    u(x, 0) has slope -2 at 1 and 2 at -1. S solves S_t = D S_xx - 2 rate S, Allen-Cahn linearised about u = -1, and
    starts as the periodic -x^2 with the same kink: the heat kernel's answer is -(x^2 + 2 D t) + 4 sqrt(D t) sum ierfc.
    """
    x, spread = np.broadcast_arrays(x, np.sqrt(diffusivity * t))
    value = -(x**2) - 2 * spread**2
    for image in range(1, 2 + 2 * math.ceil(6 * np.max(spread, initial=0)), 2):
        for distance in (image - x, image + x):  # of the kinks at image and -image
            near = distance < 12 * spread  # erfc is zero in float64 beyond
            twice = 2 * spread[near]
            z = distance[near] / twice
            value[near] += 2 * twice * (np.exp(-(z**2)) / math.sqrt(np.pi) - z * erfc(z))
    return np.exp(-2 * rate * t) * value


@cache
def allen_cahn_periodic(diffusivity: float, rate: float, points: int = 0, step: float = 1 / 768) -> Field:
    """u_t = D u_xx + rate (u - u^3), u(x, 0) = x^2 cos(pi x), period 2: Fourier points for u without its `corner` S.

    UserError for a diffusivity too small to resolve.
    """
    points = points or max(1024, _points(diffusivity, rate, 6.0, 16384))
    x = -1 + 2 * np.arange(points) / points
    waves = np.pi * np.arange(points // 2 + 1)
    latest = lru_cache(2)(lambda t: corner(x, t, diffusivity, rate))

    def nonlinear(a, t):
        u = latest(t) + np.fft.irfft(a, points)
        return np.fft.rfft(rate * (u - u**3 + 2 * latest(t)))

    start = np.fft.rfft(_start(x) - latest(0.0))
    times, samples = etdrk4(start, -diffusivity * waves**2, nonlinear, graded(step))
    smooth = Interpolant(times[::2], x, np.fft.irfft(samples[::2], points), period=2.0)
    return lambda x, t: smooth(x, t) + corner(x, t, diffusivity, rate)


@cache
def allen_cahn_dirichlet(diffusivity: float, rate: float, points: int = 0, step: float = 1 / 512) -> Field:
    """u_t = D u_xx + rate (u - u^3), u(x, 0) = x^2 cos(pi x), u = -1 at both ends: Chebyshev points.

    u is even: half of the points carry it, in eigenvectors of u_xx. Seconds for D = 1e-3, a minute for 1e-4.
    UserError for a diffusivity too small to resolve.
    """
    points = points or max(384, _points(diffusivity, rate, 9.0, 2880))
    x, first = chebyshev(points - 1)  # an even number of points: none at 0
    half = points // 2
    second = first @ first
    inside = slice(1, half)
    even = second[inside, inside] + second[inside, ::-1][:, inside]
    eigenvalues, vectors = np.linalg.eig(diffusivity * even)
    eigenvalues, vectors = eigenvalues.real, vectors.real  # they are real but for rounding
    inverse = np.linalg.inv(vectors)

    def nonlinear(a, t):
        u = vectors @ a - 1
        return inverse @ (rate * (u - u**3))

    times, samples = etdrk4(inverse @ (_start(x[inside]) + 1), eigenvalues, nonlinear, graded(step))
    values = samples[::2] @ vectors.T - 1
    values = np.pad(values, ((0, 0), (1, 0)), constant_values=-1.0)
    return Interpolant(times[::2], x[::-1], np.concatenate([values, values[:, ::-1]], axis=1))


def chebyshev(degree: int) -> tuple[np.ndarray, np.ndarray]:
    """Chebyshev points from 1 to -1 [N] and their differentiation matrix [N, N], N = degree + 1.

    Trefethen 2000, Spectral Methods in MATLAB, cheb.m; differences by sines, the diagonal by rows that sum to 0.
    """
    angle = np.pi * np.arange(degree + 1) / degree
    difference = 2 * np.sin((angle[:, None] + angle) / 2) * np.sin((angle - angle[:, None]) / 2)
    scale = np.where(np.arange(degree + 1) % 2, -1.0, 1.0)
    scale[[0, -1]] *= 2
    np.fill_diagonal(difference, 1.0)
    matrix = scale[:, None] / scale / difference
    np.fill_diagonal(matrix, 0.0)
    np.fill_diagonal(matrix, -matrix.sum(1))
    return np.sin(np.pi * np.arange(degree, -degree - 1, -2) / (2 * degree)), matrix


# ---------------------------------------------------------------------------------------------------------------------
# Burgers


@cache
def burgers(nu: float) -> Field:
    """u_t + u u_x = nu u_xx, u(x, 0) = -sin(pi x), period 2, to 1e-10. UserError for a nu too small to resolve."""
    random = np.random.default_rng(0)
    x, t = 10.0 ** random.uniform([[-3], [-4]], 0, (2, 200))  # many near the shock layer and the beginning
    counts = [48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    for fewer, more in zip(counts, counts[1:], strict=False):
        if np.abs(cole_hopf(x, t, nu, fewer) - cole_hopf(x, t, nu, more)).max() < 1e-9:
            return lambda x, t: cole_hopf(x, t, nu, more)
    raise UserError(f"Burgers: nu = {nu:g} is too small for the reference solver; give 1e-3 or more")


def cole_hopf(x: np.ndarray, t: np.ndarray, nu: float, points: int) -> np.ndarray:
    """u [n] of `burgers` by Cole and Hopf's transformation, its two integrals by the trapezoidal rule.

    u = -int sin(pi y) w dy / int w dy, w = exp(-cos(pi y) / (2 pi nu) - (x - y)^2 / (4 nu t)) (Basdevant et al. 1986).
    The rule converges geometrically, as w and its derivatives vanish at both ends of its points.
    """
    values = np.empty(len(x))
    chunk = max(1, 2**18 // points)
    for start in range(0, len(x), chunk):
        part = slice(start, start + chunk)
        # cos differs by 2, so w is below exp(-40) of its largest value beyond this distance from x
        reach = np.sqrt(4 * nu * t[part]) * np.sqrt(40 + 1 / (np.pi * nu))
        y = np.linspace(-1, 1, points)
        step = reach[:, None] * y
        place = np.pi * (x[part, None] - step)
        with np.errstate(divide="ignore", invalid="ignore"):
            fall = np.where(t[part, None] > 0, step**2 / (4 * nu * t[part, None]), 0.0)
        exponent = -np.cos(place) / (2 * np.pi * nu) - fall
        weight = np.exp(exponent - exponent.max(1, keepdims=True))
        values[part] = -(np.sin(place) * weight).sum(1) / weight.sum(1)
    return values
