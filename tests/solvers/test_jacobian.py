"""The Jacobian of batched networks against plain autograd, point by point."""

import pytest
import torch

from cpikan_hr.jets import ORDERS, row_count, seed
from cpikan_hr.networks import build_network
from cpikan_hr.solvers.jacobian import Linearised

NETWORKS = {
    "published": {"kind": "cpikan", "hidden": [3, 2], "degree": 3},
    "one layer": {"kind": "cpikan", "hidden": [], "degree": [4]},
    "variants": {
        "kind": "cpikan", "hidden": [3], "degree": [2, 3], "layer_norm": True, "shared_constant": True,
        "first_input_map": "identity", "input_map": "sine",
    },
    "siren": {"kind": "siren", "hidden": [4, 3], "first_omega": 3.0, "hidden_omega": 2.0},
    "fourier": {"kind": "fourier_mlp", "hidden": [4], "bands": 2, "activation": "silu"},
    "tensor": {"kind": "chebyshev2d", "degree": [3, 2], "input_map": "identity"},
}  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", NETWORKS)
def test_rows_are_those_of_autograd(kind, order):
    tiles, points, channels = 3, 5, 2
    draw = torch.Generator().manual_seed(1)
    network = build_network(tiles=tiles, in_features=2, out_features=channels, **NETWORKS[kind]).double()
    for parameter in network.parameters():
        parameter.data.normal_(generator=draw)
    uniform = 2 * torch.rand(tiles, points, 2, generator=draw, dtype=torch.float64) - 1
    jet = seed(uniform, order, torch.tensor([0.5, 3.0], dtype=torch.float64))
    against = torch.randn(2, tiles, row_count(order, 2), points, channels, generator=draw, dtype=torch.float64)

    whole = network(jet).rows
    here = Linearised(network.pick(torch.arange(tiles)), jet)
    assert torch.equal(here.output.rows, whole)
    for number, weights in enumerate(against):  # of nonlinear scalars, one after the other
        found = here.rows((here.output.rows.square() * weights).sum(), again=number == 0)
        for tile in range(tiles):
            for point in range(points):
                scalar = (whole.square() * weights)[tile, :, point].sum()
                grads = torch.autograd.grad(scalar, list(network.parameters()), retain_graph=True)
                expected = torch.cat([grad[tile].flatten() for grad in grads])
                least = 1e-10 * float(expected.abs().max())
                assert torch.allclose(found[tile, :, point], expected, rtol=1e-10, atol=least)


def test_the_network_it_is_given_stays_untouched():
    network = build_network(tiles=2, in_features=2, out_features=1, kind="siren", hidden=[3])
    here = Linearised(network.pick(torch.tensor([1])), seed(torch.zeros(1, 4, 2), "value"))
    here.rows(here.output.rows.sum())
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert not any(layer._forward_hooks for layer in network.modules())
