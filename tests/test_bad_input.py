"""Test what users get wrong, by kind: command lines, configs, models, data, targets. The command itself is run.

Each case ends with exit code 2, one line on stderr that says what is wrong and what to do, nothing on stdout, and
nothing new on disk. Cases that are `early` are refused before anything heavy is imported.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import MAIN
from llm_quantize import cli
from llm_quantize.io.embedded_files import EMBEDDED_CALIBRATION
from models import FAMILIES, write
from reference import write_rtn_checkpoint

SCRIPTS = Path(cli.__file__).parents[1]
TEXT = f"--calib_data {EMBEDDED_CALIBRATION}"
QUICK = "--group_size 32 --calib_samples 2 --calib_seq_len 32 --eval_data off --device cpu"


@dataclass
class Place:
    """The directories in which a case does its damage. `{model}` and `{root}` in its command stand for them."""

    root: Path
    model: Path

    def config(self, **values: Any) -> None:
        path = self.model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def weights(self, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
        path = self.model / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    def file(self, name: str, content: str | bytes = "") -> None:
        data = content.encode() if isinstance(content, str) else content
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


@dataclass(frozen=True)
class Case:
    """One case.

    words: after the script's name. said: words of the error's line. damage: done before the run.
    """

    kind: str
    name: str
    words: str
    said: str
    damage: Callable[[Place], object] = field(default=lambda place: None)
    method: str = "gptq"
    early: bool = False


def line(words: str, said: str, method: str = "gptq") -> Case:
    return Case("command line", words, words, said, method=method, early=True)


MODEL = f"--model_path {{model}} --output_path {{root}}/out {TEXT} {QUICK}"


def config(name: str, said: str, **values: Any) -> Case:
    return Case("config", name, MODEL, said, lambda place: place.config(**values))


def model(
    name: str, said: str, damage: Callable[[Place], object], words: str = MODEL, method: str = "gptq"
) -> Case:
    return Case("model", name, words, said, damage, method)


def data(name: str, content: Any, said: str, more: str = "") -> Case:
    """Make a case of a calibration file with that name and content, and a sound model."""
    words = f"--model_path {{model}} --output_path {{root}}/out {QUICK} --calib_data {{root}}/{name} {more}"
    return Case(
        "data", f"{name} {content!r:.30} {more}", words, said, lambda place: place.file(name, content)
    )


def target(name: str, words: str, said: str, damage: Callable[[Place], object] = lambda place: None) -> Case:
    return Case("target", name, f"{TEXT} {QUICK} {words}", said, damage, early=True)


def pickled(place: Place) -> None:
    torch.save(load_file(place.model / "model.safetensors"), place.model / "pytorch_model.bin")
    (place.model / "model.safetensors").unlink()


def cut(place: Place) -> None:
    path = place.model / "model.safetensors"
    os.truncate(path, path.stat().st_size // 2)


def sharded(place: Place, weight_map: Any) -> None:
    (place.model / "model.safetensors").unlink()  # it would go before an index
    (place.model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def quantized(place: Place) -> None:
    write_rtn_checkpoint(place.model, place.root / "quantized", "gptq", 4, 32, True)


def other_family(place: Place) -> None:
    (place.model / "config.json").write_text(FAMILIES["gpt_neox"]().to_json_string())


def locked(place: Place) -> None:
    (place.root / "file").write_text("x")


JSONL = '{"text": "some words"}\n'
CHAT = json.dumps({"messages": [{"role": "user", "content": "hello"}]})

CASES = [
    line("--bits 3", "--bits 3: AWQ takes 4 or 8", "awq"),
    line("--bits 5", "--bits 5: GPTQ takes 2, 3, 4 or 8"),
    line("--bits four", "'four' is no whole number: give one"),
    line("--bits", "--bits: expected one argument"),
    line("--group_size 100", "--group_size 100: a multiple of 32"),
    line("--group_size 16", "vLLM does not serve groups of 16; take 32"),
    line("--calib_samples 0", "--calib_samples 0: at least 1"),
    line("--calib_seq_len 8", "--calib_seq_len 8: at least 32"),
    line("--seed -1", "--seed -1: from 0 to"),
    line("--damp_percent 2", "--damp_percent 2: a fraction from 0 to 1"),
    line("--damp_percent nan", "'nan' is no finite number"),
    line("--desc_act perhaps", "take true, false, 1, 0, yes or no"),
    line("--zero_point true", "it is one of awq_quantize.py's"),
    line("--sym true", "it is one of gptq_quantize.py's", "awq"),
    line("--format gguf", "invalid choice: 'gguf'"),
    line("--bits 8 --format awq", "--bits 8", "awq"),
    line("--act_order_groups dynamic --desc_act false", "needs --desc_act true"),
    line("--device tpu", "take auto, cpu, cuda or cuda:N"),
    line("--max_memory -1", "--max_memory -1: GiB, more than 0"),
    line("--eval_samples 0", "--eval_samples 0: at least 1"),
    line("--max_kl 0.1 --eval_data off", "--max_kl needs a measurement"),
    line("--max_ppl_increase -3", "--max_ppl_increase -3: 0 or more"),
    line("--model_path=", "--model_path is empty: give a directory"),
    line("--output_path=", "--output_path is empty: give a directory"),
    line("--calib_data=", "--calib_data is empty: give wikitext"),
    line("--modle_path x", "unknown option --modle_path: did you mean --model_path?"),
    line("Qwen/Qwen2.5-7B", "every value follows its option"),
    config("quantized already", "already quantized (awq)", quantization_config={"quant_method": "awq"}),
    config("of a classifier", "is not a causal LM", architectures=["LlamaForSequenceClassification"]),
    config("unknown type", "config.json is not usable", model_type="no_such_type"),
    config("its own code", "pass --trust_remote_code", model_type="x", auto_map={"AutoConfig": "a.B"}),
    config("no width", "config.json is not usable", hidden_size=None),
    config("width in words", "config.json is not usable", hidden_size="wide"),
    config("more layers than tensors", "take the config.json that came with them", num_hidden_layers=4000),
    config("no layers", "has no decoder blocks", num_hidden_layers=0),
    config("wider than its weights", "take the config.json that came with the weights", vocab_size=10**10),
    config("heads that do not divide", "not a multiple of the number of attention heads",
           num_attention_heads=3, head_dim=None),
    config("unknown activation", "cannot build the model", hidden_act="nothing"),
    config("unknown rope", "take the config.json that came with the weights",
           rope_parameters={"rope_type": "x", "rope_theta": 1}),
    config("too short for the windows", "--calib_seq_len 32 is more than the model takes: at most 16",
           max_position_embeddings=16),
    Case("model", "no such directory", f"--model_path ./absent --output_path {{root}}/out {TEXT}",
         "no such directory: ./absent", early=True),
    Case("model", "a file", f"--model_path {{root}}/file --output_path {{root}}/out {TEXT}",
         "is a file: give the model's directory", lambda place: place.file("file", "x"), early=True),
    model("an empty directory", "has no config.json: give a Hugging Face model directory",
          lambda place: (place.root / "empty").mkdir(), MODEL.replace("{model}", "{root}/empty")),
    model("config.json no JSON", "cannot read config.json",
          lambda place: (place.model / "config.json").write_text("{")),
    model("config.json a list", "config.json holds no JSON object",
          lambda place: (place.model / "config.json").write_text("[]")),
    model("no weights", "has no *.safetensors weights",
          lambda place: (place.model / "model.safetensors").unlink()),
    model("pickled weights", "pass --allow_pickle", pickled),
    model("cut weights", "model.safetensors is damaged", cut),
    model("empty weights", "model.safetensors is damaged",
          lambda place: (place.model / "model.safetensors").write_bytes(b"")),
    model("a pointer in place of weights", "model.safetensors is damaged",
          lambda place: (place.model / "model.safetensors").write_text("version https://git-lfs.github.com/spec")),
    model("index without a map", "has no weight_map", lambda place: sharded(place, {})),
    model("a shard missing", "shard gone.safetensors is missing",
          lambda place: sharded(place, {"a": "gone.safetensors"})),
    model("a shard elsewhere", "names a shard that is not a file beside it",
          lambda place: sharded(place, {"a": "../a.safetensors"})),
    model("no tokenizer", "no usable tokenizer",
          lambda place: (place.model / "tokenizer.json").unlink()),
    model("a broken tokenizer", "no usable tokenizer",
          lambda place: (place.model / "tokenizer.json").write_text("{}")),
    model("an adapter beside it", "holds a LoRA adapter beside the model, and both are loaded together: merge it",
          lambda place: (place.model / "adapter_config.json").write_text("{}")),
    model("an adapter's weights", "the weights are those of a LoRA adapter (base_model.model.x): merge it",
          lambda place: place.weights(lambda t: t.update({"base_model.model.x": torch.ones(2)}))),
    model("of another family", "the weights do not match the config", other_family),
    model("weights in integers", "is int8, not a plain float: give the model in FP16, BF16 or FP32",
          lambda place: place.weights(lambda t: t.update({k: v.to(torch.int8) for k, v in t.items()}))),
    model("a group that does not fit", "which 128 does not divide: take --group_size 32", lambda place: None,
          MODEL.replace("--group_size 32", "--group_size 128")),
    model("a quantized one", "is already quantized (gptq)", quantized,
          MODEL.replace("{model}", "{root}/quantized")),
    model("unknown to AWQ", "quantize it with gptq_quantize.py",
          lambda place: write(place.root / "gptj", gptj()), MODEL.replace("{model}", "{root}/gptj"), "awq"),
    Case("data", "missing", "--calib_data {root}/none.txt", "no such file or directory", early=True),
    Case("data", "a directory of nothing", "--calib_data {root}", "holds no dataset", early=True),
    Case("data", "unknown kind", "--calib_data {root}/a.docx", "cannot tell what", early=True,
         damage=lambda place: place.file("a.docx")),
    Case("data", "malformed id", "--calib_data a:b:c:d:e", "repo[:config", early=True),
    Case("data", "pipe", "--calib_data {root}/a.txt", "is no file but a pipe or a device", early=True,
         damage=lambda place: os.mkfifo(place.root / "a.txt")),
    Case("data", "a kind of file", "--calib_data text", "is a kind of file, not a dataset", early=True,
         damage=lambda place: place.file("a.txt", "words " * 900)),
    Case("data", "a kind of file to measure on", f"{TEXT} --eval_data json", "is a kind of file, not a dataset",
         early=True, damage=lambda place: place.file("a.json", "[]")),
    Case("data", "held-out text missing", f"{TEXT} --eval_data {{root}}/none.txt", "no such file or directory",
         early=True),
    Case("data", "held-out text malformed", f"{TEXT} --eval_data a:b:c:d:e", "cannot read 'a:b:c:d:e' as held-out text",
         early=True),
    data("a.txt", "", "too little text to calibrate on"),
    data("a.txt", "few words", "take a smaller --calib_seq_len or more text"),
    data("a.txt", b"Stra\xdfe", "not UTF-8 text"),
    data("a.jsonl", "", "has none: choose with --calib_column"),
    data("a.jsonl", JSONL + "{bad", "line 2 is not JSON"),
    data("a.jsonl", '{"text": 3}\n', "neither text nor conversations"),
    data("a.jsonl", '{"a": "x", "b": "y"}\n', "no column 'text'"),
    data("a.jsonl", JSONL, "no column 'body'", "--calib_column body"),
    data("a.jsonl", CHAT, "no chat template: choose a text column"),
    data("a.json", "[1, 2", "cannot read"),
    data("a.csv", "a,b\n1,2\n", "no column 'text'"),
    data("a.parquet", b"PAR1", "cannot read"),
    data("a.txt.gz", b"no gzip", "cannot read"),
    data("a.txt.gz", gzip.compress(b"words " * 9000, mtime=0)[:-20], "cannot read"),
    target("exists", "--output_path {root}/there", "exists: use --overwrite, or choose another --output_path",
           lambda place: place.file("there/config.json", "{}")),
    target("holds other things", "--output_path {root}/there --overwrite", "no checkpoint that --overwrite may",
           lambda place: place.file("there/photo.jpg")),
    target("a file", "--output_path {root}/file --overwrite", "is not a directory: choose another", locked),
    target("below a file", "--output_path {root}/file/out", "is not a directory: choose another", locked),
    target("a mount point", "--output_path /proc --overwrite", "mount point"),
    target("the source", "--model_path {model} --output_path {model} --overwrite", "overlap"),
    target("inside the source", "--model_path {model} --output_path {model}/out", "overlap"),
    target("around the source", "--model_path {model} --output_path {root} --overwrite", "overlap"),
    target("the source by a link", "--model_path {model} --output_path {root}/link --overwrite", "overlap",
           lambda place: (place.root / "link").symlink_to(place.model)),
    target("a name too long", "--output_path {root}/" + "x" * 300, "ame too long"),
]  # fmt: skip


def gptj() -> Any:
    from transformers import GPTJConfig

    return GPTJConfig(n_embd=64, n_layer=1, n_head=4, rotary_dim=8, n_inner=96, vocab_size=2048)


def test_the_table_is_long_enough() -> None:
    assert len(CASES) >= 60
    kinds = {kind: sum(case.kind == kind for case in CASES) for kind in {case.kind for case in CASES}}
    assert kinds.keys() == {"command line", "config", "model", "data", "target"}
    assert min(kinds.values()) >= 10


@pytest.fixture
def place(tmp_path: Path, saved: Callable[[str], Path]) -> Place:
    return Place(tmp_path, Path(shutil.copytree(saved("llama"), tmp_path / "model")))


def listing(root: Path) -> dict[str, int]:
    return {str(p.relative_to(root)): p.lstat().st_mtime_ns for p in sorted(root.rglob("*"))}


def filled(case: Case, place: Place) -> list[str]:
    return [word.format(root=place.root, model=place.model) for word in case.words.split()]


@pytest.mark.parametrize("case", CASES, ids=[f"{c.kind} {c.name}"[:60] for c in CASES])
def test_bad_input(
    case: Case, place: Place, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.root)
    case.damage(place)
    capsys.readouterr()
    before = listing(place.root)
    try:
        code = MAIN[case.method](filled(case, place))
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    out, err = capsys.readouterr()
    assert code == 2, err
    assert out == ""
    assert re.fullmatch(rf"{case.method}_quantize\.py: error: [^\n]+\n", err), err
    assert case.said in err
    assert listing(place.root) == before


def test_what_needs_no_model_is_refused_before_anything_heavy_is_imported(
    place: Place, tmp_path: Path
) -> None:
    """All of them run in one fresh process, since each start of Python takes time."""
    early, commands = [case for case in CASES if case.early], []
    for number, case in enumerate(early):
        own = Place(tmp_path / str(number), tmp_path / str(number) / "model")
        shutil.copytree(place.model, own.model)
        case.damage(own)
        commands.append((case.method, filled(case, own)))
    script = (
        "import importlib, json, sys\n"
        "for method, words in json.load(sys.stdin):\n"
        "    try: code = importlib.import_module(f'{method}_quantize').main(words)\n"
        "    except SystemExit as leaving: code = leaving.code\n"
        "    assert code == 2, words\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy', 'huggingface_hub'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        input=json.dumps(commands),
        cwd=SCRIPTS,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
    assert done.stderr.count("\n") == len(early) >= 40
