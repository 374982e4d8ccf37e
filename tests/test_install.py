"""The wheel: what it holds, and what it does in an environment that has nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMALL = ["--calib_samples", "8", "--calib_seq_len", "64", "--eval_samples", "2", "--device", "cpu"]

pytestmark = [pytest.mark.install, pytest.mark.timeout(1800)]


def run(*words: str | Path, cwd: Path, **env: str) -> str:
    """A command's standard output; the test fails where the command does."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        list(map(str, words)), cwd=cwd, env=clean | env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    run("uv", "build", "--wheel", "--out-dir", out, ROOT, cwd=out)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin directory of a new environment that holds the wheel, with the locked versions of what it needs."""
    place = tmp_path_factory.mktemp("clean")
    pins = place / "constraints.txt"
    words = ("--frozen", "--no-dev", "--no-hashes", "--no-emit-project", "--output-file", pins)
    run("uv", "export", "--quiet", *words, cwd=ROOT)
    run("uv", "venv", "--quiet", "--python", sys.executable, place / "venv", cwd=place)
    python = place / "venv" / "bin" / "python"
    run("uv", "pip", "install", "--quiet", "--python", python, "--constraints", pins, wheel, cwd=place)
    return python.parent


def test_it_holds_the_package_and_the_embedded_model(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "inference" / "quantize" / "llm_quantize"
    modules = {f"llm_quantize/{p.relative_to(package)}" for p in package.rglob("*.py")}
    assert modules <= names
    model = {f"llm_quantize/embedded/model/{p.name}" for p in (package.parent / "embedded/model").iterdir()}
    assert model <= names
    assert {"llm_quantize/py.typed", "llm_quantize/embedded/heldout.txt"} <= names
    others = {name for name in names if not name.startswith(("llm_quantize/", "llm_quantize-"))}
    assert others == set()


@pytest.mark.parametrize("command", ["awq-quantize", "gptq-quantize"])
def test_the_commands_quantize_the_embedded_model(command: str, environment: Path, tmp_path: Path) -> None:
    said = run(environment / command, *SMALL, "--output_path", "out", cwd=tmp_path)
    method = command.partition("-")[0]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == method
    assert f"serve: vllm serve out --quantization {method}" in said


def test_the_api(environment: Path, tmp_path: Path) -> None:
    code = """
import sys
import llm_quantize
assert "torch" not in sys.modules
from llm_quantize import CalibrationConfig, InputError, QuantizeConfig, quantize
try:
    QuantizeConfig(method="awq", bits=3)
except InputError as error:
    print(error)
from llm_quantize.io.embedded_files import EMBEDDED_CALIBRATION
text = CalibrationConfig(data=str(EMBEDDED_CALIBRATION), samples=8, seq_len=64)
result = quantize(QuantizeConfig(method="gptq", calibration=text, output_path="out", eval_samples=2, device="cpu"))
print(result.output, result.measured.kl < 0.1, llm_quantize.__version__)
"""
    lines = run(environment / "python", "-c", code, cwd=tmp_path).splitlines()
    assert lines[0] == "--bits 3: AWQ takes 4 or 8"
    assert lines[-1].startswith("out True ")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_it_is_typed(environment: Path, tmp_path: Path) -> None:
    (tmp_path / "use.py").write_text(
        "from llm_quantize import QuantizeConfig, Result, quantize\n"
        "result: Result = quantize(QuantizeConfig(method='awq'))\n"
        "kl: float = result.measured.kl if result.measured else 0.0\n"
    )
    words = ("--strict", "--python-executable", environment / "python", "use.py")
    assert "no issues found" in run(sys.executable, "-m", "mypy", *words, cwd=tmp_path)
