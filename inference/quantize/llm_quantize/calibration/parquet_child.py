"""Decode columns of a parquet file within limited memory, and write them to standard output.

A script of its own, which imports nothing of the package: `parquet_child.py FILE BYTES COLUMNS`, where BYTES is the
memory that decoding may take, and COLUMNS a JSON list of names. It writes lines of JSON: a list with the names of all
columns; if there are COLUMNS, a list of their values for each row; then null. A string is an error, and ends it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from typing import Any

BATCH = 64  # rows decoded at once


def main(path: str, limit: int, columns: list[str]) -> None:
    """Write the lines."""
    out = os.fdopen(os.dup(1), "wb")

    def write(value: object) -> None:
        line = json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
        out.write(line.encode() + b"\n")

    try:
        for row in read(path, limit, columns):
            write(row)
        write(None)
    except BrokenPipeError:  # the parent has enough
        os._exit(0)
    except MemoryError:
        write(f"it takes more than {limit >> 20} MiB of memory to decode: write it in smaller rows")
    except Exception as error:
        write(" ".join(str(error).split())[:300] or type(error).__name__)
    with contextlib.suppress(BrokenPipeError):
        out.flush()
    os._exit(0)


def read(path: str, limit: int, columns: list[str]) -> Iterator[list[Any]]:
    """Yield what `main` writes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pa.set_memory_pool(pa.system_memory_pool())  # others reserve more address space than they use
    pa.set_cpu_count(1)
    limit_memory(limit)
    with pq.ParquetFile(path) as file:
        names = list(file.schema_arrow.names)
        kinds = {str(field.name): str(field.type) for field in file.schema_arrow}
    yield names
    if not columns:
        return
    # A dictionary holds a repeated text once. Kept as a dictionary, the column takes memory for one copy only.
    texts = [name for name in columns if kinds[name] == "string"]
    with pq.ParquetFile(path, read_dictionary=texts or None, pre_buffer=False) as file:
        for batch in file.iter_batches(batch_size=BATCH, columns=columns, use_threads=False):
            arrays = [batch.column(name) for name in columns]
            for index in range(len(batch)):
                row = [array[index].as_py() for array in arrays]
                for name, value in zip(columns, row, strict=True):
                    if not isinstance(value, str | int | float | list | dict | None):
                        raise ValueError(
                            f"column {name} holds {type(value).__name__} values, neither text nor conversations"
                        )
                yield row


def limit_memory(limit: int) -> None:
    """Let this process allocate no more than `limit` bytes beside what it has, where the system knows such a limit."""
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        total = used + limit if hard == resource.RLIM_INFINITY else min(used + limit, hard)
        resource.setrlimit(resource.RLIMIT_AS, (total, hard))
    except (ImportError, OSError, ValueError):  # Windows, macOS
        pass


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]))
