"""Whether the tensors of a checkpoint are all those that its config describes, in their sizes.

vLLM does not miss a tensor of a quantized model: it serves the random weights that nothing was loaded into. Of every
model the blocks are counted; the families of `FAMILIES`, whose layers are known, are checked tensor by tensor. Every
size that a config does not name is left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llm_quantize.serving.checkpoint_files import StoredTensor
from llm_quantize.serving.quantized_checkpoint import WEIGHT_SUFFIXES, QuantizedLinear, text_config
from llm_quantize.serving.refusal import Refusal

# A block of the language model: its stack's name and its number.
BLOCK = re.compile(r"^((?:.*?\.)?(?:layers|h|blocks))\.(\d+)\.")
# Stacks that are not the language model's.
OTHER_STACK = re.compile(r"vision|visual|audio|image|encoder|tower|mtp|draft|talker|speech|resampler")
BLOCK_COUNT_KEYS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
REMEDY = "copy or download the checkpoint again"

# Sizes by name: hidden H, intermediate I, vocabulary V, head D, all query heads Q, all key (or value) heads K.
ATTENTION = {
    "self_attn.q_proj": ("Q", "H"),
    "self_attn.k_proj": ("K", "H"),
    "self_attn.v_proj": ("K", "H"),
    "self_attn.o_proj": ("H", "Q"),
}
GATED_MLP = {"mlp.gate_proj": ("I", "H"), "mlp.up_proj": ("I", "H"), "mlp.down_proj": ("H", "I")}
TWO_NORMS = {"input_layernorm": "H", "post_attention_layernorm": "H"}
FOUR_NORMS = {**TWO_NORMS, "pre_feedforward_layernorm": "H", "post_feedforward_layernorm": "H"}
HEAD_NORMS = {"self_attn.q_norm": "D", "self_attn.k_norm": "D"}


@dataclass(frozen=True)
class Family:
    """The layers of a family of models: `(out, in)` of the linears of a block, and the widths of its norms."""

    architecture: str
    linears: Mapping[str, tuple[str, str]] = field(default_factory=lambda: {**ATTENTION, **GATED_MLP})
    norms: Mapping[str, str] = field(default_factory=lambda: TWO_NORMS)
    # Linears with a bias, and those that have one where the config's key is true.
    biased: tuple[str, ...] = ()
    biased_by_key: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


ATTENTION_AND_MLP_BIAS = {"attention_bias": tuple(ATTENTION), "mlp_bias": tuple(GATED_MLP)}
# By the `model_type` of the text config. Source: the modeling files of transformers, which the tests compare.
FAMILIES = {
    "llama": Family("LlamaForCausalLM", biased_by_key=ATTENTION_AND_MLP_BIAS),
    "mistral": Family("MistralForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", biased=tuple(ATTENTION)[:3]),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        norms={**TWO_NORMS, **HEAD_NORMS},
        biased_by_key={"attention_bias": tuple(ATTENTION)},
    ),
    "gemma": Family("GemmaForCausalLM"),
    "gemma2": Family("Gemma2ForCausalLM", norms=FOUR_NORMS),
    "gemma3_text": Family("Gemma3ForCausalLM", norms={**FOUR_NORMS, **HEAD_NORMS}),
    "granite": Family("GraniteForCausalLM", biased_by_key=ATTENTION_AND_MLP_BIAS),
    "phi3": Family(
        "Phi3ForCausalLM",
        linears={
            "self_attn.qkv_proj": ("Q+2K", "H"),
            "self_attn.o_proj": ("H", "Q"),
            "mlp.gate_up_proj": ("2I", "H"),
            "mlp.down_proj": ("H", "I"),
        },
    ),
    "smollm3": Family("SmolLM3ForCausalLM"),
}


def check_model(
    config: dict[str, Any], linears: Iterable[QuantizedLinear], tensors: dict[str, StoredTensor]
) -> None:
    """Refuse tensors that are not those of `config`; `linears` are the quantized ones among them. Raises `Refusal`."""
    linears = list(linears)
    text = text_config(config)
    stack = find_stack([linear.name for linear in linears] or list(tensors))
    if stack is None or config.get("is_encoder_decoder") is True or "block_configs" in text:
        return
    family = find_family(config, text)
    blocks = check_block_count(text, stack, tensors, is_exact=family is not None)
    if family is not None and blocks is not None:
        check_tensors(family, text, config, stack, blocks, linears, tensors)


def find_stack(names: Iterable[str]) -> str | None:
    """Return the name of the language model's stack of blocks (`model.layers`): the one with the most of `names`."""
    counts: dict[str, int] = {}
    for name in names:
        match = BLOCK.match(name)
        if match and not OTHER_STACK.search(match[1]):
            counts[match[1]] = counts.get(match[1], 0) + 1
    return max(counts, key=lambda stack: counts[stack]) if counts else None


def find_family(config: dict[str, Any], text: dict[str, Any]) -> Family | None:
    """Return the family of the language model, None where it is none of `FAMILIES`, or another task's."""
    model_type = text.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None or text is not config:
        return family
    architectures = config.get("architectures")
    return family if architectures in (None, [family.architecture]) else None


def size(text: dict[str, Any], *keys: str) -> int | None:
    """Return the first of `keys` that the config has, None where it has none. Raises `Refusal` for no whole number."""
    for key in keys:
        value = text.get(key)
        if value is not None:
            if type(value) is not int or value < 0:
                raise Refusal(f"config.json has a {key} that is no whole number: {REMEDY}")
            return value
    return None


def check_block_count(
    text: dict[str, Any], stack: str, tensors: Iterable[str], *, is_exact: bool
) -> int | None:
    """Refuse a stack that lacks a block of the config's count, where `is_exact` also one that has more.

    Returns the count, None where the config has none.
    """
    count = size(text, *BLOCK_COUNT_KEYS)
    if count is None:
        return None
    present = {
        int(match[2])
        for match in map(BLOCK.match, tensors)
        if match and match[1] == stack and len(match[2]) < 7
    }
    missing = next((i for i in range(min(count, len(present) + 1)) if i not in present), None)
    if missing is not None:
        raise Refusal(f"{stack}.{missing} is missing of the {count} layers that config.json counts: {REMEDY}")
    extra = max(present, default=-1)
    if is_exact and extra >= count:
        raise Refusal(f"{stack}.{extra} is beyond the {count} layers that config.json counts: {REMEDY}")
    return count


def check_tensors(
    family: Family,
    text: dict[str, Any],
    config: dict[str, Any],
    stack: str,
    blocks: int,
    linears: Iterable[QuantizedLinear],
    tensors: dict[str, StoredTensor],
) -> None:
    """Refuse a model of `family` that lacks a tensor, or whose tensors have other sizes than its config says."""
    sizes = known_sizes(text)
    shapes = {linear.name: (linear.out_features, linear.in_features) for linear in linears}
    biased = set(family.biased).union(
        *(names for key, names in family.biased_by_key.items() if text.get(key) is True)
    )
    for block in range(blocks):
        prefix = f"{stack}.{block}."
        for path, dimensions in family.linears.items():
            check_shape(prefix + path, "weight", dimensions, sizes, shapes, tensors)
            if path in biased:
                check_shape(prefix + path, "bias", dimensions[:1], sizes, {}, tensors)
        for path, width in family.norms.items():
            check_shape(prefix + path, "weight", (width,), sizes, {}, tensors)
    base = stack.rpartition(".")[0]
    base = f"{base}." if base else ""
    check_shape(f"{base}norm", "weight", ("H",), sizes, {}, tensors)
    check_shape(f"{base}embed_tokens", "weight", ("V", "H"), sizes, shapes, tensors)
    heads = [name for name in map(module_name, tensors) if name.rpartition(".")[2] == "lm_head"]
    is_tied = [holder["tie_word_embeddings"] for holder in (config, text) if "tie_word_embeddings" in holder]
    if heads:
        check_shape(heads[0], "weight", ("V", "H"), sizes, shapes, tensors)
    elif is_tied and not any(is_tied):
        raise Refusal(f"lm_head is missing and config.json says tie_word_embeddings false: {REMEDY}")


def known_sizes(text: dict[str, Any]) -> dict[str, int]:
    """Return the sizes that the config names, by the names that `Family` uses."""
    hidden, heads = size(text, "hidden_size"), size(text, "num_attention_heads")
    key_value_heads = size(text, "num_key_value_heads")
    head = size(text, "head_dim")
    # Only some families divide; the others have a default of their own for the size of a head.
    if head is None and hidden and heads and text.get("model_type") in HEAD_IS_HIDDEN_OVER_HEADS:
        head = hidden // heads
    intermediate = size(text, "intermediate_size")
    values = {"H": hidden, "I": intermediate, "V": size(text, "vocab_size"), "D": head}
    if head is not None and heads is not None:
        values["Q"] = head * heads
    if head is not None and key_value_heads is not None:
        values["K"] = head * key_value_heads
    if head is not None and heads is not None and key_value_heads is not None:
        values["Q+2K"] = head * (heads + 2 * key_value_heads)
    if intermediate is not None:
        values["2I"] = 2 * intermediate
    return {name: value for name, value in values.items() if value is not None}


HEAD_IS_HIDDEN_OVER_HEADS = ("llama", "mistral", "qwen2", "granite", "phi3", "smollm3")


def check_shape(
    name: str,
    part: str,
    dimensions: tuple[str, ...],
    sizes: Mapping[str, int],
    quantized: Mapping[str, tuple[int, int]],
    tensors: dict[str, StoredTensor],
) -> None:
    """Refuse a tensor `part` of the module `name` that is missing or not as large as the config says.

    `dimensions` name its sizes, of which those without a value in `sizes` are not checked; `quantized` has the shapes
    of the linears that are stored as integers.
    """
    shape: tuple[int, ...]
    if name in quantized:
        shape = quantized[name]
    elif f"{name}.{part}" in tensors:
        shape = tensors[f"{name}.{part}"].shape
    elif part == "weight" and has(name, tensors):
        return  # stored in another way, which is left to vLLM
    else:
        raise Refusal(f"{name}.{part} is missing, and vLLM would serve random numbers in its place: {REMEDY}")
    fits = map(lambda dimension, actual: sizes.get(dimension, actual) == actual, dimensions, shape)
    if len(shape) != len(dimensions) or not all(fits):
        wanted = " × ".join(str(sizes.get(dimension, "?")) for dimension in dimensions)
        raise Refusal(
            f"{name}.{part} is {' × '.join(map(str, shape))} where the sizes in config.json make {wanted}: config.json "
            "does not belong to these weights"
        )


def module_name(tensor: str) -> str:
    """Return the name of the module that the weight `tensor` belongs to, an empty text for another tensor."""
    suffix = next((s for s in (".weight", *WEIGHT_SUFFIXES.values()) if tensor.endswith(s)), None)
    return "" if suffix is None else tensor[: -len(suffix)]


def has(name: str, tensors: Mapping[str, StoredTensor]) -> bool:
    """Tell whether the files hold a weight of the module `name` in any form."""
    return any(f"{name}{suffix}" in tensors for suffix in (".weight", *WEIGHT_SUFFIXES.values()))
