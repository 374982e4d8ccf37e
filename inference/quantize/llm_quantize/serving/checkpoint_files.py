"""Reads the files of a checkpoint that may come from anyone: JSON, the shard index, safetensors headers.

Every file must lie in the checkpoint's directory, have a plausible size and agree with itself. Weights are never
read; `read_integers` reads the small integer tensors that describe them. Knows nothing of quantization.
"""

from __future__ import annotations

import json
import struct
import sys
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_quantize.serving.refusal import Refusal

MAX_JSON_BYTES = 64 << 20
MAX_HEADER_BYTES = 100 << 20  # the limit of the safetensors library
# Bytes per element. The size of a tensor of another dtype is not checked: vLLM knows whether it reads that dtype.
DTYPE_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file: its dtype as the header names it, and its bytes `start` to `end` of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def stays_inside(path: Path) -> bool:
    """Tell whether `path`, with links resolved, is a regular file of its own directory.

    A snapshot in a hub cache holds links into `blobs` of the same repository, which count as its own.
    """
    home, real = path.parent.resolve(), path.resolve()
    roots = [home]
    if home.parent.name == "snapshots":
        roots.append(home.parent.parent / "blobs")
    return real.is_file() and any(root in real.parents for root in roots)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`. Raises `Refusal` where there is none, or a file far too large."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError("it is no file, or far too large")
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise Refusal(f"{path} cannot be read ({error}): copy or download the checkpoint again") from error
    if not isinstance(value, dict):
        raise Refusal(f"{path} does not hold a JSON object: copy or download the checkpoint again")
    return value


def read_safetensors_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one safetensors file by name.

    The file is an 8-byte length, a JSON header of that length, then the tensors' bytes. Raises `Refusal` unless the
    tensors fill those bytes without overlap or hole, each with as many bytes as its dtype and shape make.
    """
    try:
        file_size = path.stat().st_size
        with path.open("rb") as file:
            header_size = struct.unpack("<Q", file.read(8))[0]
            if header_size > min(file_size - 8, MAX_HEADER_BYTES):
                raise ValueError("it is cut short")
            header = json.loads(file.read(header_size))
        data_start = 8 + header_size
        tensors = {
            name: _header_entry(path, entry, data_start)
            for name, entry in header.items()
            if name != "__metadata__"
        }
        end = data_start
        for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.end)):
            if tensor.start != end or tensor.end < end:
                raise ValueError("its tensors overlap or leave holes")
            end = tensor.end
        if end != file_size:
            raise ValueError("it is cut short" if end > file_size else "its tensors end before it does")
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        struct.error,
    ) as error:
        raise Refusal(
            f"{path} is not a whole safetensors file ({error}): copy or download the checkpoint again"
        ) from error
    return tensors


def _header_entry(path: Path, entry: Any, data_start: int) -> StoredTensor:
    """Return the tensor that one `entry` of a header describes; `data_start` is where the file's data start.

    Raises `ValueError` for sizes that cannot be, and what Python raises for an entry of another form.
    """
    start, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(n) is int and n >= 0 for n in (start, end, *shape)):
        raise ValueError("it has sizes that are none")
    count = 1
    for n in shape:
        count *= n
    if entry["dtype"] in DTYPE_BYTES and count * DTYPE_BYTES[entry["dtype"]] != end - start:
        raise ValueError("its sizes contradict each other")
    return StoredTensor(path, entry["dtype"], shape, data_start + start, data_start + end)


def read_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Return every tensor of the safetensors files in `directory` by name.

    Empty where the weights are in files of another kind. Raises `Refusal` where there are no weights at all, a shard
    is missing or damaged, or a shard lies outside the directory.
    """
    tensors: dict[str, StoredTensor] = {}
    for shard in _shard_names(directory):
        if not stays_inside(directory / shard):
            raise Refusal(f"{shard} in {directory} is a link that leads out of it: put a copy in its place")
        tensors.update(read_safetensors_header(directory / shard))
    if not tensors and not any(next(directory.glob(f"*.{kind}"), None) for kind in ("bin", "pt", "gguf")):
        raise Refusal(f"{directory} holds no weights (*.safetensors): give a model's directory")
    return tensors


def _shard_names(directory: Path) -> list[str]:
    """Return the names of the safetensors files in `directory`: those of the index, or without one all.

    Raises `Refusal` where the index names anything but a file beside it, before that name is used as a path.
    """
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(path.name for path in directory.glob("*.safetensors"))
    weight_map = read_json(index).get("weight_map")
    named = list(weight_map.values()) if isinstance(weight_map, dict) else []
    for shard in named:
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise Refusal(f"{index} names a shard that is no file beside it: {shard!r}")
    shards = sorted(set(named))
    for shard in shards:
        if "\0" in shard or not (directory / shard).is_file():
            raise Refusal(f"{directory / shard} is missing: copy or download the checkpoint again")
    return shards


def read_integers(tensor: StoredTensor) -> array[int]:
    """Return the values of an int32 or int64 tensor in the order of its bytes. Raises `ValueError` for others."""
    if tensor.dtype not in ("I32", "I64"):
        raise ValueError(f"indices of type {tensor.dtype}")
    values = array({"I32": "i", "I64": "q"}[tensor.dtype])
    with tensor.file.open("rb") as file:
        file.seek(tensor.start)
        values.frombytes(file.read(tensor.end - tensor.start))
    if sys.byteorder == "big":
        values.byteswap()
    return values
