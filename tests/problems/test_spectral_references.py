"""Spectral references: they converge, agree with independent methods, and satisfy their equations and conditions."""

from functools import partial

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from scipy.interpolate import BarycentricInterpolator

from cpikan_hr.errors import UserError
from cpikan_hr.problems.equations import build
from cpikan_hr.problems.equations.base import Periodic
from cpikan_hr.problems.equations.interpolant import CHUNK, Interpolant
from cpikan_hr.problems.equations.spectral import (
    allen_cahn_dirichlet,
    allen_cahn_periodic,
    at_points,
    burgers,
    chebyshev,
    cole_hopf,
    corner,
    etdrk4,
    graded,
)

RANDOM = np.random.default_rng(0)
X, T = RANDOM.uniform(-1, 1, 500), RANDOM.uniform(0, 1, 500)


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def test_etdrk4_takes_the_linear_part_exactly_and_the_rest_to_fourth_order():
    x = np.arange(64) / 32 - 1
    start, diffusion = np.fft.rfft(np.cos(np.pi * x) + np.sin(3 * np.pi * x)), 0.05 * (np.pi * np.arange(33)) ** 2

    def heat(t):
        return np.cos(np.pi * x) * np.exp(-diffusion[1] * t) + np.sin(3 * np.pi * x) * np.exp(-diffusion[3] * t)

    times, samples = etdrk4(start, -diffusion, lambda a, t: 0 * a, [(0.0, 0.3, 2), (0.3, 1.0, 3)])
    np.testing.assert_allclose(times, [0, 0.15, 0.3, 0.3 + 0.7 / 3, 0.3 + 1.4 / 3, 1], atol=1e-15)
    for t, sample in zip(times, samples, strict=True):
        np.testing.assert_allclose(np.fft.irfft(sample), heat(t), atol=1e-13)
    errors = []
    for steps in (8, 16, 32):  # growth as the nonlinear part
        _, samples = etdrk4(start, -diffusion, lambda a, t: 2 * a, [(0.0, 1.0, steps)])
        errors.append(np.abs(np.fft.irfft(samples[-1]) - np.exp(2) * heat(1)).max())
    assert errors[0] / errors[1] > 13 and errors[1] / errors[2] > 13


@pytest.mark.parametrize("step", [1 / 512, 1 / 768, 1 / 100])
def test_graded_panels_join_and_no_step_is_longer_than_asked(step):
    panels = graded(step)
    assert panels[0][0] == 0 and panels[-1][1] == 1 and len(panels) > 5
    assert all(before[1] == after[0] for before, after in zip(panels, panels[1:], strict=False))
    assert all(count % 2 == 0 and (end - begin) / count <= step * (1 + 1e-12) for begin, end, count in panels)


def test_chebyshev_differentiates_polynomials():
    x, first = chebyshev(20)
    assert x[0] == 1 and x[-1] == -1 and x[10] == 0
    np.testing.assert_allclose(first @ x**19, 19 * x**18, atol=1e-11)


def test_interpolant_is_exact_for_polynomials_and_spectral_for_a_period():
    times, nodes = np.sort(RANDOM.uniform(0, 1, 30)), np.sort(RANDOM.uniform(-1, 1, 40))
    times[[0, -1]], nodes[[0, -1]] = (0, 1), (-1, 1)
    found = Interpolant(times, nodes, times[:, None] ** 5 * nodes**6 - nodes, counts=(6, 7))
    np.testing.assert_allclose(found(X, T), T**5 * X**6 - X, atol=1e-11)
    x, t = nodes[[5, 0, -1]], times[[3, 0, -1]]
    np.testing.assert_allclose(found(x, t), t**5 * x**6 - x, atol=1e-14)
    nodes = np.arange(128) / 64 - 1
    found = Interpolant(times, nodes, np.sin(3 * np.pi * nodes) + times[:, None], period=2.0)
    x, t = np.append(X, [1, -1]), np.append(T, [0, 1])
    np.testing.assert_allclose(found(x, t), np.sin(3 * np.pi * x) + t, atol=1e-10)


def test_points_are_served_in_chunks_of_any_number():
    x, t = RANDOM.uniform(-1, 1, CHUNK + 3), RANDOM.uniform(0, 1, CHUNK + 3)
    for solve in (allen_cahn_dirichlet(0.05, 5.0), burgers(0.05)):
        whole = solve(x, t)
        np.testing.assert_allclose(whole[-5:], solve(x[-5:], t[-5:]), rtol=0, atol=1e-14)
        assert solve(x[:0], t[:0]).shape == (0,)
    tensor = at_points(burgers(0.05), torch.tensor(x[:7, None], dtype=torch.float32), torch.zeros(1, 1))
    assert tensor.shape == (7, 1) and tensor.dtype == torch.float64
    assert at_points(burgers(0.05), torch.zeros(0, 1), torch.zeros(0, 1)).shape == (0, 1)


@pytest.mark.parametrize("diffusivity", [0.05, 1.0])
def test_the_corner_is_the_linearised_solution(diffusivity):
    """Against its Fourier series: x^2 = 1 / 3 + 4 sum (-1)^k cos(k pi x) / (k pi)^2."""
    k = np.arange(1, 4000)[:, None]
    coefficients = 4 * (-1.0) ** k / (k * np.pi) ** 2
    t = np.append(T[:98] ** 3, [1e-3, 1.0])
    x = np.append(X[:98], [1.0, -1.0])
    series = 1 / 3 + (coefficients * np.cos(k * np.pi * x) * np.exp(-diffusivity * (k * np.pi) ** 2 * t)).sum(0)
    late = t > 1e-4
    np.testing.assert_allclose(corner(x, t, diffusivity, 5.0)[late], (-np.exp(-10 * t) * series)[late], atol=1e-12)
    np.testing.assert_array_equal(corner(x, 0 * x, diffusivity, 5.0), -(x**2))


# ---------------------------------------------------------------------------------------------------------------------
# Convergence


def errors_against(finest, others):
    return [np.abs(other(X, T) - finest(X, T)).max() for other in others]


@pytest.mark.parametrize(
    ("solve", "finest", "counts"),
    [(allen_cahn_periodic, 512, (32, 64, 128, 256)), (allen_cahn_dirichlet, 512, (32, 64, 128, 256))],
)
def test_allen_cahn_converges_spectrally_in_space(solve, finest, counts):
    errors = errors_against(solve(0.01, 5.0, finest, 1 / 128), [solve(0.01, 5.0, n, 1 / 128) for n in counts])
    assert errors[1] < errors[0] / 20 and errors[2] < errors[1] / 100 and errors[-1] < 1e-8


@pytest.mark.parametrize("solve", [allen_cahn_periodic, allen_cahn_dirichlet])
def test_allen_cahn_converges_to_fourth_order_in_time(solve):
    # Sampled where panels and steps end, so that interpolation in time plays no part
    x, t = np.linspace(-0.9, 0.9, 40), np.ones(40)
    values = [solve(0.01, 5.0, 256, step)(x, t) for step in (1 / 32, 1 / 64, 1 / 128, 1 / 512)]
    errors = [np.abs(value - values[-1]).max() for value in values[:-1]]
    assert errors[0] / errors[1] > 10 and errors[1] / errors[2] > 10 and errors[2] < 1e-6


@pytest.mark.parametrize("nu", [0.01 / np.pi, 0.05, 1.0])
def test_cole_hopf_converges_geometrically(nu):
    values = [cole_hopf(X, T, nu, count) for count in (24, 48, 96, 192, 384)]
    errors = [np.abs(value - values[-1]).max() for value in values[:-1]]
    assert errors[0] > 1e3 * errors[2] and errors[-1] < 1e-13
    np.testing.assert_allclose(burgers(nu)(X, T), values[-1], atol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Independent methods


def collocate(right_side, start, ends, degree, times):
    """Chebyshev collocation with scipy's BDF: u [T, X] at `times` and X; the inner values give those at the ends."""
    x, first = chebyshev(degree)

    def whole(inner):
        high, low = ends(first, inner)
        return np.concatenate([[high], inner, [low]])

    def rate(t, inner):
        u = whole(inner)
        return right_side(u, first @ u, first @ (first @ u))[1:-1]

    found = solve_ivp(rate, (0, times[-1]), start(x[1:-1]), "BDF", times, rtol=1e-8, atol=1e-10)
    return np.array([BarycentricInterpolator(x, whole(inner))(X) for inner in found.y.T])


def fixed(value, first, inner):
    return value, value


def flat(first, inner):
    """Values at the ends for which the derivative is zero there: what period and evenness ask for."""
    return np.linalg.solve(first[np.ix_([0, -1], [0, -1])], -first[[0, -1], 1:-1] @ inner)


@pytest.mark.parametrize(
    ("solve", "ends"), [(allen_cahn_periodic, flat), (allen_cahn_dirichlet, partial(fixed, -1.0))]
)
def test_allen_cahn_agrees_with_collocation(solve, ends):
    def right_side(u, u_x, u_xx):
        return 0.1 * u_xx + 5 * (u - u**3)

    times = np.array([0.1, 0.5, 1.0])
    found = collocate(right_side, lambda x: x**2 * np.cos(np.pi * x), ends, 48, times)
    for t, row in zip(times, found, strict=True):
        np.testing.assert_allclose(solve(0.1, 5.0)(X, np.full_like(X, t)), row, atol=1e-7)


def test_burgers_agrees_with_collocation():
    def right_side(u, u_x, u_xx):
        return 0.1 * u_xx - u * u_x

    times = np.array([0.1, 0.5, 1.0])
    found = collocate(right_side, lambda x: -np.sin(np.pi * x), partial(fixed, 0.0), 64, times)
    for t, row in zip(times, found, strict=True):
        np.testing.assert_allclose(burgers(0.1)(X, np.full_like(X, t)), row, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------------------
# The equations


class Differences:
    """u and its derivatives at x, t [n, 1] by central differences of sixth order."""

    first = np.array([-1, 9, -45, 0, 45, -9, 1]) / 60
    second = np.array([2, -27, 270, -490, 270, -27, 2]) / 180

    def __init__(self, equation, x, t, dx, dt):
        along_x = [equation.solution(x=x + k * dx, t=t) for k in range(-3, 4)]
        along_t = [equation.solution(x=x, t=t + k * dt) for k in range(-3, 4)]
        self.value = along_x[3]
        self.x = sum(c * v for c, v in zip(self.first, along_x, strict=True)) / dx
        self.xx = sum(c * v for c, v in zip(self.second, along_x, strict=True)) / dx**2
        self.t = sum(c * v for c, v in zip(self.first, along_t, strict=True)) / dt


EQUATIONS = [
    ("burgers", {}),
    ("allen_cahn", {"diffusivity": 1e-3}),
    ("allen_cahn", {"diffusivity": 3e-3, "boundary": "dirichlet", "rate": 4.0}),
]


@pytest.mark.parametrize(("name", "parameters"), EQUATIONS)
def test_references_satisfy_their_equation(name, parameters):
    """To 1e-5 of the largest term, what the differences leave of the ninth digit."""
    equation = build(name, parameters)
    random = np.random.default_rng(1)
    x, t = (torch.from_numpy(random.uniform(low, high, (300, 1))) for low, high in ((-0.99, 0.99), (0.02, 0.98)))
    u = Differences(equation, x, t, 4e-4, 1e-3)
    residual = equation.residual(u, x=x, t=t)
    assert residual.abs().max() < 1e-5 * u.t.abs().max()


@pytest.mark.parametrize(("name", "parameters"), EQUATIONS)
def test_references_satisfy_their_conditions(name, parameters):
    equation = build(name, parameters)
    x, t = torch.from_numpy(X[:, None]), torch.from_numpy(T[:, None])
    for condition in equation.conditions():
        if isinstance(condition, Periodic):
            t = 0.01 + 0.99 * t
            at_ends = [equation.solution(x=torch.full_like(t, end), t=t) for end in (-1.0, 1.0)]
            nearby = [equation.solution(x=torch.full_like(t, end), t=t) for end in (-1 + 1e-6, 1 - 1e-6)]
            torch.testing.assert_close(*at_ends, rtol=0, atol=1e-12)
            torch.testing.assert_close(*nearby, rtol=0, atol=1e-12)
            assert (nearby[0] - at_ends[0]).abs().max() < 1e-8  # u_x = 0 there: of second order in the distance
            continue
        at = {"x": x, "t": t}
        at[condition.axis] = torch.full_like(x, equation.domain()[condition.axis][condition.side == "high"])
        torch.testing.assert_close(equation.solution(**at), condition.value(**at), rtol=0, atol=5e-9)


@pytest.mark.parametrize(
    ("name", "parameters", "advice"),
    [
        ("allen_cahn", {"diffusivity": 1e-8}, "too thin"),
        ("allen_cahn", {"diffusivity": 1e-6, "boundary": "dirichlet"}, "too thin"),
        ("burgers", {"nu": 1e-7}, "too small"),
    ],
)
def test_what_no_reference_can_resolve_is_told_in_one_line(name, parameters, advice):
    with pytest.raises(UserError, match=advice) as caught:
        build(name, parameters).solution(x=torch.zeros(1, 1), t=torch.ones(1, 1))
    assert "\n" not in str(caught.value) and "give" in str(caught.value)
