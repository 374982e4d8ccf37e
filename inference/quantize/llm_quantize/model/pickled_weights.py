"""Pickled weights, converted to safetensors without running their code."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from llm_quantize.errors import InputError, WorkError, one_line
from llm_quantize.io.safetensors_files import DTYPES
from llm_quantize.io.untrusted import check_files, entries_of

# A tensor may stand in a file under several names: of a tied output head, or of layers that share their weights.
MOST_NAMES = 4


def convert_pickles(directory: Path, into: Path) -> Path:
    """Write the weights of a pickle checkpoint as safetensors into the directory `into`, and return that.

    Pickles are read with `weights_only`, one shard at a time, so that memory holds one.

    Raises InputError for what holds no weights, or tensors that unfold to more than the file holds; WorkError where the
    copy cannot be stored.
    """
    from safetensors.torch import save_file

    weight_map: dict[str, str] = {}
    check_files(directory)
    shards = [p for p in entries_of(directory) if p.suffix == ".bin" and p.name.startswith("pytorch_model")]
    if not shards:
        raise InputError(f"{directory} has no pytorch_model*.bin to convert")
    into.mkdir(parents=True, exist_ok=True)
    for number, shard in enumerate(shards):
        tensors = _unpickled(shard)
        name = f"model-{number:05d}.safetensors"
        try:
            save_file(tensors, into / name, metadata={"format": "pt"})
        except (OSError, SafetensorError) as error:
            raise WorkError(
                f"cannot store a copy of {shard.name} in {into.parent}: {one_line(error)}: set TMPDIR elsewhere"
            ) from None
        # As old as what it was made from, by which an interrupted run knows the model again.
        os.utime(into / name, ns=(shard.stat().st_atime_ns, shard.stat().st_mtime_ns))
        weight_map.update(dict.fromkeys(tensors, name))
    (into / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return into


def _unpickled(shard: Path) -> dict[str, Tensor]:
    _check_stored(shard)
    try:
        state = torch.load(shard, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise InputError(
            f"cannot read {shard.name} without running its code: {type(error).__name__}"
        ) from None
    tensors = (
        {str(k): v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}
    )
    if not tensors:
        raise InputError(f"{shard.name} holds no weights by name: convert it with the program that wrote it")
    left = MOST_NAMES * shard.stat().st_size
    for name, tensor in tensors.items():
        what = _what_unfolds(tensor)
        if what is not None:
            raise InputError(
                f"{one_line(name, 100)} in {shard.name} is {what}: convert it with the program that wrote it"
            )
        left -= tensor.nbytes
        if left < 0:
            raise InputError(
                f"{shard.name} holds the same bytes under more than {MOST_NAMES} names: convert it with the program "
                "that wrote it"
            )
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def _check_stored(shard: Path) -> None:
    """Refuse an archive with packed parts, which may unpack to any size. PyTorch stores them as they are."""
    try:
        with zipfile.ZipFile(shard) as archive:
            packed = any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist())
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return  # told by the reader
    if packed:
        raise InputError(
            f"{shard.name} is a packed archive, which PyTorch does not write: save it again with torch.save"
        )


def _what_unfolds(tensor: Tensor) -> str | None:
    """What a tensor is that takes more memory than it has in its file, or none that can be told; None for others."""
    if tensor.layout != torch.strided:
        return "sparse"
    if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.is_quantized or tensor.device.type != "cpu":
        return "no plain tensor"
    if tensor.dtype not in DTYPES:
        return f"of {tensor.dtype}"
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        return "expanded (larger than what is stored of it)"
    return None
