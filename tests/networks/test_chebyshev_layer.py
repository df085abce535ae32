"""The Chebyshev layer: recurrence, initialisation, saturation, precision."""

import math

import numpy as np
import pytest
import torch

from cpikan_hr import jets
from cpikan_hr.errors import UserError
from cpikan_hr.networks import ChebyshevLayer, ScaledCPIKAN, build_network
from cpikan_hr.networks.chebyshev import basis_moments
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
@pytest.mark.parametrize("kind", ["cpikan", "siren", "fourier_mlp", "chebyshev2d"])
def test_parameters_stored_in_bf16_still_propagate_fp32_rows(kind, order):
    network = build_network(kind, 1, 2, 1).to(torch.bfloat16)
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
