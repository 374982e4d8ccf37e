"""Test runs whose source or output is changed by others while they work: what is published is what was made.

Of a source, files beside the weights are those of the start. Of an output, every file is compared at the last moment.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import MAIN
from llm_quantize import pipeline
from llm_quantize.blockwise import block
from llm_quantize.blockwise.block_solution import solve_block
from llm_quantize.checkpoint.verification import verify_written
from llm_quantize.checkpoint.writer import CheckpointWriter
from llm_quantize.io.embedded_files import EMBEDDED_CALIBRATION
from llm_quantize.model.side_files import SideFiles

Damage = Callable[[Path], object]


@pytest.fixture
def model(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    directory = Path(shutil.copytree(saved("llama"), tmp_path / "model"))
    for name in ("NOTICE", "README.md", "additional_chat_templates/tool_use.jinja"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(f"{name} of the start")
    return directory


def words(model: Path, target: Path) -> list[str]:
    return [
        "--model_path", str(model), "--output_path", str(target), "--group_size", "32", "--device", "cpu",
        "--calib_data", str(EMBEDDED_CALIBRATION), "--calib_samples", "2", "--calib_seq_len", "32",
        "--eval_data", "off", "--quality", "fast",
    ]  # fmt: skip


def contents(directory: Path) -> dict[str, bytes]:
    """Return the bytes of every file by its path in `directory`."""
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def after_first_block(monkeypatch: pytest.MonkeyPatch, change: Callable[[], object]) -> None:
    calls: list[None] = []

    def changing(*arguments: Any) -> Any:
        if not calls:
            change()
        calls.append(None)
        return solve_block(*arguments)

    monkeypatch.setattr(block, "solve_block", changing)


# --- the source -----------------------------------------------------------------------------------------------


def test_side_files_are_those_of_the_start(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert MAIN["gptq"](words(model, tmp_path / "clean" / "out")) == 0
    names = [
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "config.json",
        "NOTICE",
        "README.md",
    ]

    def change() -> None:
        for name in names[::2]:
            (model / name).unlink()
        for name in names[1::2]:
            (model / name).write_text("another")
        shutil.rmtree(model / "additional_chat_templates")
        (model / "LICENSE").write_text("of later")

    after_first_block(monkeypatch, change)
    assert MAIN["gptq"](words(model, tmp_path / "changed" / "out")) == 0
    assert not (model / "tokenizer.json").exists()
    found = contents(tmp_path / "changed" / "out")
    assert found == contents(tmp_path / "clean" / "out")
    assert found["NOTICE"] == b"NOTICE of the start"
    assert found["BASE_README.md"] == b"README.md of the start"
    assert (
        found["additional_chat_templates/tool_use.jinja"]
        == b"additional_chat_templates/tool_use.jinja of the start"
    )


def interrupted_in_the_second_block() -> Callable[..., Any]:
    """What stands in for `solve_block` in a run that is interrupted when one block is done."""
    calls: list[None] = []

    def interrupting(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return solve_block(*arguments)

    return interrupting


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("NOTICE", Path.unlink),
        ("NOTICE", lambda path: path.write_text("another")),
        ("tokenizer_config.json", lambda path: path.write_text("{}")),
        ("LICENSE", lambda path: path.write_text("new")),
        ("additional_chat_templates/tool_use.jinja", Path.unlink),
    ],
)
def test_side_files_that_change_before_a_resumption(
    name: str,
    change: Callable[[Path], object],
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Another file is another run: said by name, and published only when it begins anew."""
    arguments = words(model, tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(block, "solve_block", interrupted_in_the_second_block())
        assert MAIN["gptq"](arguments) == 130
    kept = model / name
    before = kept.read_bytes() if kept.exists() else None
    change(kept)
    capsys.readouterr()
    assert MAIN["gptq"](arguments) == 2
    said = capsys.readouterr().err
    assert re.search(f"this one differs in .*the model's file {re.escape(name)}[,:].* add --restart", said), (
        said
    )
    if before is not None:
        after = kept.read_bytes() if kept.exists() else None
        kept.write_bytes(before)
        assert MAIN["gptq"](arguments) == 0
        assert (tmp_path / "out" / name).read_bytes() == before
        shutil.rmtree(tmp_path / "out")
        kept.unlink() if after is None else kept.write_bytes(after)
    assert MAIN["gptq"]([*arguments, "--restart"]) == 0
    assert (tmp_path / "out" / name).exists() == kept.exists()


def test_a_side_file_that_an_interrupted_run_left_is_not_published(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(block, "solve_block", interrupted_in_the_second_block())
        assert MAIN["gptq"](words(model, tmp_path / "out")) == 130
    content = tmp_path / ".out.partial" / "checkpoint"
    assert (content / "NOTICE").exists()
    (content / "stale.txt").write_text("of an earlier start")
    (content / "stale").mkdir()
    (content / "NOTICE").write_text("cut off")
    assert MAIN["gptq"](words(model, tmp_path / "out")) == 0
    assert not (tmp_path / "out" / "stale.txt").exists()
    assert (tmp_path / "out" / "NOTICE").read_text() == "NOTICE of the start"


# --- the output -----------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    """Change the last bit of a file, whose length and time stay."""
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def moved_behind_a_link(path: Path) -> None:
    path.rename(path.parent.parent / "moved")
    path.symlink_to("../moved")


DAMAGE: dict[str, tuple[Damage, str]] = {
    "config.json": (lambda d: flip(d / "config.json"), "config.json in .* differs from what was written"),
    "the first shard": (
        lambda d: flip(min(d.glob("*.safetensors"))),
        "model-00001-of-.* differs from what was",
    ),
    "the last shard": (
        lambda d: flip(max(d.glob("*.safetensors"))),
        "model-.* differs from what was written",
    ),
    "a header": (
        lambda d: os.pwrite(os.open(min(d.glob("*.safetensors")), os.O_WRONLY), b" ", 9),
        "model-00001-of-.* differs from what was written",
    ),
    "the index": (
        lambda d: flip(d / "model.safetensors.index.json"),
        "model.safetensors.index.json in .* differs",
    ),
    "the tokenizer": (lambda d: flip(d / "tokenizer.json"), "tokenizer.json in .* differs"),
    "a template": (
        lambda d: (d / "additional_chat_templates" / "tool_use.jinja").unlink(),
        "additional_chat_templates/tool_use.jinja is missing",
    ),
    "a stranger": (lambda d: (d / "extra.pkl").write_bytes(b"x"), "extra.pkl in .* is none of the files"),
    "a link": (lambda d: moved_behind_a_link(d / "NOTICE"), "NOTICE in .* differs"),
}


@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_file_that_changes_after_the_reading_back(
    case: str,
    method: str,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Nothing is published; the same command then publishes what it would have."""
    damage, message = DAMAGE[case]
    monkeypatch.setattr(
        pipeline, "CheckpointWriter", functools.partial(CheckpointWriter, shard_bytes=200_000)
    )
    target = tmp_path / "out"

    def damaging(writer: Any, *rest: Any) -> None:
        verify_written(writer, *rest)
        assert len(list(writer.directory.glob("*.safetensors"))) > 2
        damage(writer.directory)

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "verify_written", damaging)
        assert MAIN[method](words(model, target)) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert re.search(message, line), line
    assert not target.exists()
    assert MAIN[method](words(model, target)) == 0
    if case in ("config.json", "the last shard"):
        assert MAIN[method](words(model, tmp_path / "clean" / "out")) == 0
        assert contents(target) == contents(tmp_path / "clean" / "out")


def test_a_config_that_is_damaged_before_the_blocks(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content = tmp_path / ".out.partial" / "checkpoint"
    after_first_block(monkeypatch, lambda: flip(content / "config.json"))
    assert MAIN["gptq"](words(model, tmp_path / "out")) == 1
    assert "config.json in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_older_result_stays(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out"
    assert MAIN["gptq"](words(model, target)) == 0
    before = contents(target)
    content = tmp_path / ".out.partial" / "checkpoint"
    after_first_block(monkeypatch, lambda: flip(content / "config.json"))
    assert MAIN["gptq"]([*words(model, target), "--overwrite", "true", "--seed", "7"]) == 1
    assert "differs from what was written" in capsys.readouterr().err
    assert contents(target) == before


def test_the_copy_of_side_files_does_not_outlive_its_use(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[SideFiles] = []
    release = SideFiles.release

    def noting(files: SideFiles) -> None:
        made.append(files)
        release(files)

    monkeypatch.setattr(SideFiles, "release", noting)
    assert MAIN["gptq"](words(model, tmp_path / "out")) == 0
    assert made
    assert not made[0].path.exists()
