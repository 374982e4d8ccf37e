"""Test resuming an interrupted run: it publishes the same bytes, and another run is recognized and refused."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import MAIN
from llm_quantize import pipeline
from llm_quantize.blockwise import block
from llm_quantize.blockwise.block_solution import BlockProblem, solve_block
from llm_quantize.checkpoint.verification import verify_written
from llm_quantize.checkpoint.writer import CheckpointWriter
from llm_quantize.io.embedded_files import EMBEDDED_CALIBRATION
from models import FAMILIES, write

BLOCKS = 3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[torch.dtype], Path]:
    """Make a model of three blocks in a dtype; float32 is stored as float16, so that every tensor is cast."""
    made: dict[torch.dtype, Path] = {}

    def find(dtype: torch.dtype) -> Path:
        if dtype not in made:
            config = FAMILIES["llama_gqa"]()
            config.num_hidden_layers = BLOCKS
            made[dtype] = write(tmp_path_factory.mktemp("models") / "model", config, dtype=dtype)
        return made[dtype]

    return find


def words(model: Path, target: Path) -> list[str]:
    return [
        "--model_path", str(model), "--output_path", str(target), "--group_size", "32", "--device", "cpu",
        "--calib_data", str(EMBEDDED_CALIBRATION), "--calib_samples", "6", "--calib_seq_len", "32",
        "--eval_samples", "2",
    ]  # fmt: skip


plain_words = words


def contents(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


def interrupted(method: str, arguments: list[str], before: int) -> list[str]:
    """Interrupt a run as soon as it has solved `before` blocks; return the names of those that it solved."""
    solved: list[str] = []

    def until(problem: BlockProblem, *rest: Any) -> Any:
        if len(solved) == before:
            raise KeyboardInterrupt
        solved.append(problem.name)
        return solve_block(problem, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "solve_block", until)
        code = MAIN[method](arguments)
    assert code == (130 if before < BLOCKS else 0)
    return solved


def place(target: Path) -> Path:
    return target.parent / f".{target.name}.partial"


@pytest.mark.parametrize(
    ("method", "dtype", "quality"),
    [
        ("awq", torch.float32, "default"),
        ("awq", torch.bfloat16, "default"),
        ("gptq", torch.float32, "default"),
        ("gptq", torch.bfloat16, "default"),
        ("awq", torch.bfloat16, "best"),  # beside the reference model, whose states are made anew, too
        ("gptq", torch.float32, "best"),
    ],
)
def test_the_same_bytes(
    method: str,
    dtype: torch.dtype,
    quality: str,
    models: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The blocks that are done are replayed, after one interruption and after several.

    The same layers are unpacked again and compared, too: one of seven, by block and position.
    """
    model = models(dtype)
    sampled: list[list[str]] = []

    def verify(writer: CheckpointWriter, *rest: Any) -> None:
        sampled.append(sorted(writer.layers))
        verify_written(writer, *rest)

    monkeypatch.setattr(pipeline, "verify_written", verify)

    def words(model: Path, target: Path) -> list[str]:
        return [*plain_words(model, target), "--quality", quality]

    assert len(interrupted(method, words(model, tmp_path / "whole"), BLOCKS)) == BLOCKS
    for name in ("once", "again"):
        target = tmp_path / name
        if name == "once":
            assert len(interrupted(method, words(model, target), 2)) == 2
        else:
            assert len(interrupted(method, words(model, target), 1)) == 1
            assert len(interrupted(method, words(model, target), 1)) == 1
        assert {path.name for path in place(target).iterdir()} == {
            "checkpoint",
            "journal",
            "lock",
        }  # no states
        assert len(interrupted(method, words(model, target), BLOCKS)) == 1
        assert contents(target) == contents(tmp_path / "whole"), name
        assert not place(target).exists()
    assert sampled == [sampled[0]] * 3
    assert {name.split(".")[2] for name in sampled[0]} == {"0", "1", "2"}
    assert len(sampled[0]) == BLOCKS


def test_a_damaged_block_is_done_again(models: Any, tmp_path: Path) -> None:
    model, target = models(torch.bfloat16), tmp_path / "out"
    interrupted("gptq", words(model, tmp_path / "whole"), BLOCKS)
    interrupted("gptq", words(model, target), 2)
    from safetensors import safe_open

    shard = place(target) / "checkpoint" / "model.safetensors"
    with safe_open(shard, framework="pt") as stored:
        victim = stored.get_tensor("model.layers.1.mlp.up_proj.qweight").numpy().tobytes()[:64]
    data = shard.read_bytes()
    assert data.count(victim) == 1
    at = data.index(victim)
    shard.write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
    assert interrupted("gptq", words(model, target), BLOCKS) == ["model.layers.1", "model.layers.2"]
    assert contents(target) == contents(tmp_path / "whole")


def test_what_differs_is_said(
    models: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Path(shutil.copytree(models(torch.bfloat16), tmp_path / "model"))
    target = tmp_path / "out"
    arguments = words(model, target)
    interrupted("gptq", arguments, 2)
    text = tmp_path / "other.txt"
    text.write_text(EMBEDDED_CALIBRATION.read_text(encoding="utf-8")[5000:])
    weights = model / "model.safetensors"
    stamp = weights.stat()

    def refused(method: str, more: list[str], *said: str) -> None:
        capsys.readouterr()
        assert MAIN[method]([*arguments, *more]) == 2
        [line] = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
        assert "add --restart to begin anew" in line
        for part in said:
            assert part in line
        assert (place(target) / "journal").is_file()

    refused("gptq", ["--bits", "3"], "--bits (4 there, 3 here)", "--format (gptq there, compressed-tensors")
    refused("gptq", ["--damp_percent", "0.2"], "--damp_percent (0.1 there, 0.2 here)")
    refused("gptq", ["--calib_data", str(text)], "differs in the calibration text:")
    refused("gptq", ["--seed", "4"], "differs in the calibration text:")
    refused("awq", [], "the method (gptq there, awq here)")
    os.utime(weights, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    refused("gptq", [], "differs in the model's weights:")
    os.utime(weights, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with monkeypatch.context() as patch:
        patch.setattr("llm_quantize.blockwise.resume.importlib.metadata.version", lambda name: "9.9")
        refused("gptq", [], "there, 9.9 here)")

    # The bytes depend neither on the measurement, nor on whether the target may be replaced.
    assert interrupted("gptq", [*arguments, "--eval_data", "off", "--overwrite"], BLOCKS) == [
        "model.layers.2"
    ]
    shutil.rmtree(target)
    interrupted("gptq", arguments, 2)
    assert len(interrupted("gptq", [*arguments, "--bits", "3", "--restart"], BLOCKS)) == BLOCKS
    assert not place(target).exists()


def test_pickled_weights_are_known_again(models: Any, tmp_path: Path) -> None:
    """Each run converts them again, into another place."""
    from safetensors.torch import load_file

    model = Path(shutil.copytree(models(torch.bfloat16), tmp_path / "model"))
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    arguments = [*words(model, tmp_path / "out"), "--allow_pickle"]
    assert len(interrupted("gptq", arguments, 2)) == 2
    assert len(interrupted("gptq", arguments, BLOCKS)) == 1


def test_a_failed_limit_keeps_nothing(models: Any, tmp_path: Path) -> None:
    """The same command would fail again, and with another limit the work is done again, too."""
    assert MAIN["gptq"]([*words(models(torch.bfloat16), tmp_path / "out"), "--max_kl", "0"]) == 1
    assert list(tmp_path.iterdir()) == []


def test_killed_before_publishing(models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks are done, so only the measurement is repeated."""
    model, target = models(torch.bfloat16), tmp_path / "out"
    interrupted("gptq", words(model, tmp_path / "whole"), BLOCKS)

    def killed(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "measure", killed)
        assert MAIN["gptq"](words(model, target)) == 1
    assert place(target).exists()
    with monkeypatch.context() as patch:
        patch.setattr("llm_quantize.blockwise.loop.embed", killed)
        patch.setattr(pipeline, "measure", lambda *args: _measured())
        assert interrupted("gptq", words(model, target), BLOCKS) == []
    assert set(contents(target)) == set(contents(tmp_path / "whole"))
    weights = "model.safetensors"
    assert contents(target)[weights] == contents(tmp_path / "whole")[weights]


def _measured() -> Any:
    from llm_quantize.evaluation.perplexity import Measured

    return Measured(1, 2.0, 2.0, 0.0, 1.0)
