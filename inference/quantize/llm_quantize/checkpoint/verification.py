"""What was written, read back and compared with what was handed in."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm_quantize.checkpoint.writer import CheckpointWriter, digest
from llm_quantize.errors import WorkError
from llm_quantize.formats.base import CheckpointFormat
from llm_quantize.io.atomic_directory import fsync_path, write_error
from llm_quantize.io.safetensors_files import ShardFile

READERS = 4  # threads
PIECE = 1 << 22  # values looked at together


def verify_written(
    writer: CheckpointWriter,
    form: CheckpointFormat,
    settings: dict[str, Any],
    device: torch.device | str = "cpu",
) -> None:
    """Wait for all writes, read every file back, compare it with what was handed in, and make it durable.

    Every tensor must have its digest and finite values. The layers that were remembered are unpacked on `device`, as
    `settings` (the published `quantization_config`) says. From then on the atomic directory knows what it must publish.
    Raises WorkError.
    """
    writer.wait()
    missing = set(writer.planned) - set(writer.digests)
    if missing:
        raise WorkError(f"{min(missing)} was never written: report this as a fault of the program")
    packed: dict[str, dict[str, Tensor]] = {layer: {} for layer in writer.layers}
    for shard in writer.shards:
        for name, tensor in _read_shard(writer, shard).items():
            layer, _, suffix = name.rpartition(".")
            if layer in packed and suffix in form.parts:
                packed[layer][suffix] = tensor
    for layer, parts in packed.items():
        _compare_layer(layer, parts, writer.layers[layer], form, settings, device)
    try:
        fsync_path(writer.directory)
    except OSError as error:
        raise write_error(error, writer.directory.parent) from None
    writer.settle()


def _read_shard(writer: CheckpointWriter, shard: ShardFile) -> dict[str, Tensor]:
    """The tensors of a file, each compared with its digest."""
    try:
        with (
            safe_open(writer.directory / shard.file, framework="pt") as stored,
            ThreadPoolExecutor(READERS, thread_name_prefix="read-back") as readers,
        ):
            found = set(stored.keys())
            for name in shard.offsets:
                if name not in found:
                    raise WorkError(f"{name} is missing in {shard.file}: check the disk and run again")
            tensors = {name: stored.get_tensor(name) for name in shard.offsets}
            compared = [
                readers.submit(_compare, writer, name, tensor, shard.file) for name, tensor in tensors.items()
            ]
            try:
                for future in compared:
                    future.result()
            finally:
                readers.shutdown(wait=True, cancel_futures=True)
            return tensors
    except (SafetensorError, OSError) as error:
        raise WorkError(f"{shard.file} cannot be read back ({error}): check the disk and run again") from None


def _compare(writer: CheckpointWriter, name: str, tensor: Tensor, file: str) -> None:
    planned = writer.planned[name]
    if (tensor.dtype, tuple(tensor.shape)) != (planned.dtype, planned.shape):
        raise WorkError(
            f"{name} in {file} is {tensor.dtype} {tuple(tensor.shape)}, not {planned.dtype} "
            f"{planned.shape}: check the disk and run again"
        )
    if digest(tensor) != writer.digests[name]:
        raise WorkError(f"{name} in {file} differs from what was written: check the disk and run again")
    # In pieces: what is asked of each value takes memory, of an embedding more than is held of it.
    if tensor.is_floating_point() and not all(
        bool(torch.isfinite(piece).all()) for piece in torch.split(tensor.reshape(-1), PIECE)
    ):
        raise WorkError(f"{name} has NaN or infinite values: the checkpoint is not published")


def _compare_layer(
    layer: str,
    parts: dict[str, Tensor],
    expected: list[str],
    form: CheckpointFormat,
    settings: dict[str, Any],
    device: torch.device | str,
) -> None:
    try:
        read = form.unpack(
            {suffix: tensor.to(device) for suffix, tensor in parts.items()}, form.stored_settings(settings)
        )
    except (KeyError, ValueError) as error:
        raise WorkError(f"{layer} cannot be unpacked from the files written: {error}") from None
    found = (read.q, read.scale, read.zero)
    for what, tensor, wanted in zip(("integers", "scales", "zero points"), found, expected, strict=True):
        if digest(tensor.cpu().contiguous()) != wanted:
            raise WorkError(f"{layer}: the {what} in the files are not those that were computed")
