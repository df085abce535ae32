"""Least squares of each tile's linear (last or only) layer: the start of levels that are not adaptive.

Every tile is fitted, on its own pixels, to what the levels above it leave of a direct estimate of the field, then,
where asked, with its hidden layers by Gauss-Newton; the windows, which sum to one, blend the fits. Rows of tiles are
shared out over processes and their threads; each holds a strip of one row of tiles at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cpikan_hr.fields import Field, Level
from cpikan_hr.fields.tiles import TileAxis
from cpikan_hr.networks import Chebyshev2D
from cpikan_hr.parallel import in_threads
from cpikan_hr.processes import Processes
from cpikan_hr.solvers.blocks import ReadTarget
from cpikan_hr.solvers.deep_tiles import DeepTiles, write
from cpikan_hr.solvers.gauss_newton import levenberg_marquardt

SAMPLES = 128  # per axis and tile at most: larger tiles are fitted on a lattice of their pixels
BLOCK = 2**20  # pixels of one strip handled at once


@dataclass(frozen=True)
class Pixels:
    """The pixels of one axis that the tiles of a row or column are fitted on."""

    low: int  # first pixel read
    high: int  # past the last
    index: np.ndarray  # int64 [t, P]: which of the pixels read
    inside: np.ndarray  # bool [t, P]
    local: Tensor  # float64 [t, P]


def strides_of(axes: tuple[TileAxis, ...]) -> tuple[list[int], int]:
    """Pixels from one sample to the next along y and x, multiples of the third: from one pixel read to the next."""
    strides = [max(1, -int(-2 * axis.half // SAMPLES)) for axis in axes]
    read = min(strides)
    return [stride // read * read for stride in strides], read


def pixels_of(axis: TileAxis, tiles: np.ndarray, size: int, stride: int, read: int) -> Pixels:
    """Pixel centres inside the supports of tiles; those beyond the frame are mirrored back into it."""
    centre = axis.centre(torch.from_numpy(tiles)).numpy()
    first = np.ceil(centre - axis.half - 0.5 - 1e-9).astype(np.int64)
    last = np.floor(centre + axis.half - 0.5 + 1e-9).astype(np.int64)
    position = first[:, None] + stride * np.arange((last - first).max() // stride + 1)
    local = (position + 0.5 - centre[:, None]) / axis.half
    inside = np.abs(local) <= 1 + 1e-9
    if stride == 1:
        period = 2 * size
        folded = position % period
        folded = np.where(folded >= size, period - 1 - folded, folded)
    else:  # a mirrored lattice would not be one: leave pixels beyond the frame out
        inside &= (position >= 0) & (position < size)
        folded = np.where(inside, position, position[inside].min())
    low, high = int(folded.min()), int(folded.max()) + 1
    return Pixels(low, high, (folded - low) // read, inside, torch.from_numpy(local))


def fit_last_layers(
    field: Field,
    group: int,
    target: ReadTarget,
    shape: tuple[int, int],
    ridge: float,
    processes: Processes,
    progress: Callable[[float], None] | None = None,
    iterations: int = 0,
) -> None:
    """Fits the recipe's level number `group`, one grid of tiles, in place and alike on all processes.

    `iterations` of Gauss-Newton for the hidden layers of each tile.
    """
    (number,) = field.groups[group]
    level = field.levels[number]
    owned = torch.zeros(level.tile_grid.tiles, dtype=torch.bool)
    rows = range(processes.rank, level.tile_grid.shape[0], processes.ranks)

    def fit(row: int) -> list[Tensor]:
        return list(fit_row(field, group, row, target, shape, ridge, iterations))

    with closing(in_threads(fit, rows, field.device)) as fitted:
        for done, parts in enumerate(fitted):
            owned[torch.cat(parts)] = True
            if progress:
                progress((done + 1) / len(rows))
    for tensor in [*level.network.parameters(), *([level.mean, level.scale] if level.per_tile else [])]:
        tensor.data[~owned.to(tensor.device)] = 0  # tiles of other shares: theirs is the only term of the sum
        processes.sum(tensor.data)


@torch.no_grad()
def fit_row(
    field: Field, group: int, row: int, target: ReadTarget, shape: tuple[int, int], ridge: float, iterations: int = 0
) -> Iterator[Tensor]:
    """Fits one row of tiles of a level; yields the tiles done."""
    level: Level = field.levels[field.groups[group][0]]
    columns = np.arange(level.tile_grid.shape[1])
    for patch in read_row(field, group, level, row, columns, target, shape):
        fit_tiles(level, patch.tiles, patch.left.double(), patch.weight, patch.y, patch.x, ridge, iterations)
        yield patch.tiles.cpu()


@dataclass(frozen=True)
class Patches:
    """Some tiles of a row: what other levels leave of the data `left` [t, Py, Px, C], weights [t, Py, Px] in float64.

    Local coordinates y [t, Py], x [t, Px] in float64.
    """

    tiles: Tensor
    left: Tensor
    weight: Tensor
    y: Tensor
    x: Tensor


def read_row(
    field: Field, groups: int, level: Level, row: int, columns: np.ndarray, target: ReadTarget, shape: tuple[int, int]
) -> Iterator[Patches]:
    """Tiles of a level in this row and these columns, less what the first `groups` levels of the recipe give there."""
    axis_y, axis_x = level.tile_grid.axes
    device = field.device
    (stride_y, stride_x), read = strides_of((axis_y, axis_x))
    along_y = pixels_of(axis_y, np.array([row]), shape[0], stride_y, read)
    for part in column_parts(axis_x, along_y, stride_x, columns):
        along_x = pixels_of(axis_x, part, shape[1], stride_x, read)
        values, weight, _ = target(along_y.low, along_y.high, along_x.low, along_x.high, read)
        left = torch.from_numpy(values).to(device)
        if groups:
            given = field.pixels(along_y.low, along_y.high, along_x.low, along_x.high, groups, read)
            left = left - given.movedim(0, -1)
        left = left @ field.mix.T
        pick = (along_y.index[0][:, None], along_x.index[:, None, :])  # [Py, 1] and [t, 1, Px]: patches [t, Py, Px]
        inside = along_y.inside[0][:, None] & along_x.inside[:, None, :]
        tiles = torch.from_numpy(row * axis_x.count + part).to(device)
        y = along_y.local.to(device).expand(len(tiles), -1)
        weight = torch.from_numpy(weight[pick] * inside).to(device).double()
        yield Patches(tiles, left[pick], weight, y, along_x.local.to(device))


def lattice_points(y: Tensor, x: Tensor) -> Tensor:
    """The products [t, Py Px, 2] of coordinates y [t, Py] and x [t, Px]."""
    height, width = y.shape[1], x.shape[1]
    return torch.stack([y[:, :, None].expand(-1, -1, width), x[:, None].expand(-1, height, -1)], dim=-1).flatten(1, 2)


def column_parts(axis: TileAxis, rows: Pixels, stride: int, columns: np.ndarray) -> Iterator[np.ndarray]:
    """Some tiles of a row in parts: one at a time on a lattice of its own, else as many as make a block."""
    if stride > 1:
        count = 1
    else:
        count = max(1, int(BLOCK / (rows.index.shape[1] * 2 * axis.half)))
    for start in range(0, len(columns), count):
        yield columns[start : start + count]


def fit_tiles(
    level: Level,
    tiles: Tensor,
    values: Tensor,
    weight: Tensor,
    local_y: Tensor,
    local_x: Tensor,
    ridge: float,
    iterations: int = 0,
) -> None:
    """Least squares of tiles [t] to values [t, Py, Px, C] with weights [t, Py, Px], on local coordinates [t, P]."""
    network = level.network
    if isinstance(network, Chebyshev2D):
        normalised = values / level.scale.double()
        whole = (weight.flatten(1) == weight.flatten(1)[:, :1]).all(1) & (weight[:, 0, 0] > 0)
        for some, fit in ((whole, _project), (~whole, _solve_tensor)):
            if some.any():
                dense = fit(network, normalised[some], weight[some], local_y[some], local_x[some], ridge)
                network.set_last(tiles[some], dense.flatten(2).transpose(1, 2))
        return
    total = weight.sum((1, 2)).clamp_min(1e-12)
    mean = (values * weight[..., None]).sum((1, 2)) / total[:, None]
    centred = (values - mean[:, None, None]) * (weight > 0)[..., None]
    scale = ((centred.square() * weight[..., None]).sum((1, 2)) / total[:, None]).sqrt()
    scale = torch.where(scale > 1e-6, scale, torch.ones_like(scale))
    level.mean[tiles], level.scale[tiles] = mean.to(level.mean), scale.to(level.scale)
    normalised = centred / scale[:, None, None]
    height, width = values.shape[1:3]
    points = lattice_points(local_y, local_x)
    for part in torch.split(torch.arange(len(tiles), device=tiles.device), max(1, BLOCK // (height * width * 16))):
        features = network.features(points[part].to(level.mean.dtype), tiles[part]).double()
        solution = solve(features, normalised[part].flatten(1, 2), weight[part].flatten(1), ridge)
        network.set_last(tiles[part], solution)
    fit = DeepTiles(network.pick(tiles).float(), points.float())
    w = fit.read()
    if iterations and w.numel():
        root = weight.flatten(1).sqrt().float()
        data = normalised.flatten(1, 2).transpose(1, 2).float() * root[:, None]
        w, last, _ = levenberg_marquardt(fit, data, w, iterations, root)
        write(network, tiles, w, last)


def _project(network, values, weight, local_y, local_x, ridge) -> Tensor:
    """Separable least squares of whole tiles: coefficients [t, C, M, N]."""
    inverse_y = torch.linalg.pinv(network.basis(local_y, 0, "value")[:, 0])
    inverse_x = torch.linalg.pinv(network.basis(local_x, 1, "value")[:, 0])
    return torch.einsum("tmy,tyxc,tnx->tcmn", inverse_y, values, inverse_x)


def _solve_tensor(network, values, weight, local_y, local_x, ridge) -> Tensor:
    """The same for tiles with pixels missing: normal equations of the tensor products."""
    basis_y = network.basis(local_y, 0, "value")[:, 0]
    basis_x = network.basis(local_x, 1, "value")[:, 0]
    features = torch.einsum("tym,txn->tyxmn", basis_y, basis_x).flatten(3).flatten(1, 2)
    solution = solve(features, values.flatten(1, 2), weight.flatten(1), ridge)
    return solution.transpose(1, 2).unflatten(2, (basis_y.shape[-1], basis_x.shape[-1]))


def solve(features: Tensor, values: Tensor, weight: Tensor, ridge: float) -> Tensor:
    """Weighted ridge regression, batched: features [t, P, K], values [t, P, C], weight [t, P]; solution [t, K, C]."""
    weighted = features * weight[..., None]
    gram = features.transpose(1, 2) @ weighted
    trace = gram.diagonal(dim1=1, dim2=2).mean(-1).clamp_min(1e-12)
    gram = gram + torch.diag_embed((ridge * trace)[:, None].expand(-1, gram.shape[-1]))
    factor = torch.linalg.cholesky(gram)
    return torch.cholesky_solve(weighted.transpose(1, 2) @ values, factor)
