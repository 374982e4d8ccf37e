"""Run commands and kill them: a process that has imported everything forks one child for each command.

Each line on stdin is a JSON object. `words`: the arguments, the first one `awq` or `gptq`. `call`: the number of the
file-system call at which the child kills itself with SIGKILL (a write is cut in half before); or `seconds`, after which
it is killed; or neither. The answer is a JSON object: `status` (exit code, or minus the signal), `calls` (names of the
calls that were made), `seconds`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

os.environ["OMP_NUM_THREADS"] = (
    "1"  # a child of a process with threads could wait for a lock that nobody holds
)
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "inference" / "quantize"))

CALLS = ("pwrite", "write", "fsync", "ftruncate", "rename", "replace", "mkdir", "unlink", "rmdir", "sendfile")


def _watch(call: int | None, log: int) -> None:
    """Count the calls of `CALLS`, write each to `log`, and die at number `call`."""
    count = [0]
    lock = threading.Lock()
    write_log = os.write

    def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with lock:
                number = count[0]
                count[0] += 1
                if number == call:
                    if name in ("pwrite", "write"):
                        real(args[0], bytes(args[1])[: len(args[1]) // 2], *args[2:])
                    os.kill(os.getpid(), signal.SIGKILL)
                write_log(log, f"{name} {_what(args)}\n".encode())
            return real(*args, **kwargs)

        return run

    for name in CALLS:
        setattr(os, name, watched(name, getattr(os, name)))


def _what(args: tuple[Any, ...]) -> str:
    """Return the file's name, from a path or an open descriptor."""
    if isinstance(args[0], int):
        return Path(f"/proc/self/fd/{args[0]}").readlink().name
    return Path(os.fspath(args[0])).name


def _child(words: list[str], call: int | None, log: int, output: Path) -> NoReturn:
    code = 70
    try:
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        from llm_quantize.cli import run

        _watch(call, log)
        method = words[0]
        assert method in ("awq", "gptq")
        code = run("awq" if method == "awq" else "gptq", words[1:])
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve() -> None:
    from llm_quantize import pipeline  # noqa: F401 (everything heavy, once)

    output = Path(sys.argv[1])
    for line in sys.stdin:
        job = json.loads(line)
        readable, log = os.pipe()
        os.set_inheritable(log, False)
        start = time.monotonic()
        child = os.fork()
        if child == 0:
            os.close(readable)
            _child(job["words"], job.get("call"), log, output)
        os.close(log)
        if "seconds" in job:
            threading.Timer(job["seconds"], _kill, (child,)).start()
        with os.fdopen(readable) as calls_made:
            calls = calls_made.read().splitlines()
        _, status = os.waitpid(child, 0)
        answer = {
            "status": os.waitstatus_to_exitcode(status),
            "calls": calls,
            "seconds": time.monotonic() - start,
        }
        print(json.dumps(answer), flush=True)


def _kill(child: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    _serve()
