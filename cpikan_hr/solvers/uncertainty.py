"""How far a field is from the truth, per pixel: the risk of the averaged quadtrees times one factor that is measured.

Averaging over shifts and the choice of terms after it lower the risk of a single quadtree by a factor that depends on
the surface. It is found by a parametric bootstrap (Efron and Tibshirani 1993): on a sample of blocks the field is taken
for the truth, noise as large as the data's is added, the block is solved again, and the factor is the one that puts
68.27 % of the errors inside one standard deviation.
"""

from contextlib import closing

import numpy as np
import torch
from torch import Tensor

from cpikan_hr.fields import Field
from cpikan_hr.parallel import in_threads
from cpikan_hr.recipe import StartOptions
from cpikan_hr.solvers.averaging import add_quadtree, read_averaged
from cpikan_hr.solvers.blocks import Block, Pixels, ReadTarget, read_block, sampled_blocks
from cpikan_hr.solvers.leaves import Size, sizes_of
from cpikan_hr.solvers.texture import Texture

ONE_SIGMA = 0.6827  # part of a normal distribution within one standard deviation
SAMPLED = 2**18  # pixels solved again
PLACES = 16  # in so many places


def calibrate(
    field: Field, group: int, target: ReadTarget, shape: tuple[int, int], start: StartOptions,
    texture: Texture | None = None,
) -> float:  # fmt: skip
    """The factor from sqrt(risk) to one standard deviation; the same on all processes. 1 where nothing is known."""
    stride = sizes_of(field, group)[0][0].stride
    blocks = sampled_blocks(shape, stride, SAMPLED, PLACES)

    def ratios_of(numbered: tuple[int, Block]) -> np.ndarray:
        return _ratios(field, group, target, shape, numbered[1], start, numbered[0], texture)

    with closing(in_threads(ratios_of, blocks, field.device)) as solved:
        ratios = np.concatenate(list(solved))
    return float(np.quantile(ratios, ONE_SIGMA)) if len(ratios) else 1.0


@torch.no_grad()
def standard_deviation(
    field: Field, group: int, target: ReadTarget, shape: tuple[int, int], window: tuple[int, int, int, int],
    start: StartOptions, factor: float, texture: Texture | None = None,
) -> np.ndarray:  # fmt: skip
    """Per pixel of the window (y0, y1, x0, x1), float32 [h, w], in the field's unit; NaN where nothing is known."""
    sizes, halo = sizes_of(field, group)
    stride = sizes[0].stride
    y0, y1, x0, x1 = window
    row, column = y0 // stride, x0 // stride
    block = Block(row, column, -(-y1 // stride) - row, -(-x1 // stride) - column)
    averaged = read_averaged(field, group, target, shape, block, sizes, halo, start, texture)
    risk = averaged.risk
    if averaged.pixels.known is not None:
        risk = torch.where(averaged.pixels.known, risk, torch.nan)
    top, left = y0 - row * stride + halo, x0 - column * stride + halo
    return factor * risk[top : top + y1 - y0, left : left + x1 - x0].sqrt().cpu().numpy()


@torch.no_grad()
def _ratios(
    field: Field, group: int, target: ReadTarget, shape: tuple[int, int], block: Block, start: StartOptions, seed: int,
    texture: Texture | None,
) -> np.ndarray:  # fmt: skip
    """|error| / sqrt(risk) of the known pixels of a block whose truth is the field itself.

    The risk is that of the data, which is what the factor is for. Only a field that lacks the fine part of its texture
    errs so much less than the surface that its own, lower risk says more.
    """
    sizes, halo = sizes_of(field, group)
    window = field.levels[sizes[0].level].tile_grid.axes[0].window
    rng = np.random.default_rng([seed, 0])

    def simulated(y0: int, y1: int, x0: int, x1: int, stride: int, noisy: bool = True) -> tuple:
        _, weight, noise = target(y0, y1, x0, x1, stride)
        values = field.pixels(y0, y1, x0, x1, stride=stride).permute(1, 2, 0).cpu().numpy()
        if noisy:
            values = values + noise[..., None] * rng.standard_normal(values.shape, np.float32)
        return values, weight, noise

    def exact(*where: int) -> tuple:
        return simulated(*where, noisy=False)

    solved = read_averaged(field, group, simulated, shape, block, sizes, halo, start, texture)
    again = _encoded(solved.pixels, sizes, halo, start.threshold, window)
    truth = read_block(field, group, exact, shape, block, sizes[0].stride, halo).values
    risk = solved.risk
    if texture is None:
        risk = read_averaged(field, group, target, shape, block, sizes, halo, start).risk
    ratio = (again - truth).abs() / risk.sqrt()
    if solved.pixels.known is not None:
        ratio = torch.where(solved.pixels.known, ratio, torch.nan)
    height, width = ratio.shape[1] - 2 * halo, ratio.shape[2] - 2 * halo
    core = ratio[:, halo : halo + height, halo : halo + width].flatten()
    return core[core.isfinite()].cpu().numpy()


def _encoded(pixels: Pixels, sizes: list[Size], halo: int, sigmas: float, window: str) -> Tensor:
    """The block [C, h, w] as the field holds it (its outermost pixels, 2 x halo, lack their neighbours)."""
    channels, height, width = pixels.values.shape
    sums = pixels.values.new_zeros(channels + 2, height, width)
    add_quadtree(sums, (0, 0), pixels, sizes, halo, sigmas, window, plain=True)
    return sums[:-2] / sums[-1].clamp_min(1e-6)
