"""Open local text files (.txt, .jsonl, .json, .csv, .parquet) as tables.

A file may come from anyone, so its lines, its documents and the growth of compressed files are bounded. `pyarrow` is
imported only to open parquet files.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from llm_quantize.calibration.table import COLUMNS, Table
from llm_quantize.errors import InputError

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet", ".txt.gz", ".jsonl.gz", ".json.gz", ".csv.gz")
BLOCK = 1 << 20  # characters of a text file read at once
LINE = 64 << 20  # characters; a longer line is refused
WHOLE = 1 << 30  # characters; a longer JSON document is refused
HEADER = 1 << 20  # characters; a longer first line of a CSV file is refused
# A compressed file may grow to GROWTH times its size plus GROWTH_FREE bytes. Text usually shrinks to a third, and
# repetitive text to a twentieth.
GROWTH, GROWTH_FREE = 100, 64 << 20


def file_suffix(path: Path) -> str | None:
    """Return the one of `SUFFIXES` that the name of a file ends in, whatever its case; None where there is none."""
    name = path.name.lower()
    return next((s for s in SUFFIXES if name.endswith(s)), None)


def open_file(path: Path) -> Table:
    """Open a text file by its suffix, one of `SUFFIXES`; other files are read as JSON.

    Raises InputError, OSError, and what the libraries raise for a damaged file; so does reading the table.
    """
    kind = (file_suffix(path) or "").removesuffix(".gz")
    return {".txt": _open_txt, ".csv": _open_csv, ".parquet": _open_parquet}.get(kind, _open_json)(path)


class _Unpacked(io.RawIOBase):
    """Read a gzip file. Raises InputError where it grows far more than text does."""

    def __init__(self, path: Path) -> None:
        self._name = path
        self._file = gzip.open(path, "rb")  # noqa: SIM115 (closed with this)
        self._left = GROWTH_FREE + GROWTH * path.stat().st_size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._file.readinto(buffer)
        self._left -= count
        if self._left < 0:
            raise InputError(f"{self._name} unpacks to more than {GROWTH} times its size: no text does")
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _text_file(path: Path, newline: str | None = None) -> IO[str]:
    """Open a plain or gzip file as UTF-8 text, with or without a byte order mark."""
    if path.suffix.lower() != ".gz":
        return open(path, encoding="utf-8-sig", newline=newline)
    unpacked = io.BufferedReader(_Unpacked(path), 1 << 16)
    return io.TextIOWrapper(unpacked, encoding="utf-8-sig", newline=newline)


def _lines(file: IO[str], path: Path, limit: int = LINE) -> Iterator[str]:
    """Yield the lines of a file. Raises InputError for a line of more than `limit` characters."""
    number = 0
    while line := file.readline(limit + 1):
        number += 1
        if len(line) > limit:
            raise InputError(f"cannot read {path}: line {number} is longer than {limit >> 20} MiB")
        yield line


def _open_txt(path: Path) -> Table:
    def read(column: str) -> Iterator[str]:
        with _text_file(path) as file:
            while block := file.read(BLOCK):
                yield block + file.readline(BLOCK)

    return Table(str(path), ("text",), read, single=True)


def _open_csv(path: Path) -> Table:
    csv.field_size_limit(LINE)  # the default, 128 KiB, is less than a long document

    def read(column: str) -> Iterator[str | None]:
        with _text_file(path, newline="") as file:
            for row in csv.DictReader(_lines(file, path, LINE // 4), strict=True):
                yield row[column]

    with _text_file(path, newline="") as file:
        columns = tuple(next(csv.reader(_lines(file, path, HEADER)), ()))
    return Table(str(path), columns, read)


def _open_parquet(path: Path) -> Table:
    import pyarrow.parquet as pq

    def read(column: str) -> Iterator[Any]:
        # A dictionary holds a repeated text once. Kept as a dictionary, the column takes memory for one copy only.
        with pq.ParquetFile(path, read_dictionary=[column] if column in texts else None) as file:
            # The size of the row groups, not of the column: pyarrow crashes on a column's damaged metadata.
            groups = range(file.metadata.num_row_groups)
            stored = [file.metadata.row_group(i).total_byte_size for i in groups]
            if sum(stored) > GROWTH_FREE + GROWTH * path.stat().st_size:
                raise InputError(f"{path} unpacks to more than {GROWTH} times its size: no text does")
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for value in batch.column(0):
                    yield value.as_py()

    with pq.ParquetFile(path) as file:
        columns = tuple(file.schema_arrow.names)
        texts = {n for n, kind in zip(columns, file.schema_arrow.types, strict=True) if str(kind) == "string"}
    return Table(str(path), columns, read)


def _open_json(path: Path) -> Table:
    """Open a file with one record per line, or one document: a list of records, or an object that holds one.

    Records are objects or plain strings; the columns are the keys of the first one.
    """

    def lines() -> Iterator[Any]:
        with _text_file(path) as file:
            for number, line in enumerate(_lines(file, path), 1):
                if line.strip():
                    try:
                        yield json.loads(line)
                    except json.JSONDecodeError as error:
                        raise InputError(f"cannot read {path}: line {number} is not JSON ({error})") from None

    def whole() -> Iterable[Any]:
        with _text_file(path) as file:
            text = file.read(WHOLE + 1)
        if len(text) > WHOLE:
            raise InputError(f"{path} is one document of more than {WHOLE >> 30} GiB: give one record a line")
        value = json.loads(text)
        if isinstance(value, dict):
            lists = [v for v in value.values() if isinstance(v, list) and v and isinstance(v[0], dict)]
            is_record = any(name in value for name in COLUMNS)
            return lists[0] if len(lists) == 1 and not is_record else [value]
        return value if isinstance(value, list) else [value]

    records: Callable[[], Iterable[Any]] = lines
    if ".json" in path.suffixes[-2:] and not _one_record_per_line(path):
        loaded = whole()
        records = lambda: loaded  # noqa: E731

    def read(column: str) -> Iterator[Any]:
        for record in records():
            if isinstance(record, dict):
                yield record.get(column)
            elif isinstance(record, str):
                yield record if column == "text" else None
            else:
                raise InputError(
                    f"{path} holds {type(record).__name__} records: they must be objects or strings"
                )

    first: Any = next(iter(records()), {})
    return Table(str(path), tuple(first) if isinstance(first, dict) else ("text",), read)


def _one_record_per_line(path: Path) -> bool:
    """Return whether a .json file holds a record on each line, as many do, rather than one document.

    It does where its first line is valid JSON and others follow.
    """
    with _text_file(path) as file:
        filled = (line for line in _lines(file, path, WHOLE) if line.strip())
        try:
            json.loads(next(filled, ""))
        except json.JSONDecodeError:
            return False
        return next(filled, None) is not None
