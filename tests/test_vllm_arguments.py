"""Test how the user's arguments for vLLM are read, against a parser that reads them as vLLM's does."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_quantize.serving.plan import plan_serving
from llm_quantize.serving.refusal import Refusal
from llm_quantize.serving.vllm_arguments import parse_arguments, read_config_file

LOOPBACK = ["--host", "127.0.0.1"]


def planned(*words: str) -> list[str]:
    """Return the arguments for vLLM that the check makes of the user's `words`; a hub id is not looked at."""
    return plan_serving("cuda", "org/model", words).arguments


# --- where the server listens


@pytest.mark.parametrize(
    "text",
    [
        "host: 127.0.0.1\n",
        "host: 0.0.0.0\n",
        "host:\n  0.0.0.0\n",
        '"host": 0.0.0.0\n',
        "? host\n: 0.0.0.0\n",
        "{host: 0.0.0.0, port: 1}\n",
        "port: 1\nhost: >-\n  0.0.0.0\n",
        "served-model-name: |\n  a\n  host: 127.0.0.1\n",
        'chat-template: "a\n  host: 127.0.0.1"\n',
        "base: &b {host: 0.0.0.0}\n<<: *b\n",
        "---\nport: 1\n...\n---\nhost: 127.0.0.1\n",
        "uds: /tmp/socket\n",
        "host: 127.0.0.1\nhost: 0.0.0.0\n",
        "",
        "\0",
    ],
)
@pytest.mark.parametrize("form", ["--config {}", "--config={}", "--conf {}"])
def test_host_is_passed_whatever_the_config_file_says(text: str, form: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    words = form.format(file).split()
    assert planned(*words) == [*words, *LOOPBACK]
    own = [*words, "--host", "10.0.0.1"]
    assert planned(*own) == own


@pytest.mark.parametrize(
    "words",
    [
        ["--host", "0.0.0.0"],
        ["--host=0.0.0.0"],
        ["--hos", "0.0.0.0"],
        ["--host", "", "--host", "::1"],
        ["--uds", "/tmp/socket"],
        ["--uds=/tmp/socket"],
    ],
)
def test_own_words_decide(words: list[str]) -> None:
    assert planned(*words) == words


@pytest.mark.parametrize(
    "words",
    [
        ["--host="],
        ["--host", ""],
        ["--uds="],
        ["--host", "10.0.0.1", "--host="],
        ["--config", "--host"],
        ["--config", "--host=c.yaml"],  # vLLM takes the next word for the file, whatever it is
        ["--hostname", "10.0.0.1"],
        ["--served-model-name", "host"],
    ],
)
def test_words_that_give_no_host(words: list[str]) -> None:
    assert planned(*words) == [*words, *LOOPBACK]
    assert planned(*words, "--", "--host", "10.0.0.1") == [*words, *LOOPBACK, "--", "--host", "10.0.0.1"]


class LikeVllm(argparse.ArgumentParser):
    """A few of vLLM's options, parsed as its `FlexibleArgumentParser` does: argparse, dashes, `--config FILE`."""

    def __init__(self) -> None:
        super().__init__()
        self.add_argument("--host")
        self.add_argument("--port", type=int)
        self.add_argument("--uds")
        self.add_argument("--config")
        self.add_argument("--served-model-name", nargs="+")
        self.add_argument("--enforce-eager", action="store_true")
        self.add_argument("--quantization", "-q")
        self.add_argument("--dtype", choices=("auto", "half"))
        self.add_argument("-tp", "--tensor-parallel-size", type=int)

    def read(self, words: list[str], file: list[str]) -> argparse.Namespace | None:
        """Return what vLLM makes of `words` with the words of the file that they name; None where it refuses."""
        if "--config" in words:
            index = words.index("--config")
            if (
                words.count("--config") > 1
                or not words[index + 1 :]
                or not words[index + 1].endswith(".yaml")
            ):
                return None
            words = [*file, *words[:index], *words[index + 2 :]]
        words = [re.sub(r"(?<=--)[^.=]*", lambda m: m[0].replace("_", "-"), w, count=1) for w in words]
        try:
            with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
                return self.parse_args(words)
        except SystemExit:
            return None


WORDS = """
    --host --host= --hos --ho --host=10.0.0.1 10.0.0.1 --uds --uds=/s --ud --config c.yaml --config=c.yaml --con --port
    --port=1 7 --served_model_name a --enforce-eager -- - -q -qawq -q=awq --quant --dt=half -tp 2 -tp=2 -5
"""


@settings(
    max_examples=600, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
@given(
    st.lists(st.sampled_from([*WORDS.split(), ""]), max_size=7), st.sampled_from(["", "0.0.0.0", "10.9.9.9"])
)
def test_no_words_open_the_server(words: list[str], in_file: str) -> None:
    """What vLLM listens on is loopback, or what the user's own words alone give."""
    parser = LikeVllm()
    file = ["--host", in_file] if in_file else []
    own = parser.read(words, [])
    try:
        passed = parser.read(planned(*words), file)
    except Refusal:
        return
    if passed is None:
        return
    if own is not None and own.uds:
        assert passed.uds == own.uds
    else:
        assert passed.host == ((own is not None and own.host) or "127.0.0.1")
    if own is not None:  # nothing else is changed
        assert {**vars(passed), "host": own.host} == vars(own)


@settings(
    max_examples=600, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
@given(st.lists(st.sampled_from([*WORDS.split(), ""]), max_size=7))
def test_values_are_those_that_the_parser_finds(words: list[str]) -> None:
    found = LikeVllm().read(words, [])
    if found is None:
        return
    arguments = parse_arguments(words)
    for name in ("host", "uds", "quantization", "dtype"):
        assert arguments.last_word(f"--{name}") == getattr(found, name)
    size = arguments.last_word("--tensor-parallel-size")
    assert (None if size is None else int(size)) == found.tensor_parallel_size
    assert arguments.has("--enforce-eager") == found.enforce_eager


# --- the config file


def test_plain_files_are_understood(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(
        "---\n# comment\nquantization: 'gptq'\ntensor_parallel_size:   2 # two\n\nenforce-eager: true\n"
        'dtype: "half"\nlora-modules:\n  - name: a\n    path: b\nport: 9000\n'
    )
    assert read_config_file(str(file)) == {
        "--quantization": "gptq",
        "--tensor-parallel-size": "2",
        "--enforce-eager": "true",
        "--dtype": "half",
        "--lora-modules": "",
        "--port": "9000",
    }


@pytest.mark.parametrize(
    "text",
    [
        "a: |\n  b\n",
        "a: [1,\n 2]\n",
        "{a: 1}",
        "a: &x 1\n",
        "a: !!int 1\n",
        "a\n",
        "a: 1\na: 2\n",
        "a: 'b\n c'\n",
    ],
)
def test_other_files_are_left_to_vllm(text: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert read_config_file(str(file)) is None
    plan = plan_serving("cuda", "org/model", ["--config", str(file)])
    assert any("is not understood here: its settings are left to vLLM" in note for note in plan.notes)


def test_files_that_are_none(tmp_path: Path) -> None:
    huge = tmp_path / "huge.yaml"
    with huge.open("wb") as file:
        file.truncate(2 << 20)
    for path in (str(huge), str(tmp_path), str(tmp_path / "gone"), "a\0b", "x" * 5000):
        assert read_config_file(path) is None
