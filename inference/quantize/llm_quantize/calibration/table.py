"""Represent opened text as a table, whatever source it comes from. This module knows nothing of tokens or files."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llm_quantize.calibration.text_use import CALIBRATION, TextUse
from llm_quantize.errors import InputError

COLUMNS = ("text", "messages", "conversations", "content")  # names that hold text, by preference
TOOLS = "tools"  # the column that holds the tools of conversations
MANY = 1 << 18  # rows, of which more must not be short: rows cost time, whatever they hold
HEAD = 256  # rows by which a table is judged before it is read


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text that are opened but not read.

    where: the name of the source, for messages.
    columns: the names of the columns.
    rows: `rows(columns)` yields the values of some columns in order, a tuple for each row. It may be called again.
    streamed: reading costs network traffic, so the caller stops when it has enough. The rows are joined to articles
    already.
    single: the rows are consecutive parts of one document.
    """

    where: str
    columns: tuple[str, ...]
    rows: Callable[[Sequence[str]], Iterator[tuple[Any, ...]]]
    streamed: bool = False
    single: bool = False

    def read(self, column: str) -> Iterator[Any]:
        """Yield the values of a column in order."""
        return (value for (value,) in self.rows([column]))

    def documents(self, column: str) -> Iterator[Any]:
        """Yield the values of `column`, one for each document (or part of it, where `single`).

        Where there is a column of tools, conversations come with their row's: as `WithTools`.
        """
        if TOOLS in self.columns and column != TOOLS:
            return (
                value if not tools or not value else WithTools(value, tools)
                for value, tools in self.rows([column, TOOLS])
            )
        values = self.read(column)
        return values if self.single or self.streamed else articles(values)

    def column(
        self, asked: str | None, use: TextUse = CALIBRATION, log: Callable[[str], None] = lambda _: None
    ) -> str:
        """Choose the column to read: `asked`, else one of `COLUMNS`, else the only column.

        Of several names in `COLUMNS` it is the first that is filled in at least half as many of the first `HEAD` rows
        as any other.

        log: is called with a warning where another of `COLUMNS` is filled in rows in which the chosen one is not.

        Raises InputError: there is no column `asked`, or none to choose; two columns have that name; the rows are
        single messages.
        """
        has = f"{self.where} has {', '.join(self.columns) or 'none'}"
        if asked is None:
            found = self._usual(use, log)
            if found is None:
                raise InputError(f"no column 'text': {has}: choose with {use.flags}column")
        elif asked in self.columns:
            found = asked
        else:
            raise InputError(f"no column '{asked}': {has}: choose with {use.flags}column")
        if self.columns.count(found) > 1:
            raise InputError(
                f"{self.where} has {self.columns.count(found)} columns '{found}': rename all but one"
            )
        return found

    def _usual(self, use: TextUse, log: Callable[[str], None]) -> str | None:
        usual = [name for name in COLUMNS if name in self.columns]
        if usual == ["content"] and "role" in self.columns:
            raise InputError(
                f"{self.where} holds single messages (role, content): give a conversation a row, or choose a column "
                f"with {use.flags}column"
            )
        if len(usual) < 2 or any(self.columns.count(name) > 1 for name in usual):
            return usual[0] if usual else self.columns[0] if len(self.columns) == 1 else None
        head = [tuple(map(_is_filled, row)) for row in itertools.islice(self.rows(usual), HEAD)]
        counts = [sum(row[i] for row in head) for i in range(len(usual))]
        at = next(i for i in range(len(usual)) if counts[i] * 2 >= max(counts))
        for i, name in enumerate(usual):
            if lost := sum(row[i] and not row[at] for row in head):
                log(
                    f"{use.noun}: {self.where}: {lost} of the first {len(head)} rows have their text in column "
                    f"{name}, not {usual[at]}, and are left out: choose with {use.flags}column"
                )
        return usual[at]


@dataclass(frozen=True, slots=True)
class WithTools:
    """A value of a row that has tools. Both are as the source holds them."""

    value: Any
    tools: Any


def _is_filled(value: Any) -> bool:
    return bool(value.strip() if isinstance(value, str) else value)


def articles(values: Iterable[Any]) -> Iterator[Any]:
    """Join rows that are lines of articles, as in wikitext, so that each article is one document.

    Such rows are recognized by a title line, ` = Title = `, among the first 256. Other rows are yielded unchanged.
    """
    rows = iter(values)
    head = list(itertools.islice(rows, 256))
    if not any(isinstance(row, str) and _TITLE.fullmatch(row) for row in head):
        yield from itertools.chain(head, rows)
        return
    lines: list[str] = []
    for row in itertools.chain(head, rows):
        if not isinstance(row, str | None):
            yield row  # no text: the caller refuses it
            continue
        if _TITLE.fullmatch(row or "") and lines:
            yield "\n".join(lines)
            lines = []
        lines.append((row or "").removesuffix("\n"))
    yield "\n".join(lines)


_TITLE = re.compile(r" ?= (?!=).*(?<!=) = ?\n?")
