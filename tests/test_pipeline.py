"""Test both commands from end to end on small models: what is published, how good it is, and what is left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import awq_quantize
import gptq_quantize
from conftest import MAIN, Finished, Runs
from llm_quantize.blockwise import block
from llm_quantize.blockwise.block import BlockWork
from llm_quantize.blockwise.block_solution import solve_block
from llm_quantize.blockwise.run_context import ExecutionPlan
from llm_quantize.device import Device
from llm_quantize.evaluation import model_card
from llm_quantize.evaluation.perplexity import Measured, measure
from llm_quantize.io.embedded_files import EMBEDDED_CALIBRATION, EMBEDDED_HELDOUT, EMBEDDED_MODEL
from llm_quantize.model.source import SourceModel
from models import CPU, FAMILIES, write
from published_bytes import COMBINATIONS
from reference import dequantize_directory, plain_model, read_layers, read_tensors, write_rtn_checkpoint

TEXT = ("--calib_data", str(EMBEDDED_CALIBRATION))

# Relative error of the weights themselves: a bound that a wrong group, zero point or order breaks by far. At few bits
# they move away from the source's on purpose, towards its outputs.
CLOSE = {2: 0.75, 3: 0.35, 4: 0.18, 8: 0.02}


@pytest.mark.parametrize(
    ("method", "words", "name", "bits", "symmetric", "group"),
    COMBINATIONS,
    ids=[f"{c[0]} {c[1]}".strip() for c in COMBINATIONS],
)
def test_published(
    method: str, words: str, name: str, bits: int, symmetric: bool, group: int, runs: Runs
) -> None:
    run = runs(method, *words.split())
    settings = json.loads((run.path / "config.json").read_text())["quantization_config"]
    assert settings["quant_method"] == name
    dynamic = "dynamic" in words
    if name == "compressed-tensors":
        weights = settings["config_groups"]["group_0"]["weights"]
        assert (weights["num_bits"], weights["symmetric"]) == (bits, symmetric)
        assert weights["strategy"] == ("channel" if group == -1 else "group")
        assert group == -1 or weights["group_size"] == group
    else:
        assert (settings["bits"], settings["group_size"]) == (bits, group)
    if name == "awq":
        assert settings["zero_point"] is True
        assert settings["version"] == "gemm"
    if name == "gptq":
        assert (settings["sym"], settings["desc_act"]) == (symmetric, dynamic)
        assert json.loads((run.path / "quantize_config.json").read_text()) == settings
    assert (run.path / "quantize_config.json").exists() == (name == "gptq")
    layers, _ = read_layers(run.path)
    assert len(layers) == 4 * 7
    for layer in layers.values():
        width = layer.q.shape[1]
        assert layer.scales.shape[1] == (1 if group == -1 else width // group)
        assert bool((layer.zeros == 2 ** (bits - 1)).all()) == symmetric
        trivial = bool((layer.group == [i // (width if group == -1 else group) for i in range(width)]).all())
        assert trivial == (not dynamic or group == -1)
    unchanged(run, EMBEDDED_MODEL, torch.float16, CLOSE[bits])
    # AutoGPTQ cannot do without the tied head's copy, and others need not have it.
    assert ("lm_head.weight" in read_tensors(run.path)[0]) == ("--format gptq" in words)
    sides(run.path, EMBEDDED_MODEL)


def unchanged(run: Finished, source: Path, dtype: torch.dtype, close: float) -> None:
    """Check that the files hold what the solver put into the block, and other tensors but for channel scales."""
    found = dequantize_directory(run.path)
    before, _ = read_tensors(source)
    _, dtypes = read_tensors(run.path)
    head = {"lm_head.weight"} - set(before)
    if head & set(found):  # of a tied model, where the format was asked for by name
        assert np.array_equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert set(found) - head == set(before)
    assert set(run.weights) <= set(found)
    for name, tensor in before.items():
        now = torch.from_numpy(found[name])
        if name in run.weights:
            assert torch.equal(now, run.weights[name]), name
            if run.method == "gptq":
                was = torch.from_numpy(tensor)
                assert 0 < float((now - was).norm() / was.norm()) < close, name
            continue
        assert dtypes[name] == dtype, name
        smoothed = run.method == "awq" and ".layers." in name and ("norm" in name or name.endswith("bias"))
        if not smoothed:
            assert torch.equal(now, torch.from_numpy(tensor).to(dtype).float()), name


def sides(path: Path, source: Path) -> None:
    """Check that every other file of the source is there, byte for byte, and no file that does not belong."""
    for file in source.iterdir():
        if file.suffix != ".safetensors" and file.name not in ("config.json", "model.safetensors.index.json"):
            name = "BASE_README.md" if file.name == "README.md" else file.name
            assert (path / name).read_bytes() == file.read_bytes()
    own = {"config.json", "quantize_config.json", "model.safetensors", *model_card.OWN}
    assert {p.name for p in path.iterdir()} <= own | {p.name for p in source.iterdir()}
    config, before = (json.loads((p / "config.json").read_text()) for p in (path, source))
    old = {"rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_emb_base", "rotary_pct"}
    old -= before.keys()
    assert {k: v for k, v in config.items() if k not in {"quantization_config", "dtype"} | old} == {
        k: v for k, v in before.items() if k not in ("dtype", "_name_or_path")
    }
    assert old & config.keys() or "rope_parameters" not in before or "gemma3" in before["model_type"]


def test_report(runs: Runs) -> None:
    report = json.loads((runs("awq").path / "quantization_report.json").read_text())
    assert report["calibration"]["tokens"] == 16 * 128
    assert len(report["layers"]) == 28
    for layer in report["layers"]:
        assert 0 < layer["error"] < 0.05
        assert layer["fallback"] is None
        assert layer["dead"] == 0
    assert any(layer["alpha"] for layer in report["layers"])
    report = json.loads((runs("gptq").path / "quantization_report.json").read_text())
    assert all(layer["alpha"] is None for layer in report["layers"])


# -- families


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("family", list(FAMILIES))
def test_families(family: str, method: str, saved: Callable[..., Path], runs: Runs) -> None:
    """BF16 stays BF16, and the result's outputs are near the source's."""
    source = saved(family, torch.bfloat16)
    run = runs(method, "--model_path", str(source), "--group_size", "32", "--bits", "8", *TEXT)
    assert json.loads((run.path / "config.json").read_text())["dtype"] == "bfloat16"
    unchanged(run, source, torch.bfloat16, CLOSE[8])
    sides(run.path, source)
    if method == "awq":
        report = json.loads((run.path / "quantization_report.json").read_text())
        assert any(layer["alpha"] for layer in report["layers"])
    ids = torch.randint(3, 2048, (4, 64), generator=torch.Generator().manual_seed(5))
    measured = measure(SourceModel.open(source), run.path, ids, Device(CPU))
    assert measured.kl < 0.02
    assert measured.agreement > 0.9


@pytest.mark.parametrize(("dtype", "stored"), [(torch.float32, "float16"), (torch.float16, "float16")])
def test_stored_dtype(dtype: torch.dtype, stored: str, saved: Callable[..., Path], runs: Runs) -> None:
    source = saved("qwen2", dtype)
    run = runs("gptq", "--model_path", str(source), "--group_size", "32", *TEXT)
    config = json.loads((run.path / "config.json").read_text())
    assert config["dtype"] == stored
    unchanged(run, source, torch.float16, CLOSE[4])


def test_shards_and_pickles(tmp_path: Path, runs: Runs) -> None:
    """The result does not depend on how the source's weights are split into files."""
    source = write(tmp_path / "whole", FAMILIES["llama"](), dtype=torch.bfloat16)
    sharded = write(tmp_path / "sharded", FAMILIES["llama"](), dtype=torch.bfloat16, shard="200KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    pickled = Path(shutil.copytree(source, tmp_path / "pickled"))
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    results = [
        dequantize_directory(
            runs("gptq", "--model_path", str(path), "--group_size", "32", "--allow_pickle", *TEXT).path
        )
        for path in (source, sharded, pickled)
    ]
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        assert all((other[name] == results[0][name]).all() for name in other)


# -- quality


@pytest.fixture(scope="session")
def compare(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Measured]:
    """Compare a checkpoint of the embedded model with it, on held-out text."""
    source = SourceModel.open(EMBEDDED_MODEL)
    ids = source.tokenizer(EMBEDDED_HELDOUT.read_text(encoding="utf-8"))["input_ids"]
    windows = torch.tensor(ids[: 24 * 256]).reshape(24, 256)
    known: dict[Path, Measured] = {}

    def find(path: Path) -> Measured:
        if path not in known:
            known[path] = measure(source, path, windows, Device(CPU))
        return known[path]

    return find


MORE = ("--calib_samples", "64", "--calib_seq_len", "256")


@pytest.mark.parametrize(
    ("method", "words", "name", "bits", "symmetric", "share"),
    [
        ("gptq", "", "gptq", 4, True, 0.5),
        ("awq", "", "awq", 4, False, 0.55),
        ("awq", "--zero_point false", "awq", 4, True, 0.5),
        ("gptq", "--sym false", "compressed-tensors", 4, False, 0.55),
        ("gptq", "--bits 3", "compressed-tensors", 3, True, 0.35),
        ("gptq", "--bits 2", "compressed-tensors", 2, True, 0.2),
        ("gptq", "--bits 8", "gptq", 8, True, 0.6),
        ("gptq", "--act_order_groups dynamic", "gptq", 4, True, 0.5),
    ],
)
def test_beats_rounding_to_nearest(
    method: str, words: str, name: str, bits: int, symmetric: bool, share: float, runs: Runs,
    compare: Callable[[Path], Measured], tmp_path: Path,
) -> None:  # fmt: skip
    run = runs(method, *words.split(), *MORE)
    write_rtn_checkpoint(EMBEDDED_MODEL, tmp_path / "rtn", name, bits, 128, symmetric)
    ours, plain = compare(run.path), compare(tmp_path / "rtn")
    assert ours.kl < share * plain.kl
    assert ours.agreement >= plain.agreement
    if bits >= 4:
        assert ours.perplexity_quantized < 1.05 * ours.perplexity_source


def test_quality_buys_something(runs: Runs, compare: Callable[[Path], Measured]) -> None:
    fast, default, best = (
        compare(runs("gptq", "--quality", quality, *MORE).path).kl for quality in ("fast", "default", "best")
    )
    assert default < fast
    assert best < 0.95 * default


def test_saved_model_agrees_with_plain_pytorch(runs: Runs, compare: Callable[[Path], Measured]) -> None:
    """The independent reader and the whole model give the same perplexity."""
    run = runs("awq", *MORE)
    source = SourceModel.open(EMBEDDED_MODEL)
    ids = source.tokenizer(EMBEDDED_HELDOUT.read_text(encoding="utf-8"))["input_ids"]
    windows = torch.tensor(ids[: 24 * 256]).reshape(24, 256)
    with torch.no_grad():
        logits: Any = plain_model(run.path)(input_ids=windows)
    log = logits.logits[:, :-1].double().log_softmax(-1)
    loss = -log.gather(2, windows[:, 1:, None]).mean()
    assert compare(run.path).perplexity_quantized == pytest.approx(float(loss.exp()), rel=1e-4)


# -- again, and not at all


def contents(path: Path) -> dict[str, bytes]:
    """Return every file's bytes by its name."""
    return {p.name: p.read_bytes() for p in path.iterdir()}


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_same_seed_same_bytes(method: str, runs: Runs) -> None:
    assert contents(runs(method).path) == contents(runs(method, again=True).path)
    other = contents(runs(method, "--seed", "7").path)
    assert other["model.safetensors"] != contents(runs(method).path)["model.safetensors"]
    assert other["tokenizer.json"] == contents(runs(method).path)["tokenizer.json"]


QUICK = ["--calib_samples", "4", "--calib_seq_len", "64", "--eval_data", "off", "--device", "cpu"]


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line of an error, the last on stderr."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if "error:" in line]
    assert len(lines) == 1
    return lines[0]


def test_existing_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out"
    words = [*QUICK, "--output_path", str(target)]
    assert gptq_quantize.main(words) == 0
    before = contents(target)
    (target / "mark").write_text("old")
    assert awq_quantize.main(words) == 2
    assert f"{target} exists: use --overwrite" in said(capsys)
    assert {k: v for k, v in contents(target).items() if k != "mark"} == before
    assert awq_quantize.main([*words, "--overwrite"]) == 0
    assert not (target / "mark").exists()
    assert json.loads((target / "config.json").read_text())["quantization_config"]["quant_method"] == "awq"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


class _Full:
    """Raise an out-of-memory error at the calls with the given numbers, counted from 0."""

    def __init__(self, real: Callable[..., Any], *numbers: int) -> None:
        self.real, self.numbers, self.count = real, numbers, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        if self.count - 1 in self.numbers:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.34 GiB. GPU 0 has")
        return self.real(*args, **kwargs)


@pytest.mark.parametrize(
    ("where", "call"),
    [
        ("llm_quantize.model.source.Model.load", 4),
        ("llm_quantize.solver.hessian.HessianAccumulator.finish", 9),
        ("llm_quantize.solver.problem.Factorization", 9),
        ("llm_quantize.solver.problem.descend", 9),
        ("llm_quantize.model.block_forward.forward", 2),  # to see which linears share an input
        ("llm_quantize.model.block_forward.forward", 3),  # for Hessians
        ("llm_quantize.solver.hessian.HessianAccumulator.add", 5),  # between them
    ],
)
def test_out_of_memory_once(
    where: str,
    call: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    runs: Runs,
) -> None:
    """The block is tried again with less at a time: the result is as good, and no tensor is there twice."""
    module, _, attribute = where.rpartition(".")
    owner: Any = resolve_name(module)
    full = _Full(getattr(owner, attribute), call)
    monkeypatch.setattr(owner, attribute, lambda *args, **kwargs: full(*args, **kwargs))
    target = tmp_path / "out"
    assert gptq_quantize.main([*QUICK, "--output_path", str(target)]) == 0
    assert full.count > call + 1
    warned = "out of memory on cpu, tried again with" in capsys.readouterr().err
    # A forward pass is repeated at once, in smaller micro-batches.
    assert warned == ((where, call) != ("llm_quantize.model.block_forward.forward", 3))
    found, expected = read_tensors(target)[0], read_tensors(runs("gptq", *QUICK).path)[0]
    assert set(found) == set(expected)
    report = json.loads((target / "quantization_report.json").read_text())
    assert len(report["layers"]) == 28
    assert all(layer["error"] < 0.05 for layer in report["layers"])


def test_out_of_memory_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llm_quantize.solver.problem.Factorization", _Full(lambda: None, *range(1000)))
    assert gptq_quantize.main([*QUICK, "--output_path", str(tmp_path / "out")]) == 1
    line = said(capsys)
    assert "out of memory on cpu in model.layers.0 (1.34 GiB more were asked for)" in line
    assert "--calib_seq_len" in line
    assert list(tmp_path.iterdir()) == []


def test_all_inputs_captured_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where states are in host memory one pass captures all inputs of a block, and a resumed run keeps to that."""
    quality = {}
    given: list[bool] = []
    words = ["--calib_samples", "16", "--calib_seq_len", "128", "--eval_samples", "4", "--device", "cpu"]
    stop: list[type[BaseException]] = []
    real = BlockWork.quantize

    def quantize(work: BlockWork, writer: Any) -> Any:
        given.append(work._plan.in_order)
        if work._index == 2 and stop:
            raise stop.pop()
        return real(work, writer)

    monkeypatch.setattr(BlockWork, "quantize", quantize)
    for name, storage in (("in order", "cpu"), ("at once", "meta")):
        monkeypatch.setattr(
            "llm_quantize.pipeline.choose_storage", lambda *_, storage=storage: torch.device(storage)
        )
        monkeypatch.setattr(
            "llm_quantize.pipeline.ExecutionPlan",
            lambda batch, storage, in_order: ExecutionPlan(batch, CPU, in_order),
        )
        if name == "at once":
            monkeypatch.setattr(block, "resume_together", lambda *_: pytest.fail("a pass was suspended"))
            stop.append(KeyboardInterrupt)
            assert gptq_quantize.main([*words, "--output_path", str(tmp_path / name)]) == 130
            monkeypatch.setattr("llm_quantize.pipeline.choose_storage", lambda *_: CPU)
        assert gptq_quantize.main([*words, "--output_path", str(tmp_path / name)]) == 0
        report = json.loads((tmp_path / name / "quantization_report.json").read_text())
        quality[name] = report["measured"]["kl"]
    assert given == [True] * 4 + [False] * 5
    assert quality["at once"] != quality["in order"]
    assert quality["at once"] == pytest.approx(quality["in order"], rel=0.1)


def broken(directory: Path, value: float) -> Path:
    """Write a model whose last linear is not finite; return its directory."""
    write(directory, FAMILIES["llama"]())
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = value
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_failure_leaves_nothing(method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = broken(tmp_path / "model", float("nan"))
    target = tmp_path / "new" / "deeper" / "out"
    words = ["--model_path", str(source), "--output_path", str(target), "--group_size", "32", *TEXT, *QUICK]
    assert MAIN[method](words) == 1
    assert "model.layers.1.mlp.down_proj.weight has NaN or infinite weights" in said(capsys)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (MemoryError, 1), (OSError, 1)])
@pytest.mark.parametrize("keep", [True, False])
def test_interruption(
    error: type[BaseException],
    code: int,
    keep: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    runs: Runs,
) -> None:
    """The old target stays, and finished blocks are kept for the same command unless that is not wanted."""
    target = tmp_path / "out"
    shutil.copytree(runs("gptq").path, target)
    before = contents(target)
    count = [0]

    def failing(*args: Any) -> Any:
        count[0] += 1
        if count[0] == 3:
            raise error("bad")
        return solve_block(*args)

    words = [*QUICK, "--output_path", str(target), "--overwrite"]
    with monkeypatch.context() as patch:
        patch.setattr(block, "solve_block", failing)
        assert gptq_quantize.main([*words, *(() if keep else ("--no_resume",))]) == code
    assert contents(target) == before
    assert ("; 2 of 4 blocks are kept, the same command goes on there" in said(capsys)) == keep
    assert {p.name for p in tmp_path.iterdir()} == {"out"} | ({".out.partial"} if keep else set())
    assert gptq_quantize.main(words) == 0
    assert ("going on after 2 of 4 blocks" in capsys.readouterr().err) == keep
    assert contents(target) == contents(runs("gptq", *QUICK).path)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--max_kl", "0"], "over --max_kl 0"), (["--max_ppl_increase", "0"], "nothing published")],
)
def test_limits(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out"
    more = ["--calib_samples", "4", "--calib_seq_len", "64", "--eval_samples", "4", "--device", "cpu"]
    assert gptq_quantize.main([*more, "--bits", "2", *words, "--output_path", str(target)]) == 1
    assert message in said(capsys)
    assert not list(tmp_path.iterdir())
    assert gptq_quantize.main([*more, "--max_kl", "5", "--output_path", str(target)]) == 0
    out = capsys.readouterr().out
    for row in (
        "perplexity",
        "KL divergence",
        "sample: This module provides",
        f"serve: ./run_vllm.sh {target}",
    ):
        assert row in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_no_gpu(device: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert awq_quantize.main(["--device", device, "--output_path", str(tmp_path / "out")]) == 2
    assert f"--device {device}: no GPU that PyTorch can use" in said(capsys)
    assert not list(tmp_path.iterdir())


def test_refused_early(
    tmp_path: Path, saved: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Each is refused before any work, in one line, with exit code 2, and leaves nothing."""
    from transformers import GPTJConfig

    source = saved("llama")
    other = write(
        tmp_path / "gptj",
        GPTJConfig(n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_inner=96, vocab_size=2048),
    )
    for words, message in (
        (["--model_path", str(source), "--group_size", "64"], r"mlp.down_proj has 96 input channels"),
        (["--model_path", str(source), "--group_size", "32", "--calib_seq_len", "512"], "at most 256"),
        (["--model_path", str(tmp_path / "none")], "none"),
        (["--model_path", str(other), "--group_size", "32"], "GPTJBlock: quantize it with gptq_quantize.py"),
        (["--group_size", "48"], "--group_size 48"),
    ):
        quick = [*words, *TEXT, "--eval_data", "off", "--output_path", str(tmp_path / "out")]
        try:
            code = awq_quantize.main(quick)
        except SystemExit as leaving:
            code = int(leaving.code or 0)
        assert code == 2, words
        assert message in said(capsys)
        assert not (tmp_path / "out").exists()


def test_unknown_architecture_works_with_gptq(tmp_path: Path, runs: Runs) -> None:
    from transformers import GPTJConfig

    config = GPTJConfig(
        n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_inner=96, vocab_size=2048, n_positions=256
    )
    source = write(tmp_path / "gptj", config)
    run = runs("gptq", "--model_path", str(source), "--group_size", "32", *TEXT)
    unchanged(run, source, torch.float16, CLOSE[4])


def test_mappings_that_do_not_hold_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], runs: Runs
) -> None:
    """OLMo 2 has its norms after attention and MLP, so the mappings that its names suggest do not hold."""
    from transformers import Olmo2Config

    config = Olmo2Config(
        vocab_size=2048, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.15, pad_token_id=0, max_position_embeddings=256,
    )  # fmt: skip
    source = write(tmp_path / "olmo", config)
    run = runs("awq", "--model_path", str(source), "--group_size", "32", *TEXT)
    warned = capsys.readouterr().err
    assert "Olmo2DecoderLayer: no channel scales fit mlp.gate_proj, mlp.up_proj" in " ".join(warned.split())
    ids = torch.randint(3, 2048, (4, 64), generator=torch.Generator().manual_seed(5))
    gptq = runs("gptq", "--sym", "false", "--model_path", str(source), "--group_size", "32", *TEXT)
    ours, other = (measure(SourceModel.open(source), r.path, ids, Device(CPU)).kl for r in (run, gptq))
    assert ours < 1.3 * other
