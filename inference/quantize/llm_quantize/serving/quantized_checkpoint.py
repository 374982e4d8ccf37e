"""What is quantized in a checkpoint: its quantization settings and its quantized linears.

Reads both as they are stored. Knows nothing of what vLLM accepts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_quantize.serving.checkpoint_files import StoredTensor, read_integers, read_json, read_tensors
from llm_quantize.serving.refusal import Refusal

# Files in which older versions of AutoGPTQ and AutoAWQ keep the settings, each with the method that it implies.
SIDE_FILES = (("quantize_config.json", "gptq"), ("quant_config.json", "awq"))


@dataclass(frozen=True)
class QuantizationSettings:
    """The quantization settings of a checkpoint as they are stored, and the name of the file that holds them."""

    values: dict[str, Any]
    file_name: str


@dataclass(frozen=True)
class Checkpoint:
    """A model's directory: its config, its quantization settings (None: not quantized) and its tensors by name."""

    directory: Path
    config: dict[str, Any]
    quantization: QuantizationSettings | None
    tensors: dict[str, StoredTensor]


@dataclass(frozen=True)
class QuantizedLinear:
    """A quantized linear layer with `groups` groups of input channels.

    `g_idx` is the tensor that holds the group of each input channel; None where the file has none.
    """

    name: str
    out_features: int
    in_features: int
    groups: int
    g_idx: StoredTensor | None = None

    @property
    def group_size(self) -> int:
        """The input channels of a group; the last group may have fewer."""
        return -(-self.in_features // self.groups)


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a model's config that describes its language model, which multimodal models nest."""
    text = config.get("text_config")
    return text if isinstance(text, dict) else config


def find_quantization(directory: Path, config: dict[str, Any]) -> QuantizationSettings | None:
    """Return the quantization settings of the model in `directory`, None where there are none.

    They are looked for where vLLM looks: in `config.json`, its text config, then the side files. Source: vLLM's
    `config/model.py` and `model_executor/model_loader/weight_utils.py`.
    """
    for holder in (config, text_config(config)):
        for key in ("quantization_config", "compression_config"):
            if isinstance(holder.get(key), dict):
                return QuantizationSettings(holder[key], "config.json")
    for file_name, method in SIDE_FILES:
        if (directory / file_name).is_file():
            values = {"quant_method": method, **read_json(directory / file_name)}
            return QuantizationSettings(values, file_name)
    return None


def read_checkpoint(directory: Path) -> Checkpoint:
    """Return the checkpoint in `directory`, which has a `config.json`. Raises `Refusal` where a file is damaged."""
    config = read_json(directory / "config.json")
    quantization = find_quantization(directory, config)
    tensors = read_tensors(directory)
    is_side_file = quantization is not None and quantization.file_name != "config.json"
    if is_side_file and tensors and not any(name.endswith(".qweight") for name in tensors):
        quantization = (
            None  # the side file was copied from another checkpoint: these weights are not quantized
        )
    return Checkpoint(directory, config, quantization, tensors)


def quantized_linears(method: str, bits: int, tensors: dict[str, StoredTensor]) -> Iterator[QuantizedLinear]:
    """Yield the quantized linears among `tensors`, which `method` stores with `bits` bits.

    Experts are left out: vLLM joins them by rules of their own. Raises `Refusal` where scales are missing, and
    `ValueError`, `LookupError` or `OSError` where a stored shape cannot be read.
    """
    is_compressed_tensors = method == "compressed-tensors"
    weight_suffix = ".weight_packed" if is_compressed_tensors else ".qweight"
    scale_suffix = ".weight_scale" if is_compressed_tensors else ".scales"
    for key, weight in tensors.items():
        if not key.endswith(weight_suffix) or ".experts." in key or len(weight.shape) != 2:
            continue
        name = key[: -len(weight_suffix)]
        rows, columns = weight.shape
        scales = tensors.get(name + scale_suffix)
        if scales is None or not scales.shape or 0 in scales.shape:
            raise Refusal(f"{name} has no scales: the checkpoint is damaged")
        if method == "awq":
            yield QuantizedLinear(name, columns * 32 // bits, rows, scales.shape[0])
        elif method == "gptq":
            g_idx = tensors.get(f"{name}.g_idx")
            yield QuantizedLinear(name, columns, rows * 32 // bits, scales.shape[0], g_idx)
        else:
            # The packed width is rounded up to whole words, so the true one is stored beside it.
            shape = tensors.get(f"{name}.weight_shape")
            in_features = read_integers(shape)[1] if shape is not None else columns * 32 // bits
            yield QuantizedLinear(name, rows, in_features, scales.shape[1] if len(scales.shape) > 1 else 1)
