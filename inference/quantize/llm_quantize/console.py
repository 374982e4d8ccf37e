"""Show progress and notes on stderr, and the summary on stdout. This module knows nothing of quantization.

Where stderr is not a terminal, progress is plain lines, at most one per block, without control characters. `rich` is
imported only to draw on a terminal, so that importing this module is fast.
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
    """Format seconds for people: `8 s`, `3 min 05 s`, `2 h 10 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class Blocks:
    """Count finished blocks of `total`. This class shows nothing, for quiet runs; its subclasses do."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self._skipped = 0
        self._start = time.monotonic()

    def step(self, text: str) -> None:
        """Show the current step inside the block: `capture`, `solve q_proj`."""

    def advance(self) -> None:
        """Count the current block as finished."""
        self.done += 1

    def skip(self, blocks: int) -> None:
        """Count `blocks` as finished before this run; they are left out of the estimate of the time left."""
        self.done += blocks
        self._skipped += blocks

    def elapsed(self) -> float:
        """Return the seconds since the first block began."""
        return time.monotonic() - self._start

    def left(self) -> str:
        """Estimate the time left from the mean of the finished blocks, as `3 min 05 s left`.

        Returns "" before the first block and after the last one.
        """
        finished = self.done - self._skipped
        if not finished or self.done >= self.total:
            return ""
        return f"{duration(self.elapsed() / finished * (self.total - self.done))} left"


class _Lines(Blocks):
    """Print a line for each finished block."""

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
    """Draw a progress bar."""

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
    """Write a run's messages to two streams, as suits a terminal or a file.

    quiet: show only warnings, errors and results.
    stdout, stderr: streams in place of the process's own.
    terminal: whether the streams are terminals; None: ask them.
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
        self._terminal = terminal
        self._can_draw = os.environ.get("TERM") not in ("dumb", "unknown")
        self._bar: RichConsole | None = None  # while a bar is drawn, lines must go through its console

    def _is_terminal(self, stream: TextIO) -> bool:
        return self._terminal if self._terminal is not None else self._can_draw and stream.isatty()

    def warn(self, line: str) -> None:
        """Write a warning, one line, to stderr; in quiet runs, too."""
        self._say(f"warning: {one_line(line)}")

    def note(self, line: str) -> None:
        """Write a note, one line, to stderr, except in quiet runs."""
        if not self.quiet:
            self._say(one_line(line))

    def error(self, line: str, prog: str) -> None:
        """Write the line that ends a failed run to stderr. prog: the name of the command."""
        self._say(f"{prog}: error: {one_line(line)}")

    def _say(self, line: str) -> None:
        if self._bar is not None:
            self._bar.print(line, markup=False, highlight=False, emoji=False, soft_wrap=True)
        else:
            print(line, file=self._stderr, flush=True)

    @contextmanager
    def blocks(self, total: int) -> Iterator[Blocks]:
        """Show progress over `total` blocks, with the time left, until the context ends."""
        if self.quiet:
            yield Blocks(total)
        elif not self._is_terminal(self._stderr):
            yield _Lines(total, self._stderr)
        else:
            with self._progress_bar(total) as bar:
                yield bar

    @contextmanager
    def _progress_bar(self, total: int) -> Iterator[Blocks]:
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
        """Write the final table to stdout, except in quiet runs. rows: names and values."""
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
        """Write one line to stdout; in quiet runs, too."""
        print(one_line(line), file=self._stdout, flush=True)
