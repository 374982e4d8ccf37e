"""safetensors files whose content is planned before the first tensor is there, and filled in any order.

A file has its full length and its header from the start, so that it can be opened while it is being filled, holds no
tensor in memory, and does not depend on where the work was interrupted. Byte for byte what `safetensors.torch.
save_file` writes of the same tensors. Layout: 8 bytes of length, a JSON header padded with spaces to 8, the tensors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# In the order in which the library sorts them, widest last; it writes the widest first.
DTYPES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}
NAMES = {name: dtype for dtype, name in DTYPES.items()}
_RANK = {dtype: rank for rank, dtype in enumerate(DTYPES)}


class Planned(NamedTuple):
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Shard:
    """One planned file: its name, its header, and where each tensor begins in it."""

    file: str
    header: bytes
    offsets: dict[str, int]
    size: int


def plan(tensors: Sequence[Planned], shard_bytes: int) -> list[Shard]:
    """Cuts tensors, in their order, into files of at most `shard_bytes` where no tensor is larger than that.

    Errors: `ValueError` for a name twice or a dtype that safetensors does not have.
    """
    if len({t.name for t in tensors}) != len(tensors):
        raise ValueError("a tensor is planned twice")
    parts: list[list[Planned]] = []
    filled = 0
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{tensor.name} is {tensor.dtype}, which safetensors files cannot hold")
        if not parts or filled + tensor.nbytes > shard_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(tensor)
        filled += tensor.nbytes
    if len(parts) == 1:
        return [single("model.safetensors", tensors)]
    return [
        single(f"model-{number:05d}-of-{len(parts):05d}.safetensors", part)
        for number, part in enumerate(parts, 1)
    ]


def single(file: str, tensors: Iterable[Planned]) -> Shard:
    """One file of all `tensors`."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts: dict[str, int] = {}
    end = 0
    for tensor in sorted(tensors, key=lambda t: (-_RANK[t.dtype], t.name)):
        starts[tensor.name] = end
        end += tensor.nbytes
        entries[tensor.name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [starts[tensor.name], end],
        }
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return Shard(file, header, {n: len(header) + start for n, start in starts.items()}, len(header) + end)


def raw(host: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in host memory, without a copy."""
    return memoryview(host.reshape(-1).view(torch.uint8).numpy().data)


def create(shard: Shard, directory: Path) -> int:
    """Makes the file with its header, at its full length; returns the open descriptor."""
    handle = os.open(directory / shard.file, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    os.ftruncate(handle, shard.size)
    write_at(handle, memoryview(shard.header), 0)
    return handle


def write_at(handle: int, data: memoryview, offset: int) -> None:
    """All of `data` at `offset`: the system may write less at once."""
    while data:
        count = os.pwrite(handle, data[: 1 << 30], offset)
        data, offset = data[count:], offset + count
