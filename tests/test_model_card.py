"""Test model card, report and plot: what they say, what they must never say, and that two runs say the same."""

from __future__ import annotations

import json
import re
import shutil
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import metadata_load

import gptq_quantize
import llm_quantize
from conftest import Runs
from llm_quantize.blockwise.layer_report import LayerReport
from llm_quantize.calibration.windows import Windows
from llm_quantize.config import QuantizeConfig, default_calibration, shown_text
from llm_quantize.evaluation import model_card
from llm_quantize.evaluation.error_plot import plot_errors
from llm_quantize.evaluation.perplexity import Measured
from llm_quantize.io.embedded_files import EMBEDDED_CALIBRATION, EMBEDDED_HELDOUT, EMBEDDED_MODEL
from llm_quantize.io.shown_names import shown_name
from llm_quantize.types import Method
from models import FAMILIES, write

ROOT = Path(__file__).resolve().parents[1]


def facts(
    config: QuantizeConfig, base_card: bytes | None = b"# A card", **changes: Any
) -> model_card.CardFacts:
    """Make the facts of a checkpoint that `config` asks for."""
    layers = [
        LayerReport(f"model.layers.{i}.mlp.{kind}", 0.01 * (i + 1), 0.1, 0, None, None, 0.5 + i)
        for i in range(3)
        for kind in ("up_proj", "down_proj")
    ]
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    assert config.model_path is not None
    base_model = shown_name(config.model_path).partition("@")[0]
    known = model_card.CardFacts(
        method=config.method,
        scheme=config.scheme,
        format=config.checkpoint_format,
        base_model=base_model,
        on_hub="/" in base_model,
        command=" ".join(config.command()),
        base_card=base_card,
        source_bytes=4 << 20,
        quantized_bytes=1 << 20,
        architecture="LlamaForCausalLM",
        repeats_head=True,
        backend=config.backend,
        library=None,
        library_versions=None,
        quality=config.quality,
        damping=0.1,
        vllm_refusal=config.vllm_refusal,
        windows=Windows(tokens, 3, 40, 2, "/home/someone/text.txt", "f" * 64),
        calibration_data=shown_text(config.calibration.data),
        own_calibration_text=False,
        seed=config.calibration.seed,
        eval_data=shown_text(config.eval_data),
        heldout_sha256="e" * 64,
        on_calibration_text=config.eval_data == config.calibration.data,
        layers=layers,
        measured=Measured(100, 10.0, 11.0, 0.0123, 0.9),
    )
    return replace(known, **changes)


def make(target: Path, known: model_card.CardFacts) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Write the files; return the card's text, its metadata, and the report."""
    target.mkdir(exist_ok=True)
    for name, content in model_card.card_files(known).items():
        (target / name).write_bytes(content)
    text = (target / model_card.CARD).read_text("utf-8")
    return (
        text,
        metadata_load(target / model_card.CARD) or {},
        json.loads((target / model_card.REPORT).read_text("utf-8")),
    )


def config(method: Method = "gptq", **values: Any) -> QuantizeConfig:
    return QuantizeConfig(
        method=method,
        calibration=default_calibration(method, embedded=False),
        **({"model_path": "org/model@v1"} | values),
    )


def test_the_version_is_in_one_place() -> None:
    """The build takes it from the module that the program takes it from."""
    file = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert "version" not in file["project"]
    module = ROOT / file["tool"]["hatch"]["version"]["path"]
    assert f'__version__ = "{llm_quantize.__version__}"' in module.read_text("utf-8")


# -- a published checkpoint


def test_published_card(runs: Runs) -> None:
    run = runs("awq", "--eval_data", str(EMBEDDED_HELDOUT), "--eval_samples", "4")
    text = (run.path / "README.md").read_text("utf-8")
    report = json.loads((run.path / "quantization_report.json").read_text("utf-8"))
    assert metadata_load(run.path / "README.md") == {
        "base_model": "tiny",
        "base_model_relation": "quantized",
        "quantized_by": "llm-quantize",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "psf-2.0",
        "language": "en",
        "tags": ["awq", "4-bit", "quantized", "vllm"],
    }
    assert report["schema"] == 2
    measured = report["measured"]
    assert measured["tokens"] == 4 * 127
    assert 30 < measured["perplexity_source"] < measured["perplexity_quantized"] < 100
    for number in (
        f"{measured['perplexity_source']:.3f}",
        f"{measured['perplexity_quantized']:.3f}",
        f"{measured['kl']:.5f}",
        f"{100 * measured['agreement']:.2f} %",
        f"{(EMBEDDED_MODEL / 'model.safetensors').stat().st_size / 2**20:,.1f}",
        f"{(run.path / 'model.safetensors').stat().st_size / 2**20:,.1f}",
        report["calibration"]["sha256"],
    ):
        assert number in text
    worst = max(report["layers"], key=lambda layer: layer["error"])
    assert f"| `{worst['name']}` | {worst['error']:.2e} |" in text
    assert "./run_vllm.sh ./tiny-awq-4bit --quantization awq\n" in text
    assert (run.path / "BASE_README.md").read_bytes() == (EMBEDDED_MODEL / "README.md").read_bytes()
    for link in re.findall(r"\]\(([^)]*)\)", text):
        assert (run.path / link).is_file(), link


def test_the_command_makes_the_same_again(runs: Runs, tmp_path: Path) -> None:
    words = (
        "--group_size",
        "32",
        "--damp_percent",
        "0.2",
        "--seed",
        "3",
        "--calib_data",
        str(EMBEDDED_CALIBRATION),
    )
    run = runs("gptq", *words)
    command = json.loads((run.path / "quantization_report.json").read_text("utf-8"))["command"].split()
    assert command[:2] == ["python", "inference/quantize/gptq_quantize.py"]
    again = tmp_path / "again"
    assert gptq_quantize.main([*command[2:], "--output_path", str(again), "--device", "cpu"]) == 0
    assert {f.name: f.read_bytes() for f in again.iterdir()} == {
        f.name: f.read_bytes() for f in run.path.iterdir()
    }


def test_nothing_says_when_or_where(tmp_path: Path, runs: Runs) -> None:
    """No file holds a path of the run; and there are no dates, times or durations."""
    source = write(tmp_path / "secret-user" / "my-model", FAMILIES["llama"](), dtype=torch.bfloat16)
    text = tmp_path / "secret-user" / "text.txt"
    shutil.copyfile(EMBEDDED_CALIBRATION, text)
    run = runs("gptq", "--model_path", str(source), "--group_size", "32", "--calib_data", str(text))
    for file in run.path.iterdir():
        content = file.read_bytes()
        for place in (str(tmp_path), "secret-user", str(run.path.parent), str(ROOT)):
            assert place.encode() not in content, file.name
    shown = (run.path / "README.md").read_text("utf-8")
    assert (metadata_load(run.path / "README.md") or {})["base_model"] == "my-model"
    assert "--model_path my-model" in shown
    assert "--calib_data text.txt" in shown
    assert not (run.path / "BASE_README.md").exists()
    report = json.loads((run.path / "quantization_report.json").read_text("utf-8"))
    assert not [key for key in (*report, *report["layers"][0]) if re.search("second|time|date|host", key)]


# -- from facts


def test_hub_ids_stay(tmp_path: Path) -> None:
    text, metadata, report = make(tmp_path / "out", facts(config()))
    assert metadata["base_model"] == "org/model"
    assert "[org/model](https://huggingface.co/org/model)" in text
    assert "--model_path org/model@v1 " in report["command"]
    assert "--calib_data wikitext " in report["command"]
    assert "/home/someone" not in text + json.dumps(report)


def test_a_path_into_the_cache_is_its_hub_id(tmp_path: Path, runs: Runs) -> None:
    snapshot = tmp_path / "hub" / "models--org--some-model" / "snapshots" / "0123abc"
    snapshot.parent.mkdir(parents=True)
    write(snapshot, FAMILIES["llama"](), dtype=torch.bfloat16)
    assert "--model_path org/some-model@0123abc " in " ".join(config(model_path=str(snapshot)).command())
    run = runs(
        "gptq", "--model_path", str(snapshot), "--group_size", "32", "--calib_data", str(EMBEDDED_CALIBRATION)
    )
    report = json.loads((run.path / "quantization_report.json").read_text("utf-8"))
    assert report["base_model"] == "org/some-model"
    assert "--model_path org/some-model@0123abc " in report["command"]


@pytest.mark.parametrize(
    ("readme", "expected"),
    [
        (
            "---\nlicense: apache-2.0\nlanguage: [en, fr]\n---\n",
            {"license": "apache-2.0", "language": ["en", "fr"]},
        ),
        (
            "---\nlicense: other\nlicense_name: 'its: own'\nlicense_link: https://example.com/x\n---\nText",
            {"license": "other", "license_name": "its: own", "license_link": "https://example.com/x"},
        ),
        ("no metadata", {}),
        ("---\nlicense: [unclosed\n---\n", {}),
        ("---\nlicense: {a: 1}\n---\n", {}),
    ],
)
def test_license(tmp_path: Path, readme: str, expected: dict[str, Any]) -> None:
    text, metadata, _ = make(tmp_path / "out", facts(config(), readme.encode()))
    assert {key: metadata[key] for key in model_card.LICENSE_KEYS if key in metadata} == expected
    assert f"({model_card.BASE_CARD})" in text


def test_without_a_card_of_the_source(tmp_path: Path) -> None:
    text, metadata, _ = make(tmp_path / "out", facts(config(), None))
    assert model_card.BASE_CARD not in text
    assert "license" not in metadata


def test_not_measured(tmp_path: Path) -> None:
    text, _, report = make(
        tmp_path / "out", facts(config(eval_data="off"), measured=None, heldout_sha256=None)
    )
    assert report["measured"] is None
    assert "not measured" in text
    assert "| perplexity" not in text
    assert "| weights, MiB | 4.0 | 1.0 |" in text


def test_warnings(tmp_path: Path) -> None:
    plain = facts(config())
    assert make(tmp_path / "plain", plain)[2]["warnings"] == []
    assert "## Warnings" not in (tmp_path / "plain" / model_card.CARD).read_text("utf-8")
    layers = list(plain.layers)
    layers[0] = replace(layers[0], fallback="rounded to nearest: no usable inputs", damping=0.0)
    layers[1] = replace(layers[1], damping=1.0)
    layers[2] = replace(layers[2], dead=5)
    known = facts(
        config(bits=3, format="gptq", eval_data="wikitext"),
        layers=layers,
        windows=replace(plain.windows, requested=9),
    )
    text, metadata, report = make(tmp_path / "out", known)
    assert report["warnings"] == [
        "model.layers.0.mlp.up_proj: rounded to nearest: no usable inputs",
        "model.layers.0.mlp.down_proj: damping raised to 1 before the factorization succeeded",
        "1 layers have input channels that calibration never reached; most, 5, has model.layers.1.mlp.up_proj",
        "the calibration text gave 2 of 9 windows",
        "vLLM refuses 3 bits in --format gptq: take --format compressed-tensors to serve it there",
        "measured on the data that it was calibrated on: on text never seen it may be worse",
    ]
    for line in report["warnings"]:
        assert f"- {line}\n" in text
    assert "run_vllm.sh" not in text
    assert "vllm" not in metadata["tags"]


@pytest.mark.parametrize(
    ("method", "values", "tied", "there", "absent"),
    [
        ("awq", {}, False, ["AutoAWQForCausalLM", "--quantization awq"], ["AutoGPTQ", "dequantize=True"]),
        ("awq", {"bits": 8}, False, ["dequantize=True", "./run_vllm.sh ./model-awq-8bit\n"], ["AutoAWQ"]),
        ("gptq", {}, False, ["AutoGPTQForCausalLM", "--quantization gptq"], ["AutoAWQ", "dequantize=True"]),
        ("gptq", {}, True, ["gptqmodel and optimum"], ["AutoGPTQForCausalLM"]),
        ("gptq", {"bits": 2}, False, ["with compressed-tensors"], ["dequantize=True", "--quantization"]),
    ],
)
def test_how_to_use_it(
    tmp_path: Path, method: Method, values: dict[str, Any], tied: bool, there: list[str], absent: list[str]
) -> None:
    text = make(tmp_path / "out", facts(config(method, **values), repeats_head=not tied))[0]
    for word in there:
        assert word in text
    for word in absent:
        assert word not in text
    code = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code) == 1
    compile(code[0], "card", "exec")


# -- the plot


def test_plot_is_the_same_again_and_shows_the_errors() -> None:
    layers = facts(config()).layers
    first, second = plot_errors(layers), plot_errors(layers)
    assert first is not None
    assert first == second
    assert first.startswith(b"\x89PNG")
    assert b"tEXt" not in first  # no date, no program
    worse = [replace(layers[0], error=0.5), *layers[1:]]
    assert plot_errors(worse) != first
    # Names without a number, many kinds and an error of zero.
    odd = [replace(layers[0], name=f"expert_{i}.w", error=0.0) for i in range(40)]
    assert plot_errors(odd) is not None


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, name, None)
    text, _, _ = make(tmp_path / "out", facts(config()))
    assert not (tmp_path / "out" / model_card.PLOT).exists()
    assert model_card.PLOT not in text
    assert "![" not in text
