"""The jet algebra against nested autograd on explicit functions."""

import pytest
import torch
from torch import Tensor

from cpikan_hr import jets

DIMS = (1, 2, 3)


def points(dim: int) -> Tensor:
    return torch.rand(2, 5, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(dim)) + 0.1


def expected_rows(function, x: Tensor, order: str) -> Tensor:
    """Rows of a scalar function `[..., D] -> [...]` from its exact Hessian (functorch), `[..., R, P, 1]`."""
    flat = x.reshape(-1, x.shape[-1])
    dim = flat.shape[1]
    value = torch.stack([function(p) for p in flat])
    gradient = torch.func.vmap(torch.func.grad(function))(flat)
    hessian = torch.func.vmap(torch.func.hessian(function))(flat)
    rows = [value]
    if order != "value":
        rows += list(gradient.unbind(1))
    if order == "laplacian":
        rows.append(hessian.diagonal(dim1=1, dim2=2).sum(1))
    elif order == "hessian":
        rows += [hessian[:, i, j] for i in range(dim) for j in range(i, dim)]
    return torch.stack(rows).view(-1, *x.shape[:-1]).movedim(0, 1).unsqueeze(-1)


def sum_of_coordinates(jet: jets.Jet) -> jets.Jet:
    weight = torch.arange(1.0, jet.dim + 1, dtype=jet.rows.dtype).view(1, -1, 1).expand(2, -1, -1)
    return jets.linear(jet, weight, torch.full((2, 1), 0.25, dtype=jet.rows.dtype))


def phase(x: Tensor) -> Tensor:
    return (x * torch.arange(1.0, len(x) + 1, dtype=x.dtype)).sum() + 0.25


@pytest.mark.parametrize("order", jets.ORDERS)
@pytest.mark.parametrize("dim", DIMS)
def test_chain_rule_on_a_linear_map(dim, order):
    x = points(dim)
    u = sum_of_coordinates(jets.seed(x, order))
    s, c = u.value.sin(), u.value.cos()
    jet = jets.chain(u, s, c, -s)
    torch.testing.assert_close(jet.rows, expected_rows(lambda p: phase(p).sin(), x, order), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", jets.ORDERS)
@pytest.mark.parametrize("dim", DIMS)
def test_product_rule_and_nested_chain_rule(dim, order):
    """exp(sin(phase)) * sin(phase) + sin(phase)."""
    x = points(dim)
    u = sum_of_coordinates(jets.seed(x, order))
    s = jets.chain(u, u.value.sin(), u.value.cos(), -u.value.sin())
    e = jets.chain(s, *[s.value.exp()] * 3)
    jet = jets.add(jets.multiply(e, s), s)

    def function(p: Tensor) -> Tensor:
        return phase(p).sin().exp() * phase(p).sin() + phase(p).sin()

    torch.testing.assert_close(jet.rows, expected_rows(function, x, order), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("order", jets.ORDERS)
def test_seed_derivatives_are_with_respect_to_the_global_coordinates(order):
    """x = c + s xi, so the jet of (xi_y^2) has gradient 2 xi_y / s_y and curvature 2 / s_y^2."""
    xi, scale = points(2), torch.tensor([[2.0, 3.0], [0.5, 4.0]], dtype=torch.float64)
    jet = jets.seed(xi, order, scale)
    squared = jets.multiply(jet, jet)
    torch.testing.assert_close(squared.value, xi**2)
    if order != "value":
        torch.testing.assert_close(squared.gradient[:, 0, :, 0], 2 * xi[..., 0] * scale[:, :1])
        assert not squared.gradient[:, 1, :, 0].any()
    if order in ("laplacian", "hessian"):
        torch.testing.assert_close(squared.laplacian, (2 * scale**2).unsqueeze(1).expand_as(xi))


@pytest.mark.parametrize("order", jets.ORDERS)
def test_multiply_broadcasts_a_single_channel(order):
    x = points(2)
    wide = jets.seed(x, order)
    window = sum_of_coordinates(wide)
    repeated = window._replace(rows=window.rows.expand_as(wide.rows))
    torch.testing.assert_close(jets.multiply(wide, window).rows, jets.multiply(wide, repeated).rows)


@pytest.mark.parametrize("dim", DIMS)
def test_laplacian_of_a_hessian_jet_is_its_trace(dim):
    u = sum_of_coordinates(jets.seed(points(dim), "hessian"))
    cube = jets.chain(u, u.value**3, 3 * u.value**2, 6 * u.value)
    v = sum_of_coordinates(jets.seed(points(dim), "laplacian"))
    torch.testing.assert_close(cube.laplacian, jets.chain(v, v.value**3, 3 * v.value**2, 6 * v.value).laplacian)


@pytest.mark.parametrize("order, rows", [("value", 1), ("gradient", 4), ("laplacian", 5), ("hessian", 10)])
def test_row_count_in_three_dimensions(order, rows):
    assert jets.row_count(order, 3) == rows == jets.seed(points(3), order).rows.shape[-3]


def test_a_jet_refuses_what_its_order_lacks():
    with pytest.raises(ValueError, match="no gradient"):
        _ = jets.seed(points(2), "value").gradient
    with pytest.raises(ValueError, match="no second derivatives"):
        _ = jets.seed(points(2), "gradient").laplacian
    with pytest.raises(ValueError, match="no Hessian"):
        _ = jets.seed(points(2), "laplacian").hessian
    with pytest.raises(ValueError, match="unknown jet order"):
        jets.row_count("third", 2)
    with pytest.raises(ValueError, match="do not match"):
        jets.add(jets.seed(points(2), "value"), jets.seed(points(2), "gradient"))


def test_full_precision_switches_autocast_off_only_for_derivatives():
    a = torch.randn(8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with jets.full_precision("laplacian"):
            assert (a @ a).dtype == torch.float32
        with jets.full_precision("value"):
            assert (a @ a).dtype == torch.bfloat16
