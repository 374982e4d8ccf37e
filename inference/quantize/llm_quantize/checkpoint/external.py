"""A checkpoint that another program wrote: whether it is complete, and of the model that it was made from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llm_quantize.checkpoint.reader import QuantizedStore
from llm_quantize.errors import InputError, WorkError, one_line
from llm_quantize.formats.base import CheckpointFormat
from llm_quantize.io.manifest import files_below
from llm_quantize.model.source import SourceModel
from llm_quantize.model.weight_files import tensor_files
from llm_quantize.types import QuantScheme

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


# What libraries write beside the weights.
_SIDE_FILES = re.compile(
    r"(config|generation_config|quantize_config|quant_config|quantization_config|tokenizer|tokenizer_config|vocab|"
    r"special_tokens_map|added_tokens|chat_template|\w*processor_config|model\.safetensors\.index)\.json|"
    r"quant_log\.csv|recipe\.yaml|(vocab|merges)\.txt|[\w.-]+\.(model|jinja|tiktoken)|README\.md"
)
HEAD_NAMES = ("lm_head", "embed_out")  # of one and the same output head, by version of transformers


def verify_external(
    directory: Path,
    source: SourceModel,
    form: CheckpointFormat,
    scheme: QuantScheme,
    by: str,
    *,
    trust_remote_code: bool = False,
) -> int:
    """Open every file of `directory` again and check it; returns the bytes of its tensors.

    Every linear of every block must be there in the format `form`, with the shapes that it has, and every other tensor
    of the source with its own shape, a tied output head alone left free; nothing else but biases of zeros; all of it
    finite; and config.json must describe the same model. Beside the weights there may be what libraries write, and side
    files of the source; no links. by: the program that wrote it. Raises WorkError.
    """
    try:
        stored = QuantizedStore(directory)
        files = tensor_files(directory)
    except InputError as error:
        raise WorkError(f"what {by} wrote cannot be read: {error}") from None
    if (stored.format.name, stored.settings.bits) != (form.name, scheme.bits):
        raise WorkError(
            f"{by} wrote {stored.format.name} at {stored.settings.bits} bits instead of {form.name} at {scheme.bits}"
        )
    expected = _expected(source, form, scheme)
    free = _heads(source)
    missing = sorted(set(expected) - set(files) - free)
    if source.tied_head is None and not free & set(files):
        missing.append("the output head")
    if missing:
        raise WorkError(f"{by} left out {missing[0]}: nothing is published")
    # AutoGPTQ gives every linear a bias, of zeros where the model has none; readers leave them out.
    biases = {f"{linear}.bias" for linear in stored.linears} - set(expected)
    extra = sorted(set(files) - set(expected) - free - biases)
    if extra:
        raise WorkError(f"{by} wrote {extra[0]}, which is no tensor of this model: nothing is published")
    total = 0
    for file in sorted(set(files.values())):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118 (not a mapping)
                    tensor = opened.get_tensor(name)
                    total += _check_tensor(name, tensor, expected.get(name), by)
                    if name in biases and bool(tensor.any()):
                        raise WorkError(f"{by} wrote {name}, a bias that the model does not have")
        except SafetensorError as error:
            raise WorkError(f"{file.name} by {by} cannot be read back: {error}") from None
    _check_config(directory, source, by, trust_remote_code)
    for path in files_below(directory):
        name = path.relative_to(directory).as_posix()
        known = path in files.values() or name in source.side_files.digests or _SIDE_FILES.fullmatch(name)
        if not known or path.is_symlink():
            raise WorkError(
                f"{by} wrote {one_line(name, 100)}, which is no file of a checkpoint: nothing is published"
            )
    return total


def _expected(
    source: SourceModel, form: CheckpointFormat, scheme: QuantScheme
) -> dict[str, tuple[bool, tuple[int, ...]]]:
    """Whether each tensor is floating-point, and its shape."""
    expected: dict[str, tuple[bool, tuple[int, ...]]] = {}
    others = source.float_tensors(None)
    for index in range(len(source.blocks)):
        for linear in source.linears(index):
            parts = form.plan(linear.out_features, linear.in_features, scheme, torch.float16)
            for suffix, (dtype, shape) in parts.items():
                expected[f"{source.stored_linear(linear.name)}.{suffix}"] = (dtype.is_floating_point, shape)
        others += source.float_tensors(index)
    for name in others:
        dtype, shape = source.store.describe(name)
        expected[name] = (dtype.is_floating_point, shape)
    return expected


def _heads(source: SourceModel) -> set[str]:
    """Names of the output head: a tied one may be there once more or not, another under any name that it has had."""
    tied = source.tied_head
    return {f"{name}.weight" for name in HEAD_NAMES} | ({tied[0]} if tied is not None else set())


def _check_tensor(
    name: str, tensor: torch.Tensor, expected: tuple[bool, tuple[int, ...]] | None, by: str
) -> int:
    """The tensor's bytes. Raises WorkError."""
    found = (tensor.is_floating_point(), tuple(tensor.shape))
    if expected is not None and found != expected:
        raise WorkError(f"{by} wrote {name} as {tensor.dtype} {found[1]}, not with shape {expected[1]}")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise WorkError(f"{name} by {by} has NaN or infinite values: nothing is published")
    return tensor.nbytes


def _check_config(directory: Path, source: SourceModel, by: str, trust_remote_code: bool) -> None:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        written: dict[str, Any] = config.to_dict()
    except Exception as error:
        raise WorkError(f"config.json by {by} is not usable: {error}") from None
    meant: dict[str, Any] = source.config.to_dict()
    for key in sorted(meant.keys() & written.keys() - _FREE):
        filled = key == "pad_token_id" and meant[key] is None  # GPTQModel gives one to a model that has none
        if meant[key] != written[key] and not filled:
            raise WorkError(
                f"{by} changed {key} in config.json from {meant[key]!r} to {written[key]!r}: nothing is published"
            )
