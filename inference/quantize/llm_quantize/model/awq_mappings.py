"""Where AWQ's channel scales can be hidden: pairs of operations between which a scale cancels.

One table per pattern of module names covers every architecture that names its parts that way. Scaling the input
channels of some linears by `s` is undone, exactly, by dividing what produces those channels by `s`: a norm's weight,
or the rows of an earlier linear where nothing but a product lies between.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from llm_quantize.errors import InputError


@dataclass(frozen=True, slots=True)
class AWQMapping:
    """`targets` share an input whose channel `c` comes from row `rows[c]` of `source` (a norm or a linear).

    `rows`: int64 (in); several channels may come from one row (a value head that several query heads share).
    """

    source: str
    targets: tuple[str, ...]
    rows: Tensor


# (what divides, what it feeds); the first row of each kind whose names all exist in the block is taken.
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
_ATTENTION = (
    ("self_attn.v_proj", "self_attn.o_proj", "separate"),
    ("self_attn.v_proj", "self_attn.out_proj", "separate"),
    ("self_attn.qkv_proj", "self_attn.o_proj", "stacked"),  # rows: all q, all k, all v (Phi-3)
    ("attention.query_key_value", "attention.dense", "interleaved"),  # rows: q, k, v of each head (GPT-NeoX)
)
_GATED = (
    ("mlp.up_proj", "mlp.down_proj", "separate"),
    ("mlp.gate_up_proj", "mlp.down_proj", "stacked"),  # rows: all gate, all up (Phi-3)
)


def find_mappings(block: nn.Module, config: Any) -> list[AWQMapping]:
    """The folds of a block, in the order in which the block computes. Errors: `InputError` where none is known."""
    modules = dict(block.named_modules())
    mappings: list[AWQMapping] = []
    taken: set[str] = set()

    def width(path: str) -> int:
        found = modules[path]
        assert isinstance(found, nn.Linear)
        return found.in_features

    for norm, targets in _NORMS:
        if norm in modules and all(t in modules for t in targets) and not taken & set(targets):
            weight = getattr(modules[norm], "weight", None)
            if isinstance(weight, Tensor) and weight.numel() == width(targets[0]):
                mappings.append(AWQMapping(norm, targets, torch.arange(width(targets[0]))))
                taken |= set(targets)
    for source, target, layout in (*_ATTENTION, *_GATED):
        if source in modules and target in modules and target not in taken:
            rows = (
                _attention_rows(modules, source, target, layout, config)
                if "attn" in source or "attention" in source
                else (_gated_rows(modules, source, target, layout))
            )
            if rows is not None:
                mappings.append(AWQMapping(source, (target,), rows))
                taken.add(target)
    if not mappings:
        raise unknown(block)
    order = {path: position for position, path in enumerate(modules)}
    return sorted(mappings, key=lambda mapping: order[mapping.targets[0]])


def unknown(block: nn.Module) -> InputError:
    """The refusal of an architecture without folds."""
    return InputError(
        f"AWQ does not know where to put channel scales in {type(block).__name__}: "
        "quantize it with gptq_quantize.py"
    )


def _attention_rows(
    modules: dict[str, nn.Module], source: str, target: str, layout: str, config: Any
) -> Tensor | None:
    producer, consumer = modules[source], modules[target]
    assert isinstance(producer, nn.Linear)
    assert isinstance(consumer, nn.Linear)
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    kv_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    if consumer.in_features % heads or heads % kv_heads:
        return None
    size = consumer.in_features // heads
    channel = torch.arange(consumer.in_features)
    head, within = channel // size, channel % size
    if layout == "interleaved":
        return (
            head * 3 * size + 2 * size + within if producer.out_features == 3 * consumer.in_features else None
        )
    value_row = (head // (heads // kv_heads)) * size + within
    if layout == "separate":
        return value_row if producer.out_features == kv_heads * size else None
    start = heads * size + kv_heads * size
    return start + value_row if producer.out_features == start + kv_heads * size else None


def _gated_rows(modules: dict[str, nn.Module], source: str, target: str, layout: str) -> Tensor | None:
    producer, consumer = modules[source], modules[target]
    assert isinstance(producer, nn.Linear)
    assert isinstance(consumer, nn.Linear)
    start = consumer.in_features if layout == "stacked" else 0
    if producer.out_features != start + consumer.in_features:
        return None
    return start + torch.arange(consumer.in_features)


_OFFSETS: WeakKeyDictionary[nn.Module, float] = WeakKeyDictionary()


def _offset(norm: nn.Module) -> float:
    """What a norm adds to its weight before it multiplies: one in Gemma's up to the third, in most others nothing.

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
class AppliedMapping:
    """What a fold did: `channels` float32 (in) multiplies the targets' input channels; `rows` float32 (out of the
    source) divides the source's rows where it is a linear; `changed` are the block's parameters that now differ.
    """

    channels: Tensor
    rows: Tensor | None
    changed: tuple[str, ...]


@torch.no_grad()
def apply_mapping(block: nn.Module, mapping: AWQMapping, scale: Tensor, dtype: torch.dtype) -> AppliedMapping:
    """Divides what produces the fold's input by `scale` (one per source row, float32), as stored in `dtype`.

    A norm is changed at once, and the targets' scale undoes exactly what was stored: the norm's weight loses digits
    in `dtype`. A linear's weight is left to the caller, who quantizes it anyway; its bias is changed here. A scale of
    exactly one changes nothing. The device is not waited for, if `fold.rows` are there.
    """
    source = block.get_submodule(mapping.source)
    rows = mapping.rows.to(scale.device)
    bias = getattr(source, "bias", None)
    bias_name = (f"{mapping.source}.bias",) if isinstance(bias, Tensor) else ()
    if isinstance(source, nn.Linear):
        divisor = torch.ones(source.out_features, device=scale.device)
        divisor[rows] = scale[rows]
        if isinstance(bias, Tensor):
            _divide_(bias, divisor, dtype)
        return AppliedMapping(divisor[rows], divisor, bias_name)
    offset = _offset(source)
    weight = source.weight
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
    return AppliedMapping(actual, None, (f"{mapping.source}.weight", *bias_name))


def _divide_(bias: Tensor, divisor: Tensor, dtype: torch.dtype) -> None:
    """Divides in place, to the digits of `dtype`; what is divided by one stays as it is."""
    bias.copy_(torch.where(divisor == 1, bias.float(), (bias.float() / divisor).to(dtype).float()))


@torch.no_grad()
def exact_mappings(
    block: nn.Module, mappings: list[AWQMapping], hidden: Tensor, forward: Callable[[Tensor], Tensor]
) -> list[AWQMapping]:
    """Those of `folds` that leave what the block makes of `hidden` as it is; the block itself stays unchanged.

    Names alone do not tell: a norm may be called like one before the linears and stand behind them, and something
    that is not linear may lie between two linears. Each fold is tried with powers of two, which cost no digit but
    in a norm that adds an offset; they make activations smaller, so that nothing overflows.
    """
    plain = forward(hidden).float()
    # Beside what the block adds, not beside the states, which may be far larger.
    allowed = max(0.01, 4 * torch.finfo(hidden.dtype).eps) * float((plain - hidden.float()).abs().mean())

    def holds(tried: list[AWQMapping]) -> bool:
        names = {
            f"{path}.{leaf}" for f in tried for path in (f.source, *f.targets) for leaf in ("weight", "bias")
        }
        saved = {n: p.detach().clone() for n, p in block.named_parameters() if n in names}
        try:
            for mapping in tried:
                _apply_in_place(block, mapping)
            return float((forward(hidden).float() - plain).abs().mean()) <= allowed
        finally:
            for name, value in saved.items():
                block.get_parameter(name).copy_(value)

    return mappings if holds(mappings) else [mapping for mapping in mappings if holds([mapping])]


def _apply_in_place(block: nn.Module, mapping: AWQMapping) -> None:
    first = block.get_submodule(mapping.targets[0])
    assert isinstance(first, nn.Linear)
    scale = torch.exp2((torch.arange(sources(block, mapping), device=first.weight.device) % 4).float())
    smooth_block(block, mapping, scale, first.weight.dtype)


def sources(block: nn.Module, mapping: AWQMapping) -> int:
    """How many scales a fold has: the outputs of a source that is linear, the channels of a norm."""
    source, first = block.get_submodule(mapping.source), block.get_submodule(mapping.targets[0])
    assert isinstance(first, nn.Linear)
    return source.out_features if isinstance(source, nn.Linear) else first.in_features


@torch.no_grad()
def smooth_block(block: nn.Module, mapping: AWQMapping, scale: Tensor, dtype: torch.dtype) -> None:
    """Applies a fold to the whole block in place, which goes on computing what it did: source and targets.

    scale: float32 (sources); dtype: as for `apply_fold`.
    """
    folded = apply_mapping(block, mapping, scale, dtype)
    source = block.get_submodule(mapping.source)
    if isinstance(source, nn.Linear) and folded.rows is not None:
        source.weight.div_(folded.rows[:, None])
    for path in mapping.targets:
        target = block.get_submodule(path)
        assert isinstance(target, nn.Linear)
        target.weight.mul_(folded.channels)
