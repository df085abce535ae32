"""A field in few bytes: quantised parameters, coded as small integers and compressed with LZMA.

`pack` turns a state dict into two uint8 tensors, `unpack` turns them back. Parameters lose precision there, one uniform
step per level and tensor; buffers stay as they are.

The terms of a sparse Chebyshev level are quantised as amplitudes: what their orthonormal cosine contributes to the core
of its tile, in the data's unit. A step S then costs about S^2 / 12 of squared error per kept term, whatever the tile
size. Terms below S / 2 are dropped. Kept magnitudes start at `floor`, the smallest of them: magnitude number k stands
for floor + (k + 1/2) S, at most S / 2 away from every amplitude it replaces.

Coding, chosen by size on a photograph: terms in order of (tile, channel, degree m + n) as counts and gaps; amplitudes
in order of how far along its list a term lies, so that large ones stand together. With zstd files came out 2 to 6 %
larger, with zlib 10 %.
"""

import json
import lzma
import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cpikan_hr import strict_json
from cpikan_hr.fields import Field
from cpikan_hr.networks import Chebyshev2D
from cpikan_hr.networks.chebyshev2d import index_dtype

FORMAT, VERSION = "cpikan_hr packed field", 1
LZMA = [{"id": lzma.FILTER_LZMA1, "preset": 6 | lzma.PRESET_EXTREME, "dict_size": 2**12, "lc": 1, "lp": 0, "pb": 0}]
SPARSE = ("network.coefficients", "network.index", "network.offset")


@dataclass(frozen=True)
class SparseShape:
    """Terms per tile (C, M + 1, N + 1) of a sparse level; `share`: its tiles' cores over their supports, per axis."""

    terms: tuple[int, int, int]
    share: tuple[float, float]

    def order(self) -> np.ndarray:
        """Flat numbers m (N + 1) + n by total degree, as JPEG's zigzag."""
        m, n = (grid.ravel() for grid in np.indices(self.terms[1:]))
        return np.lexsort((m, m + n))

    def units(self, scale: np.ndarray) -> np.ndarray:
        """Amplitude of a coefficient of one, flat [C (M + 1) (N + 1)]; `scale` [C] is the level's."""
        norms = [np.full(count, np.sqrt(count / 2)) for count in self.terms[1:]]  # of T_n over a tile's pixels
        for norm in norms:
            norm[0] = np.sqrt(len(norm))
        rows, columns = (norm * share for norm, share in zip(norms, self.share, strict=True))
        used = np.where(scale == 0, 1, np.abs(scale))
        return (used[:, None, None] * rows[:, None] * columns).ravel()


def sparse_shapes(field: Field) -> dict[str, SparseShape]:
    """Per sparse level its prefix in the state dict and the shape."""
    found = {}
    for number, level in enumerate(field.levels):
        network = level.network
        if isinstance(network, Chebyshev2D) and network.sparse:
            share = tuple(min(1.0, axis.stride / (2 * axis.half)) for axis in level.tile_grid.axes)
            found[f"levels.{number}."] = SparseShape((network.out_features, *network.shape), share)
    return found


# ------------------------------------------------------------------------------------------------------- the two sides


def pack(
    state: dict[str, Tensor],
    parameters: set[str],
    sparse: dict[str, SparseShape],
    bits: int,
    step: float | None = None,
    description: dict | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file. `parameters`: names of what is quantised; `sparse` by level prefix.

    `bits`: the largest value of a tensor takes so many, its sign among them; `step`: instead for sparse levels.
    `description` travels along. ValueError for numbers that are not finite.
    """
    streams, records = Writer(), []
    done = {prefix + part for prefix in sparse for part in (*SPARSE, "active")}
    for name, value in state.items():
        if name in done:
            continue
        array = value.detach().cpu()
        dtype = str(array.dtype).removeprefix("torch.")
        record = {"kind": "exact", "name": name, "shape": list(array.shape), "dtype": dtype}
        if name in parameters:
            if not array.isfinite().all():
                raise ValueError(f"{name} holds numbers that are not finite")
            record |= {"kind": "uniform", "step": pack_uniform(streams, array.double().numpy().ravel(), bits)}
        else:
            streams.add(byte_planes(array.contiguous().view(-1).numpy()))
        records.append(record)
    for prefix, shape in sparse.items():  # after the scales, which they are decoded with
        records.append({"kind": "terms", "name": prefix} | pack_terms(streams, prefix, state, shape, bits, step))
    sizes = [len(part) for part in streams.parts]
    head = {"description": description or {}, "tensors": records, "streams": sizes}
    packed_head = compressed(strict_json.dumps(head).encode())
    tensors = {"head": as_tensor(packed_head), "streams": as_tensor(b"".join(streams.parts))}
    steps = {record["name"]: record["step"] for record in records if "step" in record}
    metadata = {"format": FORMAT, "version": str(VERSION), "bits": str(bits), "steps": strict_json.dumps(steps)}
    return tensors, metadata | {"crc32": checksum(tensors)}


def unpack(tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The state dict and the description. ValueError where the tensors are not what `pack` made."""
    if metadata.get("crc32") != checksum(tensors):
        raise ValueError("its checksum is wrong")
    try:
        head = json.loads(decompressed(tensors["head"].numpy().tobytes()))
        streams = Reader(tensors["streams"].numpy().tobytes(), head["streams"])
        state = {}
        for record in head["tensors"]:
            if record["kind"] == "terms":
                state |= unpack_terms(streams, record, state[record["name"] + "scale"].double().numpy()[0])
                continue
            dtype, shape = getattr(torch, record["dtype"]), record["shape"]
            if record["kind"] == "uniform":
                value = torch.from_numpy(unpack_uniform(streams, int(np.prod(shape)), record["step"]))
            else:
                plain = torch.zeros(0, dtype=dtype).numpy().dtype
                value = torch.from_numpy(from_byte_planes(streams.take(), plain))
            state[record["name"]] = value.to(dtype).view(shape)
        return state, head["description"]
    except (lzma.LZMAError, KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None


def checksum(tensors: dict[str, Tensor]) -> str:
    """CRC-32 of both tensors: neither safetensors nor raw LZMA would notice a damaged byte."""
    code = 0
    for name in ("head", "streams"):
        value = tensors.get(name, torch.zeros(0, dtype=torch.uint8))
        code = zlib.crc32(value.contiguous().view(torch.uint8).numpy(), code)
    return f"{code:08x}"


# ------------------------------------------------------------------------------------------------- sparse levels


def pack_terms(
    streams: "Writer", prefix: str, state: dict[str, Tensor], shape: SparseShape, bits: int, step: float | None
) -> dict:
    """Quantises and codes the terms of one level; returns its record."""
    values, index, offset = (state[prefix + part].detach().cpu().numpy() for part in SPARSE)
    active, scale = state.get(prefix + "active"), state[prefix + "scale"].cpu().double().numpy()[0]
    channels, rows, columns = shape.terms
    counts = np.diff(offset.astype(np.int64))
    amplitude = values.astype(np.float64) * shape.units(scale)[index]
    size = np.abs(amplitude)
    if not np.isfinite(size).all():
        raise ValueError(f"{prefix}{SPARSE[0]} holds numbers that are not finite")
    step = step or step_of(size, bits)
    keep = size >= step / 2
    tile = np.repeat(np.arange(len(counts)), counts)[keep]
    index, size, negative = index[keep].astype(np.int64), size[keep], amplitude[keep] < 0
    floor = float(size.min()) if len(size) else step
    if active is not None:  # tiles without terms go too, where they would add nothing
        used = np.bincount(tile, minlength=len(counts)) > 0
        if state[prefix + "mean"].any():
            used[:] = True
        tile = (np.cumsum(used) - 1)[tile]
        counts = counts[used]
        pack_integers(streams, gaps(active.cpu().numpy()[used]))
    rank = np.empty(rows * columns, np.int64)
    rank[shape.order()] = np.arange(rows * columns)
    channel, place = np.divmod(index, rows * columns)
    lists = tile * channels + channel
    order = np.argsort(lists * (rows * columns) + rank[place])
    lists, place = lists[order], rank[place][order]
    counts = np.bincount(lists, minlength=len(counts) * channels)
    pack_integers(streams, counts.reshape(-1, channels).T.ravel())
    begins = np.diff(lists, prepend=-1) > 0
    pack_integers(streams, np.where(begins, place, np.diff(place, prepend=0) - 1))
    numbers = np.floor((size - floor) / step).astype(np.int64)[order]
    along = sorted_along(place, counts[lists])
    pack_integers(streams, (2 * numbers + negative[order])[along], least=1)
    tiles = len(counts) // channels
    return {"terms": list(shape.terms), "share": list(shape.share), "tiles": tiles, "active": active is not None,
            "step": step, "floor": floor, "count": len(size)}  # fmt: skip


def unpack_terms(streams: "Reader", record: dict, scale: np.ndarray) -> dict[str, Tensor]:
    """A level's tiles and terms; no network where no tile is left. `scale` [C]."""
    shape, prefix = SparseShape(record["terms"], record["share"]), record["name"]
    tiles, count = record["tiles"], record["count"]
    channels, rows, columns = shape.terms
    state = {}
    if record["active"]:
        state[prefix + "active"] = torch.from_numpy(
            (np.cumsum(unpack_integers(streams, tiles) + 1) - 1).astype(np.int32)
        )
    counts = unpack_integers(streams, tiles * channels).reshape(channels, tiles).T.ravel()
    steps = unpack_integers(streams, count) + 1
    lists = np.repeat(np.arange(tiles * channels), counts)
    total, ends = np.cumsum(steps), np.cumsum(counts)
    place = total - np.concatenate([[0], total])[(ends - counts)[lists]] - 1
    coded = np.empty(count, np.int64)
    coded[sorted_along(place, counts[lists])] = unpack_integers(streams, count, least=1)
    tile, channel = np.divmod(lists, channels)
    index = channel * (rows * columns) + shape.order()[place]
    amplitude = (record["floor"] + ((coded >> 1) + 0.5) * record["step"]) * np.where(coded & 1, -1.0, 1.0)
    values = amplitude / shape.units(scale)[index]
    order = np.argsort(tile * (channels * rows * columns) + index)
    if tiles:
        offset = np.concatenate([[0], ends[channels - 1 :: channels]])
        parts = (torch.from_numpy(part) for part in (values[order], index[order], offset))
        kinds = (torch.float32, index_dtype(channels * rows * columns), torch.int32)
        state |= {prefix + name: part.to(kind) for name, part, kind in zip(SPARSE, parts, kinds, strict=True)}
    return state


def sorted_along(place: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The order of terms by place over the length of their list, in which amplitudes fall at every density."""
    return np.argsort(place * 256 // np.maximum(counts, 1), kind="stable")


def step_of(size: np.ndarray, bits: int) -> float:
    """The step at which the largest of `size` takes `bits`, its sign among them."""
    return float(size.max(initial=0.0)) / (2 ** (bits - 1) - 1) or 1.0


# ---------------------------------------------------------------------------------------------- other parameters


def pack_uniform(streams: "Writer", values: np.ndarray, bits: int) -> float:
    """Multiples of a step, at most half of it away from `values`; returns the step."""
    step = step_of(np.abs(values), bits)
    numbers = np.rint(values / step).astype(np.int64)
    pack_integers(streams, np.where(numbers < 0, -2 * numbers - 1, 2 * numbers))
    return step


def unpack_uniform(streams: "Reader", count: int, step: float) -> np.ndarray:
    coded = unpack_integers(streams, count)
    return np.where(coded & 1, -(coded + 1) // 2, coded // 2) * step


# ------------------------------------------------------------------------------------------------ bytes and streams


class Writer:
    """Collects compressed streams."""

    def __init__(self):
        self.parts: list[bytes] = []

    def add(self, data: bytes, plain: bool = False) -> None:
        self.parts.append(data if plain else compressed(data))


class Reader:
    """Hands the streams back in the order they were added."""

    def __init__(self, data: bytes, sizes: list[int]):
        if sum(sizes) != len(data):
            raise ValueError("its streams are cut short")
        ends = np.cumsum(sizes)
        self.parts = [data[end - size : end] for size, end in zip(sizes, ends, strict=True)][::-1]

    def take(self, plain: bool = False) -> bytes:
        data = self.parts.pop()
        return data if plain else decompressed(data)


def compressed(data: bytes) -> bytes:
    return lzma.compress(data, lzma.FORMAT_RAW, filters=LZMA)


def decompressed(data: bytes) -> bytes:
    return lzma.decompress(data, lzma.FORMAT_RAW, filters=LZMA)


def pack_integers(streams: Writer, values: np.ndarray, least: int = 0) -> None:
    """Non-negative integers: low bits that are mere noise (`least` or more) as they are, the rest compressed bytes."""
    usual = int(np.quantile(values, 0.99)) if len(values) else 0
    low = max(least, usual.bit_length() - 7)
    planes = [np.packbits((values >> bit & 1).astype(bool)).tobytes() for bit in range(low)]
    streams.add(b"".join([bytes([low]), *planes]), plain=True)
    streams.add(to_varints(values >> low))


def unpack_integers(streams: Reader, count: int, least: int = 0) -> np.ndarray:
    """`count` integers, int64."""
    plain = np.frombuffer(streams.take(plain=True), np.uint8)
    low = int(plain[0])
    bits = plain[1:].reshape(low, -(-count // 8))
    values = from_varints(streams.take(), count) << low
    for bit in range(low):
        values |= np.unpackbits(bits[bit], count=count).astype(np.int64) << bit
    return values


def to_varints(values: np.ndarray) -> bytes:
    """LEB128: seven bits a byte, lowest first; the eighth says that more follow."""
    length = np.ones(len(values), np.int64)
    for bits in range(7, 63, 7):
        length += values >= 1 << bits
    out, start = np.zeros(length.sum(), np.uint8), np.cumsum(length) - length
    for place in range(length.max(initial=0)):
        more = np.flatnonzero(length > place)
        last = length[more] == place + 1
        out[start[more] + place] = ((values[more] >> 7 * place) & 127) | np.where(last, 0, 128)
    return out.tobytes()


def from_varints(data: bytes, count: int) -> np.ndarray:
    coded = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(coded < 128)
    if len(ends) != count or (count and ends[-1] != len(coded) - 1):
        raise ValueError(f"a stream holds {len(ends)} numbers, not {count}")
    starts = np.concatenate([[0], ends + 1])[:count]
    values = np.zeros(count, np.int64)
    for place in range(int((ends - starts).max(initial=-1)) + 1):
        more = np.flatnonzero(ends - starts >= place)
        values[more] |= (coded[starts[more] + place].astype(np.int64) & 127) << 7 * place
    return values


def gaps(ascending: np.ndarray) -> np.ndarray:
    return np.diff(ascending, prepend=-1) - 1


def byte_planes(values: np.ndarray) -> bytes:
    """First bytes of all values, then second bytes, ...: exponents compress when they stand together."""
    return values.view(np.uint8).reshape(-1, values.itemsize).T.tobytes()


def from_byte_planes(data: bytes, dtype: np.dtype) -> np.ndarray:
    planes = np.frombuffer(data, np.uint8).reshape(dtype.itemsize, -1)
    return planes.T.copy(order="C").view(dtype).ravel()


def as_tensor(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())
