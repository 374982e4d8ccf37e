"""What a run shows: progress and notes on stderr, the summary on stdout. Knows nothing of quantization.

Where stderr is no terminal there are plain lines instead, at most one a block, without control characters.
`rich` is imported where a terminal is drawn on, so that importing this module costs nothing.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TextIO

from llm_quantize.errors import one_line

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.progress import Progress, TaskID


def duration(seconds: float) -> str:
    """Seconds for people: `8 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Blocks:
    """Progress over `total` blocks. This class itself shows nothing: it serves quiet runs."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self._skipped = 0
        self._start = time.monotonic()

    def step(self, text: str) -> None:
        """Says what goes on inside the current block: `capture`, `solve q_proj`."""

    def advance(self) -> None:
        """The current block is finished."""
        self.done += 1

    def skip(self, blocks: int) -> None:
        """`blocks` were finished before this run began; they say nothing about the time left."""
        self.done += blocks
        self._skipped += blocks

    def elapsed(self) -> float:
        """Seconds since the first block began."""
        return time.monotonic() - self._start

    def left(self) -> str:
        """Time left by the mean of the finished blocks; empty before the first one and after the last."""
        here = self.done - self._skipped
        if not here or self.done >= self.total:
            return ""
        return f"{duration(self.elapsed() / here * (self.total - self.done))} left"


class _Lines(Blocks):
    def __init__(self, total: int, stream: TextIO) -> None:
        super().__init__(total)
        self._stream = stream

    def advance(self) -> None:
        super().advance()
        left = self.left()
        tail = f", {left}" if left else ""
        line = f"block {self.done}/{self.total} done after {duration(self.elapsed())}{tail}"
        print(line, file=self._stream, flush=True)


class _Bar(Blocks):
    def __init__(self, total: int, progress: Progress, task: TaskID) -> None:
        super().__init__(total)
        self._progress = progress
        self._task = task

    def step(self, text: str) -> None:
        self._progress.update(self._task, step=one_line(text), left=self.left())

    def skip(self, blocks: int) -> None:
        super().skip(blocks)
        self._progress.update(self._task, completed=self.done)

    def advance(self) -> None:
        super().advance()
        self._progress.update(self._task, completed=self.done, step="", left=self.left())


class Console:
    """Two streams and whether each is a terminal. `quiet` leaves warnings and errors only.

    `stdout`, `stderr`: other streams than the process's; `terminal`: instead of asking the streams.
    """

    def __init__(
        self,
        quiet: bool = False,
        *,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
        terminal: bool | None = None,
    ) -> None:
        self.quiet = quiet
        self._stdout = stdout or sys.stdout
        self._stderr = stderr or sys.stderr
        dumb = os.environ.get("TERM") in ("dumb", "unknown")
        self._terminal = terminal
        self._ask = not dumb
        self._bar: RichConsole | None = None  # while a bar is drawn, lines must go through its console

    def _is_terminal(self, stream: TextIO) -> bool:
        return self._terminal if self._terminal is not None else self._ask and stream.isatty()

    def warn(self, line: str) -> None:
        """A warning: one line on stderr, in quiet runs too."""
        self._say(f"warning: {one_line(line)}")

    def note(self, line: str) -> None:
        """One line on stderr that a reader may care for."""
        if not self.quiet:
            self._say(one_line(line))

    def error(self, line: str, prog: str) -> None:
        """The one line that ends a failed run, on stderr."""
        self._say(f"{prog}: error: {one_line(line)}")

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)
        else:
            print(line, file=self._stderr, flush=True)

    @contextmanager
    def blocks(self, total: int) -> Iterator[Blocks]:
        """Shows progress over `total` blocks with the time left, until the context ends."""
        if self.quiet:
            yield Blocks(total)
        elif not self._is_terminal(self._stderr):
            yield _Lines(total, self._stderr)
        else:
            with self._drawn(total) as bar:
                yield bar

    @contextmanager
    def _drawn(self, total: int) -> Iterator[Blocks]:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._bar = RichConsole(file=self._stderr, force_terminal=True)
        columns = (
            TextColumn("blocks"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[step]}", markup=False, style="dim"),
        )
        try:
            with Progress(*columns, console=self._bar) as progress:
                yield _Bar(total, progress, progress.add_task("", total=total, step="", left=""))
        finally:
            self._bar = None

    def summary(self, rows: list[tuple[str, str]], title: str) -> None:
        """The table at the end, on stdout; nothing where `quiet`."""
        if self.quiet:
            return
        if not self._is_terminal(self._stdout):
            width = max((len(name) for name, _ in rows), default=0)
            lines = [title, *(f"  {name:{width}}  {one_line(value)}" for name, value in rows)]
            print("\n".join(lines), file=self._stdout, flush=True)
            return
        from rich.console import Console as RichConsole
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(title), show_header=False)
        for name, value in rows:
            table.add_row(Text(name), Text(one_line(value)))
        RichConsole(file=self._stdout, force_terminal=True).print(table)

    def result(self, line: str) -> None:
        """One line on stdout, in quiet runs too."""
        print(one_line(line), file=self._stdout, flush=True)
