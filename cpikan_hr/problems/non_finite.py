"""Where an equation's residuals are not finite, in words: the term, the point, and what u is there.

A loss that is NaN names no cause. The first point whose residual, or else its derivative with respect to u, is not
finite does: a root or a power of a negative u, a condition without a value, weights that have grown beyond all bounds.
"""

import torch
from torch import Tensor

from cpikan_hr.jets import Jet, pairs
from cpikan_hr.problems.collocation import Group

_DEFINED = "keep roots, powers and logarithms where they are defined, with torch.clamp, or begin elsewhere"


def first_fault(
    problem, group: Group, jet: Jet, points: Tensor, values: Tensor, lift: Tensor | None, factor: Tensor | None
) -> str | None:
    """What is wrong with one term's residuals, given the field's jet at its points; None where all are finite.

    jet: before the ansatz; values, lift, factor: as `Collocation.read` gives them.
    """
    with torch.enable_grad():
        rows = jet.rows.detach().requires_grad_()
        solved = problem.solved(jet._replace(rows=rows), lift, factor)
        found = problem.residuals(group, solved, points, values)
        slopes = torch.zeros_like(rows)
        if found.requires_grad:
            (slopes,) = torch.autograd.grad(found.sum(), rows)
    bad = ~found.detach().isfinite().all(1)
    what = f"{_name(group)} is {_first(found.detach()[bad])}"
    if not bad.any():
        bad = ~slopes.isfinite().all(2).all(0).unflatten(0, (-1, group.per)).all(1)
        what = f"the derivative of {_name(group)} with respect to u is not finite"
    if not bad.any():
        return None
    k = int(bad.nonzero()[0, 0]) * group.per
    u = solved.rows.detach()[:, k, : problem.channels]
    here = ", ".join(f"{axis} = {float(points[k, a]):.6g}" for a, axis in enumerate(problem.axes))
    there = _of_u(u, problem.axes, jet.order)
    unknown = zip(problem.options.unknown, solved.rows.detach()[0, k, problem.channels :].tolist(), strict=True)
    there = ", ".join([there, *(f"{name} = {value:.4g}" for name, value in unknown)])
    return f"{what} at {here}, where {there}; {_advice(group, rows.detach()[:, k], u, values[k])}"


def _name(group: Group) -> str:
    return {
        "residual": "the residual", "measurements": "the misfit to the measurements",
        "interface": f"the jump across {group.name}",
    }.get(group.kind, f"the misfit to the condition {group.name!r}")  # fmt: skip


def _first(found: Tensor) -> float | str:
    bad = found[~found.isfinite()]
    return float(bad[0]) if len(bad) else "finite"


def _of_u(u: Tensor, axes: tuple[str, ...], order: str) -> str:
    """u and its derivatives from jet rows [R, C] at a point, those that the order has."""
    names = ["u", *(f"u_{axis}" for axis in axes), *(f"u_{axes[i]}{axes[j]}" for i, j in pairs(len(axes)))]
    values = [", ".join(f"{value:.4g}" for value in row.tolist()) for row in u]
    brackets = "({})" if u.shape[1] > 1 else "{}"
    return ", ".join(f"{name} = {brackets.format(v)}" for name, v in zip(names, values, strict=False))


def _advice(group: Group, network: Tensor, u: Tensor, value: Tensor) -> str:
    if not network.isfinite().all():
        return "the field itself has diverged: lower the learning rate or clip gradients"
    if not u.isfinite().all():
        return "what the hard conditions give there is not finite: correct the equation's conditions or lift"
    if not value.isfinite().all():
        return "the value to compare with is not finite: correct the equation" + (
            " or the file" if group.kind == "measurements" else ""
        )
    return _DEFINED
