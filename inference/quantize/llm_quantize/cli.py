"""The command line of both scripts: arguments -> config -> pipeline -> summary and exit code.

Defaults come from `config.py`. Nothing heavy is imported before the arguments are known to be good.
Exit codes: 0 done, 2 bad usage or input, 1 failure in the work, 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.metadata
import logging
import math
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, get_args

from llm_quantize.backends import registry
from llm_quantize.config import (
    BITS,
    CALIB_SAMPLES,
    CALIB_SEQ_LEN,
    EMBEDDED_SAMPLES,
    EMBEDDED_SEQ_LEN,
    MIN_SEQ_LEN,
    ActOrderGroups,
    CalibrationConfig,
    LayoutChoice,
    Method,
    Quality,
    QuantizeConfig,
    default_calibration,
)
from llm_quantize.console import Console
from llm_quantize.errors import InputError, WorkError, one_line

DEBUG = "LLM_QUANTIZE_DEBUG"
OTHER: dict[Method, Method] = {"awq": "gptq", "gptq": "awq"}
TRUE, FALSE = ("true", "1", "yes"), ("false", "0", "no")
CALIBRATION = ("data", "samples", "seq_len", "column")  # as --calib_*; the seed is --seed


def prog(method: Method) -> str:
    """The script's name."""
    return f"{method}_quantize.py"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        # Without the usage in front: it is longer than a screen, and hides the line that matters.
        print(f"{self.prog}: error: {one_line(message)}", file=sys.stderr)
        raise SystemExit(2)


def _boolean(text: str) -> bool:
    if (lowered := text.lower()) in (*TRUE, *FALSE):
        return lowered in TRUE
    raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false: take true, false, 1, 0, yes or no")


def _integer(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number: give one, such as 128") from None


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if math.isfinite(value):
        return value
    raise argparse.ArgumentTypeError(f"'{text}' is no finite number: give one, such as 0.1")


def _default(name: str) -> Any:
    """The dataclass's default of an argument; the method's own where it differs by method is not here."""
    owner = QuantizeConfig.__dataclass_fields__
    if name == "format":
        return owner["layout"].default
    if name in owner:
        return owner[name].default
    return CalibrationConfig.__dataclass_fields__[name.removeprefix("calib_")].default


def shown(value: object) -> str:
    """A default as help and documentation write it."""
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def build_parser(method: Method) -> argparse.ArgumentParser:
    """The parser of one script. An argument left out is absent from the result; the config has it."""
    name = method.upper()
    parser = _Parser(
        prog=prog(method),
        usage="%(prog)s [--model_path MODEL] [--output_path DIR] [options]",
        description=f"Quantize a Hugging Face causal LM with {name}. Without arguments: the embedded model.",
        epilog="Dashes do for underscores. Booleans: true/false/1/0/yes/no, and alone they mean true. "
        "Exit codes: 0 done, 2 bad usage or input, 1 failure in the work, 130 interrupted.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=110),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )

    class Group:
        def __init__(self, title: str) -> None:
            self.group = parser.add_argument_group(title)

        def add(self, flag: str, text: str, *, default: str | None = None, **kwargs: Any) -> None:
            value = _default(flag) if default is None else default
            said = f"{text} (default: {shown(value)})".replace("%", "%%")
            if kwargs.get("type") is _boolean:
                kwargs |= {"nargs": "?", "const": True, "metavar": "BOOL"}
            self.group.add_argument(f"--{flag}", help=said, **kwargs)

    files = Group("model and files")
    files.add(
        "model_path",
        "model to quantize: a local directory or a hub id, repo[@revision]",
        default="the embedded model",
        metavar="MODEL",
    )
    files.add(
        "output_path",
        "directory for the checkpoint; appears complete or not at all",
        default=f"./quantized/<model name>-{method}-<bits>bit",
        metavar="DIR",
    )
    files.add("overwrite", "replace an existing output directory, at the end of a good run", type=_boolean)
    files.add(
        "restart",
        "begin anew where an interrupted run to the same directory is kept; without it the same command goes on "
        "where that run was",
        type=_boolean,
    )
    files.add(
        "no_resume",
        "keep nothing of a run that is interrupted, and begin anew",
        type=_boolean,
    )
    files.add(
        "trust_remote_code",
        "run Python code that comes with the model; only for authors you trust",
        type=_boolean,
    )
    files.add(
        "allow_pickle",
        "read pickled weights (.bin, .pt) where there are no safetensors; a crafted pickle can run any "
        "code on this machine: only for authors you trust",
        type=_boolean,
    )

    grid = Group("quantization")
    grid.add(
        "bits",
        "bits per weight: 4 for size, 8 for nearly no loss" + ("; 2 and 3 lose much" * (method == "gptq")),
        type=_integer,
        metavar="|".join(map(str, BITS[method])),
    )
    grid.add(
        "group_size",
        "input channels that share a scale: a multiple of 32, or -1 for the whole row; smaller is more "
        "accurate and larger on disk",
        type=_integer,
        metavar="N",
    )
    if method == "awq":
        grid.add(
            "zero_point",
            "asymmetric groups with zero points, more accurate; false for a symmetric grid",
            type=_boolean,
        )
    else:
        grid.add(
            "desc_act",
            "quantize channels by falling activation, more accurate; false for plain channel order",
            type=_boolean,
        )
        grid.add(
            "act_order_groups",
            "static keeps groups where they are, at no cost when served; dynamic lets them follow the order "
            "(g_idx), for ExLlamaV2 and older servers: vLLM refuses it",
            choices=get_args(ActOrderGroups),
        )
        grid.add(
            "damp_percent",
            "damping as a fraction (0 to 1) of the second moment's mean diagonal; raise it for a layer that "
            "cannot be solved",
            type=_number,
            metavar="X",
        )
        grid.add(
            "sym",
            "symmetric grid, which GPTQ kernels read; false is more accurate, and written as "
            "compressed-tensors",
            type=_boolean,
        )
    grid.add(
        "format",
        "file layout; auto takes the one that vLLM serves for these settings, another one forces it for "
        "another reader (gptq by name: with a tied output head's copy, which AutoGPTQ needs)",
        choices=get_args(LayoutChoice),
    )
    grid.add(
        "quality",
        "how much search to spend: fast for a trial, best where time does not matter; best also runs the "
        "unquantized model beside the quantized one, and every layer aims at its outputs, and at 2 and 3 bits "
        "tunes whole blocks by gradient; default aims so at 2 and 3 bits, on a share of the text",
        choices=get_args(Quality),
    )
    grid.add(
        "backend",
        "what does the work: native, this program; else a library of that name, in an environment of its own",
        choices=registry.choices(method),
    )

    text = Group("calibration")
    text.add(
        "calib_data",
        "text to calibrate on: wikitext, c4, pileval, a hub id repo[:config[:split[:column]]], a local .txt "
        ".jsonl .json .csv (.gz too) or .parquet, or a saved dataset; take text like that of your use",
        default=f"{_default('calib_data')}; its own text with the embedded model",
        metavar="DATA",
    )
    text.add(
        "calib_samples",
        "windows of text; more for accuracy, fewer for speed",
        default=f"{CALIB_SAMPLES[method]}; {EMBEDDED_SAMPLES} with the embedded model",
        type=_integer,
        metavar="N",
    )
    text.add(
        "calib_seq_len",
        f"tokens a window, {MIN_SEQ_LEN} or more; lower it if memory is short",
        default=f"{CALIB_SEQ_LEN[method]}; {EMBEDDED_SEQ_LEN} with the embedded model",
        type=_integer,
        metavar="N",
    )
    text.add("calib_column", "column that holds the text where it is not found by itself", metavar="NAME")
    text.add("seed", "draws the windows; the same seed gives the same ones", type=_integer, metavar="N")

    check = Group("measuring the result")
    check.add(
        "eval_data",
        "held-out text for perplexity and KL divergence: auto takes the text that ships with this "
        "program, off measures nothing, else as --calib_data",
        metavar="DATA",
    )
    check.add("eval_samples", "windows to measure on; more for steadier numbers", type=_integer, metavar="N")
    check.add(
        "max_kl",
        "fail, and publish nothing, above this KL divergence (nats per token)",
        type=_number,
        metavar="X",
    )
    check.add(
        "max_ppl_increase",
        "fail, and publish nothing, where perplexity grows by more than so many per cent",
        type=_number,
        metavar="X",
    )

    machine = Group("running")
    machine.add("device", "auto, cpu, cuda or cuda:N; auto takes a GPU where there is one", metavar="DEVICE")
    machine.add(
        "max_memory",
        "device memory to stay under, in GiB, where others use the GPU too",
        type=_number,
        metavar="GIB",
    )
    machine.add("quiet", "print warnings and the output directory alone, for use in scripts", type=_boolean)
    machine.group.add_argument("-h", "--help", action="help", help="show this help and exit")
    return parser


def _underscored(argv: Sequence[str]) -> list[str]:
    """`--model-path=a-b` -> `--model_path=a-b`: dashes in an option's name are underscores."""
    result = []
    for word in argv:
        name, equals, value = word.partition("=")
        if name.startswith("--") and len(name) > 2:
            name = "--" + name[2:].replace("-", "_")
        result.append(name + equals + value)
    return result


def _unknown(method: Method, parser: argparse.ArgumentParser, words: list[str]) -> str:
    word = words[0].partition("=")[0]
    if not word.startswith("-") or word == "--":
        return f"unexpected '{words[0]}': every value follows its option, such as --model_path {words[0]}"
    if word in build_parser(OTHER[method])._option_string_actions:
        return f"unknown option {word}: it is one of {prog(OTHER[method])}'s; leave it out"
    near = difflib.get_close_matches(word, parser._option_string_actions, 1)
    return f"unknown option {word}: " + (
        f"did you mean {near[0]}?" if near else "see --help for those there are"
    )


def parse(method: Method, argv: Sequence[str]) -> QuantizeConfig:
    """The config that the arguments ask for. Wrong ones: one line on stderr and SystemExit(2)."""
    parser = build_parser(method)
    namespace, unknown = parser.parse_known_args(_underscored(argv))
    if unknown:
        parser.error(_unknown(method, parser, unknown))
    given: dict[str, Any] = vars(namespace)
    if "format" in given:
        given["layout"] = given.pop("format")
    calibration = default_calibration(method, embedded="model_path" not in given)
    chosen = {key: given.pop(f"calib_{key}") for key in CALIBRATION if f"calib_{key}" in given}
    if "seed" in given:
        chosen["seed"] = given.pop("seed")
    values = {key: getattr(calibration, key) for key in CalibrationConfig.__dataclass_fields__} | chosen
    try:
        return QuantizeConfig(method=method, calibration=CalibrationConfig(**values), **given)
    except InputError as error:
        parser.error(str(error))


# Where torch's allocators take their settings from: by its age.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def _set_environment() -> None:
    """Before the heavy imports: no banners, advice or bars of theirs, settings; what the user set stays."""
    for name, value in {
        "TOKENIZERS_PARALLELISM": "true",  # nothing forks after this
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "DATASETS_VERBOSITY": "error",
        "HF_HUB_VERBOSITY": "error",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)
    if not {*ALLOCATOR} & set(os.environ):
        # Host memory is then pinned by several threads, not one: for the states of a long calibration that is seconds.
        major, minor, *_ = importlib.metadata.version("torch").split(".")
        name = ALLOCATOR[(int(major), int(minor)) < (2, 9)]
        os.environ[name] = "pinned_use_cuda_host_register:True,pinned_num_register_threads:8"
    if DEBUG not in os.environ:
        warnings.simplefilter("ignore")
        for name in ("torch", "transformers", "datasets", "huggingface_hub", "httpx", "compressed_tensors"):
            logging.getLogger(name).setLevel(logging.ERROR)


def _interrupt(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does, so that what it wrote aside is removed or kept to resume."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _failure(error: BaseException, method: Method) -> tuple[int, str]:
    """Exit code and the one line for an exception."""
    code, line = _told(error, method)
    return code, "; ".join([line, *getattr(error, "__notes__", [])])


def _told(error: BaseException, method: Method) -> tuple[int, str]:
    if isinstance(error, InputError | WorkError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted before the end"
    kind = type(error)
    # By name: torch need not be there to tell, and the class moved between modules.
    if kind.__name__ == "OutOfMemoryError" and kind.__module__.startswith("torch"):
        return 1, "the GPU is out of memory: free it, or lower --calib_seq_len or --calib_samples"
    if isinstance(error, MemoryError):
        return 1, "out of memory: lower --calib_samples or --calib_seq_len"
    if isinstance(error, ModuleNotFoundError):
        command = f"uv run python inference/quantize/{prog(method)}"
        return 1, f"the Python package '{error.name}' is missing: start it by `{command}`"
    return 1, f"{kind.__name__}: {error} (run with {DEBUG}=1 for the traceback)"


def run(method: Method, argv: Sequence[str]) -> int:
    """The whole command. Returns the exit code; only --help and wrong arguments leave by SystemExit."""
    config = parse(method, argv)
    console = Console(config.quiet)
    # The caller's warning filters are put back: `_set_environment` is for the run alone.
    with warnings.catch_warnings():
        try:
            with _terminable():
                _work(config, console)
        except (Exception, KeyboardInterrupt) as error:
            if os.environ.get(DEBUG, "0") not in ("", "0"):
                traceback.print_exc()
            code, line = _failure(error, method)
            console.error(line, prog(method))
            return code
    return 0


def _work(config: QuantizeConfig, console: Console) -> None:
    # Imports nothing heavy, so that a wrong path is told at once.
    from llm_quantize.calibration.windows import check_source
    from llm_quantize.io.atomic_directory import check_before_work
    from llm_quantize.io.hub import local_model

    check_source(config.calibration)
    if config.model_path is not None:
        local_model(config.model_path)
    check_before_work(config.target, config.may_replace)
    if config.not_served is not None:
        console.warn(config.not_served)
    _set_environment()
    from llm_quantize import pipeline

    result = pipeline.quantize(config, console)
    if config.quiet:
        console.result(str(result.output))
        return
    console.summary(result.rows, f"{result.method.upper()}, {result.bits} bits, {result.layout}")
    if result.sample is not None:
        console.result(f"sample: {result.sample}")
    console.result(f"serve: {result.serve_line}")
