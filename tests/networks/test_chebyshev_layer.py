"""The Chebyshev layer: recurrence, initialisation, saturation, precision."""

import math
import re

import numpy as np
import pytest
import torch
from network_reference import relative_error

from cpikan_hr import jets
from cpikan_hr.errors import UserError
from cpikan_hr.networks import ChebyshevLayer, ScaledCPIKAN, build_network
from cpikan_hr.networks.chebyshev import INITS, basis_moments
from cpikan_hr.networks.chebyshev_kernels import INPUT_MAPS, chebyshev_derivatives


def test_recurrence_and_its_derivatives_equal_numpy_chebyshev_series():
    s = torch.linspace(-1, 1, 41)
    for n, b in enumerate(chebyshev_derivatives(s, 20, "identity", 4), start=1):
        series = np.polynomial.Chebyshev.basis(n)
        for k in range(4):
            expected = series.deriv(k)(s.numpy()) if k else series(s.numpy())
            assert np.abs(b[k].numpy() - expected).max() <= 1e-11 * max(1.0, np.abs(expected).max())


def test_sine_map_turns_chebyshev_polynomials_into_cosines():
    v = torch.linspace(-1, 1, 33)
    theta = math.pi / 2 * (1 - v)  # sin(pi v / 2) = cos(theta)
    for n, (b,) in enumerate(chebyshev_derivatives(v, 12, "sine", 1), start=1):
        assert torch.allclose(b, torch.cos(n * theta), atol=1e-12)


def test_published_initialisation_equals_torch_xavier_normal():
    layer = ChebyshevLayer(400, 3, 7, 4)
    reference = torch.nn.init.xavier_normal_(torch.empty(3, 7, 5))
    fan_in, fan_out = torch.nn.init._calculate_fan_in_and_fan_out(reference)
    assert layer.coefficients.std().item() == pytest.approx(math.sqrt(2 / (fan_in + fan_out)), rel=0.02)


def test_chebykan_initialisation():
    assert ChebyshevLayer(400, 3, 7, 4, init="chebykan").coefficients.std().item() == pytest.approx(1 / 15, rel=0.02)


@pytest.mark.parametrize("init", INITS)
def test_a_shared_constant_starts_at_zero_and_leaves_the_spread_of_the_other_terms(init):
    published, shared = (ChebyshevLayer(2000, 3, 7, 4, init=init, shared_constant=s) for s in (False, True))
    expected = published.coefficients.detach().square().mean((0, 1, 2)).sqrt()[1:]
    assert torch.allclose(shared.coefficients.square().mean((0, 1, 2)).sqrt(), expected, rtol=0.03)
    assert not shared.constant.any()


@pytest.mark.parametrize("order", jets.ORDERS)
@pytest.mark.parametrize("options", [{}, {"layer_norm": True}, {"first_input_map": "identity", "input_map": "sine"}])
def test_the_sums_of_the_published_constants_as_shared_ones_give_the_same_function(options, order):
    published = ScaledCPIKAN(3, 2, 2, hidden=[4, 3], degree=[3, 2, 4], **options)
    shared = ScaledCPIKAN(3, 2, 2, hidden=[4, 3], degree=[3, 2, 4], shared_constant=True, **options)
    state = published.state_dict()
    for name in [n for n in state if n.endswith("coefficients")]:
        all_terms = state[name]
        assert all_terms[..., 0].abs().min() > 0
        state[name], state[name.replace("coefficients", "constant")] = all_terms[..., 1:], all_terms[..., 0].sum(1)
    shared.load_state_dict(state)
    tiles = torch.tensor([2, 0])
    jet = jets.seed(torch.rand(2, 7, 2) * 2 - 1, order)
    assert relative_error(shared(jet, tiles).rows, published(jet, tiles).rows) < 1e-13


def test_a_shared_constant_replaces_one_number_per_edge_by_one_per_output():
    shapes = [{n: tuple(p.shape) for n, p in layer.named_parameters()} for layer in (
        ChebyshevLayer(5, 3, 4, 2),
        ChebyshevLayer(5, 3, 4, 2, shared_constant=True),
    )]  # fmt: skip
    assert shapes == [{"coefficients": (5, 3, 4, 3)}, {"coefficients": (5, 3, 4, 2), "constant": (5, 4)}]


def test_a_list_of_degrees_gives_each_layer_its_own():
    network = ScaledCPIKAN(1, 2, 5, hidden=[4, 3], degree=[6, 1, 2])
    assert [tuple(layer.coefficients.shape) for layer in network.layers] == [(1, 2, 4, 7), (1, 4, 3, 2), (1, 3, 5, 3)]


def test_one_degree_equals_a_list_that_repeats_it():
    one, several = (
        ScaledCPIKAN(2, 2, 1, hidden=[4, 3], degree=degree, generator=torch.Generator().manual_seed(0))
        for degree in (3, [3, 3, 3])
    )
    jet = jets.seed(torch.rand(2, 5, 2), "laplacian")
    assert torch.equal(one(jet).rows, several(jet).rows)


@pytest.mark.parametrize("degree", [[3], [3, 2], [3, 2, 2, 1], []])
def test_a_list_with_another_number_of_degrees_than_layers_is_refused_by_name(degree):
    with pytest.raises(UserError, match=rf"cpikan degree {re.escape(str(degree))}: .*each of the 3 layers"):
        ScaledCPIKAN(1, 2, 1, hidden=[4, 3], degree=degree)


@pytest.mark.parametrize("input_map", INPUT_MAPS)
def test_moments_equal_monte_carlo(input_map):
    v = torch.rand(400_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    value, slope = basis_moments(4, input_map)
    for n, (b, b1) in enumerate(chebyshev_derivatives(v, 4, input_map, 2)):
        assert value[n] == pytest.approx(b.square().mean().item(), rel=0.02)
        assert slope[n] == pytest.approx(b1.square().mean().item(), rel=0.02)


@pytest.mark.parametrize("input_map", INPUT_MAPS)
def test_moments_initialisation_keeps_the_variance_within_the_glorot_compromise(input_map):
    """The std of n balances E[B^2] (forward) and E[B'^2] (backward): neither pass may explode."""
    layer = ChebyshevLayer(50, 24, 24, 5, input_map=input_map, init="moments")
    v = torch.rand(50, 1, 200, 24) * 2 - 1
    v.requires_grad_()
    out = layer(jets.Jet(v, "value", 1)).value
    assert out.var().item() < 2 * v.var().item()
    (grad,) = torch.autograd.grad(out, v, torch.randn_like(out))
    assert 0.05 < grad.var().item() < 3


@pytest.mark.parametrize("input_map", ["tanh", "sine"])
def test_saturated_inputs_give_finite_values_and_gradients(input_map):
    layer = ChebyshevLayer(1, 2, 3, 8, input_map=input_map)
    rows = torch.full((1, 6, 4, 2), 1.0)
    rows[:, 0] = torch.tensor([50.0, -50.0, 1e4, 0.0]).unsqueeze(-1)
    rows.requires_grad_()
    out = layer(jets.Jet(rows, "hessian", 2)).rows
    grads = torch.autograd.grad(out.square().sum(), [rows, layer.coefficients])
    assert all(torch.isfinite(t).all() for t in (out, *grads))


@pytest.mark.parametrize("kind", ["cpikan", "siren", "fourier_mlp", "chebyshev2d"])
def test_autocast_leaves_derivatives_in_full_precision(kind):
    network = build_network(kind, 2, 2, 1).float()
    jet = jets.seed(torch.rand(2, 9, 2, dtype=torch.float32), "laplacian")
    expected = network(jet).rows
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = network(jet).rows
    assert actual.dtype == torch.float32 and torch.equal(actual, expected)


def test_autocast_runs_value_only_jets_in_bf16():
    network = ScaledCPIKAN(1, 2, 1, hidden=[16]).float()
    jet = jets.seed(torch.rand(1, 200, 2, dtype=torch.float32), "value")
    exact = network(jet).rows
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coarse = network(jet).rows
    coarse.square().sum().backward()
    error = (coarse - exact).abs().max()
    assert 0 < error < 0.05
    assert network.layers[0].coefficients.grad.dtype == torch.float32


@pytest.mark.parametrize("order", ["value", "laplacian"])
@pytest.mark.parametrize(
    "kind, options",
    [
        ("cpikan", {}),
        ("cpikan", {"shared_constant": True}),
        ("siren", {}),
        ("fourier_mlp", {}),
        ("chebyshev2d", {}),
        ("chebyshev2d", {"sparse": True}),
    ],
)
def test_parameters_stored_in_bf16_still_propagate_fp32_rows(kind, options, order):
    network = build_network(kind, 1, 2, 1, **options).to(torch.bfloat16)
    rows = network(jets.seed(torch.rand(1, 5, 2, dtype=torch.float32), order)).rows
    rows.sum().backward()
    assert rows.dtype == torch.float32
    assert all(p.grad.dtype == torch.bfloat16 for p in network.parameters())


def test_unknown_options_name_the_choices():
    with pytest.raises(UserError, match="choose one of tanh, identity, sine"):
        ChebyshevLayer(1, 1, 1, input_map="sigmoid")
    with pytest.raises(UserError, match="choose one of xavier_normal"):
        ChebyshevLayer(1, 1, 1, init="ones")
    with pytest.raises(UserError, match="choose one of cpikan"):
        build_network("resnet", 1, 2, 1)
    with pytest.raises(UserError, match="must be at least 1"):
        ChebyshevLayer(1, 1, 1, degree=0)
    with pytest.raises(UserError, match="degree 0: it must be at least 1"):
        ScaledCPIKAN(1, 2, 1, hidden=[3], degree=[2, 0])
