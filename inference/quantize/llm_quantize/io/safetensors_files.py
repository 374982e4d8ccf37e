"""Plan safetensors files before the first tensor exists, then fill them in any order.

A file has its full length and its header from the start. So it can be opened while it is being filled, no tensor has
to wait in memory, and its bytes do not depend on where a run was interrupted. They equal what
`safetensors.torch.save_file` writes for the same tensors. The format: the length of the header (8 bytes, little
endian), the header (JSON, padded with spaces to a multiple of 8), the tensors.
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

# The format's name of each dtype, in the library's sort order. In a file, the tensors of later dtypes come first.
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


class PlannedTensor(NamedTuple):
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return the size of the tensor's data in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A planned file: its name, its header, the offset of each tensor and its size, in bytes.

    Offsets count from the start of the file.
    """

    file: str
    header: bytes
    offsets: dict[str, int]
    size: int


def plan_shards(tensors: Sequence[PlannedTensor], shard_bytes: int) -> list[ShardFile]:
    """Split tensors, in their order, into files of at most `shard_bytes` bytes of data.

    A tensor larger than `shard_bytes` has a file of its own. The files are named as transformers names them.

    Raises ValueError: a name occurs twice, or safetensors has no such dtype.
    """
    if len({t.name for t in tensors}) != len(tensors):
        raise ValueError("a tensor is planned twice")
    parts: list[list[PlannedTensor]] = []
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
        return [plan_single("model.safetensors", tensors)]
    return [
        plan_single(f"model-{number:05d}-of-{len(parts):05d}.safetensors", part)
        for number, part in enumerate(parts, 1)
    ]


def plan_single(file: str, tensors: Iterable[PlannedTensor]) -> ShardFile:
    """Plan one file, named `file`, that holds all `tensors`."""
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
    return ShardFile(file, header, {n: len(header) + start for n, start in starts.items()}, len(header) + end)


def raw_bytes(host: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor in host memory, without a copy."""
    return memoryview(host.reshape(-1).view(torch.uint8).numpy().data)


def create(shard: ShardFile, directory: Path) -> int:
    """Create the file with its header and full length in `directory`; return the open descriptor."""
    handle = os.open(directory / shard.file, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
    os.ftruncate(handle, shard.size)
    write_at(handle, memoryview(shard.header), 0)
    return handle


def write_at(handle: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at byte `offset`, in several calls where the system writes less than asked."""
    while data:
        count = os.pwrite(handle, data[: 1 << 30], offset)
        data, offset = data[count:], offset + count
