"""The same as `shards.py` for FSDP2, whose parameters and optimizer state are torch's sharded tensors.

Invariant: after `put` and `put_states` the next update is that of one process with these weights and this state.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


class FSDPShards:
    """What a model prepared by FSDP2 trains, and its optimizer. All methods are collective."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        self._parameters, self._optimizer = dict(model.named_parameters()), optimizer

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters one after the other, those that are frozen included."""
        for name, parameter in self._parameters.items():
            yield name, whole(parameter.detach())

    def states(self) -> dict[str, dict]:
        """What the optimizer keeps for every parameter that it has updated."""
        state = self._optimizer.state
        return {
            name: {key: whole(value) for key, value in state[parameter].items()}
            for name, parameter in self._parameters.items()
            if parameter in state
        }

    @torch.no_grad()
    def put(self, values: dict[str, Tensor]) -> None:
        """Gives the trained parameters these weights."""
        for name, parameter in self._parameters.items():
            if parameter.requires_grad:
                parameter.copy_(self._like(parameter, values[name].detach()))

    def put_states(self, states: dict[str, dict]) -> None:
        """Gives the optimizer what `states` gave."""
        for name, state in states.items():
            parameter = self._parameters[name]
            self._optimizer.state[parameter] = {key: self._like(parameter, value) for key, value in state.items()}

    @staticmethod
    def _like(parameter: DTensor, value: Tensor | float) -> Tensor | float:
        """What is as large as its parameter is sharded like it."""
        if not torch.is_tensor(value) or value.shape != parameter.shape:
            return value
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)


def whole(value: Tensor | float) -> Tensor | float:
    """Collective. A sharded tensor gathered; anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value
