"""J'J of a field of several tiles: residuals that see the same tiles form a cell, whose rows are one dense matrix."""

from collections.abc import Iterator

import torch
from torch import Tensor

from cpikan_hr.solvers.residuals import Block, Residuals


def cells(
    residuals: Residuals, count: int, blocks: list[Block], columns: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Of one term's Jacobian, cell by cell: numbers of its residuals [P], of their parameters [W], and the rows [P, W].

    count: how many residuals; `columns` [count, K]: those of the constants.
    """
    device = blocks[0].rows.device
    first = [0]  # number of each level's first tile among all
    for group in residuals.parameters:
        first.append(first[-1] + len(group[0]))
    rows, tiles, values = [], [], {}
    for block in sorted(blocks, key=lambda block: block.level):
        here = block.rows < count
        rows.append(block.rows[here])
        tiles.append((first[block.level] + block.slots)[:, None].expand_as(block.rows)[here])
        values.setdefault(block.level, []).append(block.values[here])
    row, tile = torch.cat(rows), torch.cat(tiles)
    values = {level: torch.cat(parts) for level, parts in values.items()}
    # The sorted tiles of every residual are its cell's name.
    order = (row * first[-1] + tile).argsort()
    seen = torch.bincount(row, minlength=count)
    place = torch.empty_like(row)
    place[order] = torch.arange(len(row), device=device) - (seen.cumsum(0) - seen)[row[order]]
    names = torch.full((count, int(seen.max())), -1, device=device)
    names[row, place] = tile
    names, cell = torch.unique(names, dim=0, return_inverse=True)
    members = torch.bincount(cell, minlength=len(names))
    sizes = torch.cat([torch.full((len(g[0]),), n) for g, n in zip(residuals.parameters, residuals.sizes, strict=True)])
    begins = torch.cat([
        begin + n * torch.arange(len(g[0]))
        for g, n, begin in zip(residuals.parameters, residuals.sizes, residuals.offsets, strict=False)
    ])  # fmt: skip
    widths = torch.where(names >= 0, sizes.to(device)[names.clamp(min=0)], 0)
    starts = widths.cumsum(1) - widths  # the column where a tile of a cell begins
    width, most = int(widths.sum(1).max()), int(members.max())
    extra = 0 if columns is None else columns.shape[1]
    by_cell = cell.argsort(stable=True)
    position = torch.empty_like(cell)
    position[by_cell] = torch.arange(count, device=device) - (members.cumsum(0) - members)[cell[by_cell]]
    table = next(iter(values.values())).new_zeros(len(names) * most, width + extra)
    at, start = 0, cell * most + position
    for level, found in values.items():
        mine = slice(at, at + len(found))
        at += len(found)
        column = starts[cell[row[mine]], place[mine]][:, None] + torch.arange(residuals.sizes[level], device=device)
        table[start[row[mine]][:, None], column] = found
    if columns is not None:
        table[start, width:] = columns
    table = table.unflatten(0, (len(names), most))
    constants = torch.arange(residuals.offsets[-1], residuals.count, device=device)
    for k, inside in enumerate(by_cell.split(members.tolist())):
        chosen = [begins[t] + torch.arange(sizes[t]) for t in names[k][names[k] >= 0].tolist()]
        numbers = torch.cat([part.to(device) for part in chosen])
        part = table[k, : len(inside)]
        yield inside, torch.cat([numbers, constants]), torch.cat([part[:, : len(numbers)], part[:, width:]], dim=1)
