"""Inject faults in writing, reading, numbers and memory. Each run ends in a complete result, or in one line.

After a failure only the work directory of an interrupted run may be left beside the target, and only where steps are
kept to resume from; with --no_resume nothing is left.
"""

from __future__ import annotations

import builtins
import errno
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import MAIN
from llm_quantize import pipeline
from llm_quantize.blockwise import block, loop
from llm_quantize.calibration import text_sources
from llm_quantize.calibration.table import Table
from llm_quantize.checkpoint.reader import QuantizedStore
from llm_quantize.checkpoint.verification import verify_written
from llm_quantize.checkpoint.writer import CheckpointWriter
from llm_quantize.errors import InputError, WorkError
from llm_quantize.evaluation import perplexity
from llm_quantize.formats import FORMATS
from llm_quantize.formats.base import CheckpointFormat
from llm_quantize.io import safetensors_files
from llm_quantize.io.atomic_directory import AtomicDirectory
from llm_quantize.io.embedded_files import EMBEDDED_CALIBRATION, EMBEDDED_HELDOUT
from llm_quantize.io.safetensors_files import PlannedTensor
from llm_quantize.model import block_forward, tensor_store
from llm_quantize.model.source import Model, SourceModel
from llm_quantize.solver import awq, problem
from llm_quantize.solver.hessian import HessianAccumulator

QUICK = ["--calib_samples", "4", "--calib_seq_len", "32", "--eval_data", "off", "--device", "cpu"]
QUICK += ["--group_size", "32", "--quality", "fast", "--calib_data", str(EMBEDDED_CALIBRATION), "--no_resume"]
MEASURED = ["--eval_data", str(EMBEDDED_HELDOUT), "--eval_samples", "2"]

# --- writing --------------------------------------------------------------------------------------------------


class Faults:
    """Count every call that writes below `root`, and let the `at`-th of them fail, or all from there on.

    Counted are opening for writing, writing, setting a length, making durable, making directories, renaming.
    """

    def __init__(self, root: Path, number: int, at: int | None = None, *, lasting: bool = False) -> None:
        self.root = str(root.resolve())
        self.number = number
        self.at = at
        self.lasting = lasting
        self.count = 0
        self.calls: list[str] = []

    def __call__(self, name: str, path: Any) -> None:
        """Count a call named `name` that would write to `path`, a name or a descriptor, and let it fail."""
        if isinstance(path, int):
            try:
                path = os.readlink(f"/proc/self/fd/{path}")  # noqa: PTH115 (a descriptor of anything)
            except OSError:
                return
        if not str(Path(path).absolute()).startswith(self.root):
            return
        index, self.count = self.count, self.count + 1
        self.calls.append(name)
        if self.at is not None and (index == self.at or (self.lasting and index > self.at)):
            raise OSError(self.number, os.strerror(self.number))

    @contextmanager
    def injected(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name, position in (
                ("write", 0), ("pwrite", 0), ("ftruncate", 0), ("fsync", 0), ("sendfile", 0), ("mkdir", 0),
                ("rename", 1), ("replace", 1), ("link", 1), ("copy_file_range", 1), ("writev", 0),
            ):  # fmt: skip
                if hasattr(os, name):
                    patch.setattr(os, name, self._before(name, getattr(os, name), position))
            real = os.open

            def opened(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
                if flags & (os.O_WRONLY | os.O_RDWR):
                    self("open", path)
                return real(path, flags, *args, **kwargs)

            patch.setattr(os, "open", opened)
            for module in (builtins, io):
                patch.setattr(module, "open", self._opener(module.open))
            yield

    def _before(self, name: str, real: Callable[..., Any], position: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if len(args) > position:
                self(name, args[position])
            return real(*args, **kwargs)

        return call

    def _opener(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            found = real(file, mode, *args, **kwargs) if not set(mode) & set("wax+") else None
            if found is not None:
                return found
            self("open", file)
            return _File(real(file, mode, *args, **kwargs), lambda: self("write", file))

        return call


class _File:
    """An open file that calls `before` ahead of each write."""

    def __init__(self, file: Any, before: Callable[[], None]) -> None:
        self._file = file
        self._before = before

    def write(self, data: Any) -> Any:
        self._before()
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()


PLAN = [
    PlannedTensor("b.weight", torch.bfloat16, (8, 4)),
    *(PlannedTensor(f"a.{i}", torch.float32, (16, 4)) for i in range(4)),
]


def write(target: Path, side: Path) -> None:
    """Write a whole checkpoint by the writer alone: shards, index, steps, side files, publication."""
    with AtomicDirectory(target, overwrite=True) as output_dir:
        with CheckpointWriter(output_dir, PLAN, {"run": 1}, keep=False, shard_bytes=600) as writer:
            output_dir.write_json("config.json", {"a": 1})
            for number, planned in enumerate(PLAN):
                writer.add(planned.name, torch.full(planned.shape, float(number), dtype=planned.dtype))
                writer.commit({"step": number})
            output_dir.write(side.name, side.read_bytes())
            verify_written(writer, FORMATS["awq"], {})
        output_dir.publish()


def contents(path: Path) -> dict[str, bytes]:
    """The bytes of every file below a directory, by its path in it."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("number", "lasting"),
    [(errno.ENOSPC, False), (errno.ENOSPC, True), (errno.EIO, False)],
    ids=["full once", "full from then on", "broken once"],
)
@pytest.mark.parametrize("there", [False, True], ids=["new", "over an old one"])
def test_every_write_of_a_checkpoint_fails_once(
    there: bool, number: int, lasting: bool, tmp_path: Path
) -> None:
    """The target is as it was or complete, nothing else is left, and one line gives the reason."""
    side = tmp_path / "tokenizer.json"
    side.write_text("{}")
    plain = tmp_path / "plain"
    plain.mkdir()
    with (faults := Faults(plain, number)).injected():
        write(plain / "out", side)
    complete = contents(plain / "out")
    assert faults.count >= 40
    assert {"open", "write", "pwrite", "ftruncate", "fsync", "mkdir", "rename"} <= set(faults.calls)
    failures = aside = 0
    for at in range(faults.count + 5 * there):
        root = tmp_path / f"at-{at}"
        (root / "out").mkdir(parents=True)
        (root / "out" / "config.json").write_text("old")
        before = contents(root)
        if not there:
            shutil.rmtree(root / "out")
            before = {}
        line = None
        with (here := Faults(root, number, at, lasting=lasting)).injected():
            try:
                write(root / "out", side)
            except (InputError, WorkError) as error:
                line = str(error)
        if line is None:
            # A copy is then made in another way. Which call it is depends on how far the writer's thread has come.
            assert at >= here.count or here.calls[at] == "sendfile"
        else:
            failures += 1
            assert "\n" not in line
            assert str(root) in line
            assert (
                (number not in (errno.ENOSPC, errno.EDQUOT)) or "disk full" in line or "cannot write" in line
            )
        if (root / ".out.old").exists():
            # The new one's rename may not be durable, or the old one could not be put back: it stays until the
            # next run, which puts things right.
            assert line is not None
            assert not (root / "out").exists() or contents(root / "out") == complete
            assert contents(root / ".out.old") == {"config.json": b"old"}
            aside += 1
            write(root / "out", side)
        after = contents(root)
        assert after in (before, {f"out/{name}": data for name, data in complete.items()}), at
        assert sorted(p.name for p in root.iterdir()) == (["out"] if after else []), at
        assert here.count > 0
        shutil.rmtree(root)
    assert failures >= faults.count // 2
    assert aside <= (3 if there and lasting else there)


def run(model: Path, target: Path, *words: str, method: str = "gptq") -> int:
    return MAIN[method](["--model_path", str(model), "--output_path", str(target), *QUICK, *words])


def failed(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the one line that reports a failure; only progress and warnings may come before it."""
    err = capsys.readouterr().err
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if " error: " in line]
    assert len(lines) == 1
    assert err.endswith(f"{lines[0]}\n")
    return lines[0]


@pytest.fixture
def model(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of a small model, to be damaged."""
    return Path(shutil.copytree(saved("llama"), tmp_path / "source" / "model"))


@pytest.mark.parametrize("resumed", [False, True], ids=["nothing kept", "kept and resumed"])
def test_the_disk_fills_up_in_a_run(
    resumed: bool, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk fills up at one of a dozen writes; the run resumes from what is kept, to the same bytes."""
    root = tmp_path / "disk"
    root.mkdir()
    words = ["--no_resume", "false"] if resumed else []
    with (faults := Faults(root, errno.ENOSPC)).injected():
        assert run(model, root / "out", *words) == 0
    complete = contents(root / "out")
    assert faults.count > 80
    shutil.rmtree(root / "out")
    capsys.readouterr()
    kept = 0
    for at in range(3, faults.count, faults.count // 12):
        with Faults(root, errno.ENOSPC, at, lasting=True).injected():
            code = run(model, root / "out", *words)
        left = sorted(p.name for p in root.iterdir())
        if code == 0:  # steps that cannot be kept for resuming are not needed
            assert contents(root / "out") == complete
            shutil.rmtree(root / "out")
            capsys.readouterr()
            continue
        line = failed(capsys)
        assert code == (1 if "disk full" in line else 2), line
        assert left in ([], ["out"], [".out.partial"] if resumed else [])
        if left == ["out"]:
            assert contents(root / "out") == complete
        kept += left == [".out.partial"]
        if resumed:
            assert run(model, root / "out", *words, "--overwrite") == 0
            assert contents(root / "out") == complete
        shutil.rmtree(root / "out", ignore_errors=True)
        capsys.readouterr()
    assert (kept > 3) == resumed


def test_a_bit_that_flips_on_the_way_to_the_disk(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever tensor it is in, reading back finds the difference, and nothing is published."""
    real, count, at = safetensors_files.write_at, [0], [-1]

    def flipped(handle: int, data: memoryview, offset: int) -> None:
        count[0] += 1
        changed = bytearray(data)
        if count[0] == at[0]:
            changed[len(changed) // 2] ^= 1
        real(handle, memoryview(changed), offset)

    monkeypatch.setattr(safetensors_files, "write_at", flipped)
    assert run(model, tmp_path / "out") == 0
    total = count[0]
    shutil.rmtree(tmp_path / "out")
    capsys.readouterr()
    for at[0] in range(2, total + 1, max(1, total // 8)):
        count[0] = 0
        assert run(model, tmp_path / "out") == 1
        assert "differs from what was written: check the disk and run again" in failed(capsys)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


# --- reading --------------------------------------------------------------------------------------------------


class Opened:
    """A safetensors file of which one tensor cannot be read."""

    def __init__(self, file: Any, name: str, error: Exception) -> None:
        self._file, self._name, self._error = file, name, error

    def get_tensor(self, name: str) -> Tensor:
        if name == self._name:
            raise self._error
        found: Tensor = self._file.get_tensor(name)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Any:
        return self._file.__enter__()

    def __exit__(self, *exc: object) -> None:
        self._file.__exit__(*exc)


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), SafetensorError("InvalidOffset")]
)
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_a_tensor_that_cannot_be_read(
    name: str,
    error: Exception,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real: Any = safe_open
    monkeypatch.setattr(
        tensor_store, "safe_open", lambda path, framework: Opened(real(path, framework), name, error)
    )
    assert run(model, tmp_path / "out") == 1
    assert f"cannot read {name} from model.safetensors" in failed(capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_a_cut_shard_is_reported_before_the_work(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    weight_map: dict[str, str] = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        file = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in names}, model / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert run(model, tmp_path / "out") == 0
    os.truncate(model / "model-1.safetensors", (model / "model-1.safetensors").stat().st_size - 1)
    shutil.rmtree(tmp_path / "out")
    capsys.readouterr()
    assert run(model, tmp_path / "out") == 2
    assert "model-1.safetensors is damaged" in failed(capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


# --- numbers --------------------------------------------------------------------------------------------------


def rank_one(H: Tensor) -> Tensor:
    v = torch.linspace(0.5, 2, H.shape[0])
    return torch.outer(v, v)


def with_dead(H: Tensor) -> Tensor:
    H[::3], H[:, ::3] = 0, 0
    return H


def with_value(value: float, *, everywhere: bool = False) -> Callable[[Tensor], Tensor]:
    def change(H: Tensor) -> Tensor:
        if everywhere:
            return torch.full_like(H, value)
        H[3, 3] = value
        return H

    return change


HESSIANS: dict[str, tuple[Callable[[Tensor], Tensor], str | None]] = {
    "rank one": (rank_one, None),
    "zero": (torch.zeros_like, "carried nothing"),
    "dead channels": (with_dead, "carried nothing"),
    "one NaN": (with_value(float("nan")), "rounded to nearest"),
    "all NaN": (with_value(float("nan"), everywhere=True), "rounded to nearest"),
    "infinity": (with_value(float("inf")), "rounded to nearest"),
    "indefinite": (lambda H: -H, "damping raised"),
    "far from definite": (lambda H: H - 1e3 * torch.ones_like(H), None),
    "tiny": (lambda H: H * 1e-38, None),
    "huge": (lambda H: H / H.abs().max() * 1e38, None),
}


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("case", HESSIANS)
def test_hessians_of_all_kinds(
    case: str,
    method: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The result is finite everywhere, and a warning names a layer that was not solved as usual."""
    change, said = HESSIANS[case]
    real = HessianAccumulator.finish
    monkeypatch.setattr(HessianAccumulator, "finish", lambda self: change(real(self).clone()))
    assert run(model, tmp_path / "out", method=method) == 0
    warnings = [x for x in capsys.readouterr().err.splitlines() if x.startswith("warning:")]
    if said is not None:
        assert any("model.layers.0.self_attn.q_proj" in x and said in x for x in warnings), warnings
    report = json.loads((tmp_path / "out" / "quantization_report.json").read_text())
    assert len(report["layers"]) == 14
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert not tensor.is_floating_point() or bool(torch.isfinite(tensor).all()), name


def layer(fill: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"):
            tensors[name] = fill(tensors[name].float()).to(tensors[name].dtype)

    return change


def one_row(w: Tensor) -> Tensor:
    w[5] = 0
    return w


def edge(w: Tensor) -> Tensor:
    w[::2, ::2] = 65504.0
    w[1::2, 1::2] = -65504.0
    return w


WEIGHTS: dict[str, Callable[[dict[str, Tensor]], None]] = {
    "all zero": layer(torch.zeros_like),
    "one row zero": layer(one_row),
    "constant": layer(lambda w: torch.full_like(w, 0.25)),
    "constant and negative": layer(lambda w: torch.full_like(w, -3.0)),
    "largest of FP16": layer(edge),
    "smallest of FP16": layer(lambda w: w.sign() * 6e-8),
    "one far out": layer(lambda w: w.index_put((torch.tensor([2]), torch.tensor([3])), torch.tensor(3e4))),
}


@pytest.mark.parametrize(("method", "words"), [("gptq", ""), ("gptq", "--bits 8"), ("awq", "")])
@pytest.mark.parametrize("case", WEIGHTS)
def test_weights_of_all_kinds(
    case: str, words: str, method: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The result is finite, and near the weights where these are of one size; or one line reports the failure."""
    path = model / "model.safetensors"
    tensors = {name: tensor.half() for name, tensor in load_file(path).items()}
    WEIGHTS[case](tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    code = run(model, tmp_path / "out", *words.split(), method=method)
    if code != 0:
        assert code == 1
        assert "model.layers." in failed(capsys)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
        return
    found = QuantizedStore(tmp_path / "out")
    for name in found.files:
        assert bool(torch.isfinite(found.read(name).float()).all()), name
    if case in ("all zero", "constant", "constant and negative") and method == "gptq":
        for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight"):
            torch.testing.assert_close(found.read(name), tensors[name].float(), rtol=0.15, atol=1e-6)


@pytest.mark.parametrize("value", [1e5, 1e30])
def test_weights_that_float16_cannot_hold(
    value: float, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They may be in a linear, whose scale can be too large, or in a tensor that is copied."""
    path = model / "model.safetensors"
    whole = load_file(path)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"):
        tensors = {n: t.clone() for n, t in whole.items()}
        tensors[name][2, 3] = value
        save_file(tensors, path, metadata={"format": "pt"})
        code = run(model, tmp_path / "out")
        if code == 0:
            for tensor in load_file(tmp_path / "out" / "model.safetensors").values():
                assert not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())
            shutil.rmtree(tmp_path / "out")
            continue
        line = failed(capsys)
        assert "model.layers.1" in line or "embed_tokens" in line
        assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


# --- texts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gives", [[], [0], [1]], ids=["nothing", "padding", "BOS alone"])
def test_a_tokenizer_that_yields_nothing(
    gives: list[int], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    kind = type(SourceModel.open(model).tokenizer)

    def nothing(self: Any, text: Any, **kwargs: Any) -> dict[str, Any]:
        return {"input_ids": [gives] * len(text) if isinstance(text, list) else gives}

    monkeypatch.setattr(kind, "__call__", nothing)
    assert run(model, tmp_path / "out") == 2
    assert "no usable tokenizer in" in failed(capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_a_tokenizer_that_yields_nothing_of_this_text(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm_quantize.calibration.column_tokenizer import ColumnTokenizer

    monkeypatch.setattr(ColumnTokenizer, "_encode", lambda self, texts: [[] for _ in texts])
    assert run(model, tmp_path / "out") == 2
    assert "too little text to calibrate on" in failed(capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


@pytest.mark.parametrize("error", [None, ConnectionError("reset by peer"), EOFError("ended early")])
def test_a_dataset_that_ends_early(
    error: Exception | None,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A short dataset gives fewer windows and a warning, an error one line."""

    def rows(columns: Sequence[str]) -> Iterator[tuple[str]]:
        yield from [("some words of text that a model can read " * 8,)] * 2
        if error is not None:
            raise error

    table = Table("org/text:train", ("text",), rows, streamed=True)
    monkeypatch.setattr(text_sources, "open_table", lambda source, **options: table)
    code = run(model, tmp_path / "out", "--calib_samples", "64", "--calib_data", "org/text")
    if error is None:
        assert code == 0
        assert "instead of the 64 asked for" in capsys.readouterr().err
        return
    assert code == 2
    assert str(error) in failed(capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


# --- memory ---------------------------------------------------------------------------------------------------

# Each function where it is used: the module or class that the run takes it from, and its name.
STAGES: dict[str, tuple[Any, str]] = {
    "embed": (loop, "embed"),
    "load": (Model, "load"),
    "distinct inputs": (block, "distinct_inputs"),
    "capture": (block, "capture_inputs"),
    "Hessian": (HessianAccumulator, "add"),
    "factorize": (problem, "Factorization"),
    "scale search": (problem, "search_qparams"),
    "compensate": (problem, "compensate"),
    "channel scales": (awq, "choose_scales"),
    "mappings": (block, "exact_mappings"),
    "packing": (CheckpointFormat, "pack"),
    "replay": (block_forward, "replay"),
    "block": (block_forward, "forward"),
    "measuring": (pipeline, "measure"),
    "embed for measuring": (perplexity, "embed"),
    "replay for measuring": (perplexity, "replay"),
    "output head": (perplexity, "output_head"),
}


@pytest.mark.parametrize(
    "error", [torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")]
)
@pytest.mark.parametrize("when", ["once", "always"])
@pytest.mark.parametrize("stage", STAGES)
def test_out_of_memory_at_each_stage(
    stage: str,
    when: str,
    error: Exception,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run gives a complete result, or one line about memory and leaves nothing."""
    owner, name = STAGES[stage]
    real, count = getattr(owner, name), [0]

    def scarce(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if when == "always" or count[0] == 1:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, scarce)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    code = run(model, tmp_path / "out", *MEASURED, method="awq")
    assert count[0] > 0
    if code == 0:
        assert when == "once"
        assert {"config.json", "model.safetensors"} <= {p.name for p in (tmp_path / "out").iterdir()}
        return
    assert code == 1
    assert "out of memory" in failed(capsys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_out_of_host_memory(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def scarce(*args: Any, **kwargs: Any) -> Any:
        raise MemoryError

    for owner, name in (STAGES["embed"], STAGES["factorize"], STAGES["packing"]):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, scarce)
            assert run(model, tmp_path / "out") == 1
        assert "out of memory: lower --calib_samples" in failed(capsys)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
