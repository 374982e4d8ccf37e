"""config.json: what it may say of a model that is to be quantized, and what is published of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llm_quantize.errors import InputError
from llm_quantize.io.untrusted import paths_of_this_machine, read_json, without_paths

_EXPERT_COUNTS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_routed_experts",
)
# Heads of other tasks, whose weights transformers would put under a language model's head without a word.
_OTHER_HEADS = re.compile(
    r"For(MaskedLM|PreTraining|NextSentencePrediction|MultipleChoice|QuestionAnswering|\w*Classification)$"
)


def examine_config(directory: Path) -> dict[str, Any]:
    """Read config.json of a directory that may be quantized. Raises InputError saying what it is instead."""
    if not (directory / "config.json").is_file():
        raise InputError(f"{directory} has no config.json: give a Hugging Face model directory")
    config = read_json(directory / "config.json")
    quantization = config.get("quantization_config")
    if quantization is None and isinstance(config.get("text_config"), dict):
        quantization = config["text_config"].get("quantization_config")
    if quantization is not None:
        method = (
            quantization.get("quant_method", "an unnamed method") if isinstance(quantization, dict) else "?"
        )
        raise InputError(
            f"{directory} is already quantized ({method}): give the FP16/BF16 model it was made from"
        )
    names = config.get("architectures")
    if isinstance(names, list) and names and all(_OTHER_HEADS.search(str(name)) for name in names):
        raise InputError(f"{names[0]} is not a causal LM: nothing to quantize here")
    for key in _EXPERT_COUNTS:
        value = config.get(key)
        if isinstance(value, int) and value > 1:
            name = (config.get("architectures") or [config.get("model_type", "this model")])[0]
            raise InputError(
                f"{name} is a mixture of {value} experts: not supported yet, only dense models are"
            )
    return config


def published_config(directory: Path) -> dict[str, Any]:
    """config.json of the quantized model, but for its quantization: old readers read it, and it names no path."""
    config = with_old_rope_keys(read_json(directory / "config.json"))
    config.pop("_name_or_path", None)
    cleaned: dict[str, Any] = without_paths(config, paths_of_this_machine(directory))
    return cleaned


def with_old_rope_keys(config: dict[str, Any]) -> dict[str, Any]:
    """A new config.json that transformers 4 reads as transformers 5 does.

    transformers 5 puts what it knows of rotary embeddings into `rope_parameters`, which older readers ignore; they take
    their default base instead. The old keys are added where they are missing and hold the same. Parameters by layer
    type, which have no old form, stay as they are.
    """
    result = dict(config)
    if isinstance(config.get("text_config"), dict):
        result["text_config"] = with_old_rope_keys(config["text_config"])
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, dict) or not isinstance(parameters.get("rope_theta"), int | float):
        return result
    rest = {key: value for key, value in parameters.items() if key != "rope_theta"}
    share = rest.pop("partial_rotary_factor", None)
    scaled = rest.get("rope_type", "default") != "default"
    if any(isinstance(value, dict) for value in rest.values()) or (scaled and share is not None):
        return result
    neox = config.get("model_type") == "gpt_neox"
    old = {"rotary_emb_base" if neox else "rope_theta": parameters["rope_theta"]}
    if share is not None:
        old["rotary_pct" if neox else "partial_rotary_factor"] = share
    if scaled:
        old["rope_scaling"] = rest
    return {**old, **result}
