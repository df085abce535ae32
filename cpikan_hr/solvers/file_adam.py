"""Adam whose weights and moments lie in files: an update passes over them piece by piece and hands the pages back.

Invariant: the numbers are those of torch's Adam or AdamW (its own function is called on every piece), so a run may go
on with either.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.optim import Adam
from torch.optim.adam import adam

from cpikan_hr.mapped import file_copy, file_zeros, release

PIECE = 2**20  # numbers updated at once
MOMENTS = ("exp_avg", "exp_avg_sq")


class FileAdam(Adam):
    """For parameters in files whose gradients are sparse, the rows of a batch's tiles alone, or dense.

    Parameters and state are those of `Adam`; `decoupled_weight_decay`: those of AdamW.
    """

    def __init__(self, params, lr: float, betas: tuple[float, float], weight_decay: float, decoupled: bool):
        super().__init__(params, lr, betas, weight_decay=weight_decay, fused=True, decoupled_weight_decay=decoupled)

    @torch.no_grad()
    def step(self, closure=None) -> None:
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def load_state_dict(self, state_dict: dict) -> None:
        """Copies the state, of this or of torch's Adam."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            state |= {"step": state["step"].clone()} | {name: file_copy(state[name]) for name in MOMENTS}

    def _update(self, parameter: nn.Parameter, group: dict) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state |= {name: file_zeros(parameter.shape, parameter.dtype) for name in MOMENTS}
        gradient = parameter.grad.coalesce() if parameter.grad.is_sparse else parameter.grad
        rows = max(1, PIECE * len(parameter) // max(1, parameter.numel()))
        for first in range(0, len(parameter), rows):
            piece, step = slice(first, first + rows), state["step"].clone()
            whole = (parameter.data, *(state[name] for name in MOMENTS))
            weights, mean, square = ([tensor[piece]] for tensor in whole)
            adam(
                weights, [_dense(gradient, piece, weights[0])], mean, square, [], [step], fused=True,
                decoupled_weight_decay=group["decoupled_weight_decay"], amsgrad=False, maximize=False,
                beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"],
                eps=group["eps"],
            )  # fmt: skip
            release()
        state["step"] += 1


def clip_gradients(parameters: Iterable[nn.Parameter], most: float) -> Tensor:
    """Scales all gradients, sparse ones too, so that their norm is at most `most`; returns what it was before.

    As `torch.nn.utils.clip_grad_norm_`, which takes no sparse ones.
    """
    gradients = []
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.coalesce()
            gradients.append(parameter.grad.values())
        elif parameter.grad is not None:
            gradients.append(parameter.grad)
    norm = get_total_norm(gradients)
    factor = (most / (norm + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(factor)
    return norm


def _dense(gradient: Tensor, piece: slice, like: Tensor) -> Tensor:
    """Rows `piece` of a gradient, dense."""
    if not gradient.is_sparse:
        return gradient[piece]
    rows = gradient.indices()[0]
    first, last = torch.searchsorted(rows, rows.new_tensor([piece.start, piece.stop])).tolist()
    return torch.zeros_like(like).index_copy_(0, rows[first:last] - piece.start, gradient.values()[first:last])
