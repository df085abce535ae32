"""A field as a user calls it: derivatives by torch, points outside of the domain, arrays, single precision."""

import numpy as np
import pytest
import torch
from small_pdes import CPIKAN, NETWORKS, make, random_points
from test_field import random_field

from cpikan_hr.fields import Field
from cpikan_hr.jets import pairs
from cpikan_hr.recipe import FieldOptions

HIGH = torch.tensor([23.0, 31.0], dtype=torch.float64)


def blended(field: Field, count: int) -> torch.Tensor:
    """Random points of the domain, most of them where tiles blend."""
    low, high = torch.tensor(field.domain, dtype=torch.float64).T
    return low + (high - low) * torch.rand(count, len(low), generator=torch.Generator().manual_seed(1)).double()


def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-11) -> bool:
    return found.shape == expected.shape and bool((found - expected).norm() <= tolerance * expected.norm())


def equation_fields() -> dict[str, Field]:
    level = {"overlap": 0.5}
    made = {kind: make("helmholtz", [[2, 3], [1, 2]], network, level=level)[2] for kind, network in NETWORKS.items()}
    made["circle"] = make("allen_cahn", [[1, 3]], CPIKAN, level=level, constraints="hard")[2]
    made["unscaled"] = make("helmholtz", [[2, 2]], NETWORKS["siren"], level={"scaled": False, **level})[2]
    made["hard_windows"] = make("helmholtz", [[2, 2]], CPIKAN, level={"overlap": 0.0})[2]
    made["unknown"] = make("reaction_diffusion", [[3]], unknown={"reaction": 0.3}, measurements={"points": 4})[2]
    return made


FIELDS = {window: random_field(window) for window in ("quintic", "cosine", "bump")} | equation_fields()


@pytest.mark.parametrize("name", FIELDS)
def test_torch_differentiates_a_field_as_its_jets_do_and_once_more(name):
    field = FIELDS[name]
    points = blended(field, 20)
    dim, channel, step = points.shape[1], 0, 1e-5
    jet = field(points, "hessian")
    at = points.clone().requires_grad_()
    value = field(at).value[:, channel]
    assert near(value, jet.value[:, channel])
    (first,) = torch.autograd.grad(value.sum(), at, create_graph=True)
    assert near(first, jet.gradient[..., channel].T)
    for k, (i, j) in enumerate(pairs(dim)):
        (second,) = torch.autograd.grad(first[:, i].sum(), at, create_graph=True)
        assert near(second[:, j], jet.hessian[k, :, channel], 1e-9)
    (third,) = torch.autograd.grad(second[:, -1].sum(), at)
    shift = torch.zeros(dim, dtype=torch.float64)
    shift[-1] = step
    beside = [field(points + sign * shift, "hessian", outside="unchecked").hessian[-1, :, channel] for sign in (-1, 1)]
    assert near(third[:, -1], (beside[1] - beside[0]) / (2 * step), 1e-5)
    (of_jet,) = torch.autograd.grad(field(at, "hessian").hessian[-1, :, channel].sum(), at)
    assert near(of_jet, third, 1e-9)


@pytest.mark.parametrize("name", ["quintic", "circle", "siren"])
def test_transforms_of_torch_give_the_same(name):
    field = FIELDS[name]
    points = blended(field, 4)
    jet = field(points, "hessian")
    gradient, rows = jet.gradient[..., 0].T, jet.hessian[..., 0]
    hessian = torch.stack([rows[0], rows[1], rows[1], rows[2]], -1).unflatten(-1, (2, 2))

    def u(point):
        return field(point[None]).value[0, 0]

    assert near(torch.func.vmap(torch.func.grad(u))(points), gradient)
    assert near(torch.func.vmap(torch.func.jacfwd(u))(points), gradient)
    assert near(torch.func.vmap(torch.func.hessian(u))(points), hessian, 1e-9)
    assert near(torch.func.hessian(u)(points[0]), hessian[0], 1e-9)
    tangent = torch.func.jvp(lambda p: field(p).value[:, 0], (points,), (torch.ones_like(points),))[1]
    assert near(tangent, gradient.sum(1))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", ["quintic", "cpikan"])
def test_a_loss_of_torchs_derivatives_has_the_gradient_of_that_of_jets(name, recompute):
    field = FIELDS[name]
    points, parameters = blended(field, 20), list(field.parameters())
    for level in field.levels:
        level.recompute = recompute
    jet = field(points, "hessian")
    expected = torch.autograd.grad(jet.gradient[..., 0].square().sum() + jet.laplacian[:, 0].sum(), parameters)
    at = points.clone().requires_grad_()
    (first,) = torch.autograd.grad(field(at).value[:, 0].sum(), at, create_graph=True)
    laplacian = sum(torch.autograd.grad(first[:, k].sum(), at, create_graph=True)[0][:, k] for k in (0, 1))
    loss = first.square().sum() + laplacian.sum()  # last biases have no part in it
    found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    for level in field.levels:
        level.recompute = False
    assert all((a - b).norm() <= 1e-9 * b.norm() + 1e-12 for a, b in zip(found, expected, strict=True))


def test_settled_tiles_are_differentiated_too():
    field = random_field("quintic")
    cut, _ = field.settle({1: torch.arange(12) % 2 == 0})
    at = blended(field, 20).requires_grad_()
    one, other = (torch.autograd.grad(f(at).value.sum(), at)[0] for f in (field, cut))
    assert cut.settled and near(other, one)


def test_torchs_derivatives_do_not_run_in_the_precision_of_autocast():
    field = random_field("quintic").float()
    at = blended(field, 20).requires_grad_()
    (exact,) = torch.autograd.grad(field(at).value.sum(), at)
    with torch.autocast("cpu", torch.bfloat16):
        value = field(at).value.sum()
    (found,) = torch.autograd.grad(value, at)
    assert torch.equal(found, exact)


@pytest.mark.parametrize("order", ["value", "gradient", "hessian"])
def test_outside_of_the_closed_domain_and_at_nan_there_is_no_value(order):
    for field in (FIELDS["quintic"], FIELDS["circle"]):
        low, high = torch.tensor(field.domain, dtype=torch.float64).T
        middle = (low + high) / 2
        inside = torch.stack([low, high, middle])
        beyond = torch.stack([low - 1e-3, high + 1e-3, torch.stack([middle[0], high[1] + 9]), middle * torch.nan])
        jet = field(torch.cat([inside, beyond]), order)
        assert jet.rows[:, :3].isfinite().all() and jet.rows[:, 3:].isnan().all()
        assert torch.equal(jet.rows[:, :3], field(inside, order, outside="unchecked").rows)
        assert field(inside, outside="raise").value.isfinite().all()
        with pytest.raises(ValueError, match=r"^point .* is outside of the domain, .*: 4 such points$"):
            field(torch.cat([inside, beyond]), outside="raise")


def test_ends_that_were_rounded_to_single_precision_are_inside():
    problem, field = make("diffusion", [[2, 1]], parameters={"half_width": 2.3})[1:]
    ends = torch.tensor([[-2.3, 0.0], [2.3, 1.0], [np.nextafter(np.float32(2.3), np.float32(3)), 1.0]]).float()
    assert (ends[:, 0].double().abs() > 2.3).any()
    assert field(ends).rows.isfinite().all() and field(ends.double()).rows.isfinite().all()


def test_torchs_derivatives_outside_are_nan_and_those_of_parameters_are_not():
    field = FIELDS["quintic"]
    at = torch.cat([blended(field, 5), HIGH[None] + 1]).requires_grad_()
    value = field(at).value
    (first,) = torch.autograd.grad(value.sum(), at, create_graph=True)
    (second,) = torch.autograd.grad(first[:, 0].sum(), at)
    assert first[:5].isfinite().all() and second[:5].isfinite().all()
    assert first[5].isnan().all() and second[5].isnan().all()
    known = torch.autograd.grad(field(at).value.nansum(), list(field.parameters()))
    inside = torch.autograd.grad(field(at[:5]).value.sum(), list(field.parameters()))
    assert all(torch.allclose(a, b) for a, b in zip(known, inside, strict=True))


def test_a_lattice_is_nan_outside_and_refuses_what_is_none():
    field = FIELDS["quintic"]
    ys, xs = (torch.tensor(line, dtype=torch.float64) for line in ([-1.0, 0.0, 11.0, 23.0], [0.5, 31.0, 31.5]))
    found = field.lattice(ys, xs, "gradient")
    assert found[:, :, 1:, :2].isfinite().all() and found[:, :, 0].isnan().all() and found[:, :, :, 2].isnan().all()
    assert near(found[0, :, 2, 1], field([[11.0, 31.0]]).value[0].detach())
    with pytest.raises(ValueError, match="^coordinates of a lattice do not ascend"):
        field.lattice(ys.flip(0), xs)
    with pytest.raises(ValueError, match="^the field of an equation has no lattice"):
        FIELDS["siren"].lattice(ys, xs)


def test_points_may_be_arrays_lists_or_of_any_real_type_in_either_mode():
    field = random_field("quintic")
    whole = torch.tensor([[3, 4], [5, 30]])
    expected = field(whole.double()).rows
    for points in (whole, whole.float(), whole.numpy(), whole.double().numpy(), whole.tolist()):
        assert torch.equal(field(points).rows, expected)
    assert torch.equal(field.eval()(whole).rows, expected)
    assert field(whole[:0], "hessian").rows.shape == (6, 0, 2)


@pytest.mark.parametrize(
    ("points", "error", "told"),
    [
        (torch.zeros(2), ValueError, r"points of shape \(2,\): give \[N, 2\]"),
        (torch.zeros(4, 3), ValueError, r"points of shape \(4, 3\)"),
        (torch.zeros(4, 4, 2), ValueError, r"points of shape \(4, 4, 2\)"),
        (np.zeros((3, 2), complex), TypeError, "points of complex128: give real numbers"),
        (torch.zeros(3, 2, dtype=torch.bool), TypeError, "points of torch.bool"),
        ([["a", "b"]], TypeError, "points of <U1"),
        ([[1.0], [1.0, 2.0]], TypeError, "points: rows differ in length"),
    ],
)
def test_what_are_no_points_is_refused_in_one_line(points, error, told):
    with pytest.raises(error, match=f"^{told}") as raised:
        FIELDS["quintic"](points)
    assert "\n" not in str(raised.value)


def test_single_precision_rounds_coordinates_within_a_tile_not_within_the_picture():
    """At 9344 px a slope is off by far less than the thousandth of a pixel that single precision resolves there."""
    options = {"tile": 16, "overlap": 0.5, "network": {"kind": "chebyshev2d", "degree": 1, "input_map": "identity"}}
    field = Field.build(FieldOptions(levels=[options]), (16, 9344), 1)
    level = field.levels[0]
    centres = level.tile_grid.axes[1].centre(torch.arange(level.network.tiles))
    with torch.no_grad():  # u = x - 9300 in every tile
        level.network.coefficients[:, 0, 0] = centres - 9300
        level.network.coefficients[:, 0, 1] = level.tile_grid.axes[1].half
    x = 9300 + torch.linspace(-4, 4, 101, dtype=torch.float64)
    found = field(torch.stack([torch.full_like(x, 8.0), x], 1)).value[:, 0].detach()
    assert (found - (x - 9300)).abs().max() < 2e-5


def test_unknown_coefficients_are_the_last_channels_and_the_same_everywhere():
    _, problem, field = make("reaction_diffusion", [[3]], unknown={"reaction": 0.3}, measurements={"points": 4})
    rows = field(random_points(problem, 5)).value
    assert rows.shape == (5, 2) and (rows[:, 1] == field.constants.values).all()
