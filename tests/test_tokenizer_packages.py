"""Test the advice for tokenizers whose packages are missing: it names these, and no others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers.utils import import_utils

from conftest import MAIN
from llm_quantize.calibration import tokenizer_packages
from llm_quantize.calibration.tokenizer_packages import missing_packages, naming_packages
from llm_quantize.errors import InputError

TOKENIZERS = [
    ("LlamaTokenizer", "tokenizer.model", "bpe"),
    ("T5Tokenizer", "spiece.model", "unigram"),
    ("SiglipTokenizer", "spiece.model", "unigram"),
    ("CamembertTokenizer", "sentencepiece.bpe.model", "unigram"),
]


def without_protobuf(monkeypatch: pytest.MonkeyPatch) -> None:
    found = tokenizer_packages._is_installed
    monkeypatch.setattr(
        tokenizer_packages, "_is_installed", lambda name: name != "google.protobuf" and found(name)
    )
    message = import_utils.BACKENDS_MAPPING["protobuf"][1]
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, "protobuf", (lambda: False, message))


@pytest.fixture
def model(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    """A model whose tokenizer is a sentencepiece model alone, of words."""
    path = Path(shutil.copytree(saved("llama"), tmp_path / "model"))
    for file in path.glob("*token*"):
        file.unlink()
    return path


def train(path: Path, kind: str) -> None:
    import sentencepiece

    text = path.with_suffix(".txt")
    text.write_text("\n".join(f"some words {i} and more of all kinds, number {i * 7}" for i in range(500)))
    prefix = path.with_suffix("")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(prefix), vocab_size=100, model_type=kind, minloglevel=2
    )
    text.unlink()
    path.with_suffix(".vocab").unlink()


@pytest.mark.parametrize(("name", "file", "kind"), TOKENIZERS)
def test_a_sentencepiece_model_needs_protobuf(
    name: str,
    file: str,
    kind: str,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_protobuf(monkeypatch)
    train(model / file, kind)
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    words = ["--model_path", str(model), "--output_path", str(tmp_path / "out"), "--device", "cpu"]
    assert MAIN["gptq"]([*words, "--calib_data", str(model / "config.json")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len([line for line in lines if "tiktoken" in line.lower()]) == 0, lines
    assert lines[-1] == (
        f"gptq_quantize.py: error: the tokenizer in {model} is a sentencepiece model without tokenizer.json, and needs "
        "protobuf: pip install protobuf"
    )


def test_one_that_needs_no_protobuf_is_opened(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llm_quantize.model.source import SourceModel

    without_protobuf(monkeypatch)
    train(model / "spiece.model", "bpe")
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPTSw3Tokenizer"}))
    with naming_packages(model):
        assert SourceModel.open(model).tokenizer("some words")["input_ids"]


@pytest.mark.parametrize(
    ("files", "installed", "missing"),
    [
        (["tokenizer.model"], (), ["protobuf", "sentencepiece"]),
        (["spiece.model"], ("sentencepiece",), ["protobuf"]),
        (["spiece.model"], ("google.protobuf",), ["sentencepiece"]),
        (["spiece.model"], ("sentencepiece", "google.protobuf"), []),
        (["tokenizer.model", "tokenizer.json"], (), []),
        (["tiktoken.model"], (), []),
        ([], (), []),
    ],
)
def test_the_missing_ones_are_named(
    files: list[str],
    installed: tuple[str, ...],
    missing: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in files:
        (tmp_path / name).touch()
    monkeypatch.setattr(tokenizer_packages, "_is_installed", lambda name: name in installed)
    assert missing_packages(tmp_path) == missing
    told = "pip install " + " ".join(missing) if missing else "no usable tokenizer in it"
    with pytest.raises(InputError, match=told), naming_packages(tmp_path):
        raise InputError("no usable tokenizer in it: `tiktoken` is required")
    with pytest.raises(InputError, match=r"^another fault"), naming_packages(tmp_path):
        raise InputError("another fault")
