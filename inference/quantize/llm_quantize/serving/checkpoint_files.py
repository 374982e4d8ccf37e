"""Reads the files of a checkpoint that may come from anyone: JSON, the shard index, safetensors headers.

Every file must lie in the checkpoint's directory, have a plausible size and agree with itself. Weights are never
read; `read_integers` reads the small integer tensors that describe them. Knows nothing of quantization.
"""

from __future__ import annotations

import json
import math
import os
import struct
import sys
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_quantize.serving.refusal import Refusal

MAX_JSON_BYTES = 64 << 20
MAX_HEADER_BYTES = 100 << 20  # the limit of the safetensors library
# Python reads and multiplies long integers in quadratic time, so a longer one is refused before it becomes a number.
MAX_INTEGER_DIGITS = 1000
MAX_DIMENSIONS = 64  # as many as a tensor of PyTorch has
INDEX = "model.safetensors.index.json"
MAX_FOLDERS = 1000  # of a checkpoint, which has a handful
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
    # `Path.resolve` raises on a link to itself, which `realpath` returns as it is.
    home, real = Path(os.path.realpath(path.parent)), Path(os.path.realpath(path))
    roots = [home]
    if home.parent.name == "snapshots":
        roots.append(home.parent.parent / "blobs")
    return real.is_file() and any(root in real.parents for root in roots)


def parse_json(text: bytes) -> Any:
    """Return the value of the JSON in `text`, UTF-8. Raises `ValueError` for other text, and for absurd numbers."""
    try:
        return json.loads(text.decode("utf-8"), parse_int=_integer)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _integer(digits: str) -> int:
    if len(digits) > MAX_INTEGER_DIGITS:
        raise ValueError(f"it has a number of {len(digits)} digits")
    return int(digits)


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in `path`. Raises `Refusal` where there is none, or a file far too large."""
    try:
        if not path.is_file() or path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError("it is no file, or far too large")
        value = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
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
            header = parse_json(file.read(header_size))
        if not isinstance(header, dict):
            raise ValueError("its header is no JSON object")
        tensors = {
            name: _header_entry(path, entry, 8 + header_size, file_size)
            for name, entry in header.items()
            if name != "__metadata__"
        }
        end = 8 + header_size
        for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.start, tensor.end)):
            if tensor.start != end or tensor.end < end:
                raise ValueError("its tensors overlap or leave holes")
            end = tensor.end
        if end != file_size:
            raise ValueError("it is cut short" if end > file_size else "its tensors end before it does")
    except (OSError, ValueError, struct.error) as error:
        raise Refusal(
            f"{path} is not a whole safetensors file ({error}): copy or download the checkpoint again"
        ) from error
    return tensors


def _header_entry(path: Path, entry: Any, data_start: int, file_size: int) -> StoredTensor:
    """Return the tensor that one `entry` of a header describes; `data_start` is where the file's data start.

    Raises `ValueError` for an entry of another form, and for sizes that cannot be.
    """
    if not isinstance(entry, dict):
        raise ValueError("its header has an entry that is none")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or not isinstance(shape, list) or not isinstance(offsets, list):
        raise ValueError("its header has an entry that is none")
    if len(offsets) != 2 or not all(type(n) is int and n >= 0 for n in (*offsets, *shape)):
        raise ValueError("it has sizes that are none")
    start, end = offsets
    if not start <= end <= file_size - data_start:
        raise ValueError("it is cut short")
    # An element has four bits or more, so no size can exceed twice the file's; one that does is not multiplied.
    if len(shape) > MAX_DIMENSIONS or (0 not in shape and any(n > 2 * file_size for n in shape)):
        raise ValueError("its sizes contradict each other")
    count = math.prod(shape)
    if dtype in DTYPE_BYTES and count * DTYPE_BYTES[dtype] != end - start:
        raise ValueError("its sizes contradict each other")
    return StoredTensor(path, dtype, tuple(shape), data_start + start, data_start + end)


def read_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Return every tensor by name of the safetensors files in `directory` that vLLM loads.

    Those are the files that the index names, without an index all. Empty where the weights are in files of another
    kind. Raises `Refusal` where there are no weights at all, a shard is missing or damaged, or a shard lies outside
    the directory. Source: `DefaultModelLoader._prepare_weights` in vLLM's `model_executor/model_loader/`.
    """
    has_index = (directory / INDEX).is_file()
    shards = _indexed_shards(directory / INDEX) if has_index else safetensors_files(directory)
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        check_is_own_file(directory / shard)
        try:
            tensors.update(read_safetensors_header(directory / shard))
        except Refusal as refusal:
            if has_index or len(shards) == 1:
                raise
            raise Refusal(
                f"{refusal}, or move the file away, since vLLM reads all without {INDEX}"
            ) from refusal
    if not tensors and not any(next(directory.glob(f"*.{kind}"), None) for kind in ("bin", "pt", "gguf")):
        raise Refusal(f"{directory} holds no weights (*.safetensors): give a model's directory")
    return tensors


def check_is_own_file(path: Path) -> None:
    """Refuse a weight file that is no regular file, or leads out of its directory."""
    if not stays_inside(path):
        reason = "no regular file"
        if path.is_symlink():
            reason = "a link that leads out of it" if path.exists() else "a link to nothing"
        raise Refusal(f"{path.name} in {path.parent} is {reason}: put a copy in its place")


def safetensors_files(directory: Path) -> list[str]:
    """Return the names of the safetensors files in `directory`. As for vLLM, hidden ones do not count."""
    return sorted(path.name for path in directory.glob("*.safetensors") if not path.name.startswith("."))


def _indexed_shards(index: Path) -> list[str]:
    """Return the names of the files that the shard `index` names.

    Raises `Refusal` where it names anything but a file beside it, before that name is used as a path.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise Refusal(f"{index} has no weight_map: copy or download the checkpoint again")
    named = list(weight_map.values())
    for shard in named:
        if (
            not isinstance(shard, str)
            or "\0" in shard
            or Path(shard).name != shard
            or not shard.endswith(".safetensors")
        ):
            raise Refusal(f"{index} names a shard that is no file beside it: {shard!r}")
    shards = sorted(set(named))
    for shard in shards:
        if not os.path.exists(index.parent / shard):  # noqa: PTH110 `Path.exists` raises for a name that is too long
            raise Refusal(f"{index.parent / shard} is missing: copy or download the checkpoint again")
    return shards


def unread_dtypes(directory: Path, read: set[str]) -> dict[str, str]:
    """Return the dtype of every tensor in the safetensors files of `directory` that are not among `read`.

    vLLM reads no weights from them, but their headers. Raises `Refusal` where a header cannot be read. Source:
    `get_safetensors_params_metadata` in vLLM's `transformers_utils/config.py`.
    """
    dtypes: dict[str, str] = {}
    for path in sorted(directory.glob("*.safetensors")):
        if path.name in read or not path.is_file():
            continue
        try:
            with path.open("rb") as file:
                size = struct.unpack("<Q", file.read(8))[0]
                if size > MAX_HEADER_BYTES:
                    raise ValueError("its header is far too large")
                header = parse_json(file.read(size))
            if not isinstance(header, dict):
                raise ValueError("its header is no JSON object")
        except (OSError, ValueError, struct.error) as error:
            raise Refusal(
                f"{path} is not a whole safetensors file ({error}): vLLM reads the headers of all of them, also of one "
                "that the index does not name: move it away"
            ) from error
        entries = ((name, entry) for name, entry in header.items() if name != "__metadata__")
        dtypes.update({n: str(entry.get("dtype")) for n, entry in entries if isinstance(entry, dict)})
    return dtypes


def has_consolidated_weights(directory: Path) -> bool:
    """Tell whether a `consolidated*.safetensors` lies in `directory` or below it.

    Where one does, vLLM takes the checkpoint for one of Mistral's own format and reads nothing else. Source:
    `list_filtered_repo_files` in vLLM's `transformers_utils/repo_utils.py`.
    """
    for count, (_, folders, files) in enumerate(os.walk(directory)):
        if any(name.startswith("consolidated") and name.endswith(".safetensors") for name in files):
            return True
        if count >= MAX_FOLDERS:
            folders.clear()
    return False


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
