"""The formula: windows that sum to one, points and grid alike, derivatives of the whole field."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cpikan_hr.fields import Field, TileGrid
from cpikan_hr.jets import pairs
from cpikan_hr.recipe import FieldOptions

NETWORKS = [
    {"kind": "cpikan", "hidden": [4], "degree": 3},
    {"kind": "siren", "hidden": [5], "first_omega": 3.0, "hidden_omega": 3.0},
    {"kind": "fourier_mlp", "hidden": [5], "bands": 2},
    {"kind": "fourier_mlp", "hidden": [], "bands": 2},
    {"kind": "chebyshev2d", "degree": 4},
    {"kind": "chebyshev2d", "degree": None, "sparse": True},
]


def random_active(shape: tuple[int, int], strides=(16, 8, 4)) -> dict[int, torch.Tensor]:
    """Which tiles of each stride are leaves of a quadtree over `shape`: a partition."""
    leaves: dict[int, list[int]] = {k: [] for k in range(len(strides))}
    columns = [-(-shape[1] // stride) for stride in strides]
    rows = [-(-shape[0] // stride) for stride in strides]

    def visit(k: int, y: int, x: int) -> None:
        if y >= rows[k] or x >= columns[k]:
            return
        if k + 1 < len(strides) and (y + 2 * x + k) % 3:
            for a, b in np.ndindex(2, 2):
                visit(k + 1, 2 * y + a, 2 * x + b)
        else:
            leaves[k].append(y * columns[k] + x)

    for y, x in np.ndindex(rows[0], columns[0]):
        visit(0, y, x)
    return {k: torch.tensor(sorted(tiles)) for k, tiles in leaves.items()}


def random_terms(field: Field, generator: torch.Generator) -> None:
    """Gives every sparse network a different number of random terms per tile."""
    for level in field.levels:
        network = level.network
        if not getattr(network, "sparse", False):
            continue
        size = network.out_features * network.shape[0] * network.shape[1]
        counts = torch.randint(0, 9, (network.tiles,), generator=generator)
        index = [torch.randperm(size, generator=generator)[:n].sort().values for n in counts.tolist()]
        network.set_terms(counts, torch.cat(index), torch.zeros(int(counts.sum())))


def random_field(window: str, networks=NETWORKS, shape=(23, 31)) -> Field:
    levels = [{"grid": [1, 1], "network": networks[0]}]
    levels += [
        {"tile": 8, "overlap": o, "network": n} for o, n in zip((0.0, 0.25, 0.5, 1.0), networks[1:], strict=False)
    ]
    levels.append(
        {"tile": [16, 8, 4], "overlap": 0.5, "network": {"kind": "chebyshev2d", "degree": None, "sparse": True}}
    )
    active = {len(levels) - 1 + k: tiles for k, tiles in random_active(shape).items()}
    field = Field.build(FieldOptions(window=window, levels=levels), shape, 2, seed=3, active=active)
    generator = torch.Generator().manual_seed(0)
    random_terms(field, generator)
    field = field.double()
    field.mix.copy_(torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64))
    with torch.no_grad():
        for tensor in [*field.parameters(), *(b for n, b in field.named_buffers() if n.endswith(("mean", "scale")))]:
            tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.4)
    return field


@settings(max_examples=40, deadline=None)
@given(
    extent=st.tuples(st.floats(3, 200), st.floats(3, 200)),
    stride=st.floats(2, 70),
    overlap=st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0]),
    window=st.sampled_from(["quintic", "cosine", "bump"]),
    seed=st.integers(0, 99),
)
def test_windows_are_positive_and_sum_to_one_border_included(extent, stride, overlap, window, seed):
    grid = TileGrid.over(extent, stride=stride, overlap=overlap, window=window)
    points = torch.rand(200, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    points[:4] = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]], dtype=torch.float64)
    points = points * torch.tensor(extent, dtype=torch.float64)
    point, tile, rows = grid.cover(points, "hessian")
    assert (rows[:, 0] > 0).all()
    total = torch.zeros(200, rows.shape[1], dtype=torch.float64).index_add(0, point, rows)
    assert torch.allclose(total[:, 0], torch.ones(200, dtype=torch.float64), atol=1e-12)
    # Derivatives of a sum that is one everywhere vanish.
    scale = (overlap or 1.0) * stride
    assert (total[:, 1:] * torch.tensor([scale, scale, scale**2, scale**2, scale**2])).abs().max() < 1e-8


@pytest.mark.parametrize("window", ["quintic", "cosine", "bump"])
@pytest.mark.parametrize("order", ["value", "gradient", "laplacian", "hessian"])
def test_points_and_grid_give_the_same_jet(window, order):
    field = random_field(window)
    ys, xs = torch.linspace(0, 23, 19, dtype=torch.float64), torch.linspace(0.2, 30, 27, dtype=torch.float64)
    points = torch.cartesian_prod(ys, xs)
    with torch.no_grad():
        scattered = field(points, order).rows.unflatten(1, (19, 27)).movedim(-1, 1)
    lattice = field.lattice(ys, xs, order)
    assert (scattered - lattice).norm() <= 1e-12 * lattice.norm()


@pytest.mark.parametrize("spacing", [1.0, 0.5, 0.3, 2.0])
def test_a_lattice_of_any_spacing_and_region_agrees_with_points(spacing):
    field = random_field("quintic", shape=(40, 150))
    ys = torch.arange(9.5, 30, spacing, dtype=torch.float64)
    xs = torch.arange(20.5, 141, spacing, dtype=torch.float64)
    with torch.no_grad():
        points = field(torch.cartesian_prod(ys, xs), "laplacian").rows.unflatten(1, (len(ys), len(xs))).movedim(-1, 1)
    lattice = field.lattice(ys, xs, "laplacian")
    assert (points - lattice).norm() <= 1e-12 * lattice.norm()


def test_the_leaves_of_a_quadtree_blend_to_one_everywhere():
    network = {"kind": "chebyshev2d", "degree": None, "sparse": True}
    options = FieldOptions(levels=[{"tile": [16, 8, 4], "overlap": 0.5, "network": network}])
    field = Field.build(options, (32, 32), 1, active=random_active((32, 32))).double()
    for level in field.levels:  # the constant of every tile, nothing else
        ones = torch.ones(level.network.tiles, dtype=torch.long)
        level.network.set_terms(ones, 0 * ones, ones.double())
    points = torch.rand(4000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 32
    rows = field(points, "gradient").rows.detach()
    assert (rows[0] - 1).abs().max() < 1e-12 and rows[1:].abs().max() < 1e-12


def test_a_field_is_rebuilt_from_its_state():
    sparse = {"kind": "chebyshev2d", "degree": None, "sparse": True}
    options = FieldOptions(levels=[{"tile": [16, 8, 4], "overlap": 0.5, "network": sparse}])
    field = Field.build(options, (23, 31), 2, active=random_active((23, 31)))
    random_terms(field, torch.Generator().manual_seed(1))
    for parameter in field.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(2))
    again = Field.from_state(options, (23, 31), 2, field.state_dict())
    points = torch.rand(99, 2, dtype=torch.float64) * 23
    assert torch.equal(again(points).rows, field(points).rows)
    shaped = Field.from_layout(options, (23, 31), 2, field.layout())
    assert [p.shape for p in shaped.parameters()] == [p.shape for p in field.parameters()]


def reference(field: Field, points: torch.Tensor) -> torch.Tensor:
    """The formula written out over every tile of every level, differentiable with respect to the points."""
    total = 0
    for level in field.levels:
        grid = level.tile_grid
        for slot, tile in enumerate(level.active_tiles.tolist()):
            index = [torch.tensor(int(i)) for i in np.unravel_index(tile, grid.shape)]
            window = 1
            for a, axis in enumerate(grid.axes):
                window = window * axis.windows(points[:, a], index[a])[0]
            local = torch.stack(
                [(points[:, a] - axis.centre(index[a])) / axis.half for a, axis in enumerate(grid.axes)], -1
            )
            slots = torch.tensor([slot])
            features = level.network.features(local[None], slots)[0]
            last = _last(level.network, slot)
            total = total + window[:, None] * (level.mean_of(slots) + level.scale_of(slots) * (features @ last))
    return total @ field.mix


def _last(network, tile: int) -> torch.Tensor:
    """The last layer's parameters [K, C] in the order of `features`."""
    if hasattr(network, "dense"):
        return network.dense(torch.tensor([tile]))[0].flatten(1).T
    layer = network.layers[-1]
    if hasattr(layer, "coefficients"):
        c = layer.coefficients[tile]
        return torch.cat([c[..., 0].sum(0, keepdim=True), c[..., 1:].permute(2, 0, 1).flatten(0, 1)])
    return torch.cat([layer.bias[tile][None], layer.weight[tile]])


@pytest.mark.parametrize("window", ["quintic", "cosine", "bump"])
def test_jets_of_the_field_agree_with_nested_autograd_of_the_formula(window):
    # (Sparse terms: several of them may be unused, so their gradient is compared as a whole.)
    # cPIKAN's layer is differentiable once: its own tests compare it with nested autograd, here it has no hidden layer.
    networks = [{"kind": "cpikan", "hidden": [], "degree": 3}, *NETWORKS[1:]]
    field = random_field(window, networks)
    points = torch.rand(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    points = (points * torch.tensor([23.0, 31.0], dtype=torch.float64)).requires_grad_()
    jet = field(points.detach(), "hessian")
    value = reference(field, points)
    worst = [(jet.value - value).norm() / value.norm()]
    for c in range(2):
        first = torch.autograd.grad(value[:, c].sum(), points, create_graph=True)[0]
        worst.append((jet.gradient[:, :, c].T - first).norm() / first.norm())
        for k, (i, j) in enumerate(pairs(2)):
            second = torch.autograd.grad(first[:, i].sum(), points, retain_graph=True)[0][:, j]
            worst.append((jet.hessian[k, :, c] - second).norm() / second.norm())
    assert max(worst) < 1e-10
    weights = torch.randn(jet.rows.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mine = torch.autograd.grad((jet.value * weights[0]).sum(), list(field.parameters()))
    theirs = torch.autograd.grad((value * weights[0]).sum(), list(field.parameters()))
    assert max((a - b).norm() / b.norm() for a, b in zip(mine, theirs, strict=True)) < 1e-10


def test_a_fresh_field_is_zero_and_depends_on_the_seed_alone():
    options = FieldOptions(levels=[{"tile": 8, "network": NETWORKS[0]}])
    first, second = (Field.build(options, (20, 20), 1, seed=5) for _ in range(2))
    points = torch.rand(50, 2, dtype=torch.float64) * 20
    assert first(points).value.abs().max() == 0
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_chunks_and_recomputation_do_not_change_the_gradient():
    points = torch.rand(500, 2, dtype=torch.float64) * 20
    gradients = []
    for chunk, recompute in ((2**20, False), (1024, False), (1024, True)):
        field = random_field("quintic")
        for level in field.levels:
            level.chunk, level.recompute = chunk, recompute
        loss = field(points, "laplacian").rows.square().mean()
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(field.parameters()))]))
    for other in gradients[1:]:
        assert (other - gradients[0]).norm() <= 1e-12 * gradients[0].norm()


def test_a_level_that_has_not_joined_yet_adds_nothing_and_still_gets_a_gradient():
    field = random_field("quintic", NETWORKS[:2])
    field.mix.copy_(torch.eye(2))  # a product with another matrix rounds as its rows happen to lie in memory
    points = torch.rand(30, 2, dtype=torch.float64) * 20
    jet = field(points, "value", 1)
    assert torch.equal(jet.rows, field.levels[0](points, "value"))
    jet.value.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in field.levels[1].parameters())


@pytest.mark.parametrize("order", ["value", "gradient", "laplacian", "hessian"])
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network["kind"])
def test_nothing_leaks_from_tiles_that_no_point_sees(network, order):
    """Neither of a level that has not joined yet nor of one with other tiles: finite values, gradients of zero."""
    options = FieldOptions(levels=[{"tile": 8, "network": NETWORKS[0]}, {"tile": 8, "network": network}])
    field = Field.build(options, (32, 32), 2, active={1: torch.tensor([5, 15])})
    points = torch.rand(9, 2, dtype=torch.float64) * 4
    with torch.no_grad():
        for parameter in field.levels[0].parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
        for parameter in field.levels[1].parameters():
            parameter.fill_(float("nan"))
    alone = field(points, order, active=1)
    field(points, order).rows.square().sum().backward()
    assert alone.rows.isfinite().all() and torch.equal(alone.rows, field(points, order).rows)
    assert all((p.grad is not None) and (p.grad == 0).all() for p in field.levels[1].parameters())
    joining = torch.autograd.grad(alone.rows.square().sum(), list(field.levels[1].parameters()))
    assert all((gradient == 0).all() for gradient in joining)
    assert all(p.grad.isfinite().all() for p in field.levels[0].parameters())
