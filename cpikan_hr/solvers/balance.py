"""How large the terms of an equation's loss are against each other, as their parameters see them."""

import torch

from cpikan_hr.fields import Field
from cpikan_hr.problems.pde import PDE
from cpikan_hr.solvers.residuals import Residuals

SAMPLE = 256  # points of each term


def term_sizes(field: Field, problem: PDE, method: str) -> dict[str, float]:
    """gradient_norm: norm of each term's gradient (Wang, Teng & Perdikaris 2021); ntk: trace of its tangent kernel over
    the number of its points (Wang, Yu & Perdikaris 2022). Without the factors that balance them.
    """
    residuals = Residuals(field, problem, most=SAMPLE)
    gradients, traces = {}, {}
    for term, found, blocks, columns in residuals.linearised():
        name = term.group.name
        gradient = gradients.setdefault(name, found.new_zeros(residuals.count))
        traces.setdefault(name, 0.0)
        padded = torch.cat([found, found.new_zeros(1)])
        for block in blocks:
            begin, size = residuals.offsets[block.level], residuals.sizes[block.level]
            pulled = torch.einsum("tpn,tp->tn", block.values, padded[block.rows])
            place = begin + block.slots[:, None] * size + torch.arange(size, device=found.device)
            gradient.index_add_(0, place.flatten(), pulled.flatten())
            traces[name] += float(block.values.square().sum())
        if columns is not None:
            gradient[residuals.offsets[-1] :] += columns.T @ found
            traces[name] += float(columns.square().sum())
    balance = problem.weighting.balance
    if method == "ntk":
        return {name: trace / balance[name] for name, trace in traces.items()}
    return {name: 2 * float(gradient.norm()) / balance[name] for name, gradient in gradients.items()}
