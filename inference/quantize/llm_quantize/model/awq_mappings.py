"""AWQ's mappings: pairs of layers between which a channel scale cancels.

Scaling the input channels of some linears, the *balance layers*, by `s` is undone exactly by dividing what produces
those channels, the *smooth layer*, by `s`: a norm's weight, or the rows of an earlier linear where nothing but a
product lies between. One table of module names covers every architecture that names its parts that way; each mapping is
tested on numbers before it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from llm_quantize.errors import InputError
from llm_quantize.model.block_forward import linear_at


@dataclass(frozen=True, slots=True)
class AWQMapping:
    """The balance layers share an input, whose channel `c` comes from channel `rows[c]` of the smooth layer.

    smooth_layer: path of a norm or a linear. balance_layers: paths of linears. rows: int64 (in); several channels may
    come from one row (a value head that several query heads share).
    """

    smooth_layer: str
    balance_layers: tuple[str, ...]
    rows: Tensor


# Smooth layer and balance layers; the first row whose names all exist in the block is taken for each linear.
_NORMS = (
    ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("input_layernorm", ("self_attn.qkv_proj",)),
    ("input_layernorm", ("attention.query_key_value",)),
    ("self_attn_layer_norm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
    ("pre_feedforward_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("post_attention_layernorm", ("mlp.gate_up_proj",)),
    ("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
    ("final_layer_norm", ("fc1",)),
)
# Smooth layer, balance layer, and how the smooth layer's rows are arranged.
_ATTENTION = (
    ("self_attn.v_proj", "self_attn.o_proj", "separate"),
    ("self_attn.v_proj", "self_attn.out_proj", "separate"),
    ("self_attn.qkv_proj", "self_attn.o_proj", "stacked"),  # all q, all k, all v (Phi-3)
    ("attention.query_key_value", "attention.dense", "interleaved"),  # q, k, v of each head (GPT-NeoX)
)
_GATED = (
    ("mlp.up_proj", "mlp.down_proj", "separate"),
    ("mlp.gate_up_proj", "mlp.down_proj", "stacked"),  # all gate, all up (Phi-3)
)


def find_mappings(block: nn.Module, config: Any) -> list[AWQMapping]:
    """The mappings of a block, in the order in which the block computes. Raises InputError where none is known."""
    modules = dict(block.named_modules())
    linears = {path for path, module in modules.items() if isinstance(module, nn.Linear)}
    mappings: list[AWQMapping] = []
    taken: set[str] = set()
    for norm, balance_layers in _NORMS:
        present = norm in modules and linears.issuperset(balance_layers)
        if not present or taken & set(balance_layers):
            continue
        width = linear_at(block, balance_layers[0]).in_features
        weight = getattr(modules[norm], "weight", None)
        if isinstance(weight, Tensor) and weight.numel() == width:
            mappings.append(AWQMapping(norm, balance_layers, torch.arange(width)))
            taken |= set(balance_layers)
    for table, rows_of in ((_ATTENTION, _value_rows), (_GATED, _up_rows)):
        for smooth, balance, arrangement in table:
            if not {smooth, balance} <= linears or balance in taken:
                continue
            rows = rows_of(linear_at(block, smooth), linear_at(block, balance), arrangement, config)
            if rows is not None:
                mappings.append(AWQMapping(smooth, (balance,), rows))
                taken.add(balance)
    if not mappings:
        raise no_mapping(block)
    order = {path: position for position, path in enumerate(modules)}
    return sorted(mappings, key=lambda mapping: order[mapping.balance_layers[0]])


def no_mapping(block: nn.Module) -> InputError:
    """The refusal of an architecture without mappings."""
    return InputError(
        f"AWQ does not know where to put channel scales in {type(block).__name__}: "
        "quantize it with gptq_quantize.py"
    )


def _value_rows(smooth: nn.Linear, balance: nn.Linear, arrangement: str, config: Any) -> Tensor | None:
    """The value row of each channel that enters the attention's output projection; None where the widths do not fit."""
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    if balance.in_features % heads or heads % kv_heads:
        return None
    size = balance.in_features // heads
    channel = torch.arange(balance.in_features)
    head, within = channel // size, channel % size
    if arrangement == "interleaved":
        rows = head * 3 * size + 2 * size + within
        return rows if smooth.out_features == 3 * balance.in_features else None
    value_row = (head // (heads // kv_heads)) * size + within
    if arrangement == "separate":
        return value_row if smooth.out_features == kv_heads * size else None
    start = heads * size + kv_heads * size
    return start + value_row if smooth.out_features == start + kv_heads * size else None


def _up_rows(smooth: nn.Linear, balance: nn.Linear, arrangement: str, config: Any) -> Tensor | None:
    """The row of the up projection of each channel that enters the down projection."""
    start = balance.in_features if arrangement == "stacked" else 0
    if smooth.out_features != start + balance.in_features:
        return None
    return start + torch.arange(balance.in_features)


_OFFSETS: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()


def _weight_offset(norm: nn.Module) -> float:
    """What a norm adds to its weight before it multiplies: one in Gemma's up to the third, nothing in most others.

    Found once for each norm, since it waits for the device.
    """
    known = _OFFSETS.get(norm)
    if known is not None:
        return known
    weight = norm.get_parameter("weight")
    x = torch.ones_like(weight)
    x[1::2] = -1  # its mean is zero and its mean square one
    nothing = {name: torch.zeros_like(p) for name, p in norm.named_parameters()}
    made: Tensor = torch.func.functional_call(norm, nothing, (x[None],))
    _OFFSETS[norm] = offset = float(made[0, 0].round())
    return offset


@dataclass(frozen=True, slots=True)
class Smoothed:
    """What smoothing a layer did.

    channels: float32 (in), by which the balance layers' input channels are to be multiplied.
    rows: float32 (out), by which a linear smooth layer's rows are to be divided; None for a norm.
    changed: parameters of the block that now differ, by name.
    """

    channels: Tensor
    rows: Tensor | None
    changed: tuple[str, ...]


@torch.no_grad()
def smooth(block: nn.Module, mapping: AWQMapping, scale: Tensor, dtype: torch.dtype) -> Smoothed:
    """Divide the smooth layer by `scale`, as the result is stored in `dtype`. Asynchronous if `mapping.rows` are there.

    scale: float32 (channels of the smooth layer). A norm is changed at once, and the balance layers' factor undoes
    exactly what was stored, since the norm's weight loses digits in `dtype`. A linear's weight is left to the caller,
    who quantizes it anyway; its bias is changed here. A scale of exactly one changes nothing.
    """
    layer = block.get_submodule(mapping.smooth_layer)
    rows = mapping.rows.to(scale.device)
    bias = getattr(layer, "bias", None)
    bias_name = (f"{mapping.smooth_layer}.bias",) if isinstance(bias, Tensor) else ()
    if isinstance(layer, nn.Linear):
        divisor = torch.ones(layer.out_features, device=scale.device)
        divisor[rows] = scale[rows]
        if isinstance(bias, Tensor):
            _divide_(bias, divisor, dtype)
        return Smoothed(divisor[rows], divisor, bias_name)
    offset = _weight_offset(layer)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    old = weight.float() + offset
    new = ((old / scale) - offset).to(dtype).float()
    actual = old / (new + offset)
    # A weight of zero, or one that the division lost, keeps its channel as it was.
    usable = torch.isfinite(actual) & (actual > 0) & (scale != 1)
    actual = torch.where(usable, actual, torch.ones_like(actual))
    weight.copy_(torch.where(usable, new, weight.float()))
    if isinstance(bias, Tensor):
        _divide_(bias, actual, dtype)
    return Smoothed(actual, None, (f"{mapping.smooth_layer}.weight", *bias_name))


def _divide_(bias: Tensor, divisor: Tensor, dtype: torch.dtype) -> None:
    """Divide in place, to the digits of `dtype`; what is divided by one stays as it is."""
    bias.copy_(torch.where(divisor == 1, bias.float(), (bias.float() / divisor).to(dtype).float()))


@torch.no_grad()
def exact_mappings(
    block: nn.Module, mappings: list[AWQMapping], hidden: Tensor, forward: Callable[[Tensor], Tensor]
) -> list[AWQMapping]:
    """Those mappings that leave what the block makes of `hidden` as it is. The block itself stays unchanged.

    Names alone do not tell: a norm may be called like one before the linears and stand behind them, and something that
    is not linear may lie between two linears. Each mapping is tried with powers of two, which cost no digit but in a
    norm that adds an offset; they make activations smaller, so that nothing overflows.
    """
    plain = forward(hidden).float()
    # Beside what the block adds, not beside the states, which may be far larger.
    allowed = max(0.01, 4 * torch.finfo(hidden.dtype).eps) * float((plain - hidden.float()).abs().mean())

    def holds(tried: list[AWQMapping]) -> bool:
        paths = {path for mapping in tried for path in (mapping.smooth_layer, *mapping.balance_layers)}
        names = {f"{path}.{leaf}" for path in paths for leaf in ("weight", "bias")}
        saved = {n: p.detach().clone() for n, p in block.named_parameters() if n in names}
        try:
            for mapping in tried:
                _try_in_place(block, mapping)
            return float((forward(hidden).float() - plain).abs().mean()) <= allowed
        finally:
            for name, value in saved.items():
                block.get_parameter(name).copy_(value)

    return mappings if holds(mappings) else [mapping for mapping in mappings if holds([mapping])]


def _try_in_place(block: nn.Module, mapping: AWQMapping) -> None:
    weight = linear_at(block, mapping.balance_layers[0]).weight
    scale = torch.exp2((torch.arange(scale_count(block, mapping), device=weight.device) % 4).float())
    smooth_block(block, mapping, scale, weight.dtype)


def scale_count(block: nn.Module, mapping: AWQMapping) -> int:
    """How many scales a mapping has: the outputs of a linear smooth layer, or the channels of a norm."""
    layer = block.get_submodule(mapping.smooth_layer)
    if isinstance(layer, nn.Linear):
        return layer.out_features
    return linear_at(block, mapping.balance_layers[0]).in_features


@torch.no_grad()
def smooth_block(block: nn.Module, mapping: AWQMapping, scale: Tensor, dtype: torch.dtype) -> None:
    """Apply a mapping to the block in place, which goes on computing what it did: smooth and balance layers.

    scale, dtype: as for `smooth`.
    """
    smoothed = smooth(block, mapping, scale, dtype)
    if smoothed.rows is not None:
        linear_at(block, mapping.smooth_layer).weight.div_(smoothed.rows[:, None])
    for path in mapping.balance_layers:
        linear_at(block, path).weight.mul_(smoothed.channels)
