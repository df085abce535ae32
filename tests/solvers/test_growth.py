"""Grown tiles: what is written is what was solved, ladders pay, targets are met, a quadtree beats uniform tiles."""

import math

import numpy as np
import pytest
import torch
from cases import GROWN, GROWN_SIREN, field_of, mean_square, natural, on_ranks, psnr, reader, recipe_of, rendered

from cpikan_hr.fields import TileGrid
from cpikan_hr.fields.field import grown_network
from cpikan_hr.networks import build_network
from cpikan_hr.processes import ALONE
from cpikan_hr.solvers import growth, start
from cpikan_hr.solvers.blocks import Block, blocks_of, read_block
from cpikan_hr.solvers.grown_networks import read, unit_of, write
from cpikan_hr.solvers.growth import Grown, growing_sizes, set_networks, tile_data, tile_windows
from cpikan_hr.solvers.leaves import Size
from cpikan_hr.solvers.start import fit_field
from cpikan_hr.solvers.units import features

both_kinds = pytest.mark.parametrize("network", [GROWN, GROWN_SIREN], ids=["cpikan", "siren"])


def level(tile, network=GROWN, overlap: float = 0.25) -> dict:
    return {"tile": tile, "overlap": overlap, "grow": True, "network": network}


def choice_of(levels: list[dict]):
    return recipe_of(levels).field.levels[0]


def random_pieces(unit, tiles: int, channels: int, most: int, seed: int = 0) -> dict:
    """Random networks of 0..most units, dealt to the tiles of one size in turn: what `grow` returns."""
    generator = torch.Generator().manual_seed(seed)
    pieces = {}
    for units in range(most + 1):
        numbers = torch.arange(units, tiles, most + 1)
        w = torch.randn(len(numbers), units, 1 + 2 * unit.degree, generator=generator) if units else None
        last = torch.randn(len(numbers), channels, units * unit.terms + 1, generator=generator)
        # In two parts, the later tiles first: as from two blocks.
        cut = len(numbers) // 2
        pieces[0, units] = [
            (numbers[part], None if w is None else w[part], last[part]) for part in (slice(cut, None), slice(cut))
        ]
    return pieces


def prediction(unit, size: Size, w, last) -> torch.Tensor:
    """The solver's own values [t, C, P] at the pixel centres of a support."""
    if w is None:
        return last.expand(-1, -1, size.pixels**2)
    return torch.bmm(last, features(unit, unit.inputs(size.pixels, size.pixels), w)[0])


@both_kinds
@pytest.mark.parametrize("overlap", [0.0, 0.5])
def test_written_networks_give_the_solver_s_values(network, overlap):
    """Through `Field.lattice`; with a blend, the windowed sum of the solver's values."""
    picture = np.zeros((24, 32, 2), np.float32)
    levels = [level(8, network, overlap)]
    field, unit = field_of(levels, picture), unit_of(choice_of(levels))
    field.spread.copy_(torch.tensor([3.0, 0.5]))
    pieces = random_pieces(unit, 12, 2, 4)
    set_networks(field, 0, choice_of(levels), pieces)
    sizes, grids, halo = growing_sizes(field, 0, choice_of(levels))
    size, block = sizes[0], Block(0, 0, 3, 4)
    windows = tile_windows(grids[0], size, block, size)
    expected = torch.zeros(2, 24 + 2 * halo, 32 + 2 * halo)
    for (_, _), parts in pieces.items():
        for numbers, w, last in parts:
            for number, values in zip(numbers.tolist(), prediction(unit, size, w, last), strict=True):
                y, x = 8 * (number // 4), 8 * (number % 4)
                one = values if windows is None else values * windows[number]
                expected[:, y : y + size.pixels, x : x + size.pixels] += one.view(2, size.pixels, size.pixels)
    expected = expected[:, halo : halo + 24, halo : halo + 32]
    centres = [torch.arange(n, dtype=torch.float64) + 0.5 for n in (24, 32)]
    found = field.lattice(*centres)[0]
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert np.abs(rendered(field, (24, 32)) - expected.permute(1, 2, 0).numpy()).max() < 1e-5 * expected.abs().max()
    units = sum(len(part[0]) * unit.parameters(h, 2) for (_, h), parts in pieces.items() for part in parts)
    assert field.count_parameters() == units


@both_kinds
def test_what_is_written_is_read_back(network):
    choice = choice_of([level(8, network)])
    unit, generator = unit_of(choice), torch.Generator().manual_seed(1)
    for units in (1, 3):
        built = build_network(tiles=5, in_features=2, out_features=2, **grown_network(choice, units))
        before = [part.clone() for part in read(built, unit)]
        w = torch.randn(2, units, 1 + 2 * unit.degree, generator=generator)
        last = torch.randn(2, 2, units * unit.terms + 1, generator=generator)
        write(built, unit, w, last, torch.tensor([3, 1]))
        for found, new, old in zip(read(built, unit), (w, last), before, strict=True):
            assert torch.allclose(found[[3, 1]], new, rtol=1e-6, atol=1e-7)
            assert torch.equal(found[[0, 2, 4]], old[[0, 2, 4]])


def test_windows_of_a_block_are_those_of_the_grid():
    grid = TileGrid.over((40, 50), stride=8, overlap=0.5)
    block, size = Block(1, 2, 2, 2), Size(0, 8, 12, (5, 7))
    windows = tile_windows(grid, size, block, Size(0, 16, 20, (3, 4)))  # two fine tiles to a coarse one
    for place, (ty, tx) in enumerate((y, x) for y in range(2, 6) for x in range(4, 8)):
        if ty >= 5 or tx >= 7:
            continue
        iy, ix = torch.meshgrid(*(torch.arange(12) + 8 * t - 2 + 0.5 for t in (ty, tx)), indexing="ij")
        points = torch.stack([iy.flatten(), ix.flatten()], -1).double()
        along_y, along_x = (grid.axes[a].windows(points[:, a], torch.tensor(t))[0] for a, t in ((0, ty), (1, tx)))
        assert torch.allclose(windows[place].double(), along_y * along_x, atol=1e-6)


def grown_block(picture: np.ndarray, levels: list[dict], price: float) -> Grown:
    choice, field = choice_of(levels), field_of(levels, picture)
    field.spread.fill_(float(picture.std()))
    shape = picture.shape[:2]
    (block,) = blocks_of(shape, levels[0]["tile"][0], growth.BLOCK)
    return growth.grow_block(field, 0, choice, reader(picture), shape, block, price)


@both_kinds
def test_more_units_fit_a_tile_better(network, monkeypatch):
    """Of the error alone: the prior, which counts as distortion, can outweigh what one more unit takes off."""
    monkeypatch.setattr(growth, "PRIOR", 0.0)
    grown = grown_block(natural("camera", side=64), [level([16, 8], network)], price=1.0)
    for ladder in grown.ladders:
        distortion = ladder.distortion
        tried = torch.isfinite(distortion)
        assert tried[:, 0].all() and tried[:, 2].any()
        assert (tried[:, :-1] | ~tried[:, 1:]).all()  # no rung without the one below
        pairs = tried[:, 1:]
        assert (distortion[:, 1:][pairs] <= distortion[:, :-1][pairs] * 1.001).all()
        assert distortion[:, 1][pairs[:, 0]].sum() < 0.8 * distortion[:, 0][pairs[:, 0]].sum()
        for units, rung in enumerate(ladder.rungs[1:], 1):
            one = ladder.weight if ladder.weight is None else ladder.weight[rung.tiles]
            fit = torch.bmm(rung.last, features(grown.unit, ladder.phi, rung.w, one)[0])
            error = (ladder.data[rung.tiles] - fit).square().sum((1, 2))
            assert torch.allclose(error, distortion[rung.tiles, units], rtol=1e-3, atol=1e-2)


def test_a_constant_is_the_weighted_mean_of_its_tile():
    picture = natural("camera", side=32)
    grown = grown_block(picture, [level([16, 8])], price=1e9)
    field = field_of([level([16, 8])], picture)
    sizes, grids, halo = growing_sizes(field, 0, choice_of([level([16, 8])]))
    pixels = read_block(field, 0, reader(picture), (32, 32), grown.block, 16, halo)
    for k, ladder in enumerate(grown.ladders):
        window, data = tile_windows(grids[k], sizes[k], grown.block, sizes[0]), tile_data(pixels, sizes[k])[:, 0]
        mean = (window * data).sum(1) / window.sum(1)
        assert torch.allclose(ladder.rungs[0].last[:, 0, 0], mean, rtol=1e-5)
        expected = (window * (data - mean[:, None]) ** 2).sum(1)
        assert torch.allclose(ladder.distortion[:, 0], expected, rtol=1e-3, atol=1e-2)


def test_the_leaves_at_a_price_are_a_partition_and_errors_bound_the_blend():
    picture = natural("camera", side=64)
    levels = [level([32, 16, 8])]
    grown = grown_block(picture, levels, price=200.0)
    previous = (-1.0, math.inf)
    for price in (200.0, 1000.0, 5000.0):
        leaves, _ = grown.leaves(price)
        cover = sum(np.kron(leaf.int().numpy(), np.ones((8 // len(leaf), 8 // len(leaf)))) for leaf in leaves)
        assert (cover == 1).all()
        error, parameters = grown.at(price)
        assert error >= previous[0] and parameters <= previous[1]
        previous = error, parameters
        field = field_of(levels, picture)
        field.spread.fill_(float(picture.std()))
        networks = grown.networks(price, lambda: None)
        set_networks(field, 0, choice_of(levels), {key: [piece] for key, piece in networks.items()})
        assert field.count_parameters() == parameters
        assert mean_square(rendered(field, (64, 64)), picture) <= error / 64**2 * 1.001


def solved(picture: np.ndarray, target: dict, levels: list[dict], **sections):
    field = field_of(levels, picture)
    recipe = recipe_of(levels, target=target, **sections)
    fit_field(field, reader(picture), picture.shape[:2], recipe, 255.0, ALONE)
    return field


@pytest.mark.parametrize(
    ("network", "wanted", "units"),
    [(GROWN, 26, 4), (GROWN, 32, 4), (GROWN, 32, 16), (GROWN_SIREN, 26, 4), (GROWN_SIREN, 29, 4)],
)
def test_grown_fields_meet_a_wanted_psnr(network, wanted, units):
    picture = natural("astronaut", 20, 180, 64)
    field = solved(picture, {"psnr": wanted}, [level([32, 16, 8], network | {"hidden": [units]})])
    reached = psnr(rendered(field, (64, 64)), picture)
    assert wanted <= reached + 1e-3 and reached < wanted + 0.5
    assert field.count_parameters() < picture.size


def test_of_an_error_and_parameters_the_scarcer_decides():
    picture = natural("astronaut", 20, 180, 64)
    enough = solved(picture, {"psnr": 32, "params_per_px": 0.5}, [level([32, 16, 8])])
    assert 32 <= psnr(rendered(enough, (64, 64)), picture) + 1e-3 < 32.5
    scarce = solved(picture, {"psnr": 32, "params_per_px": 0.1}, [level([32, 16, 8])])
    assert 0.09 <= scarce.count_parameters() / picture.size <= 0.1


def test_passes_end_where_no_unit_is_left_to_add(monkeypatch):
    """One unit per tile of 16 px cannot reach 45 dB: the second pass shows it."""
    passes = []
    monkeypatch.setattr(start, "grow", lambda *a: passes.append(a) or growth.grow(*a))
    solved(natural("camera", side=64), {"psnr": 45}, [level(16, GROWN | {"hidden": [1]}, overlap=0.125)])
    assert len(passes) == 2


@pytest.mark.parametrize("name", ["camera", "coffee"])
def test_a_quadtree_is_not_below_uniform_tiles_of_as_many_parameters(name):
    picture, target = natural(name, side=64), {"params_per_px": 0.25}
    adaptive = solved(picture, target, [level([32, 16, 8])])
    assert 0.9 * 0.25 <= adaptive.count_parameters() / picture.size <= 0.25
    reached = psnr(rendered(adaptive, (64, 64)), picture)
    for tile, overlap in ((16, 0.125), (8, 0.25)):
        uniform = solved(picture, target, [level(tile, overlap=overlap)])
        assert reached >= psnr(rendered(uniform, (64, 64)), picture)


def test_two_processes_grow_what_one_grows(monkeypatch):
    monkeypatch.setattr(growth, "BLOCK", 32 * 32)
    picture, levels = natural("camera", side=56), [level([16, 8])]
    recipe = recipe_of(levels, target={"psnr": 27})

    def fit(processes):
        field = field_of(levels, picture)
        fit_field(field, reader(picture), (56, 56), recipe, 255.0, processes)
        return field.state_dict()

    one, two = fit(ALONE), on_ranks(fit)
    for other in two:
        assert other.keys() == one.keys()
        assert all(torch.allclose(other[name], one[name], rtol=1e-5, atol=1e-6) for name in one)


def test_a_flat_picture_is_one_constant_per_coarsest_tile():
    picture = np.full((48, 64, 1), 77.0, np.float32)
    field = solved(picture, {"psnr": 40}, [level([32, 16])])
    assert field.count_parameters() == 4 and np.abs(rendered(field, (48, 64)) - 77).max() < 1e-3
