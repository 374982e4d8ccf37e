"""Open parquet files as tables. A child process of limited memory decodes them (`parquet_child`).

A few hundred bytes of parquet can stand for any number of values, and pyarrow allocates them before they can be
counted; damaged files can end the process inside pyarrow. Neither reaches this process.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llm_quantize.calibration import text_files
from llm_quantize.calibration.table import Table
from llm_quantize.errors import InputError

MEMORY = 2 << 30  # bytes that decoding may take, beside twice the size of the file
ROW = 64 << 20  # bytes; a longer row is refused
ROW_BYTES = 128  # that a row counts beside its content, since rows cost time, whatever they hold
CHILD = Path(__file__).with_name("parquet_child.py")


def open_parquet(path: Path) -> Table:
    """Open a parquet file.

    Raises InputError where the file is damaged; reading the table raises it, too, where the file grows far more than
    text does.
    """

    def rows(columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
        lines = _child(path, columns)
        next(lines)
        return (tuple(row) for row in lines)

    names = next(_child(path, []))
    return Table(str(path), tuple(names), rows)


def _child(path: Path, columns: Sequence[str]) -> Iterator[list[Any]]:
    """Yield the names of all columns, then the values of `columns` in each row. Raises InputError."""
    size = path.stat().st_size
    left = text_files.GROWTH_FREE + text_files.GROWTH * size
    limit = MEMORY + 2 * size
    # -P: the folder of the script, whose modules have names of their own, is not searched.
    command = [sys.executable, "-P", str(CHILD), str(path), str(limit), json.dumps(list(columns))]
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, stdin=quiet, stdout=subprocess.PIPE, stderr=quiet) as child:
        assert child.stdout is not None
        try:
            while line := child.stdout.readline(ROW):
                if not line.endswith(b"\n"):
                    break
                found = json.loads(line)
                if isinstance(found, str):
                    raise InputError(f"cannot read {path}: {found}")
                if found is None:
                    return
                left -= len(line) + ROW_BYTES
                if left < 0:
                    raise InputError(
                        f"{path} unpacks to more than {text_files.GROWTH} times its size: no text does"
                    )
                yield found
        finally:
            child.kill()
    if len(line) == ROW:
        raise InputError(f"cannot read {path}: a row is longer than {ROW >> 20} MiB")
    raise InputError(
        f"cannot read {path}: it is damaged, or takes more than {limit >> 20} MiB of memory: write it anew"
    )
