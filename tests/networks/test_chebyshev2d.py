"""The tensor-product Chebyshev expansion: its values, and the terms that a sparse network lists."""

import copy
import io

import numpy as np
import pytest
import torch
from network_reference import random_terms

from cpikan_hr import jets
from cpikan_hr.errors import UserError
from cpikan_hr.networks import Chebyshev2D

SELECTIONS = [[0, 1, 2, 3], [2], [3, 0], [1, 1, 2, 1], []]


def filled(sparse: bool, seed: int = 0, **options) -> tuple[Chebyshev2D, np.ndarray]:
    """A network with four tiles and two channels, and its coefficients [4, 2, M + 1, N + 1] put down term by term."""
    generator = torch.Generator().manual_seed(seed)
    network = Chebyshev2D(4, 2, 2, sparse=sparse, **options)
    expected = np.zeros((4, 2, network.degree[0] + 1, network.degree[1] + 1))
    if sparse:
        for tile, terms in enumerate(random_terms(network, generator)):
            for place, value in terms.items():
                expected[(tile, *place)] = value
    else:
        torch.nn.init.normal_(network.coefficients, generator=generator)
        for place in np.ndindex(expected.shape):
            tile, channel, m, n = place
            expected[place] = network.coefficients[tile, channel, m * expected.shape[3] + n].item()
    return network, expected


def saved(network: Chebyshev2D) -> dict:
    """The state as it comes back from a file."""
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ------------------------------------------------------------------------------------------------------ the expansion


@pytest.mark.parametrize("sparse", [False, True])
def test_identity_map_equals_numpy_chebval2d(sparse):
    network, coefficients = filled(sparse, degree=(4, 3), input_map="identity")
    points = torch.rand(4, 30, 2) * 2 - 1
    actual = network(jets.seed(points, "value")).value.detach().numpy()
    assert np.abs(actual).max() > 0.1
    for tile, (y, x) in enumerate(points.numpy().transpose(0, 2, 1)):
        for channel in range(2):
            expected = np.polynomial.chebyshev.chebval2d(y, x, coefficients[tile, channel])
            np.testing.assert_allclose(actual[tile, :, channel], expected, atol=1e-12)


def test_sine_map_equals_cosines_on_pixel_centres():
    network, coefficients = filled(True, degree=(3, 5))
    y, x = ((2 * np.arange(count) + 1) / count - 1 for count in (4, 6))
    points = torch.tensor(np.stack(np.meshgrid(y, x, indexing="ij"), axis=-1).reshape(-1, 2)).expand(4, -1, -1)
    cos_y, cos_x = (
        np.cos(np.outer(np.pi * (2 * np.arange(count)[::-1] + 1) / (2 * count), np.arange(count))) for count in (4, 6)
    )
    expected = np.einsum("pm,qn,tcmn->tpqc", cos_y, cos_x, coefficients).reshape(4, 24, 2)
    np.testing.assert_allclose(network(jets.seed(points, "value")).value.detach().numpy(), expected, atol=1e-12)


# ---------------------------------------------------------------------------------------------------- the terms in use


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("sparse", [False, True])
def test_dense_has_each_listed_term_in_its_place_and_zeros_elsewhere(sparse, selection):
    network, expected = filled(sparse, degree=(2, 3))
    assert np.array_equal(network.dense().detach().numpy(), expected)
    assert np.array_equal(network.dense(torch.tensor(selection).long()).detach().numpy(), expected[selection])


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("sparse", [False, True])
def test_lattice_coefficients_are_the_dense_ones_m_first_and_tiles_before_n(sparse, selection):
    network, expected = filled(sparse, degree=(2, 3))
    lattice = network.lattice_coefficients(torch.tensor(selection).long())
    assert lattice.shape == (3, 2, len(selection), 4) and lattice.is_contiguous() and not lattice.requires_grad
    assert np.array_equal(lattice.numpy(), expected[selection].transpose(2, 1, 0, 3))


@pytest.mark.parametrize("sparse", [False, True])
def test_scaling_lattice_coefficients_leaves_the_network_as_it_was(sparse):
    network, expected = filled(sparse, degree=(2, 3))
    network.lattice_coefficients(torch.arange(4)).mul_(2)
    assert np.array_equal(network.dense().detach().numpy(), expected)


@pytest.mark.parametrize("seed", range(4))
def test_unused_terms_are_no_parameters(seed):
    network, expected = filled(True, seed, degree=(3, 4))
    assert {n: p.shape for n, p in network.named_parameters()} == {"coefficients": (np.count_nonzero(expected),)}


def test_training_changes_the_listed_terms_and_no_others():
    network, before = filled(True, degree=(3, 4))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network(jets.seed(torch.rand(4, 50, 2) * 2 - 1, "laplacian")).rows.square().sum().backward()
    optimizer.step()
    after = network.dense().detach().numpy()
    assert np.array_equal(after != before, before != 0)


def test_set_terms_replaces_all_terms():
    network, _ = filled(True, seed=1, degree=(2, 3))
    network.set_terms(torch.tensor([1, 0, 2, 0]), torch.tensor([12 + 4 + 3, 0, 2 * 4]), torch.tensor([0.5, 2.0, -1.0]))
    expected = torch.zeros(4, 2, 3, 4)
    expected[0, 1, 1, 3], expected[2, 0, 0, 0], expected[2, 0, 2, 0] = 0.5, 2.0, -1.0
    assert torch.equal(network.dense().double(), expected)
    assert network.offset.tolist() == [0, 1, 1, 3, 3] and network.coefficients.requires_grad


def test_a_network_without_any_term_is_zero():
    network, _ = filled(True, degree=(2, 3))
    network.set_terms(torch.zeros(4, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(0))
    rows = network(jets.seed(torch.rand(4, 5, 2), "hessian")).rows
    assert rows.shape == (4, 6, 5, 2) and not rows.any() and network.coefficients.numel() == 0


def test_a_fresh_sparse_network_has_the_constant_of_every_tile_and_channel():
    network = Chebyshev2D(3, 2, 2, degree=(1, 2), sparse=True).double()
    with torch.no_grad():
        network.coefficients.copy_(torch.arange(6.0) + 1)
    value = network(jets.seed(torch.rand(3, 5, 2), "value")).value
    assert torch.equal(value, (torch.arange(6.0) + 1).view(3, 1, 2).expand(-1, 5, -1))


@pytest.mark.parametrize("counts", [[2, 0, 3, 1], [0, 0, 1, 4], [3, 1, 0, 0], [1, 1, 1, 1]])
def test_tile_of_names_the_tile_of_each_coefficient(counts):
    network, _ = filled(True, degree=(2, 3))
    index = torch.cat([torch.arange(n) for n in counts])
    network.set_terms(torch.tensor(counts), index, torch.zeros(len(index)))
    expected = np.repeat(np.arange(4), counts).tolist()
    assert [network.tile_of(k) for k in range(len(index))] == expected
    dense, _ = filled(False, degree=(2, 3))
    assert [dense.tile_of(k) for k in range(4)] == list(range(4))  # what an error report asks of any row


# --------------------------------------------------------------------------------------------------- saving and loading


@pytest.mark.parametrize("seed", range(4))
def test_a_fresh_network_loads_terms_and_values_whatever_their_number(seed):
    network, expected = filled(True, seed, degree=(3, 4))
    fresh = Chebyshev2D(4, 2, 2, degree=(3, 4), sparse=True)
    fresh.load_state_dict(saved(network))
    assert np.array_equal(fresh.dense().detach().numpy(), expected)
    assert torch.equal(fresh.index, network.index) and torch.equal(fresh.offset, network.offset)
    assert fresh.index.dtype == torch.int16 and fresh.offset.dtype == torch.int32
    assert fresh.tile_of(0) == network.tile_of(0) and fresh.coefficients.requires_grad


def test_a_network_with_as_many_terms_elsewhere_loads_them_too():
    network, expected = filled(True, degree=(3, 4))
    other = Chebyshev2D(4, 2, 2, degree=(3, 4), sparse=True)
    count = network.coefficients.numel()
    other.set_terms(torch.tensor([0, 0, count, 0]), torch.arange(count), torch.ones(count))
    parameter = other.coefficients
    other.load_state_dict(saved(network))
    assert other.coefficients is parameter  # an optimizer keeps what it holds
    assert np.array_equal(other.dense().detach().numpy(), expected)


@pytest.mark.parametrize("degree, dtype", [((126, 127), torch.int16), ((127, 128), torch.int32)])
def test_places_are_numbered_by_the_smallest_type_that_holds_the_last(degree, dtype):
    network = Chebyshev2D(1, 2, 2, degree=degree, sparse=True).double()
    last = 2 * (degree[0] + 1) * (degree[1] + 1) - 1
    network.set_terms(torch.tensor([1]), torch.tensor([last]), torch.ones(1))
    assert network.index.dtype == dtype
    assert network.dense()[0, 1, -1, -1] == 1 == network.lattice_coefficients(torch.tensor([0]))[-1, 1, 0, -1]


def test_a_network_may_take_the_tensors_of_a_state_themselves():
    network, expected = filled(True, degree=(3, 4))
    with torch.device("meta"):
        fresh = Chebyshev2D(4, 2, 2, degree=(3, 4), sparse=True)
    fresh.load_state_dict(network.state_dict(), assign=True)
    assert np.array_equal(fresh.dense().detach().numpy(), expected)
    for name, value in fresh.state_dict().items():
        assert value.data_ptr() == network.state_dict()[name].data_ptr()


def test_a_network_inside_a_module_loads_its_terms():
    network, expected = filled(True, degree=(3, 4))
    fresh = torch.nn.ModuleDict({"a": Chebyshev2D(4, 2, 2, degree=(3, 4), sparse=True)})
    fresh.load_state_dict({"a." + name: tensor for name, tensor in saved(network).items()})
    assert np.array_equal(fresh["a"].dense().detach().numpy(), expected)


def test_a_copied_network_evaluates_and_trains_by_itself():
    network, expected = filled(True, degree=(3, 4))
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.coefficients.mul_(2)
    assert np.array_equal(network.dense().detach().numpy(), expected)
    assert np.array_equal(other.dense().detach().numpy(), 2 * expected)


def test_a_loaded_network_shares_no_memory_with_the_state():
    network, expected = filled(True, degree=(3, 4))
    network.float()
    fresh = Chebyshev2D(4, 2, 2, degree=(3, 4), sparse=True)
    fresh.load_state_dict(network.state_dict())
    with torch.no_grad():
        fresh.coefficients.zero_()
        fresh.index.zero_()
    assert np.array_equal(network.dense().detach().double().numpy(), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_loading_network_keeps_its_precision(dtype):
    network, _ = filled(True, degree=(3, 4))
    fresh = Chebyshev2D(4, 2, 2, degree=(3, 4), sparse=True).to(dtype)
    fresh.load_state_dict(saved(network))
    assert fresh.coefficients.dtype == dtype


def test_a_frozen_network_stays_frozen_when_it_loads_other_terms():
    network, _ = filled(True, degree=(3, 4))
    fresh = Chebyshev2D(4, 2, 2, degree=(3, 4), sparse=True).requires_grad_(False)
    fresh.load_state_dict(saved(network))
    assert not fresh.coefficients.requires_grad


def test_the_state_of_another_number_of_tiles_is_refused():
    network, _ = filled(True, degree=(3, 4))
    fresh = Chebyshev2D(9, 2, 2, degree=(3, 4), sparse=True)
    assert fresh.coefficients.numel() != network.coefficients.numel()
    with pytest.raises(RuntimeError, match="offset"):
        fresh.load_state_dict(saved(network))


@pytest.mark.parametrize("sparse", [False, True])
def test_the_state_of_the_other_layout_is_refused(sparse):
    network, _ = filled(sparse, degree=(3, 4))
    with pytest.raises(RuntimeError, match="index"):
        Chebyshev2D(4, 2, 2, degree=(3, 4), sparse=not sparse).load_state_dict(saved(network))


def test_impossible_settings_are_named():
    with pytest.raises(UserError, match="works in 2 coordinates, not 3"):
        Chebyshev2D(1, 3, 1)
    with pytest.raises(UserError, match=r"degree \[512, 1\]: it must be from 0 to 511"):
        Chebyshev2D(1, degree=(512, 1))
    with pytest.raises(UserError, match=r"degree \[2, -1\]: it must be from 0 to 511"):
        Chebyshev2D(1, degree=(2, -1))
    with pytest.raises(UserError, match="choose one of tanh, identity, sine"):
        Chebyshev2D(1, input_map="cosine")
