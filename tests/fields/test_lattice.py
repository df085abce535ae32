"""A lattice keeps to the chunk, and reads no tile that does not see it."""

import pytest
import torch
from test_field import NETWORKS, random_field
from torch.utils._python_dispatch import TorchDispatchMode

from cpikan_hr.fields import Field
from cpikan_hr.fields.field import pixel_axis
from cpikan_hr.fields.lattice import add_lattice
from cpikan_hr.jets import row_count
from cpikan_hr.networks import Chebyshev2D
from cpikan_hr.recipe import FieldOptions

CHUNK = 1024


def spied_on(network, calls: list) -> None:
    """Notes jet rows x points of all tiles of every call."""
    network.register_forward_pre_hook(lambda module, arguments: calls.append(arguments[0].rows[..., 0].numel()))
    on_lattice = network.on_lattice

    def noted(y, x, origin, tiles):
        calls.append(y.rows[..., 0].numel() * x.rows.shape[2])
        return on_lattice(y, x, origin, tiles)

    network.on_lattice = noted


@pytest.mark.parametrize("order", ["value", "gradient", "laplacian", "hessian"])
@pytest.mark.parametrize("shape", [(90, 70), (3, 3000), (3000, 3), (1, 1)], ids=str)
@pytest.mark.parametrize("network", NETWORKS[:3], ids=lambda network: network["kind"])
def test_one_large_tile_is_evaluated_chunk_by_chunk(network, shape, order):
    options = FieldOptions(levels=[{"grid": [1, 1], "network": network}], chunk=CHUNK)
    field = Field.build(options, shape, 2, seed=1).double()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    ys, xs = (torch.arange(size, dtype=torch.float64) + 0.5 for size in shape)
    calls: list[int] = []
    spied_on(field.levels[0].network, calls)
    found = field.lattice(ys, xs, order)
    work = row_count(order, 2) * shape[0] * shape[1]
    assert max(calls) <= CHUNK and sum(calls) == work and len(calls) <= 4 * work / CHUNK + 1
    field.levels[0].chunk = 2**30
    calls.clear()
    whole = field.lattice(ys, xs, order)
    assert calls == [work] and (found - whole).norm() <= 1e-12 * whole.norm()


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor made, views of `known` left out."""

    def __init__(self, known: torch.Tensor):
        super().__init__()
        self.known, self.size = known.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        made = function(*arguments, **(options or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() != self.known:
                self.size = max(self.size, tensor.untyped_storage().nbytes() // tensor.element_size())
        return made


@pytest.mark.parametrize("order", ["value", "hessian"])
@pytest.mark.parametrize("shape", [(40, 900), (900, 40), (3, 4000), (4000, 3)], ids=str)
def test_the_temporaries_of_one_large_separable_tile_are_bounded(shape, order):
    options = FieldOptions(levels=[{"grid": [1, 1], "network": {"kind": "chebyshev2d", "degree": 15}}], chunk=CHUNK)
    (level,) = Field.build(options, shape, 1).double().levels
    with torch.no_grad():
        level.network.coefficients.normal_(generator=torch.Generator().manual_seed(0))
    ys, xs = (torch.arange(size, dtype=torch.float64) + 0.5 for size in shape)
    found = torch.zeros(row_count(order, 2), shape[0], 1, 2 * shape[1], dtype=torch.float64)
    whole = torch.zeros_like(found)
    with torch.no_grad(), Largest(found) as largest:
        add_lattice(level, found, ys, xs, order)
    assert largest.size <= max(6 * max(shape), 3 * CHUNK)  # windows of an axis, bases with two derivatives
    level.chunk = 2**30
    with torch.no_grad(), Largest(whole) as largest:
        add_lattice(level, whole, ys, xs, order)
    assert largest.size >= row_count(order, 2) * shape[0] * shape[1]
    assert (found - whole).norm() <= 1e-12 * whole.norm()


@pytest.mark.parametrize("overlap", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("spacing", [1.0, 0.23])
def test_tiles_larger_than_the_chunk_blend_as_points_do(overlap, spacing):
    levels = [{"grid": [2, 3], "overlap": overlap, "network": NETWORKS[1]}]
    field = Field.build(FieldOptions(levels=levels, chunk=CHUNK), (70, 150), 1, seed=1).double()
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    calls: list[int] = []
    spied_on(field.levels[0].network, calls)
    ys, xs = torch.arange(3, 60, spacing, dtype=torch.float64), torch.arange(10, 140, spacing, dtype=torch.float64)
    lattice = field.lattice(ys, xs, "laplacian")
    assert max(calls) <= CHUNK
    with torch.no_grad():
        points = field(torch.cartesian_prod(ys, xs), "laplacian").rows.unflatten(1, (len(ys), len(xs))).movedim(-1, 1)
    assert (points - lattice).norm() <= 1e-12 * lattice.norm()


@torch.no_grad()
def poison(field: Field, points: torch.Tensor) -> tuple[int, int]:
    """NaN in all parameters, means and scales of tiles that see none of the points; how many were hit and spared."""
    hit = spared = 0
    for level in field.levels:
        _, seen, _ = level.tile_grid.cover(points, "value")
        far = ~torch.isin(level.active_tiles, seen)
        hit, spared = hit + int(far.sum()), spared + int((~far).sum())
        for parameter in level.network.parameters():
            if getattr(level.network, "sparse", False):
                slots = torch.tensor([level.network.tile_of(k) for k in range(len(parameter))], dtype=torch.long)
                parameter[far[slots]] = float("nan")
            else:
                parameter[far] = float("nan")
        if level.per_tile:
            level.mean[far] = level.scale[far] = float("nan")
    return hit, spared


@pytest.mark.parametrize("chunk", [CHUNK, 2**20])
@pytest.mark.parametrize("region", [(10, 18, 60, 75), (0, 5, 0, 5), (35, 40, 140, 150), (20, 21, 0, 150)], ids=str)
def test_a_region_is_evaluated_without_touching_the_tiles_that_do_not_see_it(region, chunk):
    field = random_field("quintic", shape=(40, 150))
    for level in field.levels:
        level.chunk = chunk
    y0, y1, x0, x1 = region
    ys, xs = (torch.arange(*ends, 0.5, dtype=torch.float64) + 0.25 for ends in ((y0, y1), (x0, x1)))
    points = torch.cartesian_prod(ys, xs)
    lattice = field.lattice(ys, xs, "laplacian")
    hit, spared = poison(field, points)
    assert hit > spared > 0
    again = field.lattice(ys, xs, "laplacian")
    assert again.isfinite().all() and torch.equal(again, lattice)


def scattered_quadtree(shape: tuple[int, int]) -> Field:
    """Every leaf size with a random third of its tiles, each with a few random terms."""
    generator = torch.Generator().manual_seed(0)
    network = {"kind": "chebyshev2d", "degree": None, "sparse": True}
    field = Field.build(FieldOptions(levels=[{"tile": [16, 8, 4], "overlap": 0.5, "network": network}]), shape, 2)
    for level in field.levels:
        active = torch.nonzero(torch.rand(level.tile_grid.tiles, generator=generator) < 0.33)[:, 0]
        size = round(2 * level.tile_grid.axes[0].half)
        network = Chebyshev2D(len(active), 2, 2, degree=size - 1, sparse=True)
        values = torch.randn(6 * len(active), generator=generator)
        terms = torch.tensor([0, 1, size, size**2, size**2 + 1, size**2 + size])
        network.set_terms(torch.full((len(active),), 6), terms.repeat(len(active)), values)
        level.set_tiles(active, network, 2)
    return field.double()


@pytest.mark.parametrize("chunk", [CHUNK, 2**18])
@pytest.mark.parametrize("spacing", [0.5, 1.0, 3.7, 4.0, 16.0], ids="spacing {}".format)
@pytest.mark.parametrize("corner", [(0.5, 0.5), (37.5, 50.5)], ids=str)
def test_tiles_that_see_alike_and_tiles_that_do_not_agree_with_points(corner, spacing, chunk):
    field = scattered_quadtree((100, 140))
    for level in field.levels:
        level.chunk = chunk
    ends = zip(corner, (90, 140), strict=True)
    ys, xs = (torch.arange(*pair, spacing, dtype=torch.float64) for pair in ends)
    for order in ("value", "hessian"):
        lattice = field.lattice(ys, xs, order)
        with torch.no_grad():
            points = field(torch.cartesian_prod(ys, xs), order).rows.unflatten(1, (len(ys), len(xs))).movedim(-1, 1)
        assert (points - lattice).norm() <= 1e-12 * lattice.norm()


def test_tiles_that_see_alike_are_evaluated_together(monkeypatch):
    field = scattered_quadtree((400, 440))
    calls = []
    for level in field.levels:
        plain = level.network.lattice_coefficients
        monkeypatch.setattr(
            level.network, "lattice_coefficients", lambda slots, plain=plain: calls.append(slots) or plain(slots)
        )
    field.lattice(pixel_axis(64, 320), pixel_axis(64, 384))
    tiles = torch.cat(calls)
    assert len(tiles) > 2000 and len(calls) < 120
