"""Between the networks of a growing level and the arrays that its solvers work on."""

import torch
from torch import Tensor

from cpikan_hr.networks.base import select
from cpikan_hr.recipe import LevelOptions
from cpikan_hr.solvers.units import Unit


def unit_of(choice: LevelOptions) -> Unit:
    """The hidden unit of a recipe's growing level."""
    network = choice.network
    if network.kind == "siren":
        return Unit("siren", 1, 1, first_omega=network.first_omega)
    degrees = [network.degree] * 2 if isinstance(network.degree, int) else network.degree
    return Unit("cpikan", degrees[0], degrees[1], network.first_input_map, network.input_map)


def read(network, unit: Unit, slots: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Copies of tiles `slots` (None: all) of a grown network: hidden weights [t, h, 1 + 2 degree] and last layers
    [t, C, h terms + 1].
    """
    first, last = network.layers[0], network.layers[-1]

    def of(parameter: Tensor) -> Tensor:
        return select(parameter.detach(), slots)

    if unit.kind == "siren":
        w = torch.cat([of(first.bias)[:, None], of(first.weight)], 1).transpose(1, 2) * unit.first_omega
        return w, torch.cat([of(last.weight).transpose(1, 2), of(last.bias)[..., None]], -1)
    terms = of(first.coefficients).permute(0, 2, 1, 3).flatten(2)  # [t, h, y's then x's]
    ends = of(last.coefficients).permute(0, 2, 3, 1).flatten(2)  # [t, C, terms h]
    return torch.cat([of(first.constant)[..., None], terms], -1), torch.cat([ends, of(last.constant)[..., None]], -1)


def write(network, unit: Unit, w: Tensor, last: Tensor, slots: Tensor | None = None) -> None:
    """Undoes `read`, into the parameters of tiles `slots` (None: all)."""
    if unit.kind == "siren":
        first = w.transpose(1, 2) / unit.first_omega
    else:
        terms = w[..., 1:].unflatten(-1, (2, unit.degree)).permute(0, 3, 2, 1).flatten(1, 2)  # degree-major, y then x
        first = torch.cat([w[:, None, :, 0], terms], 1)
    network.layers[0].assign(slots, first)
    network.set_last(slots, torch.cat([last[..., -1:], last[..., :-1]], -1).transpose(1, 2))
