"""A checkpoint that another program wrote: whether it is complete, and of the model that it was made from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llm_quantize.checkpoint.reader import dequantized
from llm_quantize.errors import InputError, WorkError
from llm_quantize.formats import packing
from llm_quantize.model.source import HEAD_NAMES, Source, tensor_files

# What a library may set as it likes in config.json: it says nothing of how the model computes.
_FREE = {
    "_name_or_path",
    "architectures",
    "auto_map",
    "dtype",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def verify(
    directory: Path,
    source: Source,
    layout: str,
    bits: int,
    group_size: int,
    symmetric: bool,
    by: str,
    *,
    trust: bool = False,
) -> int:
    """Opens every file of `directory` again; the bytes of its tensors.

    Every linear of every block must be there in `layout`, with the shapes that it has, and every other tensor of
    the source with its own shape, a tied output head alone left free; nothing else but biases of zeros; all of it
    finite; and config.json must describe the same model. `by` names who wrote it; `trust`: code
    that comes with the model may run. Errors: `WorkError`.
    """
    try:
        saved = dequantized(directory)
        files = tensor_files(directory)
    except InputError as error:
        raise WorkError(f"what {by} wrote cannot be read: {error}") from None
    if (saved.layout, saved.bits) != (layout, bits):
        raise WorkError(f"{by} wrote {saved.layout} at {saved.bits} bits instead of {layout} at {bits}")
    expected = _expected(source, layout, bits, group_size, symmetric)
    free = _heads(source)
    missing = sorted(set(expected) - set(files) - free)
    if source.tied_head is None and not free & set(files):
        missing.append("the output head")
    if missing:
        raise WorkError(f"{by} left out {missing[0]}: nothing is published")
    # AutoGPTQ gives every linear a bias, of zeros where the model has none; readers leave them out.
    biases = {f"{linear}.bias" for linear in saved.linears} - set(expected)
    extra = sorted(set(files) - set(expected) - free - biases)
    if extra:
        raise WorkError(f"{by} wrote {extra[0]}, which is no tensor of this model: nothing is published")
    total = 0
    for file in sorted(set(files.values())):
        try:
            with safe_open(file, framework="pt") as stored:
                for name in stored.keys():  # noqa: SIM118 (not a mapping)
                    tensor = stored.get_tensor(name)
                    total += _look(name, tensor, expected.get(name), by)
                    if name in biases and bool(tensor.any()):
                        raise WorkError(f"{by} wrote {name}, a bias that the model does not have")
        except SafetensorError as error:
            raise WorkError(f"{file.name} by {by} cannot be read back: {error}") from None
    _same_model(directory, source, by, trust)
    return total


def _expected(
    source: Source, layout: str, bits: int, group_size: int, symmetric: bool
) -> dict[str, tuple[bool, tuple[int, ...]]]:
    """Tensor -> whether it is floating-point, and its shape."""
    expected: dict[str, tuple[bool, tuple[int, ...]]] = {}
    for index in range(len(source.blocks)):
        for linear in source.linears(index):
            parts = packing.planned(
                layout,
                linear.out_features,
                linear.in_features,
                group_size,
                bits,
                scale_dtype=torch.float16,
                symmetric=symmetric,
            )
            for suffix, (dtype, shape) in parts.items():
                expected[f"{source.stored_name(linear.name)}.{suffix}"] = (dtype.is_floating_point, shape)
    for name in source.outside():
        dtype, shape = source.describe(name)
        expected[name] = (dtype.is_floating_point, shape)
    return expected


def _heads(source: Source) -> set[str]:
    """Names of the output head: a tied one may be there once more or not, another under any name that it has had."""
    tied = source.tied_head
    return {f"{name}.weight" for name in HEAD_NAMES} | ({tied[0]} if tied is not None else set())


def _look(name: str, tensor: torch.Tensor, expected: tuple[bool, tuple[int, ...]] | None, by: str) -> int:
    found = (tensor.is_floating_point(), tuple(tensor.shape))
    if expected is not None and found != expected:
        raise WorkError(f"{by} wrote {name} as {tensor.dtype} {found[1]}, not with shape {expected[1]}")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise WorkError(f"{name} by {by} has NaN or infinite values: nothing is published")
    return tensor.nbytes


def _same_model(directory: Path, source: Source, by: str, trust: bool) -> None:
    from transformers import AutoConfig

    try:
        written: dict[str, Any] = AutoConfig.from_pretrained(directory, trust_remote_code=trust).to_dict()
    except Exception as error:
        raise WorkError(f"config.json by {by} is not usable: {error}") from None
    meant: dict[str, Any] = source.config.to_dict()
    for key in sorted(meant.keys() & written.keys() - _FREE):
        filled = key == "pad_token_id" and meant[key] is None  # GPTQModel gives one to a model that has none
        if meant[key] != written[key] and not filled:
            raise WorkError(
                f"{by} changed {key} in config.json from {meant[key]!r} to {written[key]!r}: nothing is published"
            )
