"""The command line of both scripts: arguments -> config -> pipeline -> summary and exit code.

Options and defaults come from the fields of `QuantizeConfig` and `CalibrationConfig`. Nothing heavy is imported before
the arguments are known to be good. Exit codes: 0 done, 2 bad usage or input, 1 failure in the work, 130 interrupted.
"""

from __future__ import annotations

import argparse
import difflib
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
from dataclasses import Field, replace
from types import FrameType
from typing import Any, NoReturn

from llm_quantize import options
from llm_quantize.calibration.windows import CalibrationConfig
from llm_quantize.command_line import DEBUG, OneLineParser, debugging, failure, show_any_character
from llm_quantize.config import QuantizeConfig, default_calibration
from llm_quantize.console import Console
from llm_quantize.errors import InputError
from llm_quantize.options import Option, for_method
from llm_quantize.types import METHODS, Method
from llm_quantize.validation import check_places, validate

OTHER: dict[Method, Method] = {"awq": "gptq", "gptq": "awq"}
TRUE, FALSE = ("true", "1", "yes"), ("false", "0", "no")


def prog(method: Method) -> str:
    """The script's name."""
    return f"{method}_quantize.py"


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


_READ: dict[str, Any] = {"text": str, "integer": _integer, "number": _number, "boolean": _boolean}


def command_options(method: Method) -> list[tuple[type, Field[Any], Option]]:
    """All options of a script in the order of its help: the config's class, its field, the option."""
    found = [(QuantizeConfig, *each) for each in options.options_of(QuantizeConfig, method)]
    text = [(CalibrationConfig, *each) for each in options.options_of(CalibrationConfig, method)]
    at = next(i for i, (_, field, _) in enumerate(found) if field.name == "eval_data")
    return [*found[:at], *text, *found[at:]]


def flag_of(field: Field[Any], option: Option) -> str:
    """The option's name without dashes."""
    return option.flag or field.name


def default_of(method: Method, field: Field[Any], option: Option) -> str:
    """The option's default, as help says it."""
    said = for_method(option.default, method)
    if option.flag in ("calib_samples", "calib_seq_len"):  # the method's own, and the embedded model's
        own, embedded = (
            getattr(default_calibration(method, embedded=each), field.name) for each in (False, True)
        )
        return f"{own}; {embedded} with the embedded model"
    return options.shown(field.default) if said is None else str(said)


def build_parser(method: Method) -> argparse.ArgumentParser:
    """The parser of one script. An argument left out is absent from the result; the config has it."""
    parser = OneLineParser(
        prog=prog(method),
        usage="%(prog)s [--model_path MODEL] [--output_path DIR] [options]",
        description=f"Quantize a Hugging Face causal LM with {METHODS[method]}. Without arguments: the embedded model.",
        epilog="Dashes do for underscores. Booleans: true/false/1/0/yes/no, and alone they mean true. "
        "Exit codes: 0 done, 2 bad usage or input, 1 failure in the work, 130 interrupted.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=28, width=110),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        add_help=False,
    )
    groups: dict[str, Any] = {}
    for _, field, option in command_options(method):
        group = groups.setdefault(option.group, None) or parser.add_argument_group(option.group)
        groups[option.group] = group
        text = f"{for_method(option.help, method)} (default: {default_of(method, field, option)})"
        more: dict[str, Any] = {"type": _READ[option.kind]}
        if option.kind == "boolean":
            more |= {"nargs": "?", "const": True, "metavar": "BOOL"}
        elif option.choices is not None:
            more["choices"] = for_method(option.choices, method)
        else:
            more["metavar"] = for_method(option.metavar, method)
        group.add_argument(f"--{flag_of(field, option)}", help=text.replace("%", "%%"), **more)
    group.add_argument("-h", "--help", action="help", help="show this help and exit")
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


def _unknown(method: Method, words: list[str]) -> str:
    """What is said of arguments that the parser did not take."""
    word = words[0].partition("=")[0]
    if not word.startswith("-") or word == "--":
        return f"unexpected '{words[0]}': every value follows its option, such as --model_path {words[0]}"
    own, others = (
        [f"--{flag_of(field, option)}" for _, field, option in command_options(each)]
        for each in (method, OTHER[method])
    )
    if word in others:
        return f"unknown option {word}: it is one of {prog(OTHER[method])}'s; leave it out"
    near = difflib.get_close_matches(word, [*own, "--help"], 1)
    return f"unknown option {word}: " + (
        f"did you mean {near[0]}?" if near else "see --help for those there are"
    )


def parse(method: Method, argv: Sequence[str]) -> QuantizeConfig:
    """The config that the arguments ask for, validated. Wrong ones: one line on stderr and SystemExit(2)."""
    parser = build_parser(method)
    namespace, unknown = parser.parse_known_args(_underscored(argv))
    if unknown:
        parser.error(_unknown(method, unknown))
    given = vars(namespace)
    values: dict[type, dict[str, Any]] = {QuantizeConfig: {}, CalibrationConfig: {}}
    for owner, field, option in command_options(method):
        flag = flag_of(field, option)
        if flag in given:
            values[owner][field.name] = not given[flag] if option.inverted else given[flag]
    calibration = default_calibration(method, embedded="model_path" not in given)
    try:
        config = QuantizeConfig(
            method=method,
            calibration=replace(calibration, **values[CalibrationConfig]),
            **values[QuantizeConfig],
        )
        validate(config)
    except InputError as error:
        parser.error(str(error))
    return config


# Where torch's allocators take their settings from: by its age.
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def set_environment() -> None:
    """Set up what the heavy imports read: no banners, advice or bars of theirs; what the user set stays."""
    for name, value in {
        "TOKENIZERS_PARALLELISM": "true",  # nothing forks after this
        "TRANSFORMERS_VERBOSITY": "critical",  # what it logs as an error it also raises, if it matters
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "DATASETS_VERBOSITY": "error",
        "HF_HUB_VERBOSITY": "error",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }.items():
        os.environ.setdefault(name, value)
    if not {*ALLOCATOR} & set(os.environ):
        import importlib.metadata  # takes as long as all of the package

        # Host memory is then pinned by several threads, not one: for the states of a long calibration that is seconds.
        major, minor, *_ = importlib.metadata.version("torch").split(".")
        name = ALLOCATOR[(int(major), int(minor)) < (2, 9)]
        os.environ[name] = "pinned_use_cuda_host_register:True,pinned_num_register_threads:8"
    if DEBUG not in os.environ:
        warnings.simplefilter("ignore")
        logging.getLogger("transformers").setLevel(logging.CRITICAL)
        for name in ("torch", "datasets", "huggingface_hub", "httpx", "compressed_tensors", "matplotlib"):
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


def run(method: Method, argv: Sequence[str]) -> int:
    """The whole command. Returns the exit code; only --help and wrong arguments leave by SystemExit."""
    show_any_character()
    config = parse(method, argv)
    console = Console(config.quiet)
    # The caller's warning filters are put back: `set_environment` is for the run alone.
    with warnings.catch_warnings():
        try:
            with _terminable():
                _work(config, console)
        except (Exception, KeyboardInterrupt) as error:
            if debugging():
                traceback.print_exc()
            code, line = failure(
                error,
                "the GPU is out of memory: free it, or lower --calib_seq_len or --calib_samples",
                "out of memory: lower --calib_samples or --calib_seq_len",
                f"uv run python inference/quantize/{prog(method)}",
            )
            console.error(line, prog(method))
            return code
    return 0


def _work(config: QuantizeConfig, console: Console) -> None:
    check_places(config)
    if config.vllm_refusal is not None:
        console.warn(config.vllm_refusal)
    set_environment()
    from llm_quantize import pipeline

    result = pipeline.quantize(config, console)
    if config.quiet:
        console.result(str(result.output))
        return
    console.summary(result.rows, f"{METHODS[result.method]}, {result.bits} bits, {result.format}")
    if result.sample is not None:
        console.result(f"sample: {result.sample}")
    console.result(f"serve: {result.serve_line}")


def awq() -> int:
    """The command `awq-quantize`."""
    return run("awq", sys.argv[1:])


def gptq() -> int:
    """The command `gptq-quantize`."""
    return run("gptq", sys.argv[1:])
