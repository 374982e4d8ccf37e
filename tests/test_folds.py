"""Every fold of every family cancels: the folded block computes what the unfolded one does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GPTJConfig, LlamaConfig, NemotronConfig, Olmo2Config, OPTConfig, PhiConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gemma4.modeling_gemma4 import Gemma4RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from llm_quantize.errors import InputError
from llm_quantize.model import awq_mappings, block_forward
from llm_quantize.model.awq_mappings import AWQMapping, apply_mapping, exact_mappings, find_mappings
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


def called(config: Any) -> tuple[nn.Module, Tensor, dict[str, Any], Any]:
    """A random block, states that enter it, its other arguments, and the model's config."""
    model = build(config)
    (blocks,) = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2)
    block = blocks[0]
    seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))

    with block.register_forward_pre_hook(hook, with_kwargs=True), torch.no_grad():
        model(input_ids=tokens(), use_cache=False)
        model(input_ids=tokens(1), use_cache=False)  # what goes with the states fits any number of windows
    (args, kwargs), (_, kwargs) = seen
    hidden = args[0] if args else seen[0][1]["hidden_states"]
    kwargs.pop("hidden_states", None)
    kwargs = {k: v for k, v in kwargs.items() if k not in block_forward._CACHES}
    return block, hidden, kwargs, model.config


def names(mappings: list[AWQMapping]) -> set[tuple[str, str]]:
    return {(mapping.source, " ".join(mapping.targets)) for mapping in mappings}


def scale(block: nn.Module, mapping: AWQMapping, seed: int) -> Tensor:
    source, first = block.get_submodule(mapping.source), block.get_submodule(mapping.targets[0])
    assert isinstance(first, nn.Linear)
    count = source.out_features if isinstance(source, nn.Linear) else first.in_features
    return torch.exp(torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 0.7)


@torch.no_grad()
def fold_in(block: nn.Module, mapping: AWQMapping, s: Tensor, dtype: torch.dtype) -> None:
    """What the solver does, without rounding."""
    folded = apply_mapping(block, mapping, s, dtype)
    source = block.get_submodule(mapping.source)
    if folded.rows is not None:
        assert isinstance(source, nn.Linear)
        source.weight.div_(folded.rows[:, None])
    for path in mapping.targets:
        target = block.get_submodule(path)
        assert isinstance(target, nn.Linear)
        target.weight.mul_(folded.channels)


@torch.no_grad()
def test_expected(family: str) -> None:
    block, hidden, kwargs, config = called(FAMILIES[family]())
    mappings = find_mappings(block, config)
    assert names(mappings) == EXPECTED[family]
    assert (
        exact_mappings(block, mappings, hidden, lambda x: block_forward.forward(block, x, kwargs)) == mappings
    )
    states = block_forward.States(
        (hidden.shape[0], hidden.shape[1], hidden.shape[2]), torch.float32, CPU, CPU
    )
    states.put(0, len(states), hidden)
    groups = block_forward.distinct_inputs(block, states, kwargs)
    # The targets of a fold are all that see that input: nothing else would go unscaled.
    assert all(list(mapping.targets) in groups for mapping in mappings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@torch.no_grad()
def test_output_stays(family: str, dtype: torch.dtype) -> None:
    """Norms and biases stored in BF16 lose digits, which the targets' scales make good."""
    block, hidden, kwargs, config = called(FAMILIES[family]())
    before = block_forward.forward(block, hidden, kwargs)
    state = {k: v.clone() for k, v in block.state_dict().items()}
    mappings = find_mappings(block, config)
    for mapping in [*([f] for f in mappings), mappings]:
        block.load_state_dict(state)
        for number, each in enumerate(mapping):
            fold_in(block, each, scale(block, each, number), dtype)
        after = block_forward.forward(block, hidden, kwargs)
        # Only biases, which no channel scale can make good, are off by their own rounding.
        biased = dtype != torch.float32 and any(name.endswith("bias") for name in state)
        tolerance = 2e-2 if biased else 2e-5
        assert float((after - before).abs().max()) < tolerance * float((before - hidden).abs().max())
        assert any(not torch.equal(v, state[k]) for k, v in block.state_dict().items())
        if dtype != torch.float32:
            for each in mapping:
                source = block.get_submodule(each.source)
                if not isinstance(source, nn.Linear):
                    assert isinstance(source.weight, Tensor)
                    stored = source.weight.to(dtype).float()
                    changed = source.weight != state[f"{each.source}.weight"]
                    assert torch.equal(stored[changed], source.weight[changed])


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "family" in metafunc.fixturenames:
        metafunc.parametrize("family", list(FAMILIES))


@torch.no_grad()
def test_zero_in_a_norm_keeps_its_channel() -> None:
    block, hidden, kwargs, config = called(FAMILIES["llama"]())
    norm = block.get_submodule("input_layernorm")
    assert isinstance(norm.weight, Tensor)
    norm.weight[3] = 0
    norm.weight[4] *= -1
    before = block_forward.forward(block, hidden, kwargs)
    mapping = find_mappings(block, config)[0]
    folded = apply_mapping(block, mapping, torch.full((64,), 3.0), torch.float32)
    assert folded.channels[3] == 1
    assert folded.channels[4] == pytest.approx(3)
    assert folded.changed == ("input_layernorm.weight",)
    for path in mapping.targets:
        block.get_parameter(f"{path}.weight").mul_(folded.channels)
    torch.testing.assert_close(block_forward.forward(block, hidden, kwargs), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
def test_value_rows(heads: tuple[int, int]) -> None:
    """Query heads that share a value head share its rows' scales."""
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, vocab_size=8,
        num_attention_heads=heads[0], num_key_value_heads=heads[1],
    )  # fmt: skip
    block = build(config).model.layers[0]
    (mapping,) = (f for f in find_mappings(block, config) if f.targets == ("self_attn.o_proj",))
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
        # Norms behind attention and MLP, one of them called like Llama's before the MLP.
        (
            small(Olmo2Config, **WIDE),
            {("self_attn.v_proj", "self_attn.o_proj"), ("mlp.up_proj", "mlp.down_proj")},
        ),
        # A squared activation lies between up and down; norms add one to their weights, as Gemma's do.
        (
            small(NemotronConfig, **WIDE),
            {("input_layernorm", QKV), ("self_attn.v_proj", "self_attn.o_proj")},
        ),
        # The first norm feeds the MLP too.
        (small(PhiConfig, intermediate_size=96), set()),
        (
            small(OPTConfig, ffn_dim=96, word_embed_proj_dim=64),
            {
                ("self_attn_layer_norm", QKV),
                ("self_attn.v_proj", "self_attn.out_proj"),
                ("final_layer_norm", "fc1"),
            },
        ),
        # Norms behind, under the names of norms before.
        (
            small(OPTConfig, ffn_dim=96, word_embed_proj_dim=64, do_layer_norm_before=False),
            {("self_attn.v_proj", "self_attn.out_proj")},
        ),
    ],
    ids=["olmo2", "nemotron", "phi", "opt", "opt_behind"],
)
def test_a_fold_that_changes_the_output_is_left_out(config: Any, left: set[tuple[str, str]]) -> None:
    block, hidden, kwargs, config = called(config)
    state = {k: v.clone() for k, v in block.state_dict().items()}
    named = find_mappings(block, config)
    found = exact_mappings(block, named, hidden, lambda x: block_forward.forward(block, x, kwargs))
    assert names(found) == left
    for name, value in block.state_dict().items():
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
    """Found by numbers: names do not tell."""
    norm = copy.deepcopy(norm).to(dtype)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    assert awq_mappings._offset(norm) == offset
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.func, "functional_call", lambda *_: pytest.fail("found twice"))
        assert awq_mappings._offset(norm) == offset


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.gpu
def test_the_gpu_is_not_waited_for(waits: Callable[[Callable[[], object]], int]) -> None:
    """Once the norm is known."""
    block = nn.ModuleDict({"norm": LlamaRMSNorm(64), "linear": nn.Linear(64, 8)}).cuda()
    mapping = AWQMapping("norm", ("linear",), torch.arange(64, device="cuda"))
    scale = torch.ones(64, device="cuda")
    assert waits(lambda: awq_mappings.apply_mapping(block, mapping, scale, torch.bfloat16)) == 0
