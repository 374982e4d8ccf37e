"""Test `benchmarks/compare.py`, small and on the CPU: it runs, and its table says what was measured."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llm_quantize.backends import registry

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "compare.py"
SMALL = ["--samples", "4", "--seq_len", "64", "--eval_samples", "1", "--device", "cpu"]


def compare(tmp_path: Path, *words: str) -> tuple[str, list[dict[str, Any]]]:
    """Run the script; return its table and its rows."""
    command = [sys.executable, str(SCRIPT), *SMALL, *words, "--json", str(tmp_path / "rows.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows: list[dict[str, Any]] = json.loads((tmp_path / "rows.json").read_text())
    return done.stdout, rows


def test_this_program_alone(tmp_path: Path) -> None:
    text, rows = compare(tmp_path, "--only", "native", "--method", "gptq")
    assert [(row["method"], row["entry"], row["error"]) for row in rows] == [("gptq", "native", "")]
    row = rows[0]
    assert 0 < row["kl"] < 0.1
    assert row["seconds"] > 0
    assert row["host_bytes"] > 100 << 20
    assert 2 << 20 < row["size"] < 3 << 20
    assert "4 bits, group 128, 4 x 64 = 256 tokens" in text
    assert f"| {row['seconds']:.1f} | 1.0 |" in text
    assert f"| {row['kl']:.5f} |" in text


@pytest.mark.readers
@pytest.mark.timeout(1800)
def test_beside_llm_compressor(tmp_path: Path) -> None:
    """Only the benchmark has an adapter of it; test_backends.py runs the other libraries."""
    _, rows = compare(tmp_path, "--only", "native", "llm-compressor")
    found = {(row["method"], row["entry"]): row for row in rows}
    assert len(found) == 4
    for method in ("awq", "gptq"):
        assert found[method, "llm-compressor"]["version"] == "0.14.0.1"
        assert 0 < found[method, "native"]["kl"] < found[method, "llm-compressor"]["kl"] < 0.1


def test_the_libraries_own_imports_find_nothing_of_the_benchmarks(tmp_path: Path) -> None:
    """transformers asks for packages by name, such as `kernels`: no script of the benchmarks may be found instead."""
    package = tmp_path / "llmcompressor"
    package.mkdir()
    (package / "__init__.py").write_text("""
import importlib.util
for name in ("compare", "kernels"):
    found = importlib.util.find_spec(name)
    assert found is None or "benchmarks" not in str(found.origin), found
""")
    (tmp_path / "llmcompressor-1.dist-info").mkdir()
    (tmp_path / "llmcompressor-1.dist-info" / "METADATA").write_text("Name: llmcompressor\nVersion: 1\n")
    done = subprocess.run(
        [sys.executable, str(SCRIPT.with_name("run_llmcompressor.py"))],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        input="",
        capture_output=True,
        text=True,
        check=False,
    )
    event = json.loads(done.stdout)
    assert event["event"] == "ready", event
    assert event["versions"]["llmcompressor"] == "1"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(registry, "LIBRARIES", dict(registry.LIBRARIES))  # it adds one
    spec = importlib.util.spec_from_file_location("compare_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "compare_script", found)  # its dataclass looks its own module up
    spec.loader.exec_module(found)
    return found


def test_the_table(module: ModuleType) -> None:
    rows = [
        module.Row("gptq", "native", "torch 2", 2.0, 1 << 30, 2 << 30, 3 << 20, 0.01, 40.5),
        module.Row("gptq", "auto-gptq", "0.7.1", 5.0, 0, 1 << 29, 3 << 20, 0.02, 41.0),
        module.Row("gptq", "optimum", error="no index"),
        module.Row("awq", "autoawq", "0.2.9", 7.0, 0, 1 << 30, 3 << 20, 0.03, 42.0),
    ]
    assert module.table(rows, "on this").splitlines()[4:] == [
        "| gptq | this program | torch 2 | 2.0 | 1.0 | 1.00 | 2.00 | 3.0 | 0.01000 | 40.500 |",
        "| gptq | auto-gptq | 0.7.1 | 5.0 | 2.5 | – | 0.50 | 3.0 | 0.02000 | 41.000 |",
        "| gptq | optimum | | failed: no index | | | | | | |",
        "| awq | autoawq | 0.2.9 | 7.0 |  | – | 1.00 | 3.0 | 0.03000 | 42.000 |",
    ]
    assert set(module.entries("awq")) == {"native", "autoawq", "gptqmodel", "llm-compressor"}
    assert set(module.entries("gptq")) == {"native", "auto-gptq", "optimum", "gptqmodel", "llm-compressor"}


def test_what_is_unknown_is_refused(module: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        module.main(["--only", "nobody"])
    assert left.value.code == 2
    assert "there are native, autoawq, gptqmodel, llm-compressor" in capsys.readouterr().err
