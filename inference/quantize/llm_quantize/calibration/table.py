"""Represent opened text as a table, whatever source it comes from. This module knows nothing of tokens or files."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from llm_quantize.calibration.text_use import CALIBRATION, TextUse
from llm_quantize.errors import InputError

COLUMNS = ("text", "messages", "conversations", "content")  # names that hold text, by preference


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text that are opened but not read.

    where: the name of the source, for messages.
    columns: the names of the columns.
    read: `read(column)` yields the values of a column in order. It may be called again.
    streamed: reading costs network traffic, so the caller stops when it has enough. The rows are joined to articles
    already.
    single: the rows are consecutive parts of one document.
    """

    where: str
    columns: tuple[str, ...]
    read: Callable[[str], Iterator[Any]]
    streamed: bool = False
    single: bool = False

    def documents(self, column: str) -> Iterator[Any]:
        """Yield the values of `column`, one for each document (or part of it, where `single`)."""
        rows = self.read(column)
        return rows if self.single or self.streamed else articles(rows)

    def column(self, asked: str | None, use: TextUse = CALIBRATION) -> str:
        """Choose the column to read: `asked`, else the first name of `COLUMNS` there is, else the only column.

        Raises InputError: there is no column `asked`, or none to choose.
        """
        has = f"{self.where} has {', '.join(self.columns) or 'none'}"
        if asked is not None:
            if asked not in self.columns:
                raise InputError(f"no column '{asked}': {has}: choose with {use.flags}column")
            return asked
        usual = [name for name in COLUMNS if name in self.columns]
        if usual or len(self.columns) == 1:
            return (usual or list(self.columns))[0]
        raise InputError(f"no column 'text': {has}: choose with {use.flags}column")


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
        if _TITLE.fullmatch(row or "") and lines:
            yield "\n".join(lines)
            lines = []
        lines.append((row or "").removesuffix("\n"))
    yield "\n".join(lines)


_TITLE = re.compile(r" ?= (?!=).*(?<!=) = ?\n?")
