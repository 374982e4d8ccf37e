"""The child's half of a backend: what every library's script shares. Standard library only at import.

The parent (`backend.py`) starts a script in the library's own environment and talks to it in lines. The child's
standard output carries one JSON object a line, and nothing else: whatever the library prints goes to standard
error, which is the log. The child says `ready` with versions as soon as the library is imported, then waits for one
line on standard input, the path of the job. It ends with `done` or `failed`. Where the parent goes away, so does
the child: its standard input closes.

Runs in environments from Python 3.11 on; imports nothing of the project.
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """What the parent asks for; the fields are those of the JSON file.

    `windows`: a safetensors file whose `tokens` are int64 (n, length). `dtype`: of the weights to load.
    `act_order`: `none`, `static` (groups stay where they are) or `dynamic` (groups follow the order).
    """

    model: str
    output: str
    windows: str
    method: str
    bits: int
    group_size: int
    symmetric: bool
    act_order: str
    damping: float
    dtype: str
    blocks: int
    device: str
    trust_remote_code: bool = False

    def tokens(self) -> list[list[int]]:
        """The windows as lists of token ids."""
        from safetensors.torch import load_file

        found: list[list[int]] = load_file(self.windows)["tokens"].tolist()
        return found

    def torch_dtype(self) -> Any:
        """`dtype` as torch has it."""
        import torch

        return getattr(torch, self.dtype)


class Refused(Exception):
    """What the library cannot do with this job: one line."""


@dataclass
class Channel:
    """Says things to the parent, one line each; keeps the time of the stages."""

    _out: Any
    seconds: dict[str, float] = field(default_factory=dict)
    _done: int = 0
    _total: int = 0

    def say(self, event: str, **values: Any) -> None:
        """One event."""
        self._out.write(json.dumps({"event": event, **values}) + "\n")
        self._out.flush()

    def step(self, text: str) -> None:
        """What goes on inside the current block."""
        self.say("step", text=text)

    def block(self, done: int, total: int) -> None:
        """So many blocks are finished."""
        if done > self._done:
            self._done = done
            self.say("block", done=done, total=total)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times a stage, device work included, and says its name."""
        import torch

        self.step(name)
        start = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def follow_log(self, logger: str, pattern: str) -> None:
        """Blocks from a library's own log: group 1 of `pattern` is the block just begun, from 1; 2 of how many."""
        channel, expression = self, re.compile(pattern)

        class Follow(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                if found := expression.search(record.getMessage()):
                    channel.block(int(found[1]) - 1, int(found[2]))

        logging.getLogger(logger).addHandler(Follow())
        logging.getLogger(logger).setLevel(logging.INFO)

    def follow_bar(self, module: Any) -> None:
        """Blocks from a library's own loop over a bar: `module.tqdm` is replaced by one that counts."""

        def counted(items: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
            total = len(items)
            for index, item in enumerate(items):
                yield item
                self.block(index + 1, total)

        module.tqdm = counted


def run(
    distributions: tuple[str, ...], load: Callable[[], None], quantize: Callable[[Job, Channel], None]
) -> int:
    """The script's life. `distributions`: whose versions are told; `load` imports the library.

    `quantize` writes the library's own checkpoint into `job.output`. Returns the exit code.
    """
    channel = Channel(os.fdopen(os.dup(1), "w", encoding="utf-8"))
    os.dup2(2, 1)  # from here on, what is printed is the log's
    warnings.simplefilter("ignore")
    try:
        load()
        channel.say("ready", versions={name: version(name) for name in distributions})
        line = sys.stdin.readline()
        if not line:
            return 1
        threading.Thread(target=_leave_with_parent, daemon=True).start()
        quantize(Job(**json.loads(Path(line.strip()).read_text(encoding="utf-8"))), channel)
        channel.say("done", seconds=channel.seconds, **_memory())
        return 0
    except BaseException as error:
        traceback.print_exc()
        kind = "refused" if isinstance(error, Refused) else "failed"
        channel.say(kind, error=type(error).__name__, text=" ".join(str(error).split())[:400])
        return 1


def _leave_with_parent() -> None:
    while sys.stdin.readline():
        pass
    os._exit(1)


def _memory() -> dict[str, int]:
    """Bytes at most: of the device, by PyTorch's allocator, and of this process in host memory."""
    import torch

    device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"device_bytes": device, "host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
