"""Open local text files as tables, by their suffixes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from llm_quantize.calibration.csv_files import open_csv
from llm_quantize.calibration.json_files import open_json
from llm_quantize.calibration.parquet_files import open_parquet
from llm_quantize.calibration.table import Table
from llm_quantize.calibration.text_files import open_text, without_nulls

SUFFIXES = (".txt", ".jsonl", ".json", ".csv", ".parquet", ".txt.gz", ".jsonl.gz", ".json.gz", ".csv.gz")
BLOCK = 1 << 20  # characters of a text file read at once


def file_suffix(path: Path) -> str | None:
    """Return the one of `SUFFIXES` that the name of a file ends in, whatever its case; None where there is none."""
    name = path.name.lower()
    return next((s for s in SUFFIXES if name.endswith(s)), None)


def open_file(path: Path) -> Table:
    """Open a text file by its suffix, one of `SUFFIXES`; other files are read as JSON.

    Raises InputError, OSError, and what the libraries raise for a damaged file; so does reading the table.
    """
    kind = (file_suffix(path) or "").removesuffix(".gz")
    return {".txt": _open_txt, ".csv": open_csv, ".parquet": open_parquet}.get(kind, open_json)(path)


def _open_txt(path: Path) -> Table:
    def rows(columns: Sequence[str]) -> Iterator[tuple[str]]:
        with open_text(path) as file:
            while block := file.read(BLOCK):
                yield (without_nulls(block + file.readline(BLOCK), path),)

    return Table(str(path), ("text",), rows, single=True)
