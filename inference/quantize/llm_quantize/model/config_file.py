"""config.json: what it may say of a model that is to be quantized, and what is published of it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llm_quantize.errors import InputError, one_line
from llm_quantize.io.machine_paths import paths_of_this_machine, without_paths
from llm_quantize.io.untrusted import read_json

_QUANTIZATION = (
    "quantization_config",
    "compression_config",
)  # the second as older compressed-tensors wrote it
# Keys by which transformers reads another file than config.json, or other weights than all readers take.
_OTHER_CONFIGS, _OTHER_WEIGHTS = "configuration_files", "transformers_weights"
_OTHER_TOKENIZERS = (
    "fast_tokenizer_files"  # the same of tokenizer_config.json, for other files than tokenizer.json
)
_WEIGHTS = (None, "model.safetensors", "model.safetensors.index.json")

# Heads of other tasks, whose weights transformers would put under a language model's head without a word.
_OTHER_HEADS = re.compile(
    r"For(MaskedLM|PreTraining|NextSentencePrediction|MultipleChoice|QuestionAnswering|\w*Classification)$"
)


def examine_config(directory: Path, source: Path | None = None) -> dict[str, Any]:
    """Read config.json of a directory that may be quantized. Raises InputError saying what it is instead.

    source: the directory as messages name it, where `directory` is a copy.
    """
    source = source or directory
    if not (directory / "config.json").is_file():
        raise InputError(f"{source} has no config.json: give a Hugging Face model directory")
    config = read_json(directory / "config.json")
    _check_pointers(config)
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in _QUANTIZATION:
            if part.get(key) is not None:
                settings = part[key] if isinstance(part[key], dict) else {}
                method = one_line(settings.get("quant_method", "an unnamed method"), 60)
                raise InputError(
                    f"{source} is already quantized ({method}): give the FP16/BF16 model it was made from"
                )
    names = config.get("architectures")
    if isinstance(names, list) and names and all(_OTHER_HEADS.search(str(name)) for name in names):
        raise InputError(f"{names[0]} is not a causal LM: nothing to quantize here")
    return config


def _check_pointers(config: dict[str, Any]) -> None:
    """Refuse a config that sends its reader to other files. Raises InputError naming the key."""
    if _OTHER_CONFIGS in config:
        raise InputError(
            f"config.json sends its reader to other files ({_OTHER_CONFIGS}): put the one that is meant in its place, "
            "and take the key out"
        )
    named = config.get(_OTHER_WEIGHTS)
    if named not in _WEIGHTS:
        raise InputError(
            f"config.json names its weights ({_OTHER_WEIGHTS}: {one_line(named, 60)}): call them model.safetensors, "
            "and take the key out"
        )


def published_config(config: dict[str, Any], directory: Path) -> dict[str, Any]:
    """What is published of a source's config.json, but for its quantization: old readers read it, and it names no path.

    config: as `examine_config` gave it. directory: the source's.
    """
    result = with_old_rope_keys(config)
    for key in ("_name_or_path", _OTHER_WEIGHTS):
        result.pop(key, None)
    cleaned: dict[str, Any] = without_paths(result, paths_of_this_machine(directory))
    return cleaned


def check_tokenizer_config(config: dict[str, Any]) -> None:
    """Refuse a tokenizer_config.json that names a file elsewhere, which transformers would read.

    Raises InputError naming the file.
    """
    listed = config.get(_OTHER_TOKENIZERS)
    for name in listed if isinstance(listed, list) else [] if listed is None else [listed]:
        if not isinstance(name, str) or Path(name).name != name:
            raise InputError(
                f"tokenizer_config.json names a file that is not beside it: {one_line(name, 100)}: take "
                f"{_OTHER_TOKENIZERS} out"
            )


def other_repositories(*configs: dict[str, Any]) -> list[str]:
    """List the repositories whose code a model's configs name (`auto_map`), other than the model's own."""
    found: list[str] = []
    for config in configs:
        auto_map = config.get("auto_map")
        pending = list(auto_map.values()) if isinstance(auto_map, dict) else [auto_map]
        while pending:
            value = pending.pop()
            if isinstance(value, list):
                pending += value
            elif isinstance(value, str) and "--" in value:
                found.append(value.partition("--")[0])
    return sorted(set(found))


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
