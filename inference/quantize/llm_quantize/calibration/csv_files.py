"""Open CSV files as tables, whatever delimiter they have."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llm_quantize.calibration.table import Table
from llm_quantize.calibration.text_files import LINE, lines, open_text
from llm_quantize.errors import InputError

HEADER = 1 << 20  # characters; a longer first line is refused
DELIMITERS = (",", ";", "\t", "|")
TRIED = 32  # records by which the delimiter is told


def open_csv(path: Path) -> Table:
    """Open a CSV file with a header.

    The delimiter is the one of `DELIMITERS` that parts the header in two or more, and gives the first records as many
    fields as the header has. The comma comes first. Lines that repeat the header, as in files that were joined, are
    left out.

    Raises InputError where several other delimiters would do. Reading raises InputError for a record with more fields
    than the header, and `csv.Error`.
    """
    csv.field_size_limit(LINE)  # the default, 128 KiB, is less than a long document
    delimiter = _delimiter(path)
    header = next(_records(path, delimiter, HEADER), [])

    def rows(columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        places = [header.index(column) for column in columns]
        records = _records(path, delimiter, LINE // 4)
        next(records, None)
        for number, record in enumerate(records, 2):
            if any(record[len(header) :]):
                raise InputError(
                    f"cannot read {path}: record {number} has {len(record)} fields, and the header has "
                    f"{len(header)}: put quotes around text that holds a '{delimiter}'"
                )
            if record and [record[0].lstrip("\ufeff"), *record[1:]] != header:
                yield tuple(record[place] if place < len(record) else None for place in places)

    return Table(str(path), tuple(header), rows)


def _records(path: Path, delimiter: str, limit: int) -> Iterator[list[str]]:
    """Yield the records of a file, the header first. limit: of a line, in characters."""
    with open_text(path, newline="") as file:
        yield from csv.reader(lines(file, path, limit), delimiter=delimiter, strict=True)


def _delimiter(path: Path) -> str:
    """Tell the delimiter of a file. Raises InputError where several would do."""
    parting, fitting = [], []
    for delimiter in DELIMITERS:
        records = _records(path, delimiter, LINE // 4)
        try:
            count = len(next(_records(path, delimiter, HEADER), []))
            head = [record for record in itertools.islice(records, TRIED) if record]
        except csv.Error:  # such as a quoted field that ends before another delimiter
            continue
        if count > 1:
            parting.append(delimiter)
            # Records may lack their last fields, and end in a delimiter.
            if all(len(record) > 1 and not any(record[count:]) for record in head):
                fitting.append(delimiter)
    found = fitting or parting
    if "," in found or not found:
        return ","
    if len(found) > 1:
        raise InputError(
            f"cannot read {path}: its fields may end in any of {' '.join(map(repr, found))}: use commas"
        )
    return found[0]
