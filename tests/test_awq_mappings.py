"""AWQ's mappings of every family: a smoothed block computes what it did before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import GPTJConfig, LlamaConfig, NemotronConfig, Olmo2Config, OPTConfig, PhiConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llm_quantize.errors import InputError
from llm_quantize.model import awq_mappings
from llm_quantize.model.awq_mappings import (
    AWQMapping,
    exact_mappings,
    find_mappings,
    scale_count,
    smooth,
    smooth_block,
)
from llm_quantize.model.block_forward import BlockKwargs, distinct_inputs, forward
from llm_quantize.model.model_forward import _CACHES
from llm_quantize.model.states import States
from models import CPU, FAMILIES, VOCABULARY, build, tokens

QKV = "self_attn.q_proj self_attn.k_proj self_attn.v_proj"
LLAMA = {
    ("input_layernorm", QKV),
    ("self_attn.v_proj", "self_attn.o_proj"),
    ("post_attention_layernorm", "mlp.gate_proj mlp.up_proj"),
    ("mlp.up_proj", "mlp.down_proj"),
}
GEMMA = {
    ("input_layernorm", QKV),
    ("self_attn.v_proj", "self_attn.o_proj"),
    ("pre_feedforward_layernorm", "mlp.gate_proj mlp.up_proj"),
    ("mlp.up_proj", "mlp.down_proj"),
}
NEOX = {
    ("input_layernorm", "attention.query_key_value"),
    ("attention.query_key_value", "attention.dense"),
    ("post_attention_layernorm", "mlp.dense_h_to_4h"),
}
EXPECTED = {
    "llama": LLAMA,
    "llama_gqa": LLAMA,
    "qwen2": LLAMA,
    "qwen3": LLAMA,
    "mistral": LLAMA,
    "phi3": {
        ("input_layernorm", "self_attn.qkv_proj"),
        ("self_attn.qkv_proj", "self_attn.o_proj"),
        ("post_attention_layernorm", "mlp.gate_up_proj"),
        ("mlp.gate_up_proj", "mlp.down_proj"),
    },
    "gemma2": GEMMA,
    "gemma3": GEMMA,
    "gpt_neox": NEOX,
    "gpt_neox_serial": NEOX,
}


class Called(NamedTuple):
    """A block as its model calls it. hidden: states that enter it. kwargs: its other arguments. config: the model's."""

    block: nn.Module
    hidden: Tensor
    kwargs: BlockKwargs
    config: Any

    def forward(self, hidden: Tensor) -> Tensor:
        return forward(self.block, hidden, self.kwargs)


def called(config: Any) -> Called:
    """The first block of a random model."""
    model = build(config)
    (blocks,) = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
    block = blocks[0]
    seen: list[tuple[tuple[Any, ...], BlockKwargs]] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: BlockKwargs) -> None:
        seen.append((args, kwargs))

    with block.register_forward_pre_hook(hook, with_kwargs=True), torch.no_grad():
        model(input_ids=tokens(), use_cache=False)
        model(input_ids=tokens(1), use_cache=False)  # arguments of one window fit any number of windows
    (args, kwargs), (_, kwargs) = seen
    hidden = args[0] if args else seen[0][1]["hidden_states"]
    kwargs.pop("hidden_states", None)
    kwargs = {k: v for k, v in kwargs.items() if k not in _CACHES}
    return Called(block, hidden, kwargs, model.config)


def names(mappings: list[AWQMapping]) -> set[tuple[str, str]]:
    return {(mapping.smooth_layer, " ".join(mapping.balance_layers)) for mapping in mappings}


def random_scale(block: nn.Module, mapping: AWQMapping, seed: int) -> Tensor:
    smooth_layer = block.get_submodule(mapping.smooth_layer)
    first = block.get_submodule(mapping.balance_layers[0])
    assert isinstance(first, nn.Linear)
    count = smooth_layer.out_features if isinstance(smooth_layer, nn.Linear) else first.in_features
    assert scale_count(block, mapping) == count
    return torch.exp(torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 0.7)


@torch.no_grad()
def test_mappings_by_family(family: str) -> None:
    found = called(FAMILIES[family]())
    mappings = find_mappings(found.block, found.config)
    assert names(mappings) == EXPECTED[family]
    assert exact_mappings(found.block, mappings, found.hidden, found.forward) == mappings
    states = States(tuple(found.hidden.shape), torch.float32, CPU, CPU)
    states.put(0, len(states), found.hidden)
    groups = distinct_inputs(found.block, states, found.kwargs)
    # The balance layers are all linears that see that input: none is left unscaled.
    assert all(list(mapping.balance_layers) in groups for mapping in mappings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@torch.no_grad()
def test_smoothing_keeps_the_output(family: str, dtype: torch.dtype) -> None:
    """A norm stored in BF16 loses digits, and the scales of the balance layers make up for them."""
    found = called(FAMILIES[family]())
    block, hidden = found.block, found.hidden
    before = found.forward(hidden)
    state = {k: v.clone() for k, v in block.state_dict().items()}
    mappings = find_mappings(block, found.config)
    for some in [*([mapping] for mapping in mappings), mappings]:
        block.load_state_dict(state)
        for number, mapping in enumerate(some):
            smooth_block(block, mapping, random_scale(block, mapping, number), dtype)
        after = found.forward(hidden)
        # No channel scale can make up for the rounding of a bias.
        biased = dtype != torch.float32 and any(name.endswith("bias") for name in state)
        tolerance = 2e-2 if biased else 2e-5
        assert float((after - before).abs().max()) < tolerance * float((before - hidden).abs().max())
        assert any(not torch.equal(v, state[k]) for k, v in block.state_dict().items())
        if dtype != torch.float32:
            for mapping in some:
                layer = block.get_submodule(mapping.smooth_layer)
                if not isinstance(layer, nn.Linear):
                    assert isinstance(layer.weight, Tensor)
                    stored = layer.weight.to(dtype).float()
                    changed = layer.weight != state[f"{mapping.smooth_layer}.weight"]
                    assert torch.equal(stored[changed], layer.weight[changed])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", list(FAMILIES))


@torch.no_grad()
def test_a_zero_in_a_norm_keeps_its_channel() -> None:
    found = called(FAMILIES["llama"]())
    block, hidden = found.block, found.hidden
    norm = block.get_submodule("input_layernorm")
    assert isinstance(norm.weight, Tensor)
    norm.weight[3] = 0
    norm.weight[4] *= -1
    before = found.forward(hidden)
    mapping = find_mappings(block, found.config)[0]
    smoothed = smooth(block, mapping, torch.full((64,), 3.0), torch.float32)
    assert smoothed.channels[3] == 1
    assert smoothed.channels[4] == pytest.approx(3)
    assert smoothed.changed == ("input_layernorm.weight",)
    for path in mapping.balance_layers:
        block.get_parameter(f"{path}.weight").mul_(smoothed.channels)
    torch.testing.assert_close(found.forward(hidden), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_value_rows(heads: tuple[int, int]) -> None:
    """Query heads that share a value head share the scales of its rows."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, vocab_size=8,
        num_attention_heads=heads[0], num_key_value_heads=heads[1],
    )  # fmt: skip
    block = build(config).model.layers[0]
    (mapping,) = (m for m in find_mappings(block, config) if m.balance_layers == ("self_attn.o_proj",))
    shared = heads[0] // heads[1]
    expected = [head // shared * 8 + within for head in range(4) for within in range(8)]
    assert mapping.rows.tolist() == expected


def small(kind: Any, **more: Any) -> Any:
    return kind(
        vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.15, pad_token_id=0, **more,
    )  # fmt: skip


WIDE = {"intermediate_size": 96, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("config", "left"),
    [
        # The norms stand behind attention and MLP, and one has the name of Llama's norm before the MLP.
        (
            small(Olmo2Config, **WIDE),
            {("self_attn.v_proj", "self_attn.o_proj"), ("mlp.up_proj", "mlp.down_proj")},
        ),
        # A squared activation stands between up and down; norms add one to their weights, as Gemma's do.
        (
            small(NemotronConfig, **WIDE),
            {("input_layernorm", QKV), ("self_attn.v_proj", "self_attn.o_proj")},
        ),
        # The MLP takes the output of the first norm too.
        (small(PhiConfig, intermediate_size=96), set()),
        (
            small(OPTConfig, ffn_dim=96, word_embed_proj_dim=64),
            {
                ("self_attn_layer_norm", QKV),
                ("self_attn.v_proj", "self_attn.out_proj"),
                ("final_layer_norm", "fc1"),
            },
        ),
        # The norms stand behind, under the names of norms that stand before.
        (
            small(OPTConfig, ffn_dim=96, word_embed_proj_dim=64, do_layer_norm_before=False),
            {("self_attn.v_proj", "self_attn.out_proj")},
        ),
    ],
    ids=["olmo2", "nemotron", "phi", "opt", "opt_behind"],
)
def test_a_mapping_that_changes_the_output_is_left_out(config: Any, left: set[tuple[str, str]]) -> None:
    found = called(config)
    state = {k: v.clone() for k, v in found.block.state_dict().items()}
    named = find_mappings(found.block, found.config)
    assert names(exact_mappings(found.block, named, found.hidden, found.forward)) == left
    for name, value in found.block.state_dict().items():
        assert torch.equal(value, state[name])


def test_unknown_architecture() -> None:
    config = GPTJConfig(n_embd=64, n_layer=2, n_head=4, rotary_dim=8, vocab_size=16)
    with pytest.raises(InputError, match=r"GPTJBlock.*gptq_quantize\.py") as caught:
        find_mappings(build(config).transformer.h[0], config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("norm", "offset"),
    [
        (LlamaRMSNorm(96), 0),
        (nn.LayerNorm(96), 0),
        (Gemma2RMSNorm(96), 1),
        (Gemma3RMSNorm(96), 1),
        (Gemma4RMSNorm(96), 0),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_what_a_norm_adds_to_its_weight(norm: nn.Module, offset: int, dtype: torch.dtype) -> None:
    """It is found by computing, since names do not tell."""
    norm = copy.deepcopy(norm).to(dtype)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    assert awq_mappings._weight_offset(norm) == offset
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.func, "functional_call", lambda *_: pytest.fail("found twice"))
        assert awq_mappings._weight_offset(norm) == offset


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
def test_smoothing_is_asynchronous(waits: Callable[[Callable[[], object]], int]) -> None:
    """Once the norm's offset is known, the host never waits for the GPU."""
    block = nn.ModuleDict({"norm": LlamaRMSNorm(64), "linear": nn.Linear(64, 8)}).cuda()
    mapping = AWQMapping("norm", ("linear",), torch.arange(64, device="cuda"))
    scale = torch.ones(64, device="cuda")
    assert waits(lambda: smooth(block, mapping, scale, torch.bfloat16)) == 0
