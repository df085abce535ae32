"""The linear last layer, which closed-form starts and tile-wise solvers use, and the choice of tiles."""

import pytest
import torch
from network_reference import relative_error
from test_networks_jets import VARIANTS, build

from cpikan_hr import jets

SPARSE = sorted(name for name, (_, options) in VARIANTS.items() if options.get("sparse"))
LINEAR = sorted(set(VARIANTS) - set(SPARSE))  # those that take any solution


@pytest.mark.parametrize("name", LINEAR)
def test_value_equals_features_times_solution(name):
    network = build(name, 3, 2, 2, seed=5)
    tiles = torch.tensor([2, 0])
    points = torch.rand(2, 9, 2) * 2 - 1
    features = network.features(points, tiles)
    assert torch.equal(features[..., 0], torch.ones(2, 9))
    solution = torch.randn(2, features.shape[-1], 2)
    untouched = [p[1].clone() for p in network.parameters()]
    network.set_last(tiles, solution)
    assert relative_error(network(jets.seed(points, "value"), tiles).value, features @ solution) < 1e-13
    assert all(torch.equal(p[1], u) for p, u in zip(network.parameters(), untouched, strict=True))


@pytest.mark.parametrize("name", LINEAR)
def test_set_last_without_tiles_writes_all(name):
    network = build(name, 2, 2, 1, seed=6)
    points = torch.rand(2, 5, 2)
    features = network.features(points)
    solution = torch.randn(2, features.shape[-1], 1)
    network.set_last(None, solution)
    assert relative_error(network(jets.seed(points, "value")).value, features @ solution) < 1e-13


@pytest.mark.parametrize("name", SPARSE)
def test_value_of_a_sparse_network_equals_features_times_its_dense_coefficients(name):
    network = build(name, 4, 2, 2, seed=5)
    tiles = torch.tensor([3, 0, 2])
    points = torch.rand(3, 9, 2) * 2 - 1
    expected = network.features(points, tiles) @ network.dense(tiles).flatten(2).transpose(1, 2)
    assert relative_error(network(jets.seed(points, "value"), tiles).value, expected) < 1e-13


@pytest.mark.parametrize("name", SPARSE)
def test_a_sparse_network_refuses_a_solution_with_all_terms(name):
    network = build(name, 2, 2, 1, seed=6)
    before = network.dense().clone()
    with pytest.raises(AssertionError, match="set_terms"):
        network.set_last(None, torch.randn(2, before[0, 0].numel(), 1))
    assert torch.equal(network.dense(), before)


@pytest.mark.parametrize("name", VARIANTS)
def test_zero_last_makes_the_output_zero(name):
    network = build(name, 2, 2, 2, seed=7)
    network.zero_last()
    assert not network(jets.seed(torch.rand(2, 4, 2), "hessian")).rows.any()


@pytest.mark.parametrize("name", VARIANTS)
def test_selected_tiles_equal_the_same_tiles_of_the_whole_batch(name):
    network = build(name, 4, 2, 2, seed=8)
    points = torch.rand(4, 6, 2)
    tiles = torch.tensor([3, 1, 1])
    everything = network(jets.seed(points, "laplacian")).rows
    some = network(jets.seed(points[tiles], "laplacian"), tiles).rows
    assert relative_error(some, everything[tiles]) < 1e-13


@pytest.mark.parametrize("name", VARIANTS)
def test_construction_depends_only_on_the_generator(name):
    a, b = build(name, 2, 2, 1, seed=9), build(name, 2, 2, 1, seed=9)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
