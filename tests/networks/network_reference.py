"""Independent references for the network tests: single-tile float64 formulas and nested autograd on them.

Nothing here uses jets: values come from the textbook formulas, derivatives from `torch.autograd.grad` applied twice.
"""

import math

import numpy as np
import torch
from torch import Tensor

from cpikan_hr.networks import SIREN, Chebyshev2D, FourierMLP, ScaledCPIKAN

ACTIVATIONS = {"tanh": torch.tanh, "silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu}
MAPS = {"tanh": torch.tanh, "identity": lambda v: v, "sine": lambda v: torch.sin(math.pi * v / 2)}


def chebyshev_polynomials(s: Tensor, degree: int) -> Tensor:
    """T_0..T_degree from monomial coefficients (numpy), exact enough for small degrees: `[..., degree + 1]`."""
    columns = []
    for n in range(degree + 1):
        monomials = np.polynomial.chebyshev.cheb2poly([0.0] * n + [1.0])
        columns.append(sum(float(c) * s**k for k, c in enumerate(monomials)) + 0 * s)
    return torch.stack(columns, dim=-1)


def term(network: Chebyshev2D, index: int) -> tuple[int, int, int]:
    """Channel, degree along y and degree along x of a flat index."""
    rest, n = divmod(index, network.degree[1] + 1)
    return *divmod(rest, network.degree[0] + 1), n


def random_terms(network: Chebyshev2D, generator: torch.Generator) -> list[dict[tuple[int, int, int], float]]:
    """Gives each tile of a sparse network 0 to 8 random terms, one of several tiles none, and makes it float64.

    Returns per tile {(channel, degree along y, degree along x): coefficient}.
    """
    size = network.out_features * (network.degree[0] + 1) * (network.degree[1] + 1)
    counts = torch.randint(0, 9, (network.tiles,), generator=generator).clamp(max=size)
    if network.tiles > 1:
        counts[torch.randint(network.tiles, (), generator=generator)] = 0
    index = [torch.randperm(size, generator=generator)[:n].sort().values for n in counts.tolist()]
    # representable in float32, in which terms are set
    values = [torch.randn(int(n), generator=generator, dtype=torch.float32) for n in counts]
    network.set_terms(counts, torch.cat(index), torch.cat(values))
    network.double()
    return [
        {term(network, i): v for i, v in zip(*pair, strict=True)}
        for pair in zip([i.tolist() for i in index], [v.tolist() for v in values], strict=True)
    ]


def value(network, tile: int, x: Tensor) -> Tensor:
    """The network of one tile as the papers write it: `[P, in] -> [P, out]`."""
    if isinstance(network, ScaledCPIKAN):
        for layer in network.layers:
            basis = chebyshev_polynomials(MAPS[layer.input_map](x), layer.degree)
            if layer.constant is None:
                x = torch.einsum("pin,ion->po", basis, layer.coefficients[tile])
            else:
                x = layer.constant[tile] + torch.einsum("pin,ion->po", basis[..., 1:], layer.coefficients[tile])
            if layer.norm is not None:
                # written out: the third derivatives of torch's fused layer_norm (2.13) are wrong
                centred = x - x.mean(-1, keepdim=True)
                deviation = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
                x = centred / deviation * layer.norm.gain[tile] + layer.norm.offset[tile]
        return x
    if isinstance(network, Chebyshev2D):
        mapping = MAPS[network.input_map]
        by = chebyshev_polynomials(mapping(x[:, 0]), network.degree[0])
        bx = chebyshev_polynomials(mapping(x[:, 1]), network.degree[1])
        if not network.sparse:
            return torch.einsum("pm,pn,cmn->pc", by, bx, network.coefficients[tile].unflatten(1, network.shape))
        # zero, but a function of x and of the coefficients where the tile has no terms
        channels = [0 * x[:, 0] * network.coefficients.sum() for _ in range(network.out_features)]
        for k in range(int(network.offset[tile]), int(network.offset[tile + 1])):
            c, m, n = term(network, int(network.index[k]))
            channels[c] = channels[c] + network.coefficients[k] * by[:, m] * bx[:, n]
        return torch.stack(channels, dim=-1)
    if isinstance(network, FourierMLP):
        phases = [2.0**k * math.pi * x[:, i] for i in range(x.shape[1]) for k in range(network.bands)]
        encoded = [x[:, i] for i in range(x.shape[1])] + [p.sin() for p in phases] + [p.cos() for p in phases]
        x = torch.stack(encoded, dim=-1)
    for k, layer in enumerate(network.layers):
        x = x @ layer.weight[tile] + layer.bias[tile]
        if k < len(network.layers) - 1:
            siren = isinstance(network, SIREN)
            x = torch.sin(network.omegas[k] * x) if siren else ACTIVATIONS[network.activation_name](x)
    return x


def nested_rows(function, x: Tensor, order: str) -> Tensor:
    """Rows `[R, P, C]` of the jet of `function: [P, D] -> [P, C]` at `x`, by nested autograd, differentiable."""
    x = x.detach().requires_grad_()
    u = function(x)
    dim = x.shape[1]

    def derivative(scalar_field: Tensor) -> Tensor:  # [P] -> [P, D]
        grad = torch.autograd.grad(scalar_field.sum(), x, create_graph=True, allow_unused=True)[0]
        return torch.zeros_like(x) if grad is None else grad

    channels = []
    for c in range(u.shape[1]):
        rows = [u[:, c]]
        if order != "value":
            first = derivative(u[:, c])
            rows += list(first.unbind(1))
        if order in ("laplacian", "hessian"):
            second = [derivative(first[:, d]) if first.requires_grad else torch.zeros_like(x) for d in range(dim)]
            if order == "laplacian":
                rows.append(sum(second[d][:, d] for d in range(dim)))
            else:
                rows += [second[i][:, j] for i in range(dim) for j in range(i, dim)]
        channels.append(torch.stack(rows))
    return torch.stack(channels, dim=-1)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest deviation over the largest expected magnitude; 0 if there is nothing to compare."""
    assert actual.shape == expected.shape
    if not expected.numel():
        return 0.0
    return float((actual - expected).detach().abs().max() / expected.detach().abs().max().clamp(min=1e-300))
