"""The quadratic model against dense autograd in float64, and Levenberg-Marquardt by what it promises."""

import math

import pytest
import torch
from torch import Tensor

from cpikan_hr.solvers import gauss_newton
from cpikan_hr.solvers.gauss_newton import levenberg_marquardt
from cpikan_hr.solvers.projection import RIDGE
from cpikan_hr.solvers.units import Inputs, Unit, Units, features

UNITS = {
    "sine": Unit("cpikan", 3, 4),
    "tanh": Unit("cpikan", 2, 2, first_map="tanh", hidden_map="tanh"),
    "identity": Unit("cpikan", 4, 2, first_map="identity", hidden_map="sine"),
    "siren": Unit("siren", 1, 1, first_omega=3.0),
}
MAPS = {"sine": lambda v: torch.sin(math.pi / 2 * v), "tanh": torch.tanh, "identity": lambda v: v}
SIZE = (7, 9)
unit_kinds = pytest.mark.parametrize("kind", UNITS)


def terms(v: Tensor, degree: int, kind: str) -> list[Tensor]:
    """T_1..T_degree of s(v), by powers: no recurrence."""
    s = MAPS[kind](v)
    powers = [lambda s: s, lambda s: 2 * s**2 - 1, lambda s: 4 * s**3 - 3 * s, lambda s: 8 * s**4 - 8 * s**2 + 1]
    return [power(s) for power in powers[:degree]]


def phi_of(unit: Unit) -> Tensor:
    """Inputs of the hidden units at the pixel centres of SIZE, [1 + 2 degree, P] float64."""
    y, x = torch.meshgrid(*((torch.arange(n).double() + 0.5) * 2 / n - 1 for n in SIZE), indexing="ij")
    y, x = y.flatten(), x.flatten()
    if unit.kind == "siren":
        return torch.stack([torch.ones_like(y), y, x])
    both = [term for axis in (y, x) for term in terms(axis, unit.degree, unit.first_map)]
    return torch.stack([torch.ones_like(y), *both])


def design(unit: Unit, w: Tensor) -> Tensor:
    """Unweighted features [h terms + 1, P] of one tile's hidden weights [h, M], term-major, the constant last."""
    v = w @ phi_of(unit)
    rows = [torch.sin(v)] if unit.kind == "siren" else terms(v, unit.terms, unit.hidden_map)
    return torch.cat([*rows, torch.ones(1, v.shape[1], dtype=v.dtype)])


def case(kind: str, tiles: int = 3, channels: int = 2, units: int = 2, seed: int = 0):
    """A unit, and random data [t, C, P], hidden weights [t, h, M] and pixel weights [t, P], all float64."""
    unit, generator = UNITS[kind], torch.Generator().manual_seed(seed)
    pixels = SIZE[0] * SIZE[1]
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    # tanh needs steep units: the terms of flat ones are all but linearly dependent in float32.
    w = (1.2 if kind == "tanh" else 0.4) * draw(tiles, units, 1 + 2 * unit.degree)
    weight = torch.rand(tiles, pixels, generator=generator, dtype=torch.float64)
    weight[:, :5] = 0
    return unit, draw(tiles, channels, pixels), w, weight


def model_of(unit: Unit, data: Tensor, w: Tensor, weight: Tensor | None, prior: float):
    weighted = data if weight is None else data * weight[:, None]
    fit = Units(unit, unit.inputs(*SIZE), prior)
    tiles = torch.arange(len(data))
    return fit.linearise(tiles, weighted.float(), w.float(), None if weight is None else weight.float())


def solved_last(a: Tensor, data: Tensor) -> Tensor:
    """The ridge regression of data [C, P] on weighted features a [K, P]."""
    gram = a @ a.T
    return torch.linalg.solve(gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram)).double(), a @ data.T).T


def penalties(unit: Unit, units: int, prior: float) -> Tensor:
    degrees = [0, *range(1, unit.degree + 1), *range(1, unit.degree + 1)]
    return torch.tensor([prior * (1 + k * k) for k in degrees] * units, dtype=torch.float64)


def reduced(unit: Unit, w: Tensor, data: Tensor, weight: Tensor, prior: float) -> Tensor:
    """The reduced functional of one tile: the last layer eliminated with its ridge, the prior added."""
    a = design(unit, w) * weight
    last = solved_last(a, data * weight)
    ridge = RIDGE * a.detach().square().sum(1).mean() * last.square().sum()
    error = (data * weight - last @ a).square().sum()
    return error + ridge + (penalties(unit, len(w), prior) * w.flatten() ** 2).sum()


def relative(mine: Tensor, theirs: Tensor) -> float:
    return float((mine.double() - theirs).norm() / theirs.norm())


@unit_kinds
def test_inputs_and_features_are_those_of_the_definition(kind):
    unit, _, w, weight = case(kind)
    assert relative(unit.inputs(*SIZE), phi_of(unit)) < 1e-6
    a, slopes = features(unit, unit.inputs(*SIZE), w.float(), weight.float(), slopes=True)
    for tile in range(3):
        assert relative(a[tile], design(unit, w[tile]) * weight[tile]) < 1e-5
        v = (w[tile] @ phi_of(unit)).requires_grad_()
        rows = [torch.sin(v)] if kind == "siren" else terms(v, unit.terms, unit.hidden_map)
        expected = torch.stack([torch.autograd.grad(row.sum(), v, retain_graph=True)[0] for row in rows])
        assert relative(slopes[tile], expected) < 1e-5


@unit_kinds
@pytest.mark.parametrize(("weighted", "prior"), [(False, 0.0), (True, 0.0), (True, 0.3)])
def test_the_model_is_kaufman_s_by_dense_autograd(kind, weighted, prior):
    unit, data, w, weight = case(kind)
    weight = weight if weighted else torch.ones_like(weight)
    model = model_of(unit, data, w, weight if weighted else None, prior)
    for tile in range(3):
        a = design(unit, w[tile]) * weight[tile]
        last = solved_last(a, data[tile] * weight[tile])
        gram = a @ a.T
        inverse = torch.linalg.inv(gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram)).double())
        projector = torch.eye(a.shape[1]).double() - a.T @ inverse @ a
        # Single precision leaves 1e-2 of the last layer open, as a processor likes; the rest is made of what it found.
        used = model.last[tile].double()
        prediction = lambda flat, used=used, tile=tile: used @ (design(unit, flat.view_as(w[tile])) * weight[tile])  # noqa: E731
        jacobian = torch.autograd.functional.jacobian(prediction, w[tile].flatten())  # [C, P, h M]
        diagonal = penalties(unit, 2, prior)
        matrix = sum(j.T @ projector @ j for j in jacobian) + torch.diag(diagonal)
        residual = data[tile] * weight[tile] - used @ a
        gradient = diagonal * w[tile].flatten() - sum(j.T @ r for j, r in zip(jacobian, residual, strict=True))
        loss = residual.square().sum() + (diagonal * w[tile].flatten() ** 2).sum()
        assert relative(model.last[tile] @ a.float(), last @ a) < 1e-3 and relative(model.last[tile], last) < 1e-2
        assert float(model.loss[tile]) == pytest.approx(float(loss), rel=1e-4)
        assert relative(model.matrix[tile], matrix) < (5e-3 if kind == "tanh" else 1e-3)  # its projector
        assert relative(model.gradient[tile], gradient) < 1e-4


@unit_kinds
def test_the_gradient_is_that_of_the_reduced_functional(kind):
    """Through the elimination of the last layer, which Kaufman's Jacobian leaves out without changing the gradient."""
    unit, data, w, weight = case(kind)
    model = model_of(unit, data, w, weight, 0.3)
    for tile in range(3):
        flat = w[tile].clone().requires_grad_()
        (slope,) = torch.autograd.grad(reduced(unit, flat, data[tile], weight[tile], 0.3), flat)
        assert relative(model.gradient[tile], slope.flatten() / 2) < 5e-3


@pytest.mark.parametrize(("units", "channels"), [(1, 1), (3, 2)])
def test_gram_is_the_explicit_product(units, channels):
    generator = torch.Generator().manual_seed(1)
    inputs = Inputs.of(torch.randn(5, 40, generator=generator, dtype=torch.float64))
    slopes = torch.randn(2, channels, units, 40, generator=generator, dtype=torch.float64)
    jacobian = (slopes[:, :, :, None] * inputs.phi).flatten(2, 3)  # [t, C, h M, P]
    expected = torch.einsum("tcip,tcjp->tij", jacobian, jacobian)
    assert relative(inputs.gram(slopes), expected) < 1e-12


@unit_kinds
@pytest.mark.parametrize("prior", [0.0, 1.0])
def test_no_tile_s_loss_ever_rises_and_the_result_is_consistent(kind, prior):
    unit, data, w, weight = case(kind, tiles=40, seed=3)
    weighted, phi = (data * weight[:, None]).float(), unit.inputs(*SIZE)
    losses = [model_of(unit, data, w, weight, prior).loss]
    for iterations in (1, 2, 5, 20):
        new, last, loss = levenberg_marquardt(Units(unit, phi, prior), weighted, w.float(), iterations, weight.float())
        assert (loss <= losses[-1] * (1 + 1e-5)).all()
        losses.append(loss)
        again = torch.bmm(last, features(unit, phi, new, weight.float())[0])
        penalty = unit.penalty(2, prior, data)
        expected = (weighted - again).square().sum((1, 2)) + (penalty * new.flatten(1).double() ** 2).sum(1)
        assert relative(loss, expected.double()) < 1e-5
    assert losses[-1].sum() < 0.98 * losses[0].sum()


@unit_kinds
def test_a_network_is_recovered_from_a_perturbed_start(kind):
    unit, _, w, weight = case(kind, tiles=20, units=1, seed=4)
    generator = torch.Generator().manual_seed(5)
    data = []
    for tile in range(20):
        a = design(unit, w[tile])
        data.append(torch.randn(2, len(a), generator=generator, dtype=torch.float64) @ a)
    data = torch.stack(data)
    start = w + 0.05 * torch.randn(w.shape, generator=generator, dtype=torch.float64)
    weighted = (data * weight[:, None]).float()
    before = model_of(unit, data, start, weight, 0.0).loss
    _, _, loss = levenberg_marquardt(Units(unit, unit.inputs(*SIZE)), weighted, start.float(), 60, weight.float())
    assert (before > 1e-4 * weighted.square().sum((1, 2))).float().mean() > 0.4
    # The ridge of the last layer leaves a trace.
    assert (loss < 1e-5 * weighted.square().sum((1, 2))).float().mean() >= 0.95


@unit_kinds
def test_tiles_together_are_tiles_alone_in_any_chunks(kind, monkeypatch):
    unit, data, w, weight = case(kind, tiles=11, seed=6)
    weighted, phi = (data * weight[:, None]).float(), unit.inputs(*SIZE)

    def run(some: slice) -> list[Tensor]:
        # A tolerance below zero keeps every tile to the end, so that all take the same steps.
        arguments = (weighted[some], w[some].float(), 2, weight[some].float())
        return levenberg_marquardt(Units(unit, phi, 0.5), *arguments, tolerance=-math.inf)

    together = run(slice(None))
    alone = [torch.cat(parts) for parts in zip(*(run(slice(k, k + 1)) for k in range(11)), strict=True)]
    monkeypatch.setattr(gauss_newton, "CHUNK", 3 * SIZE[0] * SIZE[1] * 2 * (2 * w.shape[2] + 3 * unit.terms))
    chunked = run(slice(None))
    for other in (alone, chunked):  # rounding differs, and poorly determined directions amplify it
        assert ((other[2] - together[2]).abs() < 5e-3 * together[2]).all()
        assert relative(other[0], together[0].double()) < 5e-2


def test_tiles_that_leave_early_keep_their_own_results():
    """Solved tiles drop out of the batch; what comes back is in the order of the tiles."""
    unit, data, w, weight = case("sine", tiles=12, seed=7)
    data[::2] = 0  # nothing to do in every second tile
    weighted = (data * weight[:, None]).float()
    fit = Units(unit, unit.inputs(*SIZE))
    new, last, loss = levenberg_marquardt(fit, weighted, w.float(), 30, weight.float(), patience=1)
    assert loss[::2].max() < 1e-8 and last[::2].abs().max() < 1e-4 and torch.equal(new[::2], w[::2].float())
    again = torch.bmm(last, features(unit, unit.inputs(*SIZE), new, weight.float())[0])
    assert relative(loss, (weighted - again).square().sum((1, 2)).double()) < 1e-5


def test_a_tile_without_pixels_stays_finite():
    unit, data, w, weight = case("sine")
    weight[1] = 0
    weighted = (data * weight[:, None]).float()
    fit = Units(unit, unit.inputs(*SIZE), 1e-2)
    new, last, loss = levenberg_marquardt(fit, weighted, w.float(), 10, weight.float())
    assert all(bool(torch.isfinite(part).all()) for part in (new, last, loss)) and last[1].abs().max() < 1e-6


@unit_kinds
def test_parameters_are_those_of_the_network(kind):
    unit = UNITS[kind]
    assert unit.parameters(0, 3) == 3
    first, last = 3 if kind == "siren" else 1 + 2 * unit.degree, unit.terms
    assert unit.parameters(4, 3) == 4 * first + 3 * (4 * last + 1)
