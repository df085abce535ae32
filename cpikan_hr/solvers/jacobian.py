"""The Jacobian of batched networks with respect to each tile's parameters, point by point.

A layer that is linear in its parameters has the Jacobian features times slopes, summed over the rows of a jet: what it
computes of its input, and the derivative of the scalar with respect to its output. One ordinary backward gives the
slopes of all layers at all points. There is no loop over parameters, and no copy of them for each point.
"""

import torch
from torch import Tensor

from cpikan_hr.jets import Jet
from cpikan_hr.networks import TiledNetwork


class Linearised:
    """Networks of all tiles in order at the points of a jet `[t, R, P, in]`, whose `output` is `[t, R, P, out]`.

    The network has to be a copy (`TiledNetwork.pick`): its parameters are frozen. `last`: off, the parameters of the
    last layer are held fixed.
    """

    def __init__(self, network: TiledNetwork, jet: Jet, last: bool = True):
        self._seen: list[tuple] = []  # layer, its input, rows of its output
        layers = list(network.jacobian_layers)
        hooks = [layer.register_forward_hook(self._keep) for layer in (layers if last else layers[:-1])]
        with torch.enable_grad():
            self.output = network.requires_grad_(False)(jet)
        for hook in hooks:
            hook.remove()

    def _keep(self, layer, arguments: tuple, output: Jet) -> None:
        if not output.rows.requires_grad:
            output.rows.requires_grad_()
        jet = arguments[0]
        self._seen.append((layer, jet._replace(rows=jet.rows.detach()), output.rows))

    def rows(self, scalar: Tensor, again: bool = False) -> Tensor:
        """Derivatives [t, n, P] of each point's share of `scalar`, a sum over points of what `output` is there.

        n runs over the parameters in their order. `again`: more of them will be asked for.
        """
        outputs = [rows for _, _, rows in self._seen]
        slopes = torch.autograd.grad(scalar, outputs, retain_graph=again)
        with torch.no_grad():
            pairs = zip(self._seen, slopes, strict=True)
            parts = [part for (layer, jet, _), slope in pairs for part in layer.jacobian(jet, slope)]
            sizes = [part[0, ..., 0].numel() for part in parts]
            tiles, rows, points, _ = slopes[0].shape
            shape = (tiles, sum(sizes), points)
            # as `outer` leaves them in memory
            found = slopes[0].new_empty(shape if rows == 1 else (shape[0], shape[2], shape[1]))
            found = found if rows == 1 else found.transpose(1, 2)
            for part, place in zip(parts, found.split(sizes, dim=1), strict=True):
                place.unflatten(1, part.shape[1:-1]).copy_(part)
        return found
