"""Which shapes and group indices of quantized linears vLLM accepts, whole and split over tensor-parallel ranks.

The rules are those of vLLM 0.30 to 0.33, read from its sources and tried on its CPU build.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from llm_quantize.serving.checkpoint_files import StoredTensor, read_integers
from llm_quantize.serving.quantized_checkpoint import QuantizedLinear, text_config
from llm_quantize.serving.refusal import Refusal

# Linears that tensor parallelism splits along the inputs, and along the outputs; others are not split here.
ROW_PARALLEL = re.compile(r"\.(o_proj|down_proj|out_proj|c_proj|dense|dense_4h_to_h|wo|w2|fc2|fc_out)$")
COLUMN_PARALLEL = re.compile(
    r"\.([qkv]_proj|qkv_proj|query_key_value|c_attn|Wqkv|gate_proj|up_proj|gate_up_proj|dense_h_to_4h|fc1|fc_in"
    r"|c_fc|w1|w3)$"
)
KEY_VALUE = re.compile(r"\.[kv]_proj$")
# Linears that vLLM fuses into one, which then has one scheme.
FUSED_LINEARS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

CPU_WIDTH_MULTIPLE = 32
RANK_OUTPUT_MULTIPLE = 8  # one int32 word holds eight 4-bit values


def check_group_indices(settings: dict[str, Any], linears: Sequence[QuantizedLinear]) -> None:
    """Refuse gptq groups in activation order.

    vLLM refuses them where the settings say `desc_act: true`; where they say false it ignores `g_idx` and answers
    wrongly. The indices of every linear are read, a few kilobytes each.
    """
    says_ordered = bool(settings["desc_act"]) and int(settings["group_size"]) != -1
    first_ordered = next((linear.name for linear in linears if not has_trivial_g_idx(linear)), None)
    remedy = "quantize it again with gptq_quantize.py --act_order_groups static"
    if says_ordered and first_ordered is None and any(linear.g_idx is not None for linear in linears):
        raise Refusal(
            "vLLM no longer serves desc_act true with groups; this file's groups are in order all the same: set "
            "desc_act to false in config.json and quantize_config.json"
        )
    if says_ordered:
        raise Refusal(
            f"vLLM no longer serves groups in activation order (desc_act true with groups): {remedy}"
        )
    if first_ordered is not None:
        raise Refusal(
            f"{first_ordered} has groups in activation order (g_idx) while the config says desc_act false: vLLM "
            f"would ignore g_idx and answer wrongly; {remedy}"
        )


def has_trivial_g_idx(linear: QuantizedLinear) -> bool:
    """Tell whether the group of each input channel is `channel // group_size`, as it is without a `g_idx`."""
    if linear.g_idx is None:
        return True
    values, group_size = read_integers(linear.g_idx), linear.group_size
    return values == array(values.typecode, (i // group_size for i in range(linear.in_features)))


def check_group_counts(group_size: int, linears: Iterable[QuantizedLinear]) -> None:
    """Refuse linears with another number of groups than the config's `group_size` (-1: one group) makes.

    vLLM would fail half way through loading them.
    """
    for linear in linears:
        expected = 1 if group_size == -1 else -(-linear.in_features // group_size)
        if linear.groups != expected:
            raise Refusal(
                f"{linear.name} has {linear.groups} groups where group_size {group_size} makes {expected} of its "
                f"width {linear.in_features}: config.json does not belong to these weights"
            )


def check_fused_linears(linears: Sequence[QuantizedLinear], tensors: dict[str, StoredTensor]) -> None:
    """Refuse a quantized linear that vLLM fuses with one that is not quantized."""
    for linear in linears:
        prefix, _, leaf = linear.name.rpartition(".")
        for members in FUSED_LINEARS:
            if leaf in members:
                unquantized = [m for m in members if f"{prefix}.{m}.weight" in tensors]
                if unquantized:
                    raise Refusal(
                        f"{linear.name} is quantized and {prefix}.{unquantized[0]} is not, which vLLM joins into "
                        "one layer: quantize the model again"
                    )


def check_cpu_widths(linears: Sequence[QuantizedLinear]) -> None:
    """Refuse linears whose widths vLLM's 4-bit CPU kernel does not take; those of fused outputs are added up.

    Source: `CPUWNA16LinearKernel` in vLLM's `model_executor/kernels/linear/mixed_precision/cpu.py`.
    """
    out_features: dict[str, int] = {}
    for linear in linears:
        prefix, _, leaf = linear.name.rpartition(".")
        fused = next(("+".join(members) for members in FUSED_LINEARS if leaf in members), leaf)
        name = f"{prefix}.{fused}"
        out_features[name] = out_features.get(name, 0) + linear.out_features
        if linear.in_features % CPU_WIDTH_MULTIPLE:
            raise Refusal(
                f"{linear.name} has {linear.in_features} inputs and vLLM on a CPU takes multiples of "
                f"{CPU_WIDTH_MULTIPLE}: serve it on an NVIDIA GPU"
            )
    for name, width in out_features.items():
        if width % CPU_WIDTH_MULTIPLE:
            raise Refusal(
                f"{name} has {width} outputs and vLLM on a CPU takes multiples of {CPU_WIDTH_MULTIPLE}: serve it "
                "on an NVIDIA GPU"
            )


def split_over_ranks(
    linears: Sequence[QuantizedLinear], ranks: int, config: dict[str, Any], replicate_scales: bool
) -> list[QuantizedLinear]:
    """Return the part of each linear that one of `ranks` tensor-parallel ranks holds.

    `config` is the model's config, which counts the attention heads. With `replicate_scales` every rank keeps all
    scales of a row-parallel linear, so that its inputs need not split at a group's border. Of each part the widths
    are those of one rank; `groups` and `g_idx` stay those of the whole linear. Raises `Refusal` where heads,
    inputs or outputs do not divide. Source: `marlin_repeat_scales_on_all_ranks` in vLLM's
    `model_executor/layers/quantization/utils/marlin_utils.py`, and `model_executor/layers/linear.py`.
    """
    remedy = "choose another --tensor-parallel-size"
    text = text_config(config)
    heads, key_value_heads = text.get("num_attention_heads"), text.get("num_key_value_heads")
    if isinstance(heads, int) and heads % ranks:
        raise Refusal(f"{heads} attention heads do not divide into {ranks} parts: {remedy}")
    if (
        isinstance(key_value_heads, int)
        and key_value_heads
        and key_value_heads % ranks
        and ranks % key_value_heads
    ):
        raise Refusal(f"{key_value_heads} key-value heads and {ranks} parts do not divide: {remedy}")
    parts = []
    for linear in linears:
        part = linear
        if ROW_PARALLEL.search(linear.name):
            multiple = 1 if replicate_scales else linear.group_size
            if linear.in_features % ranks or linear.in_features // ranks % multiple:
                raise Refusal(
                    f"{linear.name} has {linear.in_features} inputs in groups of {linear.group_size}, which do not "
                    f"divide into {ranks} parts of whole groups: {remedy}"
                )
            part = replace(linear, in_features=linear.in_features // ranks)
        elif COLUMN_PARALLEL.search(linear.name):
            out_ranks = ranks
            if (
                KEY_VALUE.search(linear.name)
                and isinstance(key_value_heads, int)
                and 0 < key_value_heads < ranks
            ):
                out_ranks = key_value_heads  # several ranks hold the same head
            if linear.out_features % out_ranks or linear.out_features // out_ranks % RANK_OUTPUT_MULTIPLE:
                raise Refusal(
                    f"{linear.name} has {linear.out_features} outputs, which do not divide into {out_ranks} parts "
                    f"of multiples of {RANK_OUTPUT_MULTIPLE}: {remedy}"
                )
            part = replace(linear, out_features=linear.out_features // out_ranks)
        parts.append(part)
    return parts
