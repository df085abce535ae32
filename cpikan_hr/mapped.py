"""Tensors that lie in a file, so that a field is solved, written and rendered without being held in memory.

A page of a map that was read stays resident until it is handed back: whoever passes over mapped tensors calls `release`
on the way (`Field.lattice` does), and what it reads next comes from the system's file cache again.
"""

import mmap
import threading
from collections.abc import Iterable
from math import prod
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn

from cpikan_hr.files import temporary_file, writing_temporary

PIECE = 2**20  # numbers copied at once

_maps: WeakSet = WeakSet()
_lock = threading.Lock()


def map_file(file, shared: bool = False) -> mmap.mmap:
    """The bytes of an open file. `shared`: what is written to them goes into the file; else it is undone by `release`.

    So tensors of a map that is not shared are for reading.
    """
    mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_WRITE if shared else mmap.ACCESS_COPY)
    with _lock:
        _maps.add(mapping)
    return mapping


def tensor_in(mapping: mmap.mmap, dtype: torch.dtype, shape: tuple[int, ...], start: int = 0) -> Tensor:
    """The tensor whose first byte is `start`, uncopied; it keeps the map alive."""
    count = prod(shape)
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mapping, dtype=dtype, count=count, offset=start).view(shape)


def release() -> None:
    """Hands back the pages of all maps of this process. Harmless to threads that are reading them."""
    with _lock:
        maps = list(_maps)
    for mapping in maps:
        if not mapping.closed:
            mapping.madvise(mmap.MADV_DONTNEED)


def in_memory(module: nn.Module) -> None:
    """Copies parameters and buffers into ordinary memory, in place: what is trained is touched as a whole anyway."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = tensor.data.clone()
    release()


def in_files(module: nn.Module) -> None:
    """Copies parameters and buffers into temporary files, in place, for training: see `training/in_files.py`.

    The gradient of a parameter then holds the rows alone that were selected.
    """
    for parameter in module.parameters():
        parameter.data, parameter.sparse_gradient = file_copy(parameter.data), True
    for buffer in module.buffers():
        buffer.data = file_copy(buffer.data)


def file_copy(tensor: Tensor) -> Tensor:
    """A copy in a temporary file, made piece by piece."""
    return _in_file(tensor.shape, tensor.dtype, tensor.detach().reshape(-1).split(PIECE))


def file_zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in a temporary file, all of which is written: a disk found full later would end the process."""
    count = prod(shape)
    zeros = torch.zeros(min(PIECE, count), dtype=dtype)
    return _in_file(shape, dtype, (zeros[: count - first] for first in range(0, count, PIECE)))


def _in_file(shape: tuple[int, ...], dtype: torch.dtype, pieces: Iterable[Tensor]) -> Tensor:
    spool = SpooledVector(dtype)
    for piece in pieces:
        spool.add(piece.numpy())
        release()
    return spool.tensor().view(shape)


class SpooledVector:
    """A vector that grows at its end, in a temporary file."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.count = dtype, 0
        self._numpy = torch.empty(0, dtype=dtype).numpy().dtype
        self._file = temporary_file()

    def add(self, values: np.ndarray) -> None:
        with writing_temporary():
            self._file.write(np.ascontiguousarray(values, self._numpy).data)
        self.count += len(values)

    def tensor(self) -> Tensor:
        """All values so far; writing to it changes them."""
        if not self.count:
            return torch.empty(0, dtype=self.dtype)
        with writing_temporary():
            self._file.flush()
        return tensor_in(map_file(self._file, shared=True), self.dtype, (self.count,))
