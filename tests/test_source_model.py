"""Models opened from disk: block by block they compute what transformers computes; what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    BertConfig,
    BloomConfig,
    FalconConfig,
    Gemma4TextConfig,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoConfig,
    LlavaConfig,
    PretrainedConfig,
    T5Config,
)

from llm_quantize.device import Device
from llm_quantize.errors import FinalError, InputError, WorkError
from llm_quantize.io.embedded_files import EMBEDDED_MODEL
from llm_quantize.io.untrusted import read_json
from llm_quantize.model.block_forward import MicroBatch, capture_inputs, distinct_inputs, replay
from llm_quantize.model.config_file import examine_config, with_old_rope_keys
from llm_quantize.model.model_forward import embed, output_head
from llm_quantize.model.pickled_weights import convert_pickles
from llm_quantize.model.source import SourceModel
from llm_quantize.model.weight_files import tensor_files
from models import CPU, FAMILIES, VOCABULARY, tokens, write

Edit = Callable[[dict[str, torch.Tensor]], object]


@pytest.fixture
def copied(saved: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a family's directory, which a test may break."""

    def copy(family: str) -> Path:
        return Path(shutil.copytree(saved(family), tmp_path / "copy"))

    return copy


@torch.no_grad()
def blockwise_logits(model: SourceModel, ids: torch.Tensor, windows: int = 2) -> torch.Tensor:
    """Logits, computed a block at a time and `windows` windows at a time."""
    states, kwargs = embed(model, ids, CPU, CPU, torch.float32)
    batch = MicroBatch(Device(CPU), ids.shape[1], 1, tokens=windows * ids.shape[1])
    for index, name in enumerate(model.blocks):
        block = model.load_block(index, CPU, torch.float32)
        replay(block, name, states, kwargs[index], batch)
        model.release(block)
    with output_head(model, CPU, torch.float32) as logits:
        result = logits(states.get(0, len(states)))
    assert all(p.is_meta for p in model.skeleton.parameters())
    return result


@torch.no_grad()
def transformers_logits(directory: Path, ids: torch.Tensor) -> torch.Tensor:
    load: Any = AutoModelForCausalLM.from_pretrained
    model = load(directory, dtype=torch.float32, attn_implementation="eager").eval()
    result: torch.Tensor = model(input_ids=ids).logits
    return result


def assert_agreement(model: SourceModel, directory: Path) -> None:
    """Assert that the model gives the logits that transformers computes from `directory`."""
    ids = tokens(5)
    expected = transformers_logits(directory, ids)
    assert float(expected.std()) > 0.1
    torch.testing.assert_close(blockwise_logits(model, ids), expected, rtol=1e-4, atol=1e-4)


def test_a_model_without_fused_attention(
    monkeypatch: pytest.MonkeyPatch, saved: Callable[[str], Path]
) -> None:
    """transformers refuses to build some models with PyTorch's fused attention, in some versions GPT-J."""
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "_supports_sdpa", False)
    directory = saved("llama")
    assert_agreement(SourceModel.open(directory), directory)


def gemma4(per_layer: int) -> Gemma4TextConfig:
    return Gemma4TextConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        layer_types=["sliding_attention", "full_attention"], num_kv_shared_layers=0, vocab_size=VOCABULARY,
        hidden_size_per_layer_input=per_layer, vocab_size_per_layer_input=VOCABULARY, pad_token_id=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        FalconConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=VOCABULARY),
        BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=VOCABULARY, initializer_range=0.15),
        GPTJConfig(n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=256, vocab_size=VOCABULARY),
        GPTBigCodeConfig(n_embd=64, n_layer=2, n_head=4, n_positions=256, vocab_size=VOCABULARY),
        gemma4(0),
        GPTNeoConfig(
            hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
            max_position_embeddings=256, vocab_size=VOCABULARY,
        ),
    ],
    ids=lambda config: str(config.model_type),
)  # fmt: skip
def test_blocks_called_in_other_ways(config: Any, tmp_path: Path) -> None:
    """Some take the first item of a block's output or pass arguments by position; BLOOM has biases for each window."""
    directory = write(tmp_path / "model", config)
    assert_agreement(SourceModel.open(directory), directory)


def test_blocks_that_take_more_than_states_for_each_token(tmp_path: Path) -> None:
    model = SourceModel.open(write(tmp_path / "model", gemma4(32)))
    with pytest.raises(InputError, match="Gemma4TextDecoderLayer takes per_layer_input for every token"):
        embed(model, tokens(2), CPU, CPU, torch.float32)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_blockwise_logits_are_those_of_the_model(family: str, saved: Callable[[str], Path]) -> None:
    directory = saved(family)
    model = SourceModel.open(directory)
    assert len(model.blocks) == 2
    assert model.dtype == torch.float32
    linears = model.linears(0)
    assert all(linear.name == f"{model.blocks[0]}.{linear.path}" for linear in linears)
    inside = {f"{x.name}.weight" for i in range(2) for x in model.linears(i)}
    parts = [model.float_tensors(index) for index in (None, 0, 1)]
    floats = [name for part in parts for name in part]
    assert len(floats) == len(set(floats))
    assert set(floats) == set(model.store.files) - inside
    assert not any("proj" in n or "dense" in n for n in floats if n.endswith("weight"))
    assert not any(".0." in n or ".1." in n for n in parts[0])
    assert all(
        n.startswith(f"{block}.") for block, part in zip(model.blocks, parts[1:], strict=True) for n in part
    )
    assert_agreement(model, directory)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_or_not(family: str, tied: bool, tmp_path: Path) -> None:
    config = FAMILIES[family]()
    config.tie_word_embeddings = tied
    directory = write(tmp_path / "m", config)
    model = SourceModel.open(directory)
    assert ("lm_head.weight" in model.store.files) is not tied
    assert_agreement(model, directory)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shards_and_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    directory = write(tmp_path / "m", FAMILIES["qwen3"](), dtype=dtype, shard="200KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    model = SourceModel.open(directory)
    assert model.dtype == dtype
    assert_agreement(model, directory)


@pytest.mark.parametrize("family", ["qwen2", "gpt_neox"])
def test_names_without_the_base_models_prefix(family: str, tmp_path: Path) -> None:
    """The base model saves them so, without its output head."""
    config = FAMILIES[family]()
    config.tie_word_embeddings = True
    directory = write(tmp_path / "m", config)
    load: Any = AutoModel.from_pretrained
    load(directory).save_pretrained(directory)
    (directory / "config.json").write_text(config.to_json_string())
    model = SourceModel.open(directory)
    assert all(name.startswith(("layers.", "embed", "norm", "final")) for name in model.store.files)
    name = model.linears(1)[0].name
    assert model.stored_linear(name) == name.partition(".")[2]
    assert_agreement(model, directory)


def test_embedded_model_opens() -> None:
    model = SourceModel.open(EMBEDDED_MODEL)
    assert model.dtype == torch.float16
    published = dict(model.side_files.published())
    assert published.keys() >= {"tokenizer.json", "generation_config.json", "LICENSE"}
    assert not any(name.endswith(".safetensors") or name == "config.json" for name in published)
    assert published["LICENSE"] == (EMBEDDED_MODEL / "LICENSE").read_bytes()
    ids = torch.tensor([model.tokenizer("This module provides a class")["input_ids"]])
    expected = transformers_logits(EMBEDDED_MODEL, ids)
    torch.testing.assert_close(blockwise_logits(model, ids), expected, rtol=1e-4, atol=1e-4)


def test_distinct_inputs(saved: Callable[[str], Path]) -> None:
    model = SourceModel.open(saved("gemma2"))
    states, kwargs = embed(model, tokens(2), CPU, CPU, torch.float32)
    block = model.load_block(1, CPU, torch.float32)
    found = distinct_inputs(block, states, kwargs[1])
    assert [sorted(p.rpartition(".")[2] for p in group) for group in found] == [
        ["k_proj", "q_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"],
    ]  # fmt: skip


def test_capture_sees_every_window_once(
    saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory runs out in the middle of a block, no group sees a window twice either."""
    model = SourceModel.open(saved("llama"))
    states, kwargs = embed(model, tokens(7), CPU, CPU, torch.float32)
    block = model.load_block(0, CPU, torch.float32)
    groups = distinct_inputs(block, states, kwargs[0])

    def captured(windows: int) -> list[torch.Tensor]:
        seen: list[list[torch.Tensor]] = [[] for _ in groups]
        batch = MicroBatch(Device(CPU), states.length, 1, tokens=windows * states.length)

        def keep(group: int, x: torch.Tensor) -> None:
            seen[group].append(x.flatten(0, -2).clone())

        capture_inputs(block, states, kwargs[0], groups, batch, keep)
        return [torch.cat(parts) for parts in seen]

    plain = captured(3)
    assert all(x.shape[0] == 7 * 24 for x in plain)
    real, calls = torch.nn.functional.silu, [0]

    def scarce(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls[0] += 1
        if x.shape[0] > 2:
            raise torch.cuda.OutOfMemoryError("no memory")
        return real(x, *args, **kwargs)

    monkeypatch.setattr(block.get_submodule("mlp.act_fn"), "forward", scarce)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    # Five windows, then two at a time: the third portion has one window that was captured and one that was not.
    for got, expected in zip(captured(5), plain, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert calls[0] > 4


def test_states_that_overflow(saved: Callable[[str], Path]) -> None:
    model = SourceModel.open(saved("llama"))
    states, kwargs = embed(model, tokens(2), CPU, CPU, torch.float32)
    block = model.load_block(0, CPU, torch.float32)
    with torch.no_grad():
        block.get_parameter("mlp.down_proj.weight").fill_(1e38)
    with pytest.raises(WorkError, match=r"states after model\.layers\.0 are not finite") as caught:
        replay(block, model.blocks[0], states, kwargs[0], MicroBatch(Device(CPU), 24, 1))
    one_line(caught.value)


# -- refusals


def one_line(error: BaseException) -> None:
    assert "\n" not in str(error)
    assert str(error)


def change(directory: Path, edit: Edit) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def configure(directory: Path, **values: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | values))


def refused(directory: Path, words: str, kind: type[Exception] = InputError) -> None:
    with pytest.raises(kind, match=words) as caught:
        SourceModel.open(directory)
    assert type(caught.value) is kind
    one_line(caught.value)


@pytest.mark.parametrize(
    ("architecture", "config", "words"),
    [
        ("T5ForConditionalGeneration", T5Config(), "T5Config is an encoder-decoder: not supported"),
        (
            "LlavaForConditionalGeneration",
            LlavaConfig(),
            "LlavaConfig is a model of more than text: not supported yet",
        ),
        ("BertForMaskedLM", BertConfig(), "BertForMaskedLM is not a causal LM"),
        (
            "Qwen2ForSequenceClassification",
            FAMILIES["qwen2"](),
            "Qwen2ForSequenceClassification is not a causal LM",
        ),
    ],
)
def test_what_is_not_a_dense_causal_lm(
    architecture: str, config: PretrainedConfig, words: str, copied: Callable[[str], Path]
) -> None:
    directory = copied("llama")
    config.architectures = [architecture]
    (directory / "config.json").write_text(config.to_json_string())
    refused(directory, words)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, r"already quantized \(gptq\).*FP16/BF16"),
        ({"quantization_config": {}}, r"already quantized \(an unnamed method\)"),
        ({"text_config": {"quantization_config": {"quant_method": "awq"}}}, r"already quantized \(awq\)"),
        ({"model_type": "no_such_type"}, r"config\.json is not usable"),
        ({"model_type": "other", "auto_map": {"AutoConfig": "c.C"}}, "own code.*--trust_remote_code"),
        (
            {"num_hidden_layers": 3, "layer_types": None},
            r"do not match the config: no tensor gives model\.layers\.2\.self_attn\.q_proj\.weight .*\(9 missing\)",
        ),
        ({"hidden_size": "wide"}, r"config\.json is not usable"),
    ],
)
def test_configs(values: dict[str, Any], words: str, copied: Callable[[str], Path]) -> None:
    directory = copied("llama")
    configure(directory, **values)
    refused(directory, words)


def test_no_config(copied: Callable[[str], Path]) -> None:
    directory = copied("llama")
    (directory / "config.json").write_text("{not json")
    refused(directory, r"cannot read config\.json: JSONDecodeError")
    (directory / "config.json").write_text("[1]")
    refused(directory, r"config\.json holds no JSON object")
    (directory / "config.json").write_bytes(b"\xff\xfe\x00")
    refused(directory, r"cannot read config\.json")
    (directory / "config.json").write_text("[" * 100_000)
    refused(directory, r"cannot read config\.json: RecursionError")
    (directory / "config.json").unlink()
    refused(directory, r"has no config\.json: give a Hugging Face model directory")


def test_a_file_too_large_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "config.json", "wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(InputError, match="larger than 64 MiB"):
        read_json(tmp_path / "config.json")


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gpt_neox"])
def test_no_tokenizer(family: str, copied: Callable[[str], Path]) -> None:
    directory = copied(family)
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").unlink()
    refused(directory, f"no usable tokenizer in {directory}")


def test_no_weights(copied: Callable[[str], Path]) -> None:
    directory = copied("llama")
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    refused(directory, "no .*safetensors weights")
    torch.save(tensors, directory / "pytorch_model.bin")
    refused(directory, r"only pickle weights \(pytorch_model\.bin\).*--allow_pickle")


def test_pickles_converted(
    saved: Callable[[str], Path], copied: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = copied("llama")
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    torch.save(dict(list(tensors.items())[::2]), directory / "pytorch_model-1.bin")
    torch.save(dict(list(tensors.items())[1::2]), directory / "pytorch_model-2.bin")
    model = SourceModel.open(directory, weights=convert_pickles(directory, tmp_path / "converted"))
    assert_agreement(model, saved("llama"))


class Harmful:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("/nowhere/reached"),))


def test_pickle_that_holds_code_is_not_run(copied: Callable[[str], Path], tmp_path: Path) -> None:
    directory = copied("llama")
    (directory / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Harmful()}))
    with pytest.raises(
        InputError, match=r"cannot read pytorch_model\.bin without running its code"
    ) as caught:
        convert_pickles(directory, tmp_path / "converted")
    one_line(caught.value)


@pytest.mark.parametrize(
    ("shard", "words"),
    [
        ("../outside.safetensors", "names a shard that is not a file beside it: '../outside.safetensors'"),
        ("/etc/outside.safetensors", "not a file beside it"),
        ("model.bin", "not a file beside it"),
        (3, "not a file beside it"),
        ("gone.safetensors", r"shard gone\.safetensors is missing.*download the model again"),
    ],
)
def test_index(shard: Any, words: str, copied: Callable[[str], Path]) -> None:
    directory = copied("llama")
    names = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").rename(directory.parent / "outside.safetensors")
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": dict.fromkeys(names, shard)})
    )
    refused(directory, words)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    refused(directory, "has no weight_map")


def test_a_single_file_goes_before_an_index(copied: Callable[[str], Path]) -> None:
    """As in transformers: an index beside it is of other times."""
    directory = copied("llama")
    index = {"weight_map": {"model.norm.weight": "gone.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_agreement(SourceModel.open(directory), directory)


def test_an_index_that_counts_wrongly(saved: Callable[[str], Path], copied: Callable[[str], Path]) -> None:
    """Of an index the names of shards count: a tensor that it lacks is read, one in no shard is not asked for."""
    directory = copied("llama")
    (directory / "model.safetensors").rename(directory / "a.safetensors")
    index = {"weight_map": {"model.norm.weight": "a.safetensors", "nowhere.weight": "a.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_agreement(SourceModel.open(directory), saved("llama"))


def test_weights_under_another_name(copied: Callable[[str], Path]) -> None:
    directory = copied("llama")
    (directory / "model.safetensors").rename(directory / "consolidated.safetensors")
    refused(directory, r"no model\.safetensors and no index of shards.* beside consolidated\.safetensors")


def test_a_package_that_is_missing(copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: Any) -> Any:
        raise ImportError("TimmWrapper requires the timm library")

    monkeypatch.setattr("llm_quantize.model.skeleton._with_fastest_attention", build)
    refused(
        copied("llama"), r"LlamaConfig needs a package that is not installed \(TimmWrapper requires the timm"
    )


def test_damaged_weights(copied: Callable[[str], Path]) -> None:
    directory = copied("llama")
    data = (directory / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused(directory, r"model\.safetensors is damaged.*download the model again")
    (directory / "model.safetensors").rename(directory / "a.safetensors")
    names = json.dumps({"weight_map": dict.fromkeys(tensor_names(data), "a.safetensors")})
    (directory / "model.safetensors.index.json").write_text(names)
    refused(directory, r"a\.safetensors is damaged")


def tensor_names(data: bytes) -> list[str]:
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return [name for name in header if name != "__metadata__"]


def test_other_weights_than_the_config_says(copied: Callable[[str], Path]) -> None:
    directory = copied("llama")
    change(directory, lambda t: [t.pop(n) for n in list(t) if "q_proj" in n])
    refused(
        directory, r"do not match the config: no tensor gives model\.layers\.0\.self_attn\.q_proj\.weight"
    )


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            lambda t: t.update({"model.layers.0.mlp.up_proj.weight": torch.zeros(90, 64)}),
            r"model\.layers\.0\.mlp\.up_proj\.weight is 90 x 64, and 96 x 64 by the config",
        ),
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            r"no tensor gives model\.layers\.1\.mlp\.up_proj\.weight of LlamaForCausalLM \(1 missing\)",
        ),
        (lambda t: t.pop("model.norm.weight"), r"no tensor gives model\.norm\.weight"),
        (lambda t: t.pop("lm_head.weight"), r"no tensor gives lm_head\.weight"),
    ],
    ids=["shape", "missing", "norm", "head"],
)
def test_weights_that_do_not_fit(edit: Edit, words: str, copied: Callable[[str], Path]) -> None:
    """Seen in the headers, before anything is read."""
    directory = copied("llama")
    change(directory, edit)
    refused(directory, words)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            lambda t: t["model.layers.0.mlp.up_proj.weight"][3].fill_(float("nan")),
            r"up_proj\.weight has NaN or infinite weights: the source model is broken",
        ),
        (
            lambda t: t["model.layers.0.input_layernorm.weight"][3].fill_(float("inf")),
            r"input_layernorm\.weight has NaN or infinite weights",
        ),
    ],
    ids=["nan", "inf"],
)
def test_broken_weights(edit: Edit, words: str, copied: Callable[[str], Path]) -> None:
    directory = copied("llama")
    change(directory, edit)
    model = SourceModel.open(directory)
    with pytest.raises(FinalError, match=words) as caught:
        blockwise_logits(model, tokens(2))
    one_line(caught.value)


UP = "model.layers.1.mlp.up_proj.weight"
GIVE = "give the model in FP16, BF16 or FP32"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            lambda t: t.update({k: v.to(torch.float8_e4m3fn) for k, v in t.items()}),
            f"is float8_e4m3fn, not a plain float: {GIVE}",
        ),
        (lambda t: t.update({UP: t[UP].to(torch.int8)}), f"{UP} is int8, not a plain float: {GIVE}"),
        (lambda t: t.update({UP: t[UP].to(torch.float64)}), f"{UP} is float64, not a plain float: {GIVE}"),
        (lambda t: t.update({UP: t[UP] > 0}), f"{UP} is bool, not a plain float: {GIVE}"),
        (
            lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn), f"{UP}_scale_inv": torch.ones(1, 1)}),
            f"the weights are quantized already \\({UP}_scale_inv\\): {GIVE}",
        ),
        (
            lambda t: t.update({UP: t[UP].to(torch.uint8), f"{UP}.absmax": torch.ones(4)}),
            f"the weights are quantized already \\({UP}.absmax\\): {GIVE}",
        ),
        (
            lambda t: t.update({UP.replace("weight", "qweight"): torch.ones(4, dtype=torch.int32)}),
            f"the weights are quantized already \\({UP.replace('weight', 'qweight')}\\): {GIVE}",
        ),
    ],
    ids=["all float8", "one int8", "one float64", "one bool", "float8 blocks", "bitsandbytes", "gptq"],
)
def test_integers_are_not_taken_for_weights(edit: Edit, words: str, copied: Callable[[str], Path]) -> None:
    """Whatever the config says of them: not one tensor is read as weights that needs scales beside it."""
    directory = copied("llama")
    change(directory, edit)
    refused(directory, words)


def test_model_without_linears(copied: Callable[[str], Path]) -> None:
    from transformers import GPT2Config

    directory = copied("llama")
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=VOCABULARY)
    (directory / "config.json").write_text(config.to_json_string())
    refused(directory, "GPT2LMHeadModel has no decoder blocks with linear layers")


def test_config_and_tensor_files(saved: Callable[[str], Path]) -> None:
    directory = saved("llama")
    assert examine_config(directory)["model_type"] == "llama"
    assert set(tensor_files(directory)) == set(load_file(directory / "model.safetensors"))


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "old"),
    [
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, {"rope_theta": 5e5}),
        ({"rope_parameters": {"rope_theta": 5e5}}, {"rope_theta": 5e5}),
        ({"rope_parameters": {"rope_theta": 7}, "rope_theta": 9, "rope_scaling": None}, {}),
        ({"rope_parameters": {"rope_theta": 5e5, **LLAMA3}}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
        (
            {"rope_parameters": {"rope_theta": 7, "partial_rotary_factor": 0.5}},
            {"rope_theta": 7, "partial_rotary_factor": 0.5},
        ),
        (
            {"model_type": "gpt_neox", "rope_parameters": {"rope_theta": 7, "partial_rotary_factor": 0.5}},
            {"rotary_emb_base": 7, "rotary_pct": 0.5},
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 7}}}, {}),
        ({"rope_parameters": {"rope_theta": 7, "full_attention": {"rope_theta": 7}}}, {}),
        ({"rope_parameters": {"rope_theta": "7"}}, {}),
        ({"rope_parameters": [7]}, {}),
        ({}, {}),
    ],
)
def test_rope_keys_for_old_readers(config: dict[str, Any], old: dict[str, Any]) -> None:
    before = json.dumps(config)
    assert with_old_rope_keys(config) == old | config
    nested = with_old_rope_keys({"text_config": config})
    assert nested == {"text_config": old | config}
    assert json.dumps(config) == before


@pytest.mark.parametrize("rope", [{"rope_type": "default"}, LLAMA3])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_rope_is_read_as_before(family: str, rope: dict[str, Any], copied: Callable[[str], Path]) -> None:
    from transformers import AutoConfig

    directory = copied(family)
    shared = json.loads((directory / "config.json").read_text())["rope_parameters"]
    configure(directory, rope_parameters=shared | {"rope_theta": 5e5} | rope)
    before = AutoConfig.from_pretrained(directory).rope_parameters
    raw = with_old_rope_keys(json.loads((directory / "config.json").read_text()))
    (directory / "config.json").write_text(json.dumps(raw))
    assert AutoConfig.from_pretrained(directory).rope_parameters == before
    # Old readers ignore the new key. Without it the old keys say the same, where they can.
    del raw["rope_parameters"]
    (directory / "config.json").write_text(json.dumps(raw))
    found = AutoConfig.from_pretrained(directory).rope_parameters
    if "rope_theta" in raw or "rotary_emb_base" in raw:
        assert found == before
    else:
        assert family == "gpt_neox"


def test_what_is_written_into_a_block_is_not_read_again(saved: Callable[..., Path]) -> None:
    """Files are mapped, and float32 on the CPU needs no conversion: a block still has its own memory."""
    model = SourceModel.open(saved("llama", torch.float32))
    block: Any = model.load_block(0, CPU, torch.float32)
    weight = block.mlp.up_proj.weight
    before = weight.clone()
    with torch.no_grad():
        weight.zero_()
    model.load_block(0, CPU, torch.float32)
    assert torch.equal(block.mlp.up_proj.weight, before)
