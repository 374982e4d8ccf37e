"""Which shapes and group indices of quantized linears vLLM accepts, whole and split over tensor-parallel ranks.

The rules are those of vLLM 0.30 to 0.33, read from its sources and tried on its CPU build.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llm_quantize.serving.checkpoint_files import StoredTensor, read_integers
from llm_quantize.serving.model_rules import size
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
MAX_RANKS = 64  # up to which sizes that would serve are named
GROUP_SIZES = (128, 64, 32)  # those that may be named, which vLLM serves in every format


def check_group_indices(settings: dict[str, Any], linears: Sequence[QuantizedLinear]) -> None:
    """Refuse gptq groups in activation order.

    vLLM refuses them where the settings say `desc_act: true`; where they say false it ignores `g_idx` and answers
    wrongly. The indices of every linear are read, a few kilobytes each.
    """
    says_ordered = bool(settings.get("desc_act")) and settings["group_size"] != -1
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


def check_group_counts(group_size_of: Callable[[str], int], linears: Iterable[QuantizedLinear]) -> None:
    """Refuse linears with another number of groups than the settings make of their width.

    `group_size_of` gives the group size of a linear by its name, -1 for one group. vLLM would fail half way through
    loading them.
    """
    for linear in linears:
        group_size = group_size_of(linear.name)
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


@dataclass(frozen=True)
class Split:
    """How a checkpoint's linears are split over tensor-parallel ranks.

    `config` is the model's config, which counts the attention heads. With `replicate_scales` every rank keeps all
    scales of a row-parallel linear, so that its inputs need not split at a group's border; with `whole_experts` each
    rank has whole experts.
    """

    linears: Sequence[QuantizedLinear]
    config: dict[str, Any]
    replicate_scales: bool
    whole_experts: bool

    def over(self, ranks: int, group_size: int | None = None) -> list[QuantizedLinear]:
        """Return the part of each linear that one of `ranks` holds, with `group_size` in place of their own.

        Of each part the widths are those of one rank; `groups` and `g_idx` stay those of the whole linear. Raises
        `Indivisible` where heads, inputs or outputs do not divide. Source: `marlin_repeat_scales_on_all_ranks` in
        vLLM's `model_executor/layers/quantization/utils/marlin_utils.py`, and `model_executor/layers/linear.py`.
        """
        text = text_config(self.config)
        heads, key_value_heads = size(text, "num_attention_heads"), size(text, "num_key_value_heads")
        if heads is not None and heads % ranks:
            raise Indivisible(f"{heads} attention heads do not divide into {ranks} parts")
        if key_value_heads and key_value_heads % ranks and ranks % key_value_heads:
            raise Indivisible(f"{key_value_heads} key-value heads and {ranks} parts do not divide")
        return [self._part(linear, ranks, group_size, key_value_heads) for linear in self.linears]

    def _part(
        self, linear: QuantizedLinear, ranks: int, group_size: int | None, key_value_heads: int | None
    ) -> QuantizedLinear:
        if linear.is_expert and self.whole_experts:
            return linear
        if ROW_PARALLEL.search(linear.name):
            groups_of = group_size or linear.group_size
            multiple = 1 if self.replicate_scales else groups_of
            if linear.in_features % ranks or linear.in_features // ranks % multiple:
                raise Indivisible(
                    f"{linear.name} has {linear.in_features} inputs in groups of {groups_of}, which do not divide into "
                    f"{ranks} parts of whole groups"
                )
            return replace(linear, in_features=linear.in_features // ranks)
        if COLUMN_PARALLEL.search(linear.name):
            out_ranks = ranks
            if KEY_VALUE.search(linear.name) and key_value_heads and key_value_heads < ranks:
                out_ranks = key_value_heads  # several ranks hold the same head
            if linear.out_features % out_ranks or linear.out_features // out_ranks % RANK_OUTPUT_MULTIPLE:
                raise Indivisible(
                    f"{linear.name} has {linear.out_features} outputs, which do not divide into {out_ranks} parts of "
                    f"multiples of {RANK_OUTPUT_MULTIPLE}"
                )
            return replace(linear, out_features=linear.out_features // out_ranks)
        return linear

    def fits(self, ranks: int, group_size: int | None = None) -> bool:
        """Tell whether the linears split over `ranks`, with `group_size` in place of their own."""
        try:
            self.over(ranks, group_size)
        except Indivisible:
            return False
        return group_size is None or all(linear.in_features % group_size == 0 for linear in self.linears)


class Indivisible(Exception):
    """A checkpoint does not split over so many ranks. The text says what does not divide."""


def split_over_ranks(split: Split, ranks: int) -> list[QuantizedLinear]:
    """Return the part of each linear that one of `ranks` tensor-parallel ranks holds.

    Raises `Refusal` where the checkpoint does not split so, with the numbers of ranks and the group sizes that would
    serve.
    """
    try:
        return split.over(ranks)
    except Indivisible as error:
        serving = ["1", *(str(n) for n in range(2, MAX_RANKS + 1) if split.fits(n))]
        largest = max(linear.group_size for linear in split.linears)
        groups = [str(g) for g in GROUP_SIZES if g < largest and split.fits(ranks, g)]
        remedy = f"choose another --tensor-parallel-size ({one_of(serving)})"
        if groups:
            remedy += f", or quantize the model again with --group_size {one_of(groups)}"
        raise Refusal(f"{error}: {remedy}") from error


def one_of(choices: Sequence[str]) -> str:
    """Return `choices` as words: `1, 2 or 4`."""
    return " or ".join(part for part in (", ".join(choices[:-1]), choices[-1]) if part)
