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

    The network has to be a copy (`TiledNetwork.pick`): its parameters are frozen.
    """

    def __init__(self, network: TiledNetwork, jet: Jet):
        self._seen: list[tuple] = []  # layer, its input, rows of its output
        hooks = [layer.register_forward_hook(self._keep) for layer in network.jacobian_layers]
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
        """Derivatives [t, P, n] of each point's share of `scalar`, a sum over points of what `output` is there.

        n runs over the parameters in their order. `again`: more of them will be asked for.
        """
        outputs = [rows for _, _, rows in self._seen]
        slopes = torch.autograd.grad(scalar, outputs, retain_graph=again)
        with torch.no_grad():
            found = [layer.jacobian(jet, slope) for (layer, jet, _), slope in zip(self._seen, slopes, strict=True)]
        return found[0] if len(found) == 1 else torch.cat(found, dim=-1)
