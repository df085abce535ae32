"""Blocks: every tile once, the halo mirrored, the levels above subtracted, unknown pixels filled between the known."""

import numpy as np
import pytest
import torch
from cases import SPARSE, field_of, reader, rendered
from hypothesis import given, settings
from hypothesis import strategies as st

from cpikan_hr.data.windows import mirrored
from cpikan_hr.solvers.blocks import Block, blocks_of, fill, read_block, shares_of


@pytest.mark.parametrize("size", [1, 2, 5, 16])
@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 3), (7, 20), (40, 40)])
def test_mirrored_indices_are_those_of_a_symmetric_pad(size, before, after):
    assert np.array_equal(mirrored(-before, size + after, size), np.pad(np.arange(size), (before, after), "symmetric"))


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    stride=st.integers(2, 64),
    pixels=st.integers(1, 2**15),
    shares=st.integers(1, 3),
)
def test_every_coarsest_tile_is_in_one_block_of_one_share(shape, stride, pixels, shares):
    rows, columns = -(-shape[0] // stride), -(-shape[1] // stride)
    seen = np.zeros((rows, columns), int)
    blocks = blocks_of(shape, stride, pixels)
    numbers = []
    for share in range(shares):
        for number, block in shares_of(blocks, share, shares):
            assert blocks[number] is block
            assert block.row + block.rows <= rows and block.column + block.columns <= columns
            assert block.rows * block.columns == 1 or block.rows * block.columns * stride**2 <= pixels
            seen[block.row : block.row + block.rows, block.column : block.column + block.columns] += 1
            numbers.append(number)
    assert (seen == 1).all() and sorted(numbers) == list(range(len(blocks)))


def two_levels(picture: np.ndarray):
    """A float64 field of random values, whose channels are turned; the second level is the constants of a quadtree."""
    levels = [{"grid": [2, 1], "overlap": 0.5, "network": {"kind": "chebyshev2d", "degree": 3}}]
    field = field_of([*levels, {"tile": 8, "overlap": 0.5, "network": SPARSE}], picture).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        field.mix.copy_(torch.tensor([[0.6, 0.8], [-0.8, 0.6]]))
    return field


@pytest.mark.parametrize("block", [Block(0, 0, 3, 4), Block(1, 2, 1, 2), Block(2, 0, 1, 1), Block(0, 3, 1, 1)])
@pytest.mark.parametrize("group", [0, 1])
def test_a_block_is_the_mirrored_residual_in_the_field_s_channels(block, group):
    picture = np.random.default_rng(1).normal(size=(21, 30, 2))
    noise = np.random.default_rng(2).uniform(1, 2, size=(21, 30))
    field, halo, stride = two_levels(picture), 2, 8
    pixels = read_block(field, group, reader(picture, noise=noise), picture.shape[:2], block, stride, halo)
    residual = picture - rendered(field, (21, 30), group) if group else picture
    whole = np.pad(residual @ field.mix.numpy().T, ((8, 16), (8, 16), (0, 0)), "symmetric")
    y, x = block.row * stride - halo + 8, block.column * stride - halo + 8
    part = (slice(y, y + block.rows * stride + 2 * halo), slice(x, x + block.columns * stride + 2 * halo))
    assert pixels.known is None
    assert np.abs(pixels.values.numpy() - whole[part].transpose(2, 0, 1)).max() < 1e-12
    assert np.abs(pixels.noise.numpy() - np.pad(noise, ((8, 16), (8, 16)), "symmetric")[part]).max() < 1e-6


def test_unknown_pixels_of_a_block_are_told_and_filled():
    picture = np.random.default_rng(1).normal(size=(21, 30, 1)).astype(np.float32)
    known = (np.random.default_rng(3).uniform(size=(21, 30)) > 0.4).astype(np.float32)
    spoilt = np.where(known[..., None] > 0, picture, 1e9).astype(np.float32)
    field = field_of([{"tile": 8, "network": SPARSE, "overlap": 0.5}], picture)
    pixels = read_block(field, 0, reader(spoilt, known), (21, 30), Block(0, 0, 3, 4), 8, 2)
    pad = ((2, 24 + 2 - 21), (2, 32 + 2 - 30))
    expected = np.pad(known > 0, pad, "symmetric")
    assert np.array_equal(pixels.known.numpy(), expected)
    values = pixels.values[0].numpy()
    assert np.array_equal(values[expected], np.pad(picture[..., 0], pad, "symmetric")[expected])
    assert np.abs(values).max() <= np.abs(picture[known > 0]).max() + 1e-6


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 40)),
    share=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_fill_keeps_the_known_and_stays_between_their_extremes(shape, share, seed):
    rng = np.random.default_rng(seed)
    values, known = rng.normal(size=shape).astype(np.float32), rng.uniform(size=shape[1:]) < share
    filled = fill(np.where(known, values, np.nan), known)
    assert filled.shape == shape and np.isfinite(filled).all()
    assert np.array_equal(filled[:, known], values[:, known])
    if not known.any():
        assert not filled.any()
        return
    for plane, original in zip(filled, values, strict=True):
        assert original[known].min() - 1e-5 <= plane.min() and plane.max() <= original[known].max() + 1e-5


def test_fill_continues_a_constant():
    known = np.zeros((37, 23), bool)
    known[5, 7] = True
    assert np.array_equal(fill(np.full((1, 37, 23), 3.0, np.float32), known), np.full((1, 37, 23), 3.0, np.float32))
