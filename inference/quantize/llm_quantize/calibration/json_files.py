"""Open JSON files as tables: a record a line, or one document. Documents are read a record at a time."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from llm_quantize.calibration.table import COLUMNS, HEAD, MANY, Table
from llm_quantize.calibration.text_files import LINE, lines, open_text
from llm_quantize.errors import InputError

BLOCK = 1 << 16  # characters read at once
SHORT = 10  # characters with their punctuation; lists of more than MANY values have as many a value, or more
_BLANK = re.compile("[ \t\n\r\ufeff]*")  # files that were joined hold byte order marks


def open_json(path: Path) -> Table:
    """Open a file of JSON records. Records are objects or plain strings.

    A .jsonl file has one record a line. A .json file has records one after another, or one document: a list of records,
    an object with one list of objects, or one record. A list alone is taken for a document in a .jsonl file, too. The
    columns are the keys of the first `HEAD` records.

    Raises InputError where the file is not JSON, or holds more than one list; so does reading the table.
    """
    records = _records(path)

    def rows(columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        for record in records():
            if isinstance(record, dict):
                yield tuple(record.get(column) for column in columns)
            elif isinstance(record, str):
                yield tuple(record if column == "text" else None for column in columns)
            else:
                raise InputError(
                    f"{path} holds {type(record).__name__} records: they must be objects or strings"
                )

    names: dict[str, None] = {}
    for record in itertools.islice(records(), HEAD):
        names |= dict.fromkeys(record if isinstance(record, dict) else ["text"])
    return Table(str(path), tuple(names), rows)


def _records(path: Path) -> Callable[[], Iterable[Any]]:
    """Tell how the records of a file are read."""
    by_lines = ".json" not in path.suffixes[-2:]
    with open_text(path) as file:
        document = _Document(file, path)
        first = document.peek()
        if first == "[":
            return lambda: _list(path)
        if by_lines:
            return lambda: _lines(path)
        if first != "{":
            return lambda: _values(path)
        # An object: the first record of several, a record by itself, or one that holds the list of records.
        keys, lists = [], []
        for key in document.members():
            keys.append(key)
            if document.peek() == "[":
                elements = document.elements()
                if isinstance(next(elements, None), dict):
                    lists.append(key)
                _skip(elements)
            else:
                document.value()
        alone = document.peek() == ""
    if alone and len(lists) == 1 and not set(keys) & set(COLUMNS):
        return lambda: _list(path, lists[0])
    return lambda: _values(path)


def _lines(path: Path) -> Iterator[Any]:
    with open_text(path) as file:
        for number, line in enumerate(lines(file, path), 1):
            if line.strip():
                try:
                    yield json.loads(line)
                except json.JSONDecodeError as error:
                    raise InputError(f"cannot read {path}: line {number} is not JSON ({error})") from None
                except RecursionError:
                    raise InputError(f"cannot read {path}: its JSON is nested too deeply") from None


def _values(path: Path) -> Iterator[Any]:
    """Yield the values that follow one another in a file."""
    with open_text(path) as file:
        document = _Document(file, path)
        empty = True
        while document.peek() or empty:
            empty = False
            yield document.value()


def _list(path: Path, key: str | None = None) -> Iterator[Any]:
    """Yield the elements of the list that a file is, or that its object holds under `key`."""
    with open_text(path) as file:
        document = _Document(file, path)
        if key is None:
            yield from document.elements()
            if document.peek():
                raise InputError(
                    f"cannot read {path}: more follows its list: give one list, or one record a line"
                )
            return
        for name in document.members():
            if document.peek() != "[":
                document.value()
            elif name == key:
                yield from document.elements()
            else:
                _skip(document.elements())


def _skip(values: Iterator[Any]) -> None:
    for _ in values:
        pass


class _Document:
    """Read JSON from a file a value at a time, holding no more than one value of at most `LINE` characters.

    Every method raises InputError where the file is not JSON there, or a value is longer.
    """

    def __init__(self, file: IO[str], path: Path) -> None:
        self._file = file
        self._path = path
        self._text = ""  # read and not parsed, from `_at` on
        self._at = 0
        self._before = 0  # characters of the file before `_text`
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """Skip white space and return the next character without taking it; "" at the end of the file."""
        while True:
            blank = _BLANK.match(self._text, self._at)
            self._at = blank.end() if blank else self._at
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more(BLOCK):
                return ""

    def value(self) -> Any:
        """Take the next value."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                # It may end further on in the file. Twice as much at a time, so that parsing anew costs little.
                refusal = self._refusal(error.msg, error.pos)
                if not self._more(max(BLOCK, len(self._text) - self._at)):
                    raise refusal from None
                continue
            except RecursionError:
                raise InputError(f"cannot read {self._path}: its JSON is nested too deeply") from None
            # A number at the end may go on.
            if end < len(self._text):
                self._at = end
                return value
            if not self._more(BLOCK):
                self._at = len(self._text)
                return value

    def elements(self) -> Iterator[Any]:
        """Take a list; yield its values."""
        self._take("[")
        start = self._before + self._at
        for number, value in enumerate(self._separated("]", self.value), 1):
            if number > MANY and self._before + self._at - start < SHORT * number:
                raise InputError(
                    f"cannot read {self._path}: it has more than {MANY:,} values of fewer than {SHORT} characters on "
                    "average: join them to documents"
                )
            yield value

    def members(self) -> Iterator[str]:
        """Take an object; yield its keys. The caller takes each key's value."""
        self._take("{")
        yield from self._separated("}", self._key)

    def _separated(self, end: str, take: Callable[[], Any]) -> Iterator[Any]:
        if self.peek() != end:
            yield take()
            while self.peek() == ",":
                self._at += 1
                yield take()
        self._take(end)

    def _key(self) -> str:
        key = self.value() if self.peek() == '"' else None
        if not isinstance(key, str):
            raise self._refusal("Expecting property name enclosed in double quotes", self._at)
        self._take(":")
        return key

    def _take(self, character: str) -> None:
        if self.peek() != character:
            raise self._refusal(f"Expecting '{character}'", self._at)
        self._at += 1

    def _more(self, count: int) -> bool:
        """Read on, and forget what was parsed; return False at the end of the file."""
        if len(self._text) - self._at > LINE:
            raise InputError(
                f"cannot read {self._path}: a value is longer than {LINE >> 20} MiB: give one record a line"
            )
        block = self._file.read(count)
        self._before += self._at
        self._text, self._at = self._text[self._at :] + block, 0
        return bool(block)

    def _refusal(self, what: str, at: int) -> InputError:
        return InputError(f"cannot read {self._path}: not JSON ({what} at character {self._before + at})")
