"""Test the reader against the independent one, streamed numbers against plain forward passes, and the command."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    PretrainedConfig,
    Qwen2Config,
)

from llm_quantize.calibration.windows import CalibrationConfig
from llm_quantize.checkpoint.external import HEAD_NAMES
from llm_quantize.checkpoint.reader import QuantizedStore, open_quantized
from llm_quantize.device import Device
from llm_quantize.errors import InputError, WorkError
from llm_quantize.evaluation import perplexity
from llm_quantize.evaluation.command import main
from llm_quantize.evaluation.heldout import heldout_windows
from llm_quantize.evaluation.perplexity import Measured, measure
from llm_quantize.evaluation.sample import sample
from llm_quantize.io.embedded_files import EMBEDDED_HELDOUT, EMBEDDED_MODEL
from llm_quantize.model.model_forward import output_head
from llm_quantize.model.source import SourceModel
from models import CPU, FAMILIES
from models import write as write_model
from reference import dequantize_directory, plain_model, write_rtn_checkpoint

DEVICE = Device(CPU)
VOCABULARY = 300
FORMATS = [  # name, bits, group size, symmetric, activation order
    ("awq", 4, 32, False, False),
    ("awq", 4, -1, True, False),
    *(
        ("gptq", bits, 32, sym, order)
        for bits in (2, 3, 4, 8)
        for sym in (True, False)
        for order in (False, True)
    ),
    ("gptq", 3, -1, False, False),
    *(("compressed-tensors", bits, 32, sym, False) for bits in range(2, 9) for sym in (True, False)),
    ("compressed-tensors", 4, -1, False, False),
]


def qwen2(tied: bool = False) -> PretrainedConfig:
    # Weights this large make a random model sure of its tokens, so that errors show in the divergence.
    return Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.15,
        tie_word_embeddings=tied,
    )


def gpt_neox() -> PretrainedConfig:
    return GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=128,
        initializer_range=0.15,
    )


def make(directory: Path, config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> Path:
    """Write a random model with the embedded model's tokenizer; return its directory."""
    torch.manual_seed(0)
    build: Any = AutoModelForCausalLM.from_config
    model = build(config, dtype=dtype)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:  # norms and biases that do something
            shift = torch.randn_like(parameter, dtype=torch.float32) * 0.2
            parameter.data += shift.to(dtype)
            assert "weight" in name or "bias" in name
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EMBEDDED_MODEL / name, directory)
    return directory


def tokens(windows: int = 5, length: int = 24) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(1))


def plain(source: Path, quantized: Path, ids: torch.Tensor) -> Measured:
    """Measure the same with both models whole in memory, in float64 from the logits on."""
    # Loaded by transformers itself, which renames some tensors on the way.
    with tempfile.TemporaryDirectory() as name:
        weights = {k: torch.from_numpy(v).contiguous() for k, v in dequantize_directory(quantized).items()}
        save_file(weights, Path(name) / "model.safetensors", metadata={"format": "pt"})
        shutil.copy(source / "config.json", name)
        build: Any = AutoModelForCausalLM.from_pretrained
        model, other = (
            build(p, dtype=torch.float32, attn_implementation="eager").eval() for p in (source, name)
        )
    with torch.no_grad():
        p = model(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
        q = other(input_ids=ids).logits[:, :-1].double().log_softmax(-1)
    target = ids[:, 1:, None]
    return Measured(
        ids.numel() - ids.shape[0],
        math.exp(-p.gather(2, target).mean()),
        math.exp(-q.gather(2, target).mean()),
        float((p.exp() * (p - q)).sum(-1).mean()),
        float((p.argmax(-1) == q.argmax(-1)).double().mean()),
    )


def agree(one: Measured, other: Measured, rel: float = 1e-4) -> None:
    assert one.tokens == other.tokens
    assert one.perplexity_source == pytest.approx(other.perplexity_source, rel=rel)
    assert one.perplexity_quantized == pytest.approx(other.perplexity_quantized, rel=rel)
    assert one.kl == pytest.approx(other.kl, rel=rel, abs=1e-6)
    assert one.agreement == pytest.approx(other.agreement, abs=1e-9)


def change(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def settings(directory: Path, **values: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= values
    (directory / "config.json").write_text(json.dumps(config))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("models") / "qwen2", qwen2())


# -- unpacking


@pytest.mark.parametrize(("name", "bits", "group_size", "symmetric", "act_order"), FORMATS)
def test_reading(
    model: Path, tmp_path: Path, name: str, bits: int, group_size: int, symmetric: bool, act_order: bool
) -> None:
    out = tmp_path / "out"
    write_rtn_checkpoint(model, out, name, bits, group_size, symmetric, act_order=act_order, shards=2)
    saved = QuantizedStore(out)
    expected = dequantize_directory(out)
    assert set(saved.files) == set(expected)
    assert len(saved.linears) == 21
    for tensor, array in expected.items():
        found = saved.read(tensor)
        assert saved.dtype(tensor) == found.dtype
        assert np.array_equal(found.float().numpy(), array), tensor
        if tensor.removesuffix(".weight") in saved.linears:
            assert found.dtype == torch.float32


@pytest.mark.parametrize("name", ["awq", "gptq", "compressed-tensors"])
def test_reading_in_slices(model: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rtn_checkpoint(model, tmp_path / "out", name, 4, 32, False)
    for module in ("formats.bit_streams", "checkpoint.reader"):  # a few rows, and not a divisor
        monkeypatch.setattr(f"llm_quantize.{module}.UNPACKED_TOGETHER", 700)
    saved = QuantizedStore(tmp_path / "out")
    expected = dequantize_directory(tmp_path / "out")
    for linear in saved.linears:
        assert np.array_equal(saved.read(f"{linear}.weight").numpy(), expected[f"{linear}.weight"])


def test_padded_words_of_old_compressed_tensors(model: Path, tmp_path: Path) -> None:
    """Before 0.18 a word held ten 3-bit values and two idle bits, of zero points, too."""
    out = tmp_path / "out"
    write_rtn_checkpoint(model, out, "compressed-tensors", 3, 32, False)
    name = "model.layers.1.mlp.down_proj"
    rng = np.random.default_rng(0)
    q, z = rng.integers(0, 8, (64, 96)), rng.integers(0, 8, (64, 3))

    def padded(values: Any) -> torch.Tensor:
        rows, count = values.shape
        words = np.zeros((rows, -(-count // 10)), np.uint32)
        for i in range(count):
            words[:, i // 10] |= values[:, i].astype(np.uint32) << np.uint32(3 * (i % 10))
        return torch.from_numpy(words.view(np.int32))

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[f"{name}.weight_packed"] = padded(q)
        tensors[f"{name}.weight_zero_point"] = padded(z.T).T.contiguous()

    change(out, edit)
    scale = load_file(out / "model.safetensors")[f"{name}.weight_scale"].double().numpy()
    expected = (q - np.repeat(z, 32, axis=1)) * np.repeat(scale, 32, axis=1)
    np.testing.assert_allclose(QuantizedStore(out).read(f"{name}.weight").numpy(), expected, rtol=1e-6)


def test_gptq_v2_zero_points(model: Path, tmp_path: Path) -> None:
    """Version 2 stores zero points as they are: the same words stand for weights that are one scale higher."""
    out, name = tmp_path / "out", "model.layers.0.mlp.up_proj"
    write_rtn_checkpoint(model, out, "gptq", 4, 32, True)
    before = QuantizedStore(out).read(f"{name}.weight")
    settings(out, checkpoint_format="gptq_v2")
    scales = load_file(out / "model.safetensors")[f"{name}.scales"].float().T
    difference = QuantizedStore(out).read(f"{name}.weight") - before
    torch.testing.assert_close(difference, scales.repeat_interleave(32, dim=1))


def test_g_idx_that_readers_ignore_is_refused(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_rtn_checkpoint(model, out, "gptq", 4, 32, True, act_order=True)
    settings(out, desc_act=False)
    with pytest.raises(WorkError, match="g_idx is not trivial"):
        QuantizedStore(out).read("model.layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize(
    ("format_name", "suffix", "replacement", "message"),
    [
        ("awq", "scales", lambda t: t[:, :-8].contiguous(), "scales"),
        ("awq", "qzeros", None, "no tensor qzeros"),
        ("gptq", "g_idx", lambda t: t + 1, "g_idx does not give"),
        ("gptq", "scales", None, "no tensor scales"),
        ("compressed-tensors", "weight_packed", lambda t: t[:, :-1].contiguous(), "does not hold"),
        ("compressed-tensors", "weight_zero_point", lambda t: t[:, :1].contiguous(), "weight_zero_point"),
    ],
)
def test_damage_is_named(
    model: Path, tmp_path: Path, format_name: str, suffix: str, replacement: Any, message: str
) -> None:
    out, name = tmp_path / "out", "model.layers.0.mlp.up_proj"
    write_rtn_checkpoint(model, out, format_name, 4, 32, False)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensor = tensors.pop(f"{name}.{suffix}")
        if replacement is not None:
            tensors[f"{name}.{suffix}"] = replacement(tensor)

    change(out, edit)
    with pytest.raises(WorkError, match=message) as caught:
        QuantizedStore(out).read(f"{name}.weight")
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ({"bits": 5}, "5 bits"),
        ({"quant_method": "awq", "version": "gemv"}, "gemm"),
        ({"quant_method": "compressed-tensors", "format": "dense"}, "pack-quantized"),
    ],
)
def test_unknown_formats_are_refused(model: Path, tmp_path: Path, values: Any, message: str) -> None:
    write_rtn_checkpoint(model, tmp_path / "out", "gptq", 4, 32, True)
    settings(tmp_path / "out", **values)
    with pytest.raises(InputError, match=message):
        QuantizedStore(tmp_path / "out")


# -- measuring


@pytest.mark.parametrize(
    ("config", "format_name", "bits"),
    [
        (qwen2(), "gptq", 3),
        (qwen2(tied=True), "awq", 4),
        (gpt_neox(), "compressed-tensors", 3),
        (gpt_neox(), "gptq", 4),
    ],
    ids=["qwen2", "qwen2-tied", "gpt_neox", "gpt_neox-4"],
)
def test_streamed_equals_plain(tmp_path: Path, config: PretrainedConfig, format_name: str, bits: int) -> None:
    directory = make(tmp_path / "model", config)
    write_rtn_checkpoint(directory, tmp_path / "out", format_name, bits, 32, False, shards=2)
    source, ids, seen = SourceModel.open(directory), tokens(), list[int]()
    found = measure(source, tmp_path / "out", ids, DEVICE, on_block=seen.append)
    expected = plain(directory, tmp_path / "out", ids)
    assert expected.kl > 1e-3  # what is compared is not nothing
    assert expected.agreement < 1
    agree(found, expected)
    assert seen == [0, 1, 2]
    # The source is as it was: measured again, with nothing left in memory.
    assert all(parameter.is_meta for parameter in source.skeleton.parameters())
    assert measure(source, tmp_path / "out", ids, DEVICE) == found


def test_norms_and_biases_are_the_checkpoint_s(model: Path, tmp_path: Path) -> None:
    """AWQ changes norms and biases, so measuring must not take those of the source."""
    write_rtn_checkpoint(model, tmp_path / "out", "awq", 4, 32, False)
    before = measure(SourceModel.open(model), tmp_path / "out", tokens(), DEVICE)

    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("layers.1.input_layernorm.weight", "layers.2.self_attn.q_proj.bias", "norm.weight"):
            tensors[f"model.{name}"] *= 1.5

    change(tmp_path / "out", edit)
    found = measure(SourceModel.open(model), tmp_path / "out", tokens(), DEVICE)
    agree(found, plain(model, tmp_path / "out", tokens()))
    assert found.kl > before.kl * 1.2


def test_eight_bits_are_near_and_a_wrong_scale_is_far(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    write_rtn_checkpoint(model, out, "gptq", 8, 32, False)
    near = measure(SourceModel.open(model), out, tokens(), DEVICE)
    assert 0 < near.kl < 2e-3
    assert near.agreement > 0.9
    assert near.perplexity_quantized == pytest.approx(near.perplexity_source, rel=0.02)
    write_rtn_checkpoint(model, tmp_path / "two", "gptq", 2, 32, False)
    assert measure(SourceModel.open(model), tmp_path / "two", tokens(), DEVICE).kl > 100 * near.kl

    def edit(scales: dict[str, torch.Tensor]) -> None:
        scales["model.layers.1.mlp.down_proj.scales"][0, 5] *= 30

    change(out, edit)
    far = measure(SourceModel.open(model), out, tokens(), DEVICE)
    assert far.kl > 3 * near.kl


def test_logits_stay_within_bounds(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rtn_checkpoint(model, tmp_path / "out", "gptq", 3, 32, False)
    source, ids = SourceModel.open(model), tokens(5, 24)
    shapes: list[tuple[int, ...]] = []

    @contextmanager
    def watched(*args: Any) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        with output_head(*args) as logits:

            def watch(hidden: torch.Tensor) -> torch.Tensor:
                out = logits(hidden)
                shapes.append(tuple(out.shape))
                return out

            yield watch

    monkeypatch.setattr(perplexity, "output_head", watched)
    whole = measure(source, tmp_path / "out", ids, DEVICE)
    assert shapes == [(5, 23, VOCABULARY)] * 2
    for count in (1, 7, 50):  # tokens at once: one, pieces of a window, two windows
        shapes.clear()
        limit = count * VOCABULARY * 4 * perplexity.COPIES
        agree(measure(source, tmp_path / "out", ids, DEVICE, logit_bytes=limit), whole, rel=1e-5)
        assert max(n * length for n, length, _ in shapes) == {1: 1, 7: 7, 50: 46}[count]
        assert sum(n * length for n, length, _ in shapes) == 2 * 5 * 23


def test_bfloat16_source(tmp_path: Path) -> None:
    directory = make(tmp_path / "model", qwen2(), torch.bfloat16)
    write_rtn_checkpoint(directory, tmp_path / "out", "compressed-tensors", 3, 32, False)
    agree(
        measure(SourceModel.open(directory), tmp_path / "out", tokens(), DEVICE),
        plain(directory, tmp_path / "out", tokens()),
    )


def test_a_missing_untied_head_is_reported(model: Path, tmp_path: Path) -> None:
    """The embedding must not take its place: all numbers would be wrong."""
    write_rtn_checkpoint(model, tmp_path / "out", "gptq", 4, 32, True)
    change(tmp_path / "out", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(InputError, match=r"no lm_head\.weight"):
        measure(SourceModel.open(model), tmp_path / "out", tokens(), DEVICE)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["awq", "gptq", "compressed-tensors"])
def test_on_the_gpu(model: Path, tmp_path: Path, name: str) -> None:
    write_rtn_checkpoint(model, tmp_path / "out", name, 4, 32, False)
    found = measure(SourceModel.open(model), tmp_path / "out", tokens(), Device(torch.device("cuda")))
    agree(found, measure(SourceModel.open(model), tmp_path / "out", tokens(), DEVICE), rel=1e-2)


def test_a_checkpoint_of_another_model_is_refused(model: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "other", gpt_neox())
    write_rtn_checkpoint(other, tmp_path / "out", "gptq", 4, 32, True)
    with pytest.raises(
        InputError, match=r"checkpoint has no model\.embed_tokens\.weight: is it of another model"
    ):
        measure(SourceModel.open(model), tmp_path / "out", tokens(), DEVICE)
    with pytest.raises(InputError, match="not quantized"):
        open_quantized(SourceModel.open(model), model)


def test_a_checkpoint_with_nan_is_named(model: Path, tmp_path: Path) -> None:
    write_rtn_checkpoint(model, tmp_path / "out", "gptq", 4, 32, True)
    change(tmp_path / "out", lambda t: t["model.layers.1.mlp.up_proj.scales"][0, 0].fill_(math.nan))
    with pytest.raises(WorkError, match=r"layers\.1\.mlp\.up_proj.*quantized checkpoint is broken"):
        measure(SourceModel.open(model), tmp_path / "out", tokens(), DEVICE)


# -- text


CALIBRATION = CalibrationConfig(data=str(EMBEDDED_HELDOUT), samples=4, seq_len=64)


def test_heldout_windows(tmp_path: Path) -> None:
    tokenizer, said = AutoTokenizer.from_pretrained(EMBEDDED_MODEL), list[str]()

    def heldout(
        data: str = "auto",
        samples: int = 16,
        calibration: CalibrationConfig = CALIBRATION,
        *,
        embedded: bool = True,
    ) -> torch.Tensor:
        return heldout_windows(data, samples, calibration, tokenizer, embedded=embedded, log=said.append)

    found = heldout(samples=3)
    assert found.shape == (3, 64)
    assert found.dtype == torch.int64
    assert not said
    # Another model is measured on the same text, and a note says so.
    same = heldout(samples=3, embedded=False)
    assert torch.equal(same, found)
    assert "--eval_data" in said.pop()
    # Of the calibration data itself other windows, and a warning.
    assert torch.equal(heldout(str(EMBEDDED_HELDOUT), 3), found)
    assert "calibration data too" in said.pop()
    # Never longer than what the numbers are compared at.
    longer = replace(CALIBRATION, seq_len=2048)
    assert heldout(samples=2, calibration=longer).shape == (2, 512)
    (tmp_path / "short.txt").write_text("A few words.")
    with pytest.raises(InputError, match="too little held-out text"):
        heldout(str(tmp_path / "short.txt"))
    (tmp_path / "few.txt").write_text("Some words that make a line.\n" * 30)
    heldout(str(tmp_path / "few.txt"))
    assert said.pop().startswith("held-out text: ")


def test_sample_of_the_embedded_model(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    write_rtn_checkpoint(EMBEDDED_MODEL, tmp_path / "out", "gptq", 8, 32, False)
    text = sample(tmp_path / "out", tokenizer, CPU, "This module provides", 12)
    assert text.startswith("This module provides")
    reference: Any = plain_model(tmp_path / "out")
    ids = torch.tensor([tokenizer("This module provides")["input_ids"]])
    for _ in range(12):
        with torch.no_grad():
            token = reference(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
        if int(token) == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, token], 1)
    assert text == tokenizer.decode(ids[0], skip_special_tokens=True)
    change(tmp_path / "out", lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(WorkError, match=r"model\.norm\.weight"):
        sample(tmp_path / "out", tokenizer, CPU, "This", 2)


@pytest.mark.parametrize("name", HEAD_NAMES)
def test_sample_finds_the_output_head_under_any_name(name: str, tmp_path: Path) -> None:
    """GPT-NeoX's output head is `embed_out` in files of transformers 4, and `lm_head` in memory."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    model = write_model(tmp_path / "neox", FAMILIES["gpt_neox"]())
    write_rtn_checkpoint(model, tmp_path / "out", "gptq", 8, 32, False)
    plain = sample(tmp_path / "out", tokenizer, CPU, "This module provides", 6)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        (old,) = [stored for stored in tensors if stored.split(".")[0] in HEAD_NAMES]
        tensors[f"{name}.weight"] = tensors.pop(old)

    change(tmp_path / "out", rename)
    assert sample(tmp_path / "out", tokenizer, CPU, "This module provides", 6) == plain


# -- the command


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    storage = tmp_path_factory.mktemp("checkpoints")
    write_rtn_checkpoint(EMBEDDED_MODEL, storage / "three", "gptq", 3, 32, True)
    write_rtn_checkpoint(EMBEDDED_MODEL, storage / "four", "awq", 4, 32, False)
    return storage / "three", storage / "four"


SMALL = ["--samples", "2", "--seq_len", "64", "--device", "cpu"]


def test_command_as_json(checkpoints: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(EMBEDDED_MODEL), str(checkpoints[1]), "--json", *SMALL]) == 0
    out, err = capsys.readouterr()
    (row,) = json.loads(out)["results"]
    assert not err
    assert row["tokens"] == 2 * 63
    assert row["bytes"] == (checkpoints[1] / "model.safetensors").stat().st_size
    assert 0 < row["kl"] < 1
    assert row["perplexity_source"] < 200  # a trained model, on text of its kind


def test_command_side_by_side(checkpoints: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(EMBEDDED_MODEL), *SMALL, "--compare", *map(str, checkpoints)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "checkpoint",
        "(source)",
        str(checkpoints[0]),
        str(checkpoints[1]),
        "over",
    ]
    three, four = (float(line.split()[3]) for line in lines[2:4])
    assert three > four > 0
    assert lines[-1] == "over 126 tokens"


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{model}"], 2, "--compare"),
        (["{model}", "/nowhere/at/all"], 2, "no such directory"),
        (["/nowhere/at/all", "{four}"], 2, "no such directory"),
        (["{model}", "{model}"], 2, "not quantized"),
        (["{four}", "{four}"], 2, "already quantized"),
        (["{model}", "{four}", "--samples", "0"], 2, "--samples 0"),
        (["{model}", "{four}", "--seq_len", "1"], 2, "--seq_len 1"),
        (["{model}", "{four}", "--seq_len", "999999"], 2, "at most"),
        (["{model}", "{four}", "--device", "tpu"], 2, "--device tpu"),
        (["{model}", "{four}", "--data", "/nowhere.txt"], 2, "nowhere.txt"),
        (["{model}", "{four}", "--data", "csv"], 2, "is a kind of file, not a dataset"),
        (["{model}", "{damaged}", *SMALL], 2, "has no model.norm.weight: is it of another model?"),
    ],
)
def test_command_refusals(
    checkpoints: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(checkpoints[1], damaged)
    change(damaged, lambda tensors: tensors.pop("model.norm.weight"))
    places = {"model": EMBEDDED_MODEL, "four": checkpoints[1], "damaged": damaged}
    assert main([argument.format(**places) for argument in arguments]) == code
    out, err = capsys.readouterr()
    last = err.splitlines()[-1]
    assert last.startswith("evaluate.py: error: ")
    assert message in last
    assert not out
    assert "Traceback" not in err


def test_command_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--nonsense"])
    assert caught.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
