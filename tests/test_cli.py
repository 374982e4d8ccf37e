"""Test the command line: refusals, help, exit codes, what reaches the pipeline, and what is shown."""

from __future__ import annotations

import dataclasses
import importlib
import io
import os
import re
import signal
import subprocess
import sys
import time
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llm_quantize
from llm_quantize import cli, options
from llm_quantize.calibration.windows import CalibrationConfig
from llm_quantize.config import QuantizeConfig, default_calibration
from llm_quantize.console import Console, duration
from llm_quantize.errors import InputError, WorkError, one_line
from llm_quantize.io.embedded_files import EMBEDDED_CALIBRATION
from llm_quantize.types import Method
from option_help import help_defaults

SCRIPTS = Path(cli.__file__).parents[1]
METHODS: tuple[Method, ...] = ("awq", "gptq")

# (method, arguments, what the one line must hold: the argument, and the remedy)
WRONG: list[tuple[Method, str, str, str]] = [
    ("awq", "--bits 3", "--bits 3", "4 or 8"),
    ("awq", "--bits 2", "--bits 2", "4 or 8"),
    ("gptq", "--bits 5", "--bits 5", "2, 3, 4 or 8"),
    ("gptq", "--bits 16", "--bits 16", "2, 3, 4 or 8"),
    ("awq", "--bits four", "--bits", "whole number"),
    ("awq", "--bits 4.0", "--bits", "whole number"),
    ("awq", "--bits", "--bits", "expected one argument"),
    ("awq", "--group_size 0", "--group_size 0", "multiple of 32"),
    ("awq", "--group_size 16", "--group_size 16", "vLLM does not serve groups of 16; take 32"),
    ("gptq", "--group_size 100", "--group_size 100", "multiple of 32"),
    ("gptq", "--group_size -2", "--group_size -2", "-1 for the whole row"),
    ("gptq", "--group-size=-32", "--group_size -32", "-1 for the whole row"),
    ("gptq", "--group_size all", "--group_size", "whole number"),
    ("awq", "--calib_samples 0", "--calib_samples 0", "at least 1"),
    ("gptq", "--calib_samples -5", "--calib_samples -5", "at least 1"),
    ("gptq", "--calib_samples many", "--calib_samples", "whole number"),
    ("awq", "--calib_seq_len 31", "--calib_seq_len 31", "at least 32"),
    ("awq", "--calib_seq_len 2k", "--calib_seq_len", "whole number"),
    ("awq", "--calib_data=", "--calib_data", "wikitext"),
    ("awq", "--calib_data ./absent.txt", "./absent.txt", "no such file"),
    ("gptq", "--calib_data a:b:c:d:e", "a:b:c:d:e", "repo[:config"),
    ("awq", "--seed -1", "--seed -1", "from 0"),
    ("awq", "--seed 4294967296", "--seed 4294967296", "to 4294967295"),
    ("gptq", "--damp_percent 1.5", "--damp_percent 1.5", "a fraction from 0 to 1"),
    ("gptq", "--damp_percent -0.1", "--damp_percent -0.1", "a fraction from 0 to 1"),
    ("gptq", "--damp_percent nan", "--damp_percent", "finite number"),
    ("gptq", "--damp_percent ten", "--damp_percent", "finite number"),
    ("gptq", "--desc_act perhaps", "--desc_act", "true, false, 1, 0, yes or no"),
    ("gptq", "--sym 2", "--sym", "true, false, 1, 0, yes or no"),
    ("awq", "--zero_point none", "--zero_point", "true, false, 1, 0, yes or no"),
    ("awq", "--overwrite=", "--overwrite", "true, false, 1, 0, yes or no"),
    ("gptq", "--zero_point", "--zero_point", "awq_quantize.py"),
    ("awq", "--sym false", "--sym", "gptq_quantize.py"),
    ("awq", "--damp-percent 0.1", "--damp_percent", "gptq_quantize.py"),
    ("awq", "--act_order_groups static", "--act_order_groups", "gptq_quantize.py"),
    ("gptq", "--act_order_groups moving", "--act_order_groups", "static"),
    ("gptq", "--act_order_groups dynamic --desc_act false", "--act_order_groups", "--desc_act true"),
    ("gptq", "--act_order_groups dynamic --format compressed-tensors", "dynamic", "--format gptq"),
    ("gptq", "--act_order_groups dynamic --format awq", "dynamic", "--format gptq"),
    ("awq", "--bits 8 --format awq", "--bits 8", "written as compressed-tensors"),
    ("gptq", "--bits 3 --format awq", "--bits 3", "written as compressed-tensors"),
    ("gptq", "--bits 8 --format awq", "--bits 8", "written as gptq"),
    ("awq", "--format gguf", "--format", "compressed-tensors"),
    ("awq", "--quality good", "--quality", "best"),
    ("awq", "--device gpu", "--device gpu", "cuda:N"),
    ("awq", "--device cuda:", "--device cuda:", "cuda:N"),
    ("awq", "--device cuda:-1", "--device cuda:-1", "cuda:N"),
    ("awq", "--max_memory 0", "--max_memory 0", "more than 0"),
    ("awq", "--max_memory 6GiB", "--max_memory", "finite number"),
    ("awq", "--eval_samples 0", "--eval_samples 0", "--eval_data off"),
    ("awq", "--eval_data=", "--eval_data", "auto, off"),
    ("awq", "--max_kl -1", "--max_kl -1", "leave it out"),
    ("awq", "--max_kl inf", "--max_kl", "finite number"),
    ("awq", "--max_kl 0.1 --eval_data off", "--max_kl", "leave --eval_data off out"),
    ("awq", "--max_ppl_increase -2", "--max_ppl_increase -2", "leave it out"),
    ("awq", "--max_ppl_increase 5 --eval_data off", "--max_ppl_increase", "--eval_data off out"),
    ("awq", "--model_path=", "--model_path", "give a directory"),
    ("awq", "--output_path=", "--output_path", "give a directory"),
    ("awq", "--model_path", "--model_path", "expected one argument"),
    ("awq", "Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B", "--model_path"),
    ("awq", "--model Qwen", "--model", "--model_path"),
    ("awq", "--calib_sample 12", "--calib_sample", "--calib_samples"),
    ("awq", "--xyzzy", "--xyzzy", "--help"),
    ("gptq", "-b 4", "-b", "--help"),
    ("awq", "--group_size " + "9" * 5000, "--group_size", "whole number"),
]


@dataclasses.dataclass
class Result:
    """What the pipeline returns."""

    output: Path = Path("quantized/tiny-awq-4bit")
    method: str = "awq"
    bits: int = 4
    format: str = "awq"
    rows: list[tuple[str, str]] = dataclasses.field(default_factory=lambda: [("size", "3 MB -> 1 MB")])
    sample: str | None = "once upon\na time"
    serve_line: str = "./run_vllm.sh quantized/tiny-awq-4bit --quantization awq"


Quantize = Callable[[QuantizeConfig, Console], Result]


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Callable[[Quantize], None]:
    """Put a function in the place of `pipeline.quantize`."""
    monkeypatch.setattr(os, "environ", os.environ.copy())

    def put(quantize: Quantize) -> None:
        module: Any = types.ModuleType("pipeline")
        module.quantize = quantize
        monkeypatch.setitem(sys.modules, "llm_quantize.pipeline", module)
        monkeypatch.setattr(llm_quantize, "pipeline", module, raising=False)

    return put


def front_door(method: Method, argv: list[str]) -> int:
    """Return the exit code of the script's `main`, returned or raised as SystemExit."""
    try:
        code = importlib.import_module(f"{method}_quantize").main(argv)
    except SystemExit as leaving:
        code = leaving.code
    assert isinstance(code, int)
    return code


@pytest.mark.parametrize(
    ("method", "line", "culprit", "remedy"), WRONG, ids=[f"{m} {a[:40]}" for m, a, _, _ in WRONG]
)
def test_wrong_command_line(
    method: Method,
    line: str,
    culprit: str,
    remedy: str,
    capsys: pytest.CaptureFixture[str],
    pipeline: Callable[[Quantize], None],
) -> None:
    pipeline(lambda config, console: pytest.fail("the work started"))
    assert front_door(method, line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(rf"{method}_quantize\.py: error: [^\n]+\n", err)
    assert culprit in err
    assert remedy in err


def test_the_table_is_long_enough() -> None:
    assert len(WRONG) >= 40


@pytest.mark.parametrize("where", ["", "deeper/still", ".."])
def test_output_and_model_must_not_overlap(
    where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "a" / "model"
    model.mkdir(parents=True)
    assert front_door("awq", ["--model_path", str(model), "--output_path", str(model / where)]) == 2
    err = capsys.readouterr().err
    assert "--output_path" in err
    assert "overlap" in err
    config = cli.parse(
        "awq", ["--model_path", str(model), "--output_path", str(tmp_path / "a" / "model-awq")]
    )
    assert config.target == tmp_path / "a" / "model-awq"


# ---------------------------------------------------------------------------------- arguments -> config


@pytest.mark.parametrize("method", METHODS)
def test_no_arguments_give_the_defaults(method: Method) -> None:
    config = cli.parse(method, [])
    assert config == QuantizeConfig(method=method, calibration=default_calibration(method, embedded=True))
    assert config.calibration.data == str(EMBEDDED_CALIBRATION)
    assert config.target == Path(f"quantized/tiny-{method}-4bit")
    assert config.may_replace
    assert config.symmetric == (method == "gptq")
    assert config.checkpoint_format.name == method


@pytest.mark.parametrize(("method", "samples", "length"), [("awq", 512, 512), ("gptq", 1024, 2048)])
def test_a_model_of_the_users(method: Method, samples: int, length: int) -> None:
    config = cli.parse(method, ["--model_path", "Qwen/Qwen2.5-7B-Instruct@main"])
    assert config.calibration == CalibrationConfig(samples=samples, seq_len=length)
    assert config.calibration.data == "wikitext"
    assert config.target == Path(f"quantized/Qwen2.5-7B-Instruct-{method}-4bit")
    assert not config.may_replace


def test_every_argument_arrives() -> None:
    line = (
        "--model-path m/n --output_path o --bits 3 --group-size -1 --desc_act yes --act_order_groups static "
        "--damp-percent 0.05 --sym NO --format compressed-tensors --quality best --calib_data c4 "
        "--calib_samples 7 --calib-seq-len 64 --calib_column a-b --seed 9 --device cuda:1 --max_memory 5.5 "
        "--overwrite --trust-remote-code --allow_pickle --eval_data x.txt --eval_samples 3 --max_kl 0.2 "
        "--max-ppl-increase 4 --quiet"
    )
    assert cli.parse("gptq", line.split()) == QuantizeConfig(
        method="gptq",
        calibration=CalibrationConfig(data="c4", samples=7, seq_len=64, column="a-b", seed=9),
        model_path="m/n",
        output_path="o",
        bits=3,
        group_size=-1,
        desc_act=True,
        act_order_groups="static",
        damping=0.05,
        symmetric=False,
        format="compressed-tensors",
        quality="best",
        device="cuda:1",
        max_memory=5.5,
        overwrite=True,
        trust_remote_code=True,
        allow_pickle=True,
        eval_data="x.txt",
        eval_samples=3,
        max_kl=0.2,
        max_ppl_increase=4.0,
        quiet=True,
    )
    assert cli.parse("awq", ["--model-path=a-b/c-d"]).model_path == "a-b/c-d"


@pytest.mark.parametrize("text", ["true", "True", "TRUE", "1", "yes", "YES", None])
def test_true(text: str | None) -> None:
    assert cli.parse("awq", ["--overwrite", *([text] if text else [])]).overwrite is True


@pytest.mark.parametrize("text", ["false", "False", "FALSE", "0", "no", "No"])
def test_false(text: str) -> None:
    assert cli.parse("awq", [f"--zero-point={text}"]).symmetric is True
    config = cli.parse("gptq", ["--sym", text, "--desc_act", text])
    assert config.symmetric is False
    assert config.desc_act is False


@pytest.mark.parametrize(
    ("method", "line", "expected"),
    [
        ("awq", "", "awq"),
        ("awq", "--zero_point false", "awq"),
        ("awq", "--bits 8", "compressed-tensors"),
        ("awq", "--bits 8 --format gptq", "gptq"),
        ("gptq", "", "gptq"),
        ("gptq", "--bits 8", "gptq"),
        ("gptq", "--bits 2", "compressed-tensors"),
        ("gptq", "--bits 3", "compressed-tensors"),
        ("gptq", "--sym false", "compressed-tensors"),
        ("gptq", "--act_order_groups dynamic", "gptq"),
        ("gptq", "--act_order_groups dynamic --bits 3 --sym false", "gptq"),
        ("gptq", "--format compressed-tensors", "compressed-tensors"),
    ],
)
def test_format(method: Method, line: str, expected: str) -> None:
    assert cli.parse(method, line.split()).checkpoint_format.name == expected


@pytest.mark.parametrize(
    ("line", "warning"),
    [
        ("--act_order_groups dynamic", "--act_order_groups dynamic"),
        ("--format gptq --bits 3", "3 bits"),
        ("--format gptq --sym false", "asymmetric"),
        ("--group_size 256", "--group_size 256"),
        ("--act_order_groups dynamic --group_size -1", None),
        ("--bits 3", None),
        ("--format compressed-tensors --group_size 256", None),
    ],
)
def test_what_vllm_refuses_is_said(
    line: str,
    warning: str | None,
    pipeline: Callable[[Quantize], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    pipeline(lambda config, console: Result())
    assert front_door("gptq", ["--calib_data", "wikitext", *line.split()]) == 0
    err = capsys.readouterr().err
    if warning is None:
        assert err == ""
    else:
        assert re.fullmatch(r"warning: vLLM [^\n]+ serve it there\n", err)
        assert warning in err


# ---------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("method", METHODS)
def test_help_says_every_option_and_its_default(method: Method) -> None:
    config = QuantizeConfig(method=method, calibration=default_calibration(method, embedded=False))
    other = {"desc_act", "act_order_groups", "damping"} if method == "awq" else set()
    names = {f.name for f in dataclasses.fields(config)} - {"method", "calibration", "symmetric"} - other
    values = {"damp_percent" if name == "damping" else name: getattr(config, name) for name in names}
    values |= {"zero_point": not config.symmetric} if method == "awq" else {"sym": config.symmetric}
    calibration = config.calibration
    values |= {f"calib_{n}": getattr(calibration, n) for n in ("data", "samples", "seq_len", "column")}
    values |= {"seed": calibration.seed, "model_path": "the embedded model"}
    values["output_path"] = f"./quantized/<model name>-{method}-<bits>bit"
    assert help_defaults(method) == {name: options.shown(value) for name, value in values.items()}


@pytest.mark.parametrize("method", METHODS)
def test_help_is_quick_and_light(method: Method) -> None:
    script = str(SCRIPTS / f"{method}_quantize.py")
    times = []
    for _ in range(3):
        start = time.monotonic()
        done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=False)
        times.append(time.monotonic() - start)
        assert (done.returncode, done.stderr) == (0, "")
        assert "--group_size" in done.stdout
        if times[-1] < 0.5:
            break
    assert min(times) < 0.5
    code = (
        f"import sys; sys.path.insert(0, {str(SCRIPTS)!r}); import {method}_quantize as door\n"
        "try: door.main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'huggingface_hub', 'rich', 'pyarrow'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# ---------------------------------------------------------------------------------------- exit codes


class OutOfMemoryError(RuntimeError):
    """Look like torch's, which the command recognizes by its name."""


OutOfMemoryError.__module__ = "torch"


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (InputError("no config.json: give a model"), 2, "no config.json: give a model"),
        (WorkError("disk full:\nfree 3 GB"), 1, "disk full: free 3 GB"),
        (KeyboardInterrupt(), 130, "interrupted before the end"),
        (OutOfMemoryError("CUDA out of memory. Tried"), 1, "the GPU is out of memory: free it"),
        (MemoryError(), 1, "out of memory: lower --calib_samples"),
        (
            ModuleNotFoundError("No module named 'x'", name="x"),
            1,
            "the Python package 'x' is missing: start it by `uv run",
        ),
        (ZeroDivisionError("by\n\x1b[31mzero"), 1, "ZeroDivisionError: by ?[31mzero (run with LLM_QUANTIZE"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
@pytest.mark.parametrize("debug", [False, True])
def test_failures(
    error: BaseException,
    code: int,
    line: str,
    debug: bool,
    pipeline: Callable[[Quantize], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(config: QuantizeConfig, console: Console) -> Result:
        raise error

    pipeline(fail)
    os.environ["LLM_QUANTIZE_DEBUG"] = "1" if debug else "0"
    assert front_door("gptq", ["--calib_data", "wikitext"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert f"gptq_quantize.py: error: {line}" in err.splitlines()[-1]
    assert ("Traceback" in err) == debug
    if not debug:
        assert err.count("\n") == 1


def test_sigterm_is_an_interrupt(
    pipeline: Callable[[Quantize], None], capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(config: QuantizeConfig, console: Console) -> Result:
        with console.blocks(2):
            signal.raise_signal(signal.SIGTERM)
        pytest.fail("the signal was ignored")

    pipeline(stopped)
    before = signal.getsignal(signal.SIGTERM)
    assert front_door("awq", ["--calib_data", "wikitext"]) == 130
    assert signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err == "awq_quantize.py: error: interrupted before the end\n"


def test_a_good_run(pipeline: Callable[[Quantize], None], capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[QuantizeConfig] = []

    def quantize(config: QuantizeConfig, console: Console) -> Result:
        seen.append(config)
        console.note("fetching")
        return Result()

    pipeline(quantize)
    argv = ["--calib_data", "wikitext", "--model_path", "a/b"]
    assert front_door("awq", argv) == 0
    out, err = capsys.readouterr()
    assert seen == [cli.parse("awq", argv)]
    assert out.splitlines() == [
        "AWQ, 4 bits, awq",
        "  size  3 MB -> 1 MB",
        "sample: once upon a time",
        "serve: ./run_vllm.sh quantized/tiny-awq-4bit --quantization awq",
    ]
    assert err == "fetching\n"
    assert front_door("awq", [*argv, "--quiet"]) == 0
    assert capsys.readouterr() == ("quantized/tiny-awq-4bit\n", "")


# ------------------------------------------------------------------------------------------- console


def drawn(terminal: bool, *, quiet: bool = False) -> tuple[str, str]:
    """Return what two blocks with a warning between them, and a summary, print on stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    console = Console(quiet, stdout=out, stderr=err, terminal=terminal)
    with console.blocks(2) as blocks:
        assert blocks.left() == ""
        blocks.step("solve [bold]q_proj[/bold]")
        blocks.advance()
        assert blocks.left().endswith("left")
        console.warn("layer 0:\n\x07dead [red]channels[/red]")
        blocks.advance()
        assert blocks.left() == ""
    console.summary([("perplexity", "5.1 [x] -> 5.2"), ("kl", "0.03")], "GPTQ [4]")
    return out.getvalue(), err.getvalue()


def test_plain_lines_where_there_is_no_terminal() -> None:
    out, err = drawn(terminal=False)
    first, warning, last = err.splitlines()
    assert re.fullmatch(r"block 1/2 done after \d+ s, \d+ s left", first)
    assert warning == "warning: layer 0: ?dead [red]channels[/red]"
    assert re.fullmatch(r"block 2/2 done after \d+ s", last)
    assert out == "GPTQ [4]\n  perplexity  5.1 [x] -> 5.2\n  kl          0.03\n"


def test_a_bar_on_a_terminal() -> None:
    out, err = drawn(terminal=True)
    assert "\x1b[" in err
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", err)
    assert "2/2" in plain
    assert plain.count("warning: layer 0: ?dead [red]channels[/red]\n") == 1
    assert "5.1 [x] -> 5.2" in out
    assert "GPTQ [4]" in out


def test_quiet_keeps_warnings() -> None:
    assert drawn(terminal=True, quiet=True) == ("", "warning: layer 0: ?dead [red]channels[/red]\n")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("what", "line"),
    [
        (ValueError("two\n\tlines \x1b[31m"), "two lines ?[31m"),
        (KeyError(), "KeyError"),
        (ValueError("x" * 400), "x" * 299 + "…"),
        ("a\x00b\n" + "c" * 400, "a?b " + "c" * 400),
    ],
)
def test_one_line(what: object, line: str) -> None:
    assert one_line(what) == line


def test_time_left_does_not_count_what_another_run_did() -> None:
    with Console(stderr=io.StringIO()).blocks(3) as blocks:
        blocks.skip(1)
        assert blocks.left() == ""
        blocks.advance()
        assert blocks.left().endswith("left")
        assert blocks.done == 2


@pytest.mark.parametrize(
    ("version", "name"), [("2.6.0", "PYTORCH_CUDA_ALLOC_CONF"), ("2.15.0+cu132", "PYTORCH_ALLOC_CONF")]
)
@pytest.mark.parametrize("own", [None, *cli.ALLOCATOR])
def test_allocator_is_set_where_the_user_did_not(
    version: str, name: str, own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {} if own is None else {own: "mine"}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr("importlib.metadata.version", lambda _: version)
    with warnings.catch_warnings():
        cli.set_environment()
    settings = {key: value for key, value in environment.items() if key in cli.ALLOCATOR}
    if own is None:
        assert list(settings) == [name]
        assert "pinned_num_register_threads" in settings[name]
    else:
        assert settings == {own: "mine"}
