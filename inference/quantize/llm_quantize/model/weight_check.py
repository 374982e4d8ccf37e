"""Whether a checkpoint's tensors are the weights that its config promises: by their headers, before any is read."""

from __future__ import annotations

import math
from typing import Any

import torch

from llm_quantize.errors import InputError, one_line
from llm_quantize.model.tensor_store import SafetensorsStore
from llm_quantize.model.weight_map import Conversion, WeightMap

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# Parts of quantized weights, which have no place beside plain ones.
_QUANTIZED = (
    "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_zero_point", "weight_packed", "weight_shape",
    "input_scale", "input_scale_inv", "activation_scale", "qweight", "qzeros", "scales", "g_idx", "absmax", "quant_map",
    "quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4", "SCB", "weight_format", "blocks", "_scale_inv",
)  # fmt: skip
_ADAPTER = ("lora_A", "lora_B", "base_layer", "lora_embedding_A", "lora_magnitude_vector", "modules_to_save")
_GIVE = "give the model in FP16, BF16 or FP32"


def check_weights(skeleton: Any, weights: WeightMap, store: SafetensorsStore) -> None:
    """Raise InputError, naming the tensor, unless every parameter is there, as a float of 16 or 32 bits, in its shape.

    Weights that are quantized or adapted are refused as such.
    """
    _check_kind(store)
    if weights.missing:
        raise InputError(
            f"the weights do not match the config: no tensor gives {weights.missing[0]} of "
            f"{type(skeleton).__name__} ({len(weights.missing)} missing)"
        )
    converted: dict[int, Conversion] = {}
    named = [*skeleton.named_parameters(remove_duplicate=False), *skeleton.named_buffers()]
    for name, expected in named:
        for stored in weights.sources(name):
            dtype, _ = store.describe(stored)
            if expected.is_floating_point() and dtype not in FLOATS:
                raise InputError(f"{stored} is {_short(dtype)}, not a plain float: {_GIVE}")
            if not expected.is_floating_point() and dtype.is_floating_point:
                raise InputError(
                    f"{stored} is {_short(dtype)}, and {type(skeleton).__name__} has integers there"
                )
        plain, conversion = weights.stored_name(name), weights.conversion(name)
        if plain is not None:
            _check_shape(plain, store.describe(plain)[1], tuple(expected.shape))
        elif conversion is not None:
            converted[id(conversion)] = conversion
    shapes = {name: tuple(tensor.shape) for name, tensor in named}
    for conversion in converted.values():
        _check_conversion(skeleton, conversion, store, shapes)


def _check_kind(store: SafetensorsStore) -> None:
    for name in store.files:
        parts = name.split(".")
        if name.startswith("base_model.model.") or any(part in _ADAPTER for part in parts):
            raise InputError(
                f"the weights are those of a LoRA adapter ({one_line(name, 100)}): merge it into its model first"
            )
        if parts[-1] in _QUANTIZED:
            raise InputError(f"the weights are quantized already ({one_line(name, 100)}): {_GIVE}")


def _check_conversion(
    skeleton: Any, conversion: Conversion, store: SafetensorsStore, shapes: dict[str, tuple[int, ...]]
) -> None:
    """Whether the parameters made of several tensors come out in their shapes."""

    def empty(name: str) -> torch.Tensor:
        dtype, shape = store.describe(name)
        return torch.empty(shape, dtype=dtype, device="meta")

    try:
        made = {name: tuple(tensor.shape) for name, tensor in conversion.convert(skeleton, empty).items()}
    except Exception as error:
        raise InputError(
            f"the weights do not match the config: {conversion.target} cannot be made of {conversion.stored[0]} and "
            f"its like ({one_line(error)})"
        ) from None
    for name in conversion.parameters:
        if name not in made:
            raise InputError(f"the weights do not match the config: {conversion.stored[0]} gives no {name}")
        if name in shapes:
            _check_shape(f"{name}, made of {conversion.stored[0]} and its like,", made[name], shapes[name])


def _check_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    # A single number may be stored as one or as a list of one.
    if found != expected and not (math.prod(found) == math.prod(expected) == 1):
        raise InputError(
            f"the weights do not match the config: {name} is {_shape(found)}, and {_shape(expected)} by the config"
        )


def _shape(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "a single number"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
