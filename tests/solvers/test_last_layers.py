"""Least squares of last layers against float64 lstsq of every tile on its own pixels."""

import numpy as np
import pytest
import torch
from cases import field_of, on_ranks, reader

from cpikan_hr.jets import seed
from cpikan_hr.processes import ALONE
from cpikan_hr.solvers.last_layer import fit_last_layers

SHAPE = (27, 34)
NETWORKS = {
    "sine": {"kind": "chebyshev2d", "degree": 4},
    "identity": {"kind": "chebyshev2d", "degree": 4, "input_map": "identity"},
    "cpikan": {"kind": "cpikan", "hidden": [4], "degree": 3},
    "deep": {"kind": "cpikan", "hidden": [4, 3], "degree": 2, "input_map": "sine"},
    "siren": {"kind": "siren", "hidden": [6], "first_omega": 3.0},
}
MAPS = {"sine": lambda x: np.sin(np.pi / 2 * x), "identity": lambda x: x}
TINY = 1e-9  # ridge


def data(channels: int = 2) -> np.ndarray:
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]] / 10
    planes = [50 + 20 * np.sin(x + 2 * y) + 5 * x * y, 3 * np.cos(x) - y**2, x - y]
    return np.stack(planes[:channels], -1) + np.random.default_rng(0).normal(size=(*SHAPE, channels))


def fitted(network: dict, level: dict, weight=None, processes=ALONE, picture=None):
    picture = data() if picture is None else picture
    field = field_of([{"network": network} | level], picture).double()
    fit_last_layers(field, 0, reader(picture, weight), SHAPE, TINY, processes)
    return field


def pixels_of_tile(grid, tile: int):
    """Mirrored pixel numbers and local coordinates of a tile's support, per axis."""
    out = []
    for axis, number, size in zip(grid.axes, np.unravel_index(tile, grid.shape), SHAPE, strict=True):
        centre = axis.origin + (number + 0.5) * axis.stride
        inside = [k for k in range(-size, 2 * size) if abs(k + 0.5 - centre) <= axis.half + 1e-9]
        folded = np.pad(np.arange(size), size, "symmetric")[np.array(inside) + size]
        out.append((folded, (np.array(inside) + 0.5 - centre) / axis.half))
    return out


def design(network: dict, level, tile: int, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """[Py Px, K] of the last layer's functions."""
    if network["kind"] == "chebyshev2d":
        axes = [MAPS[network.get("input_map", "sine")](axis) for axis in (y, x)]
        by, bx = (np.polynomial.chebyshev.chebvander(axis, network["degree"]) for axis in axes)
        return np.einsum("ym,xn->yxmn", by, bx).reshape(len(y) * len(x), -1)
    points = torch.from_numpy(np.stack(np.meshgrid(y, x, indexing="ij"), -1).reshape(1, -1, 2))
    with torch.no_grad():
        return level.network.features(points, torch.tensor([tile]))[0].numpy()


def least_squares(a: np.ndarray, values: np.ndarray, square: np.ndarray, centre: bool) -> np.ndarray:
    """Predictions at the rows of `a`; the ridge as further rows, on what deviates from the weighted mean."""
    mean = (square**2 * values).sum(0) / (square**2).sum() if centre else 0.0
    ridge = np.sqrt(TINY * np.mean(np.sum((square * a) ** 2, 0))) * np.eye(a.shape[1])
    rows = np.concatenate([square * (values - mean), np.zeros((a.shape[1], values.shape[1]))])
    return mean + a @ np.linalg.lstsq(np.concatenate([square * a, ridge]), rows, rcond=None)[0]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("overlap", [0.0, 0.5])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_tile_is_the_least_squares_of_its_pixels(name, overlap, masked):
    network, picture = NETWORKS[name], data()
    weight = np.ones(SHAPE, np.float32)
    if masked:
        weight[np.random.default_rng(1).uniform(size=SHAPE) < 0.3] = 0
        weight[9:11] = 0.25  # known, but less
    spoilt = np.where(weight[..., None] > 0, picture, 1e7)
    field = fitted(network, {"tile": 9, "overlap": overlap}, weight, picture=spoilt)
    (level,) = field.levels
    for tile in range(level.tile_grid.tiles):
        (iy, y), (ix, x) = pixels_of_tile(level.tile_grid, tile)
        part, square = np.ix_(iy, ix), np.sqrt(weight[np.ix_(iy, ix)].reshape(-1, 1).astype(np.float64))
        a = design(network, level, tile, y, x)
        values = picture[part].reshape(len(a), -1)
        expected = least_squares(a, values, square, centre=network["kind"] != "chebyshev2d")
        points = torch.from_numpy(np.stack(np.meshgrid(y, x, indexing="ij"), -1).reshape(1, -1, 2))
        slot = torch.tensor([tile])
        with torch.no_grad():
            found = level.normalised(level.network(seed(points, "value"), slot), slot).value[0].numpy()
        scale = np.abs(values[square[:, 0] > 0]).max()
        error = np.abs((found - expected) * (square > 0)).max()
        assert error < 1e-6 * scale


@pytest.mark.parametrize("name", ["sine", "cpikan"])
def test_one_tile_over_the_whole_picture(name):
    network, picture = NETWORKS[name], data(1)
    field = fitted(network, {"grid": [1, 1]}, picture=picture)
    level = field.levels[0]
    y, x = ((np.arange(n) + 0.5) * 2 / n - 1 for n in SHAPE)
    a = design(network, level, 0, y, x)
    expected = least_squares(a, picture.reshape(-1, 1), np.ones((len(a), 1)), centre=name == "cpikan")
    ys, xs = (torch.arange(n, dtype=torch.float64) + 0.5 for n in SHAPE)
    assert np.abs(field.lattice(ys, xs)[0, 0].numpy().ravel() - expected[:, 0]).max() < 1e-6 * np.abs(picture).max()


@pytest.mark.parametrize("shape", [(100, 300), (300, 100), (140, 390), (390, 140)])
@pytest.mark.parametrize("group", [0, 1])
def test_large_tiles_are_fitted_on_a_lattice_whatever_their_sides(shape, group):
    """A polynomial of the level's degree is found exactly, from some of the pixels; alone and below another level."""
    y, x = (np.linspace(-1, 1, n) for n in shape)
    picture = (3 + y[:, None] ** 3 - 2 * x**2 * y[:, None] + 5 * x)[..., None]
    level = {"grid": [1, 1], "network": NETWORKS["identity"]}
    above = {"grid": [2, 1], "overlap": 0.5, "network": {"kind": "chebyshev2d", "degree": 1, "input_map": "identity"}}
    field = field_of([above, level][1 - group :], picture).double()
    with torch.no_grad():
        for parameter in field.levels[0].parameters():
            parameter.fill_(0.1 * group)
    counts = []

    def read(y0: int, y1: int, x0: int, x1: int, stride: int):
        counts.append(picture[y0:y1:stride, x0:x1:stride].size)
        return reader(picture + above_at)(y0, y1, x0, x1, stride)

    ys, xs = (torch.arange(n, dtype=torch.float64) + 0.5 for n in shape)
    above_at = field.lattice(ys, xs, groups=1)[0].permute(1, 2, 0).numpy() if group else 0.0
    fit_last_layers(field, group, read, shape, TINY, ALONE)
    found = field.lattice(ys, xs)[0].permute(1, 2, 0).numpy() - above_at
    assert np.abs(found - picture).max() < 1e-5
    assert max(counts) <= 128 * 400


def test_a_second_level_fits_what_the_first_leaves():
    picture = data(1)
    levels = [{"grid": [1, 1], "network": NETWORKS["sine"]}]
    levels += [{"tile": 9, "overlap": 0.0, "network": NETWORKS["identity"]}]
    field = field_of(levels, picture).double()
    ys, xs = (torch.arange(n, dtype=torch.float64) + 0.5 for n in SHAPE)
    errors = []
    for group in range(2):
        fit_last_layers(field, group, reader(picture), SHAPE, TINY, ALONE)
        errors.append(np.mean((field.lattice(ys, xs, groups=group + 1)[0, 0].numpy() - picture[..., 0]) ** 2))
    assert errors[1] < 0.5 * errors[0] and errors[1] < 1.0


@pytest.mark.parametrize("name", ["sine", "cpikan"])
def test_a_tile_without_known_pixels_stays_finite(name):
    weight = np.ones(SHAPE, np.float32)
    weight[:10, :10] = 0
    field = fitted(NETWORKS[name], {"tile": 9, "overlap": 0.0}, weight)
    assert all(bool(torch.isfinite(p).all()) for p in field.parameters())


@pytest.mark.parametrize("name", ["sine", "cpikan"])
def test_rows_shared_by_processes_are_those_of_one(name):
    level = {"tile": 9, "overlap": 0.5}
    one = fitted(NETWORKS[name], level).state_dict()
    for other in on_ranks(lambda processes: fitted(NETWORKS[name], level, processes=processes).state_dict(), 2):
        assert all(torch.equal(other[key], one[key]) for key in one)
