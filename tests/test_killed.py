"""Kill runs at any moment: the same command resumes and publishes the bytes of an undisturbed run.

LLM_QUANTIZE_KILLS=N kills at N random moments and at every file-system call; without it at a few of both.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_quantize.io.embedded_files import EMBEDDED_CALIBRATION
from models import FAMILIES, write

KILLS = int(os.environ.get("LLM_QUANTIZE_KILLS", "0"))
pytestmark = pytest.mark.timeout(7200 if KILLS else 600)
Kill = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def kill(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kill]:
    """Run one command in a process of its own, which may be killed; see killed.py."""
    output = tmp_path_factory.mktemp("killed") / "output"
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("killed.py")), str(output)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert server.stdin is not None
    assert server.stdout is not None

    def run(*words: str, **job: Any) -> dict[str, Any]:
        assert server.stdin is not None
        assert server.stdout is not None
        output.unlink(missing_ok=True)
        print(json.dumps({"words": words, **job}), file=server.stdin, flush=True)
        answer: dict[str, Any] = json.loads(server.stdout.readline())
        answer["output"] = output.read_text() if output.exists() else ""
        return answer

    with server:
        yield run
        server.stdin.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("model") / "model", FAMILIES["qwen2"](), dtype=torch.bfloat16)


def words(method: str, model: Path, target: Path) -> list[str]:
    return [
        method, "--model_path", str(model), "--output_path", str(target), "--group_size", "32",
        "--calib_data", str(EMBEDDED_CALIBRATION), "--calib_samples", "4", "--calib_seq_len", "32",
        "--eval_data", "off", "--device", "cpu", "--quality", "fast", "--overwrite",
    ]  # fmt: skip


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def complete(folder: Path, *allowed: dict[str, str]) -> None:
    """Check that the target is absent, the old one or the new one, as it is at every instant."""
    if folder.exists():
        assert content(folder) in allowed


@pytest.fixture(scope="module")
def whole(kill: Kill, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """Return the content that an undisturbed run publishes, its calls, and its seconds."""
    known: dict[str, Any] = {}

    def find(method: str) -> Any:
        if method not in known:
            target = tmp_path_factory.mktemp("whole") / "out"
            done = kill(*words(method, model, target))
            assert done["status"] == 0, done["output"]
            assert [p.name for p in target.parent.iterdir()] == ["out"]
            known[method] = (content(target), done["calls"], done["seconds"])
        return known[method]

    return find


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """Make a target that holds an old checkpoint."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "config.json").write_text("old")
    return target


def points(calls: list[str], count: int) -> list[int]:
    """Choose the calls to die at, by number: all of them, or the first and last of each kind and `count` others."""
    if KILLS:
        return list(range(len(calls)))
    kinds: dict[str, list[int]] = {}
    for number, call in enumerate(calls):
        kinds.setdefault(call, []).append(number)
    chosen = {n for numbers in kinds.values() for n in (numbers[0], numbers[-1])}
    small = sorted(chosen)[:: max(1, len(chosen) // 12)]
    return sorted({*small, *random.Random(0).sample(range(len(calls)), count)})


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_killed_at_a_call(method: str, kill: Kill, model: Path, whole: Any, old: Path) -> None:
    expected, calls, _ = whole(method)
    assert {call.split()[0] for call in calls} >= {"pwrite", "write", "fsync", "ftruncate", "rename", "mkdir"}
    before = content(old)
    saved = old.with_name("saved")
    shutil.copytree(old, saved)
    resumed = 0
    numbers = points(calls, 4)
    for number in numbers:
        dead = kill(*words(method, model, old), call=number)
        assert dead["status"] == -9, (number, dead["output"])
        complete(old, before, expected)
        done = kill(*words(method, model, old))
        assert done["status"] == 0, (number, calls[number], done["output"])
        resumed += "going on after" in done["output"]
        assert content(old) == expected, (number, calls[number])
        assert {p.name for p in old.parent.iterdir()} == {"out", "saved"}, (number, calls[number])
        shutil.rmtree(old)
        shutil.copytree(saved, old)
    assert resumed > 0


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_killed_again_and_again(method: str, kill: Kill, model: Path, whole: Any, old: Path) -> None:
    """Kill at random moments until a run completes; then start over, until there were enough kills."""
    expected, _, seconds = whole(method)
    before = content(old)
    saved = old.with_name("saved")
    shutil.copytree(old, saved)
    chance = random.Random(1)
    kills = 0
    while kills < max(4, KILLS // 2):
        # The later runs of a chain are shorter: what an undisturbed run takes is often too long to hit them.
        done = kill(*words(method, model, old), seconds=chance.uniform(0, seconds))
        complete(old, before, expected)
        if done["status"] == -9:
            kills += 1
            continue
        assert done["status"] == 0, done["output"]
        assert content(old) == expected
        assert {p.name for p in old.parent.iterdir()} == {"out", "saved"}
        shutil.rmtree(old)
        shutil.copytree(saved, old)
