"""What is quantized in a checkpoint: its quantization settings and its quantized linears.

Reads both as they are stored. Knows nothing of what vLLM accepts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_quantize.serving.checkpoint_files import (
    StoredTensor,
    read_integers,
    read_json,
    read_tensors,
    unread_dtypes,
)
from llm_quantize.serving.refusal import Refusal

# Files in which older versions of AutoGPTQ and AutoAWQ keep the settings, each with the method that it implies.
SIDE_FILES = (("quantize_config.json", "gptq"), ("quant_config.json", "awq"))
SETTINGS_KEYS = ("quantization_config", "compression_config")
MODELOPT_FILE = "hf_quant_config.json"
# The tensor by which a quantized linear is known, by the method; a linear of gptq and awq looks alike in this.
WEIGHT_SUFFIXES = {"awq": ".qweight", "gptq": ".qweight", "compressed-tensors": ".weight_packed"}
# The other tensors of a quantized linear, which mean nothing without it.
PART_SUFFIXES = {
    "awq": (".qzeros", ".scales"),
    "gptq": (".qzeros", ".scales", ".g_idx"),
    "compressed-tensors": (".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx"),
}
INTEGER_DTYPES = ("I32", "U32", "I64")
MAX_NESTING = 8  # of objects in config.json in which settings are looked for


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

    def dtypes(self) -> dict[str, str]:
        """Return the dtype of every tensor by which vLLM finds what is float.

        vLLM reads the headers of all safetensors files for it, also of those that it does not load. Raises `Refusal`
        where one of those cannot be read.
        """
        dtypes = {name: tensor.dtype for name, tensor in self.tensors.items()}
        return {**unread_dtypes(self.directory, {t.file.name for t in self.tensors.values()}), **dtypes}


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

    @property
    def is_expert(self) -> bool:
        """Whether vLLM joins it with the other experts of its layer, by rules of their own."""
        return ".experts." in self.name


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a model's config that describes its language model, which multimodal models nest.

    Source: `_CONFIG_ATTRS_MAPPING` in vLLM's `transformers_utils/config.py`, which makes an `llm_config` the
    `text_config` where there is none, and `DeepseekVLV2Config`, which does so with `language_config`.
    """
    keys = ["text_config", "llm_config"]
    if config.get("model_type") == "deepseek_vl_v2":
        keys = ["language_config"]
    found = next((config[key] for key in keys if key in config), None)
    return found if isinstance(found, dict) else config


def find_quantization(directory: Path, config: dict[str, Any]) -> QuantizationSettings | None:
    """Return the quantization settings of the model in `directory` that vLLM finds in its config, else None.

    Source: `ModelArchConfigConvertorBase.get_quantization_config` in vLLM's
    `transformers_utils/model_arch_config_convertor.py`, and `get_config` in its `config.py`. Raises `Refusal` for
    settings that are no object.
    """
    places = [(config, "quantization_config"), (config, "compression_config")]
    text = text_config(config)
    if text is not config:
        places.append((text, "quantization_config"))
    for number, (holder, key) in enumerate(places):
        values = holder.get(key)
        if values is None or values == {}:
            # ModelOpt's file comes second: vLLM reads it where config.json has no `quantization_config` of its own.
            if number == 0 and (directory / MODELOPT_FILE).is_file():
                return QuantizationSettings(
                    {"quant_method": "modelopt", **read_json(directory / MODELOPT_FILE)}, MODELOPT_FILE
                )
            continue
        if not isinstance(values, dict):
            raise Refusal(f"config.json has a {key} that is no object: copy or download the checkpoint again")
        return QuantizationSettings(values, "config.json")
    return None


def find_side_file(directory: Path) -> QuantizationSettings | None:
    """Return the quantization settings in a side file of AutoGPTQ or AutoAWQ, None where there is none."""
    for file_name, method in SIDE_FILES:
        if (directory / file_name).is_file():
            return QuantizationSettings(
                {"quant_method": method, **read_json(directory / file_name)}, file_name
            )
    return None


def unseen_settings(config: dict[str, Any]) -> str | None:
    """Return the path in `config` of quantization settings that vLLM does not see there, None without any."""
    places: list[tuple[str, dict[str, Any]]] = [("", config)]
    for _ in range(MAX_NESTING):
        deeper = []
        for path, holder in places:
            for key, value in holder.items():
                if isinstance(value, dict):
                    if value and key in SETTINGS_KEYS:
                        return path + key
                    deeper.append((f"{path}{key}.", value))
        places = deeper
    return None


def read_checkpoint(directory: Path) -> Checkpoint:
    """Return the checkpoint in `directory`, which has a `config.json`.

    Raises `Refusal` where a file that vLLM reads is damaged, or where the weights are quantized and vLLM finds no
    settings for them.
    """
    config = read_json(directory / "config.json")
    quantization = find_quantization(directory, config)
    tensors = read_tensors(directory)
    if quantization is None:
        suffixes = tuple(set(WEIGHT_SUFFIXES.values()))
        quantized = next((name for name in tensors if name.endswith(suffixes)), None)
        if quantized is not None or not tensors:
            check_unseen_settings(config)
        if quantized is not None:
            quantization = _settings_outside(directory, quantized)
    return Checkpoint(directory, config, quantization, tensors)


def check_unseen_settings(config: dict[str, Any]) -> None:
    """Refuse quantization settings in a place of `config` where vLLM does not look. Raises `Refusal`."""
    path = unseen_settings(config)
    if path is not None:
        raise Refusal(
            f"config.json holds its quantization settings as {path}, where vLLM does not look: copy them to "
            "quantization_config at its top level"
        )


def _settings_outside(directory: Path, quantized: str) -> QuantizationSettings:
    """Return the settings in a side file for weights of which `quantized` is one; raises `Refusal` without any."""
    settings = find_side_file(directory) if quantized.endswith(".qweight") else None
    if settings is None:
        raise Refusal(
            f"{quantized} is quantized and config.json has no quantization_config, without which vLLM cannot load it: "
            "add it, or download the checkpoint again"
        )
    return settings


def quantized_linears(
    method: str, bits_of: Callable[[str], int | None], tensors: dict[str, StoredTensor]
) -> Iterator[QuantizedLinear]:
    """Yield the quantized linears among `tensors`, which `method` stores.

    `bits_of` gives the bits of a weight by the linear's name, None for one that is left out. Raises `Refusal` where a
    tensor of a linear is missing or does not fit the others.
    """
    suffix = WEIGHT_SUFFIXES[method]
    for key, weight in tensors.items():
        if key.endswith(suffix) and (len(weight.shape) == 2 or ".experts" not in key):
            name = key[: -len(suffix)]
            bits = bits_of(name)
            if bits is None:
                continue
            if len(weight.shape) != 2 or weight.dtype not in INTEGER_DTYPES:
                raise _damaged(key, weight)
            if method == "compressed-tensors":
                yield _packed_linear(name, bits, tensors)
            else:
                yield _qweight_linear(method, name, bits, tensors)
    check_parts(method, tensors)


def _qweight_linear(method: str, name: str, bits: int, tensors: dict[str, StoredTensor]) -> QuantizedLinear:
    """Return the awq or gptq linear `name`; raises `Refusal` where its tensors do not fit each other."""
    rows, columns = tensors[f"{name}.qweight"].shape
    out_features, in_features = (
        (columns * 32 // bits, rows) if method == "awq" else (columns, rows * 32 // bits)
    )
    scales = _part(name, "scales", tensors)
    if len(scales.shape) != 2 or scales.shape[1] != out_features or 0 in scales.shape:
        raise _damaged(f"{name}.scales", scales)
    groups = scales.shape[0]
    # vLLM ignores the zero points of gptq files, which it reads where they are symmetric alone.
    zeros = _part(name, "qzeros", tensors) if method == "awq" else tensors.get(f"{name}.qzeros")
    if zeros is not None and zeros.shape != (groups, out_features * bits // 32):
        raise _damaged(f"{name}.qzeros", zeros)
    g_idx = tensors.get(f"{name}.g_idx")
    if g_idx is not None and (g_idx.shape != (in_features,) or g_idx.dtype not in ("I32", "I64")):
        raise _damaged(f"{name}.g_idx", g_idx)
    return QuantizedLinear(name, out_features, in_features, groups, g_idx if method == "gptq" else None)


def _packed_linear(name: str, bits: int, tensors: dict[str, StoredTensor]) -> QuantizedLinear:
    """Return the compressed-tensors linear `name`; raises `Refusal` where its tensors do not fit each other."""
    out_features, columns = tensors[f"{name}.weight_packed"].shape
    in_features = columns * 32 // bits
    # The packed width is rounded up to whole words, so the true one is stored beside it.
    shape = tensors.get(f"{name}.weight_shape")
    if shape is not None:
        if shape.shape != (2,) or shape.dtype not in ("I32", "I64"):
            raise _damaged(f"{name}.weight_shape", shape)
        stored_out, in_features = read_integers(shape)
        if stored_out != out_features or -(-in_features * bits // 32) != columns:
            raise Refusal(
                f"{name}.weight_shape says {stored_out} × {in_features}, which does not fit the packed weight of "
                f"{bits} bits: copy or download the checkpoint again"
            )
    scales = _part(name, "weight_scale", tensors)
    if not scales.shape or scales.shape[0] not in (1, out_features) or 0 in scales.shape:
        raise _damaged(f"{name}.weight_scale", scales)
    return QuantizedLinear(name, out_features, in_features, scales.shape[1] if len(scales.shape) > 1 else 1)


def check_parts(method: str, tensors: dict[str, StoredTensor]) -> None:
    """Refuse tensors of a quantized linear whose integers are missing: vLLM would serve random ones."""
    for key in tensors:
        for part in PART_SUFFIXES[method]:
            if key.endswith(part):
                name = key[: -len(part)]
                if f"{name}{WEIGHT_SUFFIXES[method]}" not in tensors and f"{name}.weight" not in tensors:
                    raise Refusal(
                        f"{name} has {part[1:]} and no {WEIGHT_SUFFIXES[method][1:]}: copy or download the "
                        "checkpoint again"
                    )


def _part(name: str, part: str, tensors: dict[str, StoredTensor]) -> StoredTensor:
    """Return the tensor `part` of the linear `name`. Raises `Refusal` where it is missing."""
    if f"{name}.{part}" not in tensors:
        raise Refusal(f"{name} has no {part}: copy or download the checkpoint again")
    return tensors[f"{name}.{part}"]


def _damaged(key: str, tensor: StoredTensor) -> Refusal:
    shape = " × ".join(map(str, tensor.shape)) or "one number"
    return Refusal(
        f"{key} is {tensor.dtype} of {shape}, which does not fit the other tensors and the settings of its layer: "
        "copy or download the checkpoint again"
    )
