"""Test models and datasets from a hub on loopback.

`huggingface_hub` reads its environment when it is imported. So each environment (online, offline, a hub that does not
answer) has a process of its own, which makes a list of calls.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hub_server import HubServer

SOURCES = Path(__file__).parents[1] / "inference" / "quantize"
EMBEDDED = SOURCES / "embedded" / "model"

# Reads a list of calls, each a function of this script with its arguments; prints their values or errors.
CHILD = """
import json, sys
from llm_quantize.calibration import hub_datasets
from llm_quantize.calibration.windows import CalibrationConfig, load_windows
from llm_quantize.errors import InputError
from llm_quantize.io import hub

def set_timeout(seconds):
    hub.HUB_TIMEOUT = seconds

def model(path, **options):
    snapshot = hub.resolve_model(path, log=lambda line: None, **options)
    return {str(p.relative_to(snapshot)): p.stat().st_size for p in snapshot.rglob("*") if p.is_file()}

def windows(data, limit=hub_datasets.DOWNLOAD_LIMIT, **options):
    from transformers import PreTrainedTokenizerFast
    hub_datasets.DOWNLOAD_LIMIT = limit
    tokenizer = PreTrainedTokenizerFast.from_pretrained(sys.argv[1])
    lines = []
    config = CalibrationConfig(**{"data": data, "samples": 8, "seq_len": 32, **options})
    found = load_windows(config, tokenizer, log=lines.append)
    text = "<eos>".join(tokenizer.decode(window.tolist()) for window in found.tokens)
    return {"shape": list(found.tokens.shape), "source": found.source, "fingerprint": found.fingerprint,
            "text": text, "log": lines}

for name, arguments, options in json.load(sys.stdin):
    try:
        print(json.dumps({"value": globals()[name](*arguments, **options)}))
    except InputError as error:
        print(json.dumps({"error": str(error)}))
"""


def words(start: int, count: int) -> str:
    return " ".join(f"w{i}" for i in range(start, start + count))


def wikitext_rows() -> list[str]:
    """Return rows as in Salesforce/wikitext: lines of articles, with blank lines between."""
    rows = []
    for article in range(20):
        start = article * 40
        rows += ["", f" = w{start} = \n", "", f" {words(start + 1, 30)} \n", f" = = w{start + 31} = = \n", ""]
    return rows


@dataclass
class Hub:
    server: HubServer
    home: Path  # the value of HF_HOME: processes share this cache
    model: Path
    tokenizer: Path

    def run(self, calls: list[tuple[Any, ...]], **environment: str) -> list[dict[str, Any]]:
        """Make `calls`, each (function, argument, options), in a new process; return their answers."""
        settings = {"HF_ENDPOINT": self.server.url, "HF_HOME": str(self.home), **environment}
        kept = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("HF_", "HUGGING")) and "proxy" not in k.lower()
        }
        done = subprocess.run(
            [sys.executable, "-c", CHILD, str(self.tokenizer)],
            input=json.dumps([(name, [argument], options) for name, argument, options in calls]),
            env={
                **kept,
                "PYTHONPATH": str(SOURCES),
                "OMP_NUM_THREADS": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                **settings,
            },
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == "", "nothing but one-line errors is shown"
        return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    root = tmp_path_factory.mktemp("hub")
    model = make_model(root / "tiny")
    pickled = root / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").write_bytes(b"\x80")
    datasets = {
        "Salesforce/wikitext": make_wikitext(root / "wikitext"),
        "allenai/c4": make_c4(root / "c4"),
        "mit-han-lab/pile-val-backup": make_pile(root / "pile"),
        "org/rows": make_rows(root / "rows"),
    }
    server = HubServer(
        models={"org/tiny": model, "org/pickled": pickled, "org/gated": model},
        datasets={**datasets, "org/gated": datasets["org/rows"]},
        gated=("org/gated",),
    )
    with server:
        yield Hub(server, root / "home", model, make_tokenizer(root / "tokenizer"))


def make_model(path: Path) -> Path:
    """Copy the embedded model, and add files that a snapshot must leave out."""
    shutil.copytree(EMBEDDED, path)
    (path / "original").mkdir()
    for name in (
        "modeling_tiny.py",
        "pytorch_model.bin",
        "tiny.gguf",
        "consolidated.safetensors",
        "original/a.json",
    ):
        (path / name).write_text("{}")
    return path


def make_tokenizer(path: Path) -> Path:
    """Save a tokenizer of a thousand words, w0 to w999."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<eos>", "=", *(f"w{i}" for i in range(1000))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="="))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast: Any = PreTrainedTokenizerFast
    fast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained(path)
    return path


def make_wikitext(path: Path) -> Path:
    for config, rows in {"wikitext-2-raw-v1": wikitext_rows(), "wikitext-2-v1": ["w0"]}.items():
        for split in ("train", "validation", "test"):
            write_parquet(path / config / f"{split}-00000-of-00001.parquet", {"text": rows})
    splits = "".join(
        f"""- config_name: {config}
  data_files:
"""
        + "".join(f"  - split: {s}\n    path: {config}/{s}-*\n" for s in ("train", "validation", "test"))
        for config in ("wikitext-2-raw-v1", "wikitext-2-v1")
    )
    (path / "README.md").write_text(f"---\nconfigs:\n{splits}---\n")
    return path


def make_c4(path: Path) -> Path:
    (path / "en").mkdir(parents=True)
    for shard in range(3):
        records = [json.dumps({"text": words(shard * 300 + i * 10, 10), "url": "x"}) for i in range(30)]
        with gzip.open(path / f"en/c4-train.0000{shard}-of-00003.json.gz", "wt") as file:
            file.write("\n".join(records) + "\n")
    (path / "README.md").write_text(
        "---\nconfigs:\n- config_name: en\n  data_files:\n"
        "  - split: train\n    path: en/c4-train.*.json.gz\n---\n"
    )
    return path


def make_pile(path: Path) -> Path:
    path.mkdir()
    records = "".join(json.dumps({"text": words(i * 20, 20), "meta": {}}) + "\n" for i in range(40))
    with pa.CompressedOutputStream(str(path / "val.jsonl.zst"), "zstd") as file:
        file.write(records.encode())
    return path


def make_rows(path: Path) -> Path:
    """Write a dataset without a README and without a column named text."""
    write_parquet(path / "train.parquet", {"body": [words(0, 500)], "number": [1]})
    return path


def write_parquet(path: Path, columns: dict[str, list[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


MODEL_FILES = {p.name for p in EMBEDDED.iterdir()}
Calls = dict[str, tuple[str, str, dict[str, Any]]]
ONLINE: Calls = {
    "model": ("model", "org/tiny", {}),
    "model revision": ("model", "org/tiny@main", {}),
    "model code": ("model", "org/tiny", {"trust_remote_code": True}),
    "pickled": ("model", "org/pickled", {"allow_pickle": True}),
    "pickled refused": ("model", "org/pickled", {}),
    "no revision": ("model", "org/tiny@v9", {}),
    "no model": ("model", "org/absent", {}),
    "typo": ("model", "absent", {}),
    "gated model": ("model", "org/gated", {}),
    "wikitext": ("windows", "wikitext", {}),
    "wikitext again": ("windows", "wikitext", {}),
    "wikitext seed": ("windows", "wikitext", {"seed": 1}),
    "wikitext streamed": ("windows", "wikitext", {"limit": 0}),
    "split": ("windows", "wikitext::test", {}),
    "c4": ("windows", "c4", {"limit": 0}),
    "c4 again": ("windows", "c4", {"limit": 0}),
    "c4 seed": ("windows", "c4", {"limit": 0, "seed": 1}),
    "pileval": ("windows", "pileval", {}),
    "column": ("windows", "org/rows:::body", {}),
    "calib_column": ("windows", "org/rows", {"column": "body"}),
    "no text column": ("windows", "org/rows", {}),
    "no column": ("windows", "org/rows:::nope", {}),
    "no split": ("windows", "wikitext::dev", {}),
    "no config": ("windows", "Salesforce/wikitext:nope", {}),
    "which config": ("windows", "Salesforce/wikitext", {}),
    "no dataset": ("windows", "org/absent", {}),
    "gated dataset": ("windows", "org/gated", {}),
}
OFFLINE: Calls = {
    "model": ("model", "org/tiny", {}),
    "not cached": ("model", "org/other", {}),
    "wikitext": ("windows", "wikitext", {}),
    "c4": ("windows", "c4", {}),
}
REFUSED: Calls = {"model": ("model", "org/tiny", {}), "wikitext": ("windows", "wikitext", {})}


@pytest.fixture(scope="module")
def online(hub: Hub) -> dict[str, dict[str, Any]]:
    return dict(zip(ONLINE, hub.run(list(ONLINE.values())), strict=True))


@pytest.fixture(scope="module")
def offline(hub: Hub, online: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return dict(zip(OFFLINE, hub.run(list(OFFLINE.values()), HF_HUB_OFFLINE="1"), strict=True))


@pytest.mark.parametrize(
    ("case", "files"),
    [
        ("model", MODEL_FILES),
        ("model revision", MODEL_FILES),
        ("model code", MODEL_FILES | {"modeling_tiny.py"}),
        ("pickled", {"config.json", "pytorch_model.bin"}),
    ],
)
def test_a_snapshot_holds_the_files_of_a_checkpoint(
    hub: Hub, online: dict[str, Any], case: str, files: set[str]
) -> None:
    source = hub.model if case.startswith("model") else hub.model.parent / "pickled"
    assert online[case]["value"] == {name: (source / name).stat().st_size for name in files}


@pytest.mark.parametrize(
    ("case", "source"),
    [
        ("wikitext", "Salesforce/wikitext:wikitext-2-raw-v1:train"),
        ("wikitext streamed", "Salesforce/wikitext:wikitext-2-raw-v1:train"),
        ("split", "Salesforce/wikitext:wikitext-2-raw-v1:test"),
        ("c4", "allenai/c4:en:train, column text"),
        ("pileval", "mit-han-lab/pile-val-backup:validation, column text"),
        ("column", "org/rows:train, column body"),
        ("calib_column", "org/rows:train, column body"),
    ],
)
def test_windows_come_from_the_hub(online: dict[str, Any], case: str, source: str) -> None:
    value = online[case]["value"]
    assert value["shape"] == [8, 32]
    assert value["source"] == source
    assert value["log"] == []


def test_lines_of_wikitext_become_articles(online: dict[str, Any]) -> None:
    # Within an article, word numbers rise by one, across headings; EOS separates articles.
    headings = 0
    for article in online["wikitext"]["value"]["text"].split("<eos>"):
        numbers = [int(word[1:]) for word in article.split() if word != "="]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True
        assert len({n // 40 for n in numbers}) <= 1
        headings += any(n % 40 == 31 for n in numbers[1:])
    assert headings > 1


def test_a_stream_is_read_from_several_files(online: dict[str, Any]) -> None:
    drawn = {int(word[1:]) // 300 for word in online["c4"]["value"]["text"].replace("<eos>", " ").split()}
    assert drawn == {0, 1, 2}


def test_the_seed_decides(online: dict[str, Any]) -> None:
    prints = {
        case: answer["value"]["fingerprint"] for case, answer in online.items() if "shape" in str(answer)
    }
    assert (
        prints["wikitext"]
        == prints["wikitext again"]
        == prints["wikitext streamed"]
        != prints["wikitext seed"]
    )
    assert prints["c4"] == prints["c4 again"] != prints["c4 seed"]


@pytest.mark.parametrize(
    ("case", "line"),
    [
        ("pickled refused", "org/pickled has no safetensors weights"),
        ("no revision", "model org/tiny has no revision 'v9'"),
        ("no model", "no such directory: org/absent, and the hub has no such model: org/absent"),
        ("typo", "no such directory: absent, and the hub has no such model: absent"),
        ("gated model", "org/gated is gated: accept its conditions at"),
        ("gated model", "`hf auth login` or set HF_TOKEN"),
        ("no text column", "no column 'text': org/rows:train has body, number: choose with --calib_column"),
        ("no column", "no column 'nope': org/rows:train has body, number"),
        ("no split", "has no split 'dev': it has train, validation, test"),
        ("no config", "has no configuration 'nope'"),
        ("no config", "Salesforce/wikitext:CONFIG: wikitext-2-raw-v1, wikitext-2-v1"),
        ("which config", "several configurations: name one as Salesforce/wikitext:CONFIG: wikitext-2-raw-v1"),
        ("no dataset", "the hub has no such dataset: org/absent"),
        ("no dataset", "--calib_data takes a local .txt"),
        ("gated dataset", "org/gated is gated: accept its conditions at"),
        ("gated dataset", "datasets/org/gated"),
    ],
)
def test_refusals_of_the_hub_are_one_line(online: dict[str, Any], case: str, line: str) -> None:
    assert line in online[case]["error"]
    assert "\n" not in online[case]["error"]


def test_the_cache_serves_without_a_network(online: dict[str, Any], offline: dict[str, Any]) -> None:
    assert set(offline["model"]["value"]) >= MODEL_FILES
    assert offline["wikitext"]["value"]["fingerprint"] == online["wikitext"]["value"]["fingerprint"]


@pytest.mark.parametrize(
    ("case", "lines"),
    [
        ("not cached", ["model org/other is not in the cache, and HF_HUB_OFFLINE forbids"]),
        ("c4", ["dataset allenai/c4", "Without the hub, --calib_data takes a local .txt"]),
    ],
)
def test_offline_refusals_are_one_line(offline: dict[str, Any], case: str, lines: list[str]) -> None:
    for line in lines:
        assert line in offline[case]["error"]


def test_an_unreachable_hub(hub: Hub, tmp_path: Path) -> None:
    closed = HubServer()
    closed._server.server_close()  # now its port refuses connections
    answers = hub.run(list(REFUSED.values()), HF_ENDPOINT=closed.url, HF_HOME=str(tmp_path))
    for kind, answer in zip(("model org/tiny", "dataset Salesforce/wikitext"), answers, strict=True):
        assert answer["error"].startswith(f"cannot reach the hub at {closed.url} for {kind} (")
        assert "refused" in answer["error"]
    assert "--calib_data takes a local .txt" in answers[1]["error"]


def test_a_silent_hub_is_asked_once_until_the_timeout(hub: Hub, tmp_path: Path) -> None:
    """Test a hub that accepts connections but never answers: without a time limit, a run would never end."""
    asked: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def take() -> None:
            with suppress(OSError):
                while True:
                    asked.append(listening.accept()[0])

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        calls: list[tuple[Any, ...]] = [("set_timeout", 1, {}), *REFUSED.values()]
        _, *answers = hub.run(calls, HF_ENDPOINT=url, HF_HOME=str(tmp_path))
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()
        for connection in asked:
            connection.close()
    assert [a["error"].partition(" for ")[0] for a in answers] == [f"cannot reach the hub at {url}"] * 2
    assert len(asked) == 2


def test_the_cache_serves_where_the_hub_is_unreachable(hub: Hub, online: dict[str, Any]) -> None:
    closed = HubServer()
    closed._server.server_close()
    (answer,) = hub.run([REFUSED["model"]], HF_ENDPOINT=closed.url)
    assert set(answer["value"]) >= MODEL_FILES
