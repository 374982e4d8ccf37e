"""What of a source's weights is published, under which names, in which dtypes, and what the config says of them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3MoeConfig

from conftest import MAIN
from llm_quantize.blockwise import block, block_check
from llm_quantize.blockwise.block_check import check_block
from llm_quantize.errors import InputError
from llm_quantize.io.embedded_files import EMBEDDED_CALIBRATION, EMBEDDED_HELDOUT, EMBEDDED_MODEL
from llm_quantize.model import linear_choice
from llm_quantize.model.linear_choice import called_linears, choose_linears
from llm_quantize.model.skeleton import LinearLayer
from llm_quantize.model.source import SourceModel
from llm_quantize.model.states import make_states
from models import CPU, FAMILIES, write
from tiny_architectures import tiny_model

WORDS = [
    "--calib_samples",
    "4",
    "--calib_seq_len",
    "64",
    "--eval_data",
    "off",
    "--device",
    "cpu",
    "--quality",
    "fast",
]
TEXT = ["--calib_data", str(EMBEDDED_CALIBRATION)]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def quantize(method: str, model: Path, target: Path, *more: str) -> int:
    try:
        places = ["--model_path", str(model), "--output_path", str(target)]
        return MAIN[method]([*places, "--group_size", "32", *WORDS, *TEXT, *more])
    except SystemExit as leaving:
        return int(leaving.code or 0)


def change(directory: Path, edit: Callable[[dict[str, Tensor]], Any]) -> dict[str, Tensor]:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return tensors


def published(target: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    config: dict[str, Any] = json.loads((target / "config.json").read_text())
    return load_file(target / "model.safetensors"), config


def tiny(model_type: str, directory: Path) -> Path:
    """A tiny model of an architecture, with the embedded model's tokenizer."""
    from transformers import AutoTokenizer

    tiny_model(model_type).to(torch.bfloat16).save_pretrained(directory)
    AutoTokenizer.from_pretrained(EMBEDDED_MODEL).save_pretrained(directory)
    return directory


# -- the output head


@pytest.mark.parametrize("same", [True, False], ids=["same", "another"])
def test_a_head_that_the_config_ties(same: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A head of its own stays one for every reader: those that tie it by the config would answer with another."""
    model = write(tmp_path / "model", FAMILIES["qwen2"](), dtype=torch.float16)
    own = load_file(model / "model.safetensors")[EMBEDDING].clone()
    if not same:
        own[3] += 1
    change(model, lambda t: t.update({HEAD: own}))
    assert quantize("gptq", model, tmp_path / "out", "--format", "compressed-tensors") == 0
    tensors, config = published(tmp_path / "out")
    assert config["tie_word_embeddings"] is same
    assert torch.equal(tensors[HEAD], own)
    assert ("lm_head.weight differs from the embedding" in capsys.readouterr().err) is not same


# -- dtypes


def test_tensors_of_another_dtype_stay_in_it(tmp_path: Path) -> None:
    model = write(tmp_path / "model", FAMILIES["llama"](), dtype=torch.bfloat16)
    norm, post = "model.layers.1.input_layernorm.weight", "model.norm.weight"
    source = change(model, lambda t: t.update({n: t[n].float() + 1e-4 for n in (norm, post)}))
    assert quantize("gptq", model, tmp_path / "out") == 0
    tensors, _ = published(tmp_path / "out")
    for name in (norm, post):
        assert tensors[name].dtype == torch.float32
        assert torch.equal(tensors[name], source[name])
    assert tensors[EMBEDDING].dtype == torch.bfloat16


def test_a_scaled_norm_keeps_its_dtype(tmp_path: Path) -> None:
    model = write(tmp_path / "model", FAMILIES["llama"](), dtype=torch.bfloat16)
    norm = "model.layers.1.input_layernorm.weight"
    source = change(model, lambda t: t.update({norm: t[norm].float()}))
    assert (
        quantize("awq", model, tmp_path / "out", "--eval_data", str(EMBEDDED_HELDOUT), "--max_kl", "1") == 0
    )
    tensors, _ = published(tmp_path / "out")
    assert tensors[norm].dtype == torch.float32
    assert not torch.equal(tensors[norm], source[norm])


def test_tensors_that_the_model_does_not_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are copied as they are; of those that transformers passes over without a word nothing is said."""
    model = write(tmp_path / "model", FAMILIES["llama"](), dtype=torch.float16)
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.rand(8),
        "model.layers.2.eh_proj.weight": torch.rand(64, 128).to(torch.float16),
    }
    change(model, lambda t: t.update(extra))
    assert quantize("gptq", model, tmp_path / "out", "--format", "compressed-tensors") == 0
    tensors, config = published(tmp_path / "out")
    for name, tensor in extra.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert config["quantization_config"]["ignore"] == ["lm_head", "model.layers.2.eh_proj"]
    said = capsys.readouterr().err
    assert "1 tensors of the weights belong to nothing in LlamaForCausalLM" in said
    assert "copied as they are: model.layers.2.eh_proj.weight" in said


@pytest.mark.parametrize("name", [HEAD, EMBEDDING, "model.extra.weight"])
def test_infinity_outside_the_blocks_is_final(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = write(tmp_path / "model", FAMILIES["llama"](), dtype=torch.float16)

    def infinite(tensors: dict[str, Tensor]) -> None:
        tensors.setdefault(name, torch.zeros(8, 8, dtype=torch.float16))[1, 2] = torch.inf

    change(model, infinite)
    assert quantize("gptq", model, tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert f"{name} has NaN or infinite weights: the source model is broken" in said
    assert "the same command goes on" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# -- names


def test_names_that_transformers_changes(tmp_path: Path) -> None:
    """Gemma 3 is saved under other names than its modules have: read, quantized and published under those."""
    from transformers import AutoModelForCausalLM

    model = tiny("gemma3", tmp_path / "model")
    stored = set(load_file(model / "model.safetensors"))
    modules = {name for name, _ in AutoModelForCausalLM.from_pretrained(model).named_parameters()}
    assert not stored & modules, "the names differ, or this tests nothing"
    assert quantize("gptq", model, tmp_path / "out", "--format", "compressed-tensors") == 0
    tensors, _ = published(tmp_path / "out")
    linears = {name.removesuffix("_packed") for name in tensors if name.endswith("weight_packed")}
    assert len(linears) == 2 * 7
    assert linears <= stored
    assert stored - linears <= set(tensors)


def test_names_that_nothing_reads_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What transformers would fill with random numbers is no model."""
    model = write(tmp_path / "model", FAMILIES["qwen3"](), dtype=torch.float16)
    tensors = load_file(model / "model.safetensors")
    renamed = {name.replace("model.", "model.language_model.", 1): t for name, t in tensors.items()}
    save_file(renamed, model / "model.safetensors", metadata={"format": "pt"})
    assert quantize("gptq", model, tmp_path / "out") == 2
    assert (
        "the weights do not match the config: no tensor gives model.embed_tokens.weight"
        in capsys.readouterr().err
    )


# -- which linears are quantized


def test_a_linear_that_is_not_called_stays_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Mamba multiplies by the weight of `dt_proj` itself: it is read as a float, whatever becomes of the others."""
    model = tiny("falcon_mamba", tmp_path / "model")
    source = load_file(model / "model.safetensors")
    assert quantize("gptq", model, tmp_path / "out") == 0
    tensors, config = published(tmp_path / "out")
    odd = [f"backbone.layers.{i}.mixer.dt_proj" for i in (0, 1)]
    for name in odd:
        assert torch.equal(tensors[f"{name}.weight"], source[f"{name}.weight"])
        assert f"{name}.qweight" not in tensors
    assert "backbone.layers.0.mixer.in_proj.qweight" in tensors
    rules = list(config["quantization_config"]["dynamic"])
    assert [rule.removeprefix("-:") for rule in rules] == [
        rf"(.*\.)?backbone\.layers\.{i}\.mixer\.dt_proj$" for i in (0, 1)
    ]
    settings = config["quantization_config"]
    assert settings["block_name_to_quantize"] == "backbone.layers"
    assert settings["modules_in_block_to_quantize"] == [["mixer.in_proj", "mixer.x_proj", "mixer.out_proj"]]
    assert "mixer.dt_proj stays as it is in 2 of 2 blocks: it is not called" in capsys.readouterr().err


def test_linears_that_are_never_called_are_no_small_matter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A decoder whose attention to an encoder is built and never used."""
    assert quantize("gptq", tiny("bart", tmp_path / "model"), tmp_path / "out") == 2
    assert "encoder_attn.k_proj is never used in the forward pass" in capsys.readouterr().err


def test_a_small_linear_that_does_not_fit_stays_as_it_is(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def misfit(linear: LinearLayer) -> str | None:
        return f"{linear.name} is odd" if linear.path.endswith("k_proj") else None

    model = SourceModel.open(saved("llama_gqa"))
    with pytest.raises(InputError, match=r"model\.layers\.0\.self_attn\.k_proj is odd"):
        choose_linears(model, misfit)
    monkeypatch.setattr(linear_choice, "FEW", 0.1)
    left = choose_linears(model, misfit)
    assert [each.linear.name for each in left] == [f"model.layers.{i}.self_attn.k_proj" for i in (0, 1)]
    assert "model.layers.0.self_attn.k_proj" not in {linear.name for linear in model.linears(0)}
    assert "model.layers.0.self_attn.k_proj.weight" in model.float_tensors(0)
    assert model.float_modules() == [*(each.linear.name for each in left), "lm_head"]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_what_a_forward_pass_calls(family: str, saved: Callable[[str], Path]) -> None:
    model = SourceModel.open(saved(family))
    linears = {linear.name for index in range(len(model.blocks)) for linear in model.linears(index)}
    assert called_linears(model) == linears


@pytest.mark.parametrize(("hidden", "said"), [(192, "64"), (96, "32"), (80, "16"), (72, "-1")])
def test_a_group_size_that_fits_is_named(
    hidden: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = FAMILIES["llama"]()
    config.update({"hidden_size": hidden, "intermediate_size": 2 * hidden, "head_dim": hidden // 4})
    model = write(tmp_path / "model", config, dtype=torch.float16)
    assert quantize("gptq", model, tmp_path / "out", "--group_size", "128") == 2
    assert f"which 128 does not divide: take --group_size {said}\n" in capsys.readouterr().err


# -- dense or not


def moe_config(dense: list[int]) -> Qwen3MoeConfig:
    """Blocks of a class that is named after mixtures, of which those in `dense` have no experts."""
    shape = FAMILIES["qwen3"]().to_dict()
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim",
            "num_key_value_heads", "max_position_embeddings", "initializer_range", "tie_word_embeddings")  # fmt: skip
    return Qwen3MoeConfig(
        **{key: shape[key] for key in keys},
        num_experts=4,
        moe_intermediate_size=32,
        num_experts_per_tok=2,
        mlp_only_layers=dense,
    )


def test_a_dense_model_of_a_mixture_s_class(tmp_path: Path) -> None:
    model = write(tmp_path / "model", moe_config([0, 1]), dtype=torch.float16)
    assert quantize("gptq", model, tmp_path / "out") == 0


@pytest.mark.parametrize("dense", [[], [0]])
def test_a_mixture_in_any_block(dense: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write(tmp_path / "model", moe_config(dense), dtype=torch.float16)
    assert quantize("gptq", model, tmp_path / "out") == 2
    assert "Qwen3MoeForCausalLM is a mixture of experts" in capsys.readouterr().err


# -- whether blocks can be worked on one by one


class Mixed(torch.nn.Module):
    """A block that adds what the other windows of its batch hold."""

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + hidden.mean(0, keepdim=True)


class Narrow(torch.nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden[..., :4]


class Single(torch.nn.Module):
    def forward(self, hidden: Tensor) -> Tensor:
        return hidden.view(1, -1, hidden.shape[-1]) + torch.ones(8, hidden.shape[-1])


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (Mixed(), "Mixed computes a window otherwise beside others: not supported"),
        (Narrow(), "Narrow makes states of another shape than it takes: not supported"),
        (Single(), "Single does not run by itself (The size of tensor a (16)"),
    ],
    ids=["mixed", "narrow", "single"],
)
def test_blocks_that_do_not_run_by_themselves(made: torch.nn.Module, said: str) -> None:
    states = make_states((2, 8, 16), torch.float32, CPU, CPU)
    states.put(0, 2, torch.randn(2, 8, 16))
    with pytest.raises(InputError, match=re.escape(said)):
        check_block(made, states, {})


def test_names_of_mappings_that_are_no_linears(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Moshi's `q_proj` holds a linear, and is none."""
    assert quantize("awq", tiny("moshi", tmp_path / "model"), tmp_path / "out") == 2
    assert "AWQ does not know where to put channel scales in MoshiDecoderLayer" in capsys.readouterr().err


def test_a_model_that_adds_tokens_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """CPM-Ant puts a prompt of its own before the text."""
    assert quantize("gptq", tiny("cpmant", tmp_path / "model"), tmp_path / "out") == 2
    assert re.search(
        r"CpmAntForCausalLM gives its blocks states of \(4, \d+\) for tokens of \(4, 64\)",
        capsys.readouterr().err,
    )


def test_other_kinds_of_blocks_are_checked_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a hybrid's second kind one is run before its first block is rounded."""
    model = write(tmp_path / "model", FAMILIES["gemma3"](), dtype=torch.float16)
    checked: list[int] = []
    for module in (block, block_check):
        monkeypatch.setattr(module, "check_block", lambda each, *_: checked.append(each.self_attn.layer_idx))
    monkeypatch.setattr(block_check, "blocks_alike", lambda blocks: [[0], [1]])
    assert quantize("gptq", model, tmp_path / "out") == 0
    assert checked == [1, 0]
