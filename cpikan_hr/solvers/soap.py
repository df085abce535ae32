"""SOAP, Adam in the eigenbasis of Shampoo's preconditioner (Vyas et al. 2024, arXiv 2409.11321), for tiled networks.

The implementation is `pytorch-optimizer`'s. It gives every dimension of a parameter a factor, also that of the tiles,
whose rotation would move a tile by the gradients of others, and which would take tiles^2 numbers. Here tiles keep to
themselves: factors belong to the dimensions within a tile, [in, out, terms], and are shared by all tiles of a
parameter, while Adam's moments are each tile's own. The library's first step only looks at the gradient.
"""

from typing import Any

import torch
from pytorch_optimizer import SOAP
from torch import Tensor

LARGEST = 1024  # dimensions beyond that are not rotated


class TileSOAP(SOAP):
    """SOAP for parameters [tiles, ...]."""

    needs_shapes = True  # a backend that hands over flat pieces of parameters would turn this into plain Adam

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float):
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay, max_precondition_dim=LARGEST)

    def init_pre_conditioner(self, grad: Tensor, state: dict[str, Any], **options: Any) -> None:
        super().init_pre_conditioner(grad[:1], state, **options)
        state["GG"][0] = []

    def update_pre_conditioner(self, grad: Tensor, state: dict[str, Any], step: int, **options: Any) -> None:
        for axis, factor in enumerate(state["GG"]):
            if len(factor):
                others = [other for other in range(grad.ndim) if other != axis]
                product = torch.tensordot(grad, grad, dims=[others, others])
                factor.lerp_(product, weight=1 - state["shampoo_beta"])
        if state["Q"] is None:
            state["Q"] = self.get_orthogonal_matrix(state["GG"])
        elif step and step % state["precondition_frequency"] == 0:
            state["Q"] = self.get_orthogonal_matrix_qr(state)
