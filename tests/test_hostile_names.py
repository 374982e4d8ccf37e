"""Test names with quotes, line ends and control characters, and users without a home: whole runs of the commands."""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from conftest import MAIN
from llm_quantize.io.embedded_files import EMBEDDED_CALIBRATION, EMBEDDED_MODEL
from llm_quantize.io.shown_names import shown_name

QUANTIZE = Path(__file__).resolve().parents[1] / "inference" / "quantize"
QUICK = ["--calib_samples", "2", "--calib_seq_len", "32", "--eval_data", "off", "--device", "cpu"]
QUICK += ["--group_size", "32", "--quality", "fast", "--calib_data", str(EMBEDDED_CALIBRATION)]
NAMES = [
    'x"); import os; os.system("touch ran"); ("',
    "quo'te\\",
    "a\n# Heading\n- [x](javascript:x)",
    "a\r\x1b]0;title\x07\x1b[31mred",
    "$(touch ran)`touch ran`",
    "``` <script>x | &amp; *b*",
    "--- {a: b} # c",
    "\u00e9\u4e2d\u2028\u202e",
]


def fences(card: str) -> list[str]:
    return re.findall(r"^```\w*\n(.*?)^```$", card, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", NAMES)
def test_a_card_of_any_name(
    name: str,
    saved: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Heading, YAML, snippets and terminal show the name, and nothing in it does anything."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved("llama"), tmp_path / "from" / name)
    capsys.readouterr()
    words = ["--model_path", str(tmp_path / "from" / name), "--output_path", str(tmp_path / "to" / name)]
    assert MAIN["gptq"]([*words, *QUICK]) == 0
    shown = capsys.readouterr()
    assert [line for line in (shown.out + shown.err).split("\n") if not line.isprintable()] == []
    card = (tmp_path / "to" / name / "README.md").read_text("utf-8")
    assert [line for line in card.split("\n") if not line.isprintable()] == []

    _, front, body = re.split(r"^---\n", card, maxsplit=2, flags=re.MULTILINE)
    assert yaml.safe_load(front)["base_model"] == name
    headings = [
        line
        for line in re.sub(r"^```.*?^```$", "", body, flags=re.DOTALL | re.M).splitlines()
        if line[:1] == "#"
    ]
    assert headings[0].startswith("# ")
    assert [heading for heading in headings[1:] if not heading.startswith("## ")] == []

    snippet = next(fence for fence in fences(card) if "from_pretrained" in fence)
    tree = ast.parse(snippet)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert {ast.unparse(call.func) for call in calls} <= {
        "AutoModelForCausalLM.from_pretrained",
        "AutoGPTQForCausalLM.from_quantized",
    }
    title = f"{name}-gptq-4bit"
    assert {ast.literal_eval(call.args[0]) for call in calls} == {f"./{title}"}

    serve = next(fence for fence in fences(card) if "run_vllm.sh" in fence)
    assert first_word_given_by_bash(serve, tmp_path) == os.fsencode(f"./{title}")
    (line,) = [line for line in shown.out.splitlines() if line.startswith("serve: ")]
    assert first_word_given_by_bash(line.removeprefix("serve: "), tmp_path) == os.fsencode(
        tmp_path / "to" / name
    )
    assert not (tmp_path / "ran").exists()


def first_word_given_by_bash(command: str, folder: Path) -> bytes:
    """Return the first argument that a command of one line passes to `run_vllm.sh` or `vllm serve`."""
    script = 'run() { printf %s "$1"; }; ' + re.sub(r"^(\S*run_vllm\.sh|vllm serve)", "run", command)
    return subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, check=True).stdout


@pytest.mark.parametrize("which", ["source", "target"])
def test_names_that_are_not_utf8(
    which: str, saved: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """safetensors cannot open them: told before the work, not when all is written."""
    odd = tmp_path / os.fsdecode(b"bytes\xff\x80")
    source = Path(shutil.copytree(saved("llama"), odd if which == "source" else tmp_path / "model"))
    target = odd if which == "target" else tmp_path / "out"
    capsys.readouterr()
    assert MAIN["gptq"](["--model_path", str(source), "--output_path", str(target), *QUICK]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(
        r"the name .* is not UTF-8, so that no safetensors file there can be opened: rename it", line
    )
    assert not target.exists() or which == "source"


def test_a_directory_that_only_looks_like_the_hubs_cache(tmp_path: Path) -> None:
    sound = tmp_path / "models--org--name" / "snapshots" / "c0ffee"
    odd = tmp_path / "models--x](http:y)--z\n# h" / "snapshots" / "c0ffee"
    for path in (sound, odd):
        path.mkdir(parents=True)
    assert shown_name(str(sound)) == "org/name@c0ffee"
    assert shown_name(str(odd)) == "c0ffee"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_streams_of_any_encoding(encoding: str, tmp_path: Path) -> None:
    """What the stream has no character for is escaped; a result is not lost for its name."""
    target = tmp_path / "\u00e9\u4e2d \U0001f600"
    done = command(
        "gptq_quantize.py", ["--output_path", str(target), *QUICK], tmp_path, PYTHONIOENCODING=encoding
    )
    assert done.returncode == 0, done.stderr
    assert (target / "config.json").exists()
    assert b"Traceback" not in done.stderr
    done = command(
        "evaluate.py",
        [str(EMBEDDED_MODEL), str(target), "--samples", "1", "--seq_len", "32", "--device", "cpu"],
        tmp_path,
        PYTHONIOENCODING=encoding,
    )
    assert done.returncode == 0, done.stderr
    done = command("gptq_quantize.py", ["--model_path", "./\u4e2d"], tmp_path, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)


def command(
    script: str, words: list[str], folder: Path, prelude: str = "", **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """Run a front door in a process of its own, without the variables that name the user, after `prelude`."""
    source = f"{prelude}\nimport runpy, sys\nsys.argv = sys.argv[1:]\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", source, str(QUANTIZE / script), *words],
        env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "PYTHONPATH": str(QUANTIZE), **environment},
        cwd=folder,
        capture_output=True,
        check=False,
        timeout=300,
    )


# A user that the system does not know, as in a container with a number for a user.
NOBODY = """
import pwd
def unknown(_): raise KeyError("uid not found")
pwd.getpwuid = pwd.getpwnam = unknown
"""


@pytest.mark.parametrize("home", [None, "", "/nonexistent"])
def test_a_user_without_a_home(home: str | None, tmp_path: Path) -> None:
    """Both commands do their work, and say nothing of it."""
    environment = {} if home is None else {"HOME": home}
    target = tmp_path / "out"
    words = ["--output_path", str(target), *QUICK]
    done = command("gptq_quantize.py", words, tmp_path, NOBODY, **environment)
    assert done.returncode == 0, done.stderr
    lines = [
        line for line in done.stderr.decode().splitlines() if not line.startswith(("block ", "calibration: "))
    ]
    assert lines == []
    words = [str(EMBEDDED_MODEL), str(target), "--samples", "1", "--seq_len", "32", "--device", "cpu"]
    done = command("evaluate.py", words, tmp_path, NOBODY, **environment)
    assert done.returncode == 0, done.stderr
    done = command("serve_check.py", ["cpu", str(target)], tmp_path, NOBODY, **environment)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "words",
    [
        "gptq_quantize.py --model_path ~/x",
        "awq_quantize.py --output_path ~/x",
        "gptq_quantize.py --calib_data ~/x.txt",
        "awq_quantize.py --eval_data ~/x.txt",
        "gptq_quantize.py --model_path ~nobody-of-this-name/x",
        "gptq_quantize.py --model_path org/model",
        "evaluate.py ~/x ~/y",
        "serve_check.py cpu ~/x",
    ],
)
def test_what_needs_a_home_is_told_in_one_line(words: str, tmp_path: Path) -> None:
    script, *rest = shlex.split(words)
    done = command(script, rest, tmp_path, NOBODY, HF_ENDPOINT="http://127.0.0.1:9")
    assert done.returncode == 2, done.stderr
    lines = done.stderr.decode().splitlines()
    assert lines[-1].startswith((f"{script}: error: ", "run_vllm.sh: "))
    assert len(lines) <= 2
    assert "Traceback" not in done.stderr.decode()
