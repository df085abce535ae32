"""The closed-form start: each level's linear layer by least squares per tile, coarse to fine.

Every tile is fitted, on its own pixels, to what the levels above it leave of a direct estimate of the field; the
windows, which sum to one, blend the fits. Rows of tiles are shared out over processes. Only a strip of one row of
tiles is in memory at a time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cpikan_hr.fields import Field, Level
from cpikan_hr.fields.tiles import TileAxis
from cpikan_hr.networks import Chebyshev2D
from cpikan_hr.recipe import StartOptions

SAMPLES = 128  # per axis and tile at most: larger tiles are fitted on a lattice of their pixels
BLOCK = 2**22  # pixels of one strip handled at once

ReadTarget = Callable[[int, int, int, int, int], tuple]  # y0, y1, x0, x1, stride -> values, weight, noise


@dataclass(frozen=True)
class Pixels:
    """The pixels of one axis that the tiles of a row or column are fitted on."""

    low: int  # first pixel read
    high: int  # past the last
    stride: int
    index: np.ndarray  # int64 [t, P]: which of the pixels read
    inside: np.ndarray  # bool [t, P]
    local: Tensor  # float64 [t, P]


def pixels_of(axis: TileAxis, tiles: np.ndarray, size: int) -> Pixels:
    """Pixel centres inside the supports of tiles; those beyond the frame are mirrored back into it."""
    centre = axis.centre(torch.from_numpy(tiles)).numpy()
    stride = max(1, -int(-2 * axis.half // SAMPLES))
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
    return Pixels(low, high, stride, (folded - low) // stride, inside, torch.from_numpy(local))


def fit_field(field: Field, target: ReadTarget, shape: tuple[int, int], options: StartOptions, share: int = 0,
              shares: int = 1, reduce: Callable[[Tensor], None] | None = None,
              progress: Callable[[str, float], None] | None = None) -> None:
    """Fits all levels in place. `reduce` sums a tensor over the processes that hold the other shares."""
    for number, level in enumerate(field.levels):
        owned = torch.zeros(level.tile_grid.tiles, dtype=torch.bool)
        rows = range(share, level.tile_grid.shape[0], shares)
        for done, row in enumerate(rows):
            for tiles in fit_row(field, number, row, target, shape, options):
                owned[tiles] = True
            if progress:
                progress(f"start, level {number + 1} of {len(field.levels)}", (done + 1) / len(rows))
        if reduce is not None:
            for tensor in [*level.parameters(), *level.buffers()]:
                tensor.data[~owned.to(tensor.device)] = 0  # tiles of other shares: theirs is the only term of the sum
                reduce(tensor.data)


@torch.no_grad()
def fit_row(field: Field, number: int, row: int, target: ReadTarget, shape: tuple[int, int],
            options: StartOptions) -> Iterator[Tensor]:
    """Fits one row of tiles of a level; yields the tiles done."""
    level: Level = field.levels[number]
    axis_y, axis_x = level.tile_grid.axes
    device = level.mean.device
    rows = pixels_of(axis_y, np.array([row]), shape[0])
    for columns_part in _column_parts(axis_x, rows, shape[1]):
        columns = pixels_of(axis_x, columns_part, shape[1])
        values, weight, noise = target(rows.low, rows.high, columns.low, columns.high, rows.stride)
        residual = torch.from_numpy(values).to(device)
        if number:
            ys = torch.arange(rows.low, rows.high, rows.stride, dtype=torch.float64, device=device) + 0.5
            xs = torch.arange(columns.low, columns.high, columns.stride, dtype=torch.float64, device=device) + 0.5
            residual = residual - field.grid(ys, xs, levels=number)[0]
        pick = (rows.index[0][:, None], columns.index[:, None, :])  # [Py, 1] and [t, 1, Px]: blocks [t, Py, Px]
        inside = rows.inside[0][:, None] & columns.inside[:, None, :]
        block_weight = torch.from_numpy(weight[pick] * inside).to(device).double()
        block_noise = None if noise is None else torch.from_numpy(noise[pick]).to(device).double()
        tiles = torch.from_numpy(row * axis_x.count + columns_part).to(device)
        local_y = rows.local.to(device).expand(len(tiles), -1)
        fit_tiles(level, tiles, residual[pick].double(), block_weight, block_noise, local_y, columns.local.to(device), options)
        yield tiles.cpu()


def _column_parts(axis: TileAxis, rows: Pixels, width: int) -> Iterator[np.ndarray]:
    """Consecutive tiles of a row: one at a time on a lattice of its own, else as many as make a block."""
    if max(1, -int(-2 * axis.half // SAMPLES)) > 1:
        count = 1
    else:
        count = max(1, int(BLOCK / (rows.index.shape[1] * 2 * axis.half)))
    for start in range(0, axis.count, count):
        yield np.arange(start, min(start + count, axis.count))


def fit_tiles(level: Level, tiles: Tensor, values: Tensor, weight: Tensor, noise: Tensor | None, local_y: Tensor,
              local_x: Tensor, options: StartOptions) -> None:
    """Least squares of tiles [t] to values [t, Py, Px, C] with weights [t, Py, Px], on local coordinates [t, P]."""
    total = weight.sum((1, 2)).clamp_min(1e-12)
    mean = (values * weight[..., None]).sum((1, 2)) / total[:, None]
    centred = (values - mean[:, None, None]) * (weight > 0)[..., None]
    scale = ((centred.square() * weight[..., None]).sum((1, 2)) / total[:, None]).sqrt()
    scale = torch.where(scale > 1e-6, scale, torch.ones_like(scale))
    level.mean[tiles], level.scale[tiles] = mean.float(), scale.float()
    normalised = centred / scale[:, None, None]
    sigma = None
    if noise is not None:  # rms over the pixels of the tile, in units of its scale
        sigma = ((noise.square() * weight).sum((1, 2)) / total).sqrt()[:, None] / scale
    network = level.network
    if isinstance(network, Chebyshev2D):
        whole = (weight.flatten(1) == weight.flatten(1)[:, :1]).all(1) & (weight[:, 0, 0] > 0)
        for some, fit in ((whole, _project), (~whole, _solve_tensor)):
            if some.any():
                dense, error = fit(network, normalised[some], weight[some], local_y[some], local_x[some], options.ridge)
                keep = None
                if sigma is not None and options.threshold > 0:
                    keep = dense.abs() > options.threshold * sigma[some][:, :, None, None] * error[:, None]
                    keep[..., 0, 0] = True
                network.set_coefficients(tiles[some], dense.float(), keep=keep)
        return
    height, width = values.shape[1:3]
    points = torch.stack(
        [local_y[:, :, None].expand(-1, -1, width), local_x[:, None].expand(-1, height, -1)], dim=-1
    ).flatten(1, 2)
    for part in torch.split(torch.arange(len(tiles), device=tiles.device), max(1, BLOCK // (height * width * 16))):
        features = network.features(points[part].to(level.mean.dtype), tiles[part]).double()
        solution, _ = solve(features, normalised[part].flatten(1, 2), weight[part].flatten(1), options.ridge)
        network.set_last(tiles[part], solution.float())


def _project(network, values, weight, local_y, local_x, ridge) -> tuple[Tensor, Tensor]:
    """Separable least squares of whole tiles: coefficients [t, C, M, N] and their standard errors at unit noise [t, M, N]."""
    inverse_y = torch.linalg.pinv(network.basis(local_y, 0, "value")[:, 0])
    inverse_x = torch.linalg.pinv(network.basis(local_x, 1, "value")[:, 0])
    dense = torch.einsum("tmy,tyxc,tnx->tcmn", inverse_y, values, inverse_x)
    return dense, inverse_y.norm(dim=-1)[:, :, None] * inverse_x.norm(dim=-1)[:, None, :]


def _solve_tensor(network, values, weight, local_y, local_x, ridge) -> tuple[Tensor, Tensor]:
    """The same for tiles with pixels missing: normal equations of the tensor products."""
    basis_y = network.basis(local_y, 0, "value")[:, 0]
    basis_x = network.basis(local_x, 1, "value")[:, 0]
    features = torch.einsum("tym,txn->tyxmn", basis_y, basis_x).flatten(3).flatten(1, 2)
    solution, error = solve(features, values.flatten(1, 2), weight.flatten(1), ridge)
    shape = (basis_y.shape[-1], basis_x.shape[-1])
    return solution.transpose(1, 2).unflatten(2, shape), error.unflatten(1, shape)


def solve(features: Tensor, values: Tensor, weight: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Weighted ridge regression, batched: features [t, P, K], values [t, P, C], weight [t, P].

    Returns the solution [t, K, C] and its standard errors at unit noise [t, K].
    """
    weighted = features * weight[..., None]
    gram = features.transpose(1, 2) @ weighted
    trace = gram.diagonal(dim1=1, dim2=2).mean(-1).clamp_min(1e-12)
    gram = gram + torch.diag_embed((ridge * trace)[:, None].expand(-1, gram.shape[-1]))
    factor = torch.linalg.cholesky(gram)
    solution = torch.cholesky_solve(weighted.transpose(1, 2) @ values, factor)
    error = torch.cholesky_inverse(factor).diagonal(dim1=1, dim2=2).sqrt()
    return solution, error
