"""What the commands share: a parser whose errors are one line, and exit codes with one line for every exception."""

from __future__ import annotations

import argparse
import io
import os
import sys
from typing import NoReturn

from llm_quantize.errors import InputError, WorkError, one_line

DEBUG = "LLM_QUANTIZE_DEBUG"


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line: the usage in front would hide the line that matters."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {one_line(message)}", file=sys.stderr)
        raise SystemExit(2)


def show_any_character() -> None:
    """Let stdout and stderr escape what their encoding has no character for: a name of a file must not end a run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def debugging() -> bool:
    """Whether tracebacks are asked for."""
    return os.environ.get(DEBUG, "0") not in ("", "0")


def failure(error: BaseException, out_of_gpu_memory: str, out_of_memory: str, start: str) -> tuple[int, str]:
    """The exit code and the one line for an exception.

    out_of_gpu_memory, out_of_memory: the lines for those. start: the command to start the program by.
    """
    code, line = 1, f"{type(error).__name__}: {error} (run with {DEBUG}=1 for the traceback)"
    kind = type(error)
    if isinstance(error, InputError | WorkError):
        code, line = error.exit_code, str(error)
    elif isinstance(error, KeyboardInterrupt):
        code, line = 130, "interrupted before the end"
    # By name: torch need not be there to tell, and the class moved between modules.
    elif kind.__name__ == "OutOfMemoryError" and kind.__module__.startswith("torch"):
        line = out_of_gpu_memory
    elif isinstance(error, MemoryError):
        line = out_of_memory
    elif isinstance(error, ModuleNotFoundError):
        line = f"the Python package '{error.name}' is missing: start it by `{start}`"
    return code, "; ".join([line, *getattr(error, "__notes__", [])])
