"""A device that is not the CPU, on machines without one: tensors that say `meta` and hold their numbers on the CPU.

Inside `pretending()` operations on them work as on a GPU, and one that mixes them with tensors of the CPU raises
`DeviceMix`, where CUDA would. As there, numbers (0-d tensors), copies and indices into a tensor may come from the CPU.
"""

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("meta")
COPIES = ("copy_", "_to_copy", "copy", "_local_scalar_dense")
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")


class DeviceMix(RuntimeError):
    """Tensors of two devices in one operation."""


class Pretended(torch.Tensor):
    """`held` [...], a tensor of the CPU, under the name of the other device."""

    @staticmethod
    def __new__(cls, held: torch.Tensor, requires_grad: bool = False):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=DEVICE, requires_grad=requires_grad,
        )  # fmt: skip

    def __init__(self, held: torch.Tensor, requires_grad: bool = False):
        self.held = held

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, arguments=(), options=None):
        return run(function, arguments, options or {})


class Factories(TorchDispatchMode):
    """Makes the tensors that are asked for on the device."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        return run(function, arguments, options or {})


def held(value):
    return value.held if isinstance(value, Pretended) else value


def run(function, arguments: tuple, options: dict):
    name = function._schema.name.removeprefix("aten::")
    tensors = [t for t in tree_leaves((arguments, options)) if isinstance(t, torch.Tensor)]
    there = [t for t in tensors if isinstance(t, Pretended)]
    here = [t for t in tensors if t.dim() and not isinstance(t, Pretended)]
    if name in INDEXED and isinstance(arguments[0], Pretended):
        here = [t for t in here if not any(t is index for index in arguments[1])]
    if there and here and name not in COPIES:
        raise DeviceMix(f"{name}: {[tuple(t.shape) for t in there]} there, {[tuple(t.shape) for t in here]} here")
    device = options.get("device")
    if device is not None:
        remains = torch.device(device) == DEVICE
        options = {**options, "device": torch.device("cpu") if remains else device}
    else:
        remains = isinstance(arguments[0], Pretended) if name == "copy_" else bool(there)
    made = function(*tree_map(held, arguments), **tree_map(held, options))
    given = {id(held(t)): t for t in tensors}  # what is changed in place comes back itself

    def named(value):
        if not isinstance(value, torch.Tensor):
            return value
        return given.get(id(value)) if id(value) in given else Pretended(value) if remains else value

    return tree_map(named, made)


@contextlib.contextmanager
def pretending() -> Iterator[None]:
    tensor, autocast, is_autocast = torch.tensor, torch.autocast, torch.is_autocast_enabled

    def make_tensor(*arguments, device=None, **options):
        made = tensor(*arguments, **options)
        return made if device is None or torch.device(device) != DEVICE else Pretended(made)

    def no_autocast(device, *arguments, **options):
        return contextlib.nullcontext() if device == DEVICE.type else autocast(device, *arguments, **options)

    with (
        mock.patch.object(torch, "tensor", make_tensor),
        mock.patch.object(torch, "autocast", no_autocast),
        mock.patch.object(torch, "is_autocast_enabled", lambda kind: kind != DEVICE.type and is_autocast(kind)),
        mock.patch.object(torch.nn.Module, "to", move),
        Factories(),
    ):
        yield


_to = torch.nn.Module.to


def move(module: torch.nn.Module, *arguments, **options) -> torch.nn.Module:
    """`module.to(...)` with the pretended device."""
    if not arguments or arguments[0] != DEVICE:
        return _to(module, *arguments, **options)
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None and not isinstance(value, Pretended):
                part._parameters[name] = torch.nn.Parameter(Pretended(value.data), value.requires_grad)
        for name, value in part._buffers.items():
            if value is not None and not isinstance(value, Pretended):
                part._buffers[name] = Pretended(value)
    return module
