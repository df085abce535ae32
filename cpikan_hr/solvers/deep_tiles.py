"""Tiles of any depth for Gauss-Newton: all layers but the last by their Jacobian, the last one by its features."""

import torch
from torch import Tensor

from cpikan_hr.jets import seed
from cpikan_hr.networks import TiledNetwork
from cpikan_hr.networks.base import assign
from cpikan_hr.solvers.jacobian import Linearised
from cpikan_hr.solvers.projection import Model, eliminate


class DeepTiles:
    """Networks at points of their own [t, P, 2], in local coordinates (`gauss_newton.Fit`).

    Hidden weights w [t, n]: the parameters of all layers but the last, in their order.
    """

    def __init__(self, network: TiledNetwork, points: Tensor):
        self.network, self.points = network, points

    def elements(self, w: Tensor, channels: int) -> int:
        return self.points.shape[1] * (channels + 1) * w.shape[1]

    def read(self) -> Tensor:
        """Hidden weights [t, n] of all tiles."""
        parts = [parameter.detach().flatten(1) for parameter in _hidden(self.network)]
        return torch.cat(parts, dim=1).float() if parts else self.points.new_zeros(len(self.points), 0)

    @torch.no_grad()
    def linearise(self, tiles: Tensor, data: Tensor, w: Tensor, weight: Tensor | None) -> Model:
        network, jet = self.network.pick(tiles), seed(self.points[tiles], "value")
        write(network, None, w)
        features = network.features(jet.value).transpose(1, 2)
        if weight is not None:
            features = features * weight[:, None]
        found = eliminate(features, data)
        network.set_last(None, found.last.transpose(1, 2))
        here = Linearised(network, jet, last=False)
        with torch.enable_grad():
            sums = here.output.value.sum((0, 1)).unbind()
        rows = [here.rows(channel, again=True) for channel in sums]
        jacobian = torch.stack(rows, dim=1)
        if weight is not None:
            jacobian *= weight[:, None, None]
        matrix = sum(torch.bmm(part, part.transpose(1, 2)) for part in jacobian.unbind(1)).double()
        gradient = found.reduce(matrix, jacobian)
        return Model(w, found.loss, found.last, matrix, gradient)


def _hidden(network: TiledNetwork) -> list[Tensor]:
    return [parameter for layer in list(network.jacobian_layers)[:-1] for parameter in layer.parameters()]


def write(network: TiledNetwork, tiles: Tensor | None, w: Tensor, last: Tensor | None = None) -> None:
    """Gives `tiles` (None: all) of a network these hidden weights and, where told, last layers [t, C, K]."""
    parts = w.split([parameter[0].numel() for parameter in _hidden(network)], dim=1)
    for parameter, values in zip(_hidden(network), parts, strict=True):
        assign(parameter, tiles, values.reshape(-1, *parameter.shape[1:]))
    if last is not None:
        network.set_last(tiles, last.transpose(1, 2))
