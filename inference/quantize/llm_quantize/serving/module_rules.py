"""Whether a checkpoint's quantization settings call float exactly what its files hold as floats.

vLLM builds each linear by the settings: one that the files hold otherwise fails to load after minutes, or is served
with the random weights that nothing was loaded into.
"""

from __future__ import annotations

import re
from typing import Any

from llm_quantize.serving.float_modules import FLOAT_DTYPES, OUTPUT_HEAD, FloatModules, class_of
from llm_quantize.serving.quantized_checkpoint import WEIGHT_SUFFIXES, Checkpoint
from llm_quantize.serving.refusal import Refusal

BLOCK = re.compile(r"^(.*?)\.\d+\.")
# Linears inside blocks that vLLM builds with float weights, whatever the settings say. Read from its sources: routers,
# heads of other tasks, parts of Mamba, of sparse attention and of multi-token prediction.
BUILT_FLOAT = re.compile(
    r"(^|\.)(gate|router|router\..*|shared_expert_gate|classifier|score|v_head|x_proj|dt_proj|conv1d|mixer\.in_proj"
    r"|mixer\.out_proj|mamba\.in_proj|mamba\.out_proj|indexer\..*|weights_proj|eh_proj|.*_res_proj"
    r"|input_mix_weight_.*|block_inject_weight|altup\..*)$"
)
# 2-D weights that belong to no linear, by their names.
LOOKUP_TABLE = re.compile(
    r"(embed|(^|\.)(wte|wpe|shared|relative_attention_bias|tok_|.*_table)\b|position|rotary|norm)"
)
# Layers that vLLM does not load as part of the model itself.
NOT_LOADED = re.compile(r"(^|\.)(mtp|mtp_layers|nextn)\.")
# Models whose vision tower and projector vLLM builds by the settings, as their classes say, and the linears of those.
TOWERS_BY_SETTINGS = re.compile(
    r"qwen\w*vl\w*|qwen3_5\w*|llava(_next|_onevision)?|mistral3|pixtral|gemma3|paligemma|idefics3|smolvlm"
)
TOWER_LINEAR = re.compile(
    r"(^|\.)(visual|vision_tower|vision_model|vision_encoder)\..*\b([qkv]_proj|o_proj|out_proj|qkv|qkv_proj|proj|fc1|fc2"
    r"|gate_proj|up_proj|down_proj|linear_fc1|linear_fc2|merger\.mlp\.\d+|w1|w2|w3)$"
)


def check_float_modules(checkpoint: Checkpoint, rules: FloatModules, notes: list[str]) -> None:
    """Refuse a linear that the files hold as integers and the settings call float, or the other way.

    Appends to `notes` a float linear of which the settings do not tell, where vLLM may build it float all the same.
    Raises `Refusal`.
    """
    suffix = WEIGHT_SUFFIXES[rules.method]
    quantized = [name[: -len(suffix)] for name in checkpoint.tensors if name.endswith(suffix)]
    for name in quantized:
        if rules.is_float(name, class_of(name)) and not NOT_LOADED.search(name):
            raise Refusal(
                f"{name} is quantized in the files and the quantization settings call it float: {correction(rules)}"
            )
    stacks = {match[1] for match in map(BLOCK.match, quantized) if match}
    for name in float_linears(checkpoint, set(quantized)):
        if rules.is_float(name, class_of(name)):
            continue
        if is_built_by_settings(name, stacks, checkpoint.config):
            raise Refusal(
                f"{name} is float in the files and the quantization settings do not say so, so that vLLM would look "
                f"for integers: {correction(rules)}"
            )
        notes.append(
            f"{name} is float and the quantization settings do not say so: vLLM serves it only if it builds that layer "
            "as float"
        )
        return


def float_linears(checkpoint: Checkpoint, quantized: set[str]) -> list[str]:
    """Return the linears that the files hold as floats, but for those that vLLM builds as floats in every case."""
    found = []
    for key, tensor in checkpoint.tensors.items():
        name = key[: -len(".weight")]
        if (
            key.endswith(".weight")
            and len(tensor.shape) == 2
            and tensor.dtype in FLOAT_DTYPES
            and name not in quantized
            and not any(pattern.search(name) for pattern in (BUILT_FLOAT, LOOKUP_TABLE, NOT_LOADED))
        ):
            found.append(name)
    return found


def is_built_by_settings(name: str, stacks: set[str], config: dict[str, Any]) -> bool:
    """Tell whether vLLM builds the linear `name` by the settings for sure.

    It does so for those in `stacks`, the stacks of blocks that hold quantized linears, for those outside all blocks,
    and for the vision towers of some models.
    """
    block = BLOCK.match(name)
    if block is not None and block[1] in stacks:
        return True
    if TOWER_LINEAR.search(name):
        return TOWERS_BY_SETTINGS.fullmatch(str(config.get("model_type"))) is not None
    roots = {stack.rpartition(".")[0] for stack in stacks}
    return block is None and (name.rpartition(".")[0] in roots or class_of(name) == OUTPUT_HEAD)


def correction(rules: FloatModules) -> str:
    """Return what to correct so that the settings say what is float."""
    key = {"awq": "modules_to_not_convert", "gptq": "dynamic", "compressed-tensors": "ignore"}[rules.method]
    return f"correct {key} in config.json, or quantize the model again"
