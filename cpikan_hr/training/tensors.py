"""Safetensors files, tensor by tensor: no more than a chunk of them need be in memory.

A safetensors file is the length of a JSON header (8 bytes, little endian), the header (per tensor its type, shape and
the bytes it takes after the header) and the tensors. safetensors' own writer takes all tensors at once.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from cpikan_hr import strict_json
from cpikan_hr.errors import UserError
from cpikan_hr.files import whole_file
from cpikan_hr.mapped import map_file, release, tensor_in

CHUNK = 2**22  # bytes written at a time
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def save_tensors(path: Path, state: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, whole or not at all."""
    ordered = sorted(state.items(), key=lambda item: (-item[1].element_size(), item[0]))  # so every tensor is aligned
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, value in ordered:
        begin, end = end, end + value.nbytes
        header[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [begin, end]}
    text = strict_json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with whole_file(path) as part, open(part, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, value in ordered:
            whole = value.detach().cpu().contiguous().view(-1).view(torch.uint8)
            for piece in whole.split(CHUNK):
                file.write(piece.numpy())
                release()


def load_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises UserError where it is not there or cut short."""
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: cannot be read, or cut short ({error}); train again") from None


def map_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors that lie in the file, for reading (see `mapped.py`), and its metadata.

    SafetensorError, OSError: not a whole safetensors file. KeyError: a type this program does not use.
    """
    with safe_open(path, "pt") as checked:
        metadata = checked.metadata() or {}
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        mapping = map_file(file)
    return {
        name: tensor_in(mapping, DTYPES[about["dtype"]], tuple(about["shape"]), 8 + length + about["data_offsets"][0])
        for name, about in header.items()
    }, metadata
