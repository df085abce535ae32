"""Tiles of any depth: their model against that of one hidden layer and against autograd, and in a start."""

import copy

import numpy as np
import pytest
import torch
from cases import GROWN, GROWN_SIREN, field_of, natural, on_ranks, reader, recipe_of, rendered

from cpikan_hr.jets import seed
from cpikan_hr.networks import build_network
from cpikan_hr.processes import ALONE
from cpikan_hr.solvers.deep_tiles import DeepTiles, write
from cpikan_hr.solvers.gauss_newton import levenberg_marquardt
from cpikan_hr.solvers.grown_networks import read, unit_of
from cpikan_hr.solvers.last_layer import fit_last_layers
from cpikan_hr.solvers.projection import RIDGE
from cpikan_hr.solvers.start import fit_field
from cpikan_hr.solvers.units import Units

DEEP = {
    "cpikan": {"kind": "cpikan", "hidden": [3, 2], "degree": 3, "first_input_map": "sine"},
    "norm": {"kind": "cpikan", "hidden": [4], "degree": 2, "layer_norm": True, "shared_constant": True},
    "siren": {"kind": "siren", "hidden": [5, 4], "first_omega": 3.0, "hidden_omega": 2.0},
    "fourier": {"kind": "fourier_mlp", "hidden": [5, 4], "bands": 1, "activation": "tanh"},
}
SIDE, TILES, CHANNELS = 9, 4, 2


def case(network: dict, tiles: int = TILES):
    """Networks, pixel centres [t, P, 2], data [t, C, P] and weights [t, P], float32."""
    torch.manual_seed(0)
    built = build_network(tiles=tiles, in_features=2, out_features=CHANNELS, **network)
    axis = (2 * torch.arange(SIDE) + 1) / SIDE - 1
    points = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).flatten(0, 1).expand(tiles, -1, -1)
    y, x = points.unbind(-1)
    data = torch.stack([torch.sin(3 * x + y * y), x * y + 0.3 * torch.cos(4 * y)], 1)
    weight = 0.2 + torch.rand(tiles, SIDE**2)
    weight[:, :4] = 0
    return built, points.contiguous(), data * (1 + torch.arange(tiles))[:, None, None], weight


@pytest.mark.parametrize("grown", [GROWN | {"shared_constant": True}, GROWN_SIREN])
def test_one_hidden_layer_has_the_model_of_the_tiles_that_grow(grown):
    network, points, data, weight = case(grown)
    (choice,) = recipe_of([{"tile": 16, "grow": True, "overlap": 0.125, "network": grown}]).field.levels
    unit, numbers = unit_of(choice), torch.arange(TILES)
    weighted = data * weight[:, None]
    w, _ = read(network, unit)
    expected = Units(unit, unit.inputs(SIDE, SIDE)).linearise(numbers, weighted, w, weight)
    fit = DeepTiles(network, points)
    found = fit.linearise(numbers, weighted, fit.read(), weight)
    # the same parameters in another order: where each of them stands
    counted = build_network(tiles=1, in_features=2, out_features=CHANNELS, **grown)
    every = DeepTiles(counted, points[:1])
    write(counted, None, torch.arange(found.w.shape[1])[None].float())
    place = read(counted, unit)[0].flatten()
    scale = w.new_tensor(1.0)
    if unit.kind == "siren":  # there w takes the frequency in
        place, scale = place / unit.first_omega, 1 / w.new_tensor(unit.first_omega)
    place = place.round().long()
    assert every.read().shape == (1, len(place)) and torch.equal(place.sort().values, torch.arange(len(place)))
    assert torch.allclose(found.loss, expected.loss, rtol=1e-4)
    for mine, theirs, power in ((found.gradient[:, place], expected.gradient, 1),
                                (found.matrix[:, place][:, :, place], expected.matrix, 2)):  # fmt: skip
        assert float((mine * scale**power - theirs).norm() / theirs.norm()) < 1e-3


def reduced(network, points, data, weight) -> torch.Tensor:
    """Half the loss [t], the last layer eliminated with its ridge, in float64 and differentiable: no Jacobian."""
    a = network.features(points) * weight[..., None]
    gram = a.transpose(1, 2) @ a
    ridge = RIDGE * gram.diagonal(dim1=1, dim2=2).mean(1)
    eye = torch.eye(gram.shape[1], dtype=gram.dtype)
    right = a.transpose(1, 2) @ (data * weight[:, None]).transpose(1, 2)
    last = torch.linalg.solve(gram + ridge[:, None, None] * eye, right)
    error = (data * weight[:, None]).transpose(1, 2) - a @ last
    return (error.square().sum((1, 2)) + ridge * last.square().sum((1, 2))) / 2


@pytest.mark.parametrize("kind", DEEP)
def test_the_gradient_is_that_of_the_reduced_functional(kind):
    network, points, data, weight = case(DEEP[kind])
    fit = DeepTiles(network, points)
    model = fit.linearise(torch.arange(TILES), data * weight[:, None], fit.read(), weight)
    exact = build_network(tiles=TILES, in_features=2, out_features=CHANNELS, **DEEP[kind]).double()
    exact.load_state_dict(network.state_dict())
    half = reduced(exact, points.double(), data.double(), weight.double())
    hidden = [p for layer in list(exact.jacobian_layers)[:-1] for p in layer.parameters()]
    slopes = torch.cat([g.flatten(1) for g in torch.autograd.grad(half.sum(), hidden)], 1)
    assert torch.allclose(model.loss.double(), 2 * half, rtol=1e-2)
    assert float((model.gradient - slopes).norm() / slopes.norm()) < 2e-2
    eigenvalues = torch.linalg.eigvalsh(model.matrix)
    assert (eigenvalues[:, 0] > -1e-5 * eigenvalues[:, -1]).all()


@pytest.mark.parametrize("kind", DEEP)
def test_no_tile_s_loss_rises_and_its_network_has_it(kind):
    network, points, data, weight = case(DEEP[kind], tiles=7)
    fit, weighted = DeepTiles(network, points), data[:7] * weight[:, None]
    losses = [fit.linearise(torch.arange(7), weighted, fit.read(), weight).loss]
    for iterations in (1, 4, 12):
        w, last, loss = levenberg_marquardt(fit, weighted, fit.read(), iterations, weight)
        assert (loss <= losses[-1] * (1 + 1e-5)).all()
        losses.append(loss)
    assert losses[-1].sum() < 0.3 * losses[0].sum()
    solved = network.pick(torch.arange(7))
    write(solved, torch.arange(7), w, last)
    with torch.no_grad():
        left = weighted - solved(seed(points, "value")).value.transpose(1, 2) * weight[:, None]
    assert torch.allclose(left.square().sum((1, 2)), loss, rtol=1e-3)


@pytest.mark.parametrize("kind", DEEP)
def test_a_start_with_iterations_comes_nearer_to_the_picture(kind):
    picture = natural("astronaut", side=48)
    shape, errors = picture.shape[:2], []
    for iterations in (0, 6):
        torch.manual_seed(0)
        level = {"tile": 16, "overlap": 0.25, "network": DEEP[kind]}
        recipe = recipe_of([level], start={"iterations": iterations})
        field = field_of([level], picture)
        told = fit_field(field, reader(picture), shape, recipe, 255.0)
        error = float(np.sqrt(np.mean((rendered(field, shape) - picture) ** 2)))
        assert told[0]["rmse"] == pytest.approx(error, rel=1e-2)
        errors.append(error)
    assert errors[1] < 0.75 * errors[0]


def test_rows_shared_by_processes_are_those_of_one():
    picture, level = natural("coffee", side=32), {"tile": 8, "overlap": 0.5, "network": DEEP["cpikan"]}
    begun = field_of([level], picture)

    def fitted(processes):
        field = copy.deepcopy(begun)
        fit_last_layers(field, 0, reader(picture), picture.shape[:2], 1e-6, processes, iterations=2)
        return field.state_dict()

    one = fitted(ALONE)
    for other in on_ranks(fitted, 2):
        assert all(torch.equal(other[key], one[key]) for key in one)


def test_a_level_without_hidden_layers_has_nothing_to_iterate():
    picture = natural("coffee", side=32)
    level = {"tile": 8, "overlap": 0.0, "network": {"kind": "cpikan", "hidden": [], "degree": 3}}
    states = []
    for iterations in (0, 3):
        field = field_of([level], picture)
        fit_last_layers(field, 0, reader(picture), picture.shape[:2], 1e-6, ALONE, iterations=iterations)
        states.append(field.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
