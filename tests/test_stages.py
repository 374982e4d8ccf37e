"""Test `benchmarks/stages.py`, small and on the CPU: it runs, and its times add up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "stages.py"
SMALL = ["--samples", "4", "--seq_len", "64", "--device", "cpu"]
MODEL = ["--model", str(ROOT / "inference" / "quantize" / "embedded" / "model")]


@pytest.mark.timeout(300)
def test_times_add_up(tmp_path: Path) -> None:
    words = [
        *SMALL,
        *MODEL,
        "--only",
        "awq",
        "gptq-whole",
        "--runs",
        "2",
        "--json",
        str(tmp_path / "rows.json"),
    ]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["case"] for row in rows] == ["awq", "gptq-whole"]
    for row in rows:
        assert len(row["runs"]) == 2
        for run in row["runs"]:
            stages = run["stages"]
            assert {"embed", "capture", "solve", "replay", "reading back"} <= set(stages)
            alone = sum(stages[name] for name in ("embed", "capture", "solve", "replay"))
            assert 0 < alone <= run["loop"] < sum(stages.values()) + 1
            assert run["loop"] < run["run"] < row["seconds"]
        assert 100 << 20 < row["host"] < 8 << 30
    assert "measuring" in rows[1]["runs"][0]["stages"]
    assert "measuring" not in rows[0]["runs"][0]["stages"]
    table = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in table[-2:]] == ["| awq", "| gptq-whole"]


def test_a_failed_run_is_reported() -> None:
    words = [*SMALL, "--model", "/nowhere", "--only", "gptq"]
    done = subprocess.run([sys.executable, str(SCRIPT), *words], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "/nowhere" in done.stderr
