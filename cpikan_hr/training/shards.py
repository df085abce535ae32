"""Weights and optimizer state that ZeRO keeps in shards: as whole tensors on every process, and back.

ZeRO steps flat fp32 vectors, of which each rank holds a part. `Shards` knows where the parts of every parameter lie
(stages 1 and 2: a range of its group's vector; stage 3: a range of a sub-group's), so that what is asked for by the
parameter's name is gathered from all ranks, and what is put goes to those that hold it. Sub-groups on NVMe are read for
that, and written back.

Invariant: after `put` and `put_states` the next update is that of one process with these weights and this state.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from deepspeed import DeepSpeedEngine
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import GatheredParameters, parameter_offload
from torch import Tensor, nn


def forget(engine: DeepSpeedEngine) -> None:
    """Lets an engine and its weights go; DeepSpeed itself keeps a list of all models under stage 3."""
    engine.destroy()
    known = parameter_offload.FWD_MODULE_STACK
    known[:] = [module for module in known if module is not engine.module]


@dataclass(frozen=True)
class Part:
    """This rank's part of a parameter: `count` numbers from `first` on are those of `flat` from `begin` on.

    `group`: of stage 3, the number of the sub-group that `flat` is the vector of.
    """

    flat: Tensor
    begin: int
    first: int
    count: int
    group: int = -1

    def of(self, vector: Tensor) -> Tensor:
        return vector.narrow(0, self.begin, self.count)


class Shards:
    """What an engine of ZeRO 1, 2 or 3 trains. All methods are collective."""

    def __init__(self, engine: DeepSpeedEngine):
        self._zero = engine.optimizer
        self._state = self._zero.optimizer.state
        self._parameters = dict(engine.module.named_parameters())
        self._partitioned = hasattr(self._zero, "fp32_partitioned_groups_flat")
        self._device = get_accelerator().current_device_name()  # gathered there whatever is offloaded
        find = self._part_of_3 if self._partitioned else self._part_of_1_and_2
        self._parts = {name: find(p) for name, p in self._parameters.items() if p.requires_grad}

    def _part_of_1_and_2(self, parameter: nn.Parameter) -> Part | None:
        held = parameter._hp_mapping
        if held is None:
            return None
        flat, here = self._zero.single_partition_of_fp32_groups[held.param_group_index], held.hp_fragment_address
        return Part(flat, here.start, held.lp_fragment_address.start, here.numel)

    def _part_of_3(self, parameter: nn.Parameter) -> Part | None:
        group, begin, size = self._zero.grad_position[self._zero.get_param_id(parameter)]
        first = size * self._zero._get_param_partition_rank(parameter)
        count = min(size, parameter.ds_numel - first)  # the last ranks' parts are padded
        flat = self._zero.fp32_partitioned_groups_flat[group]
        return Part(flat, begin, first, count, group) if count > 0 else None

    @contextmanager
    def _in_memory(self, part: Part, changed: bool = False) -> Iterator[None]:
        """Reads a sub-group that lies on NVMe, and writes it back where it is changed."""
        swapped = self._partitioned and self._zero._swappable_optimizer_subgroup(part.group)
        if swapped:
            self._zero._optimizer_states_and_gradient_swap_in(part.group)
        yield
        if swapped and changed:
            self._zero._optimizer_states_and_gradient_swap_out(part.group)
        elif swapped:
            self._zero._release_swap_buffers(part.group)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """All parameters one after the other, those that are frozen included."""
        for name, parameter in self._parameters.items():
            if name in self._parts:
                yield name, self._gather(name, None)
            else:
                with GatheredParameters([parameter], enabled=self._partitioned):
                    yield name, parameter.detach()

    def states(self) -> dict[str, dict]:
        """What the optimizer keeps for every trained parameter; {} before its first update."""
        zero = self._zero
        flats = zero.fp32_partitioned_groups_flat if self._partitioned else zero.single_partition_of_fp32_groups
        known = next((self._state[flat] for flat in flats if self._state.get(flat)), {})
        moments = [key for key, value in known.items() if torch.is_tensor(value) and value.ndim]
        others = {key: value for key, value in known.items() if key not in moments}
        return {name: others | {key: self._gather(name, key) for key in moments} for name in self._parts if known}

    def put(self, values: dict[str, Tensor]) -> None:
        """Gives the trained parameters these weights."""
        for name in self._parts:
            self._put(name, None, values[name])

    def put_states(self, states: dict[str, dict]) -> None:
        """Gives the optimizer what `states` gave."""
        for name, state in states.items():
            for key, value in state.items():
                self._put(name, key, value)

    def _gather(self, name: str, key: str | None) -> Tensor:
        parameter, part = self._parameters[name], self._parts[name]
        shape = parameter.ds_shape if self._partitioned else parameter.shape
        whole = torch.zeros(shape.numel(), device=self._device)
        if part is not None:
            with self._in_memory(part):
                vector = part.flat if key is None else self._state[part.flat][key]
                whole.narrow(0, part.first, part.count).copy_(part.of(vector.detach()))
        torch.distributed.all_reduce(whole)
        return whole.view(shape)

    @torch.no_grad()
    def _put(self, name: str, key: str | None, value: Tensor | float) -> None:
        parameter, part = self._parameters[name], self._parts[name]
        if key is None and parameter.numel() == value.numel():
            parameter.copy_(value)  # what the forward pass sees; stage 3 keeps small parameters whole as well
        if part is None:
            return
        if key is not None and not (torch.is_tensor(value) and value.ndim):
            self._state[part.flat][key] = value
            return
        here = value.flatten().narrow(0, part.first, part.count)
        with self._in_memory(part, changed=True):
            if key is not None:
                part.of(self._state[part.flat].setdefault(key, torch.zeros_like(part.flat))).copy_(here)
                return
            part.of(part.flat).copy_(here)
        if self._partitioned:
            parameter.ds_tensor.narrow(0, 0, part.count).copy_(here)
