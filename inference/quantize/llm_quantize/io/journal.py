"""An append-only file of JSON objects, one a line, each with its checksum: what is listed has happened.

A line that a crash tore, and everything after it, is dropped when the file is opened again.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import xxhash

from llm_quantize.io.atomic_directory import sync

MAX_BYTES = 256 << 20


def _line(entry: dict[str, Any]) -> bytes:
    text = json.dumps(entry, separators=(",", ":"), sort_keys=True).encode()
    return xxhash.xxh3_64_hexdigest(text).encode() + b" " + text + b"\n"


def _entry(line: bytes) -> dict[str, Any] | None:
    """The object of one line without its end, or None where the line is damaged."""
    digest, space, text = line.partition(b" ")
    if not space or xxhash.xxh3_64_hexdigest(text).encode() != digest:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


class Journal:
    """`entries` are those that are intact; `append` returns when its entry is on disk. Errors: `OSError`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        self._ends = [0]  # where each entry's line ends in the file
        self._handle = -1
        if path.is_file() and path.stat().st_size <= MAX_BYTES:
            for line in path.read_bytes().split(b"\n")[:-1]:
                entry = _entry(line)
                if entry is None:
                    break
                self.entries.append(entry)
                self._ends.append(self._ends[-1] + len(line) + 1)

    def keep(self, count: int) -> None:
        """Drops all entries but the first `count`, in the file too; needed once before `append`."""
        self.close()
        del self.entries[count:], self._ends[count + 1 :]
        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        os.ftruncate(self._handle, self._ends[-1])
        os.lseek(self._handle, 0, os.SEEK_END)
        os.fsync(self._handle)
        sync(self.path.parent)

    def append(self, entry: dict[str, Any]) -> None:
        """Adds one object of JSON values."""
        line = _line(entry)
        written = 0
        while written < len(line):
            written += os.write(self._handle, line[written:])
        os.fsync(self._handle)
        self.entries.append(entry)
        self._ends.append(self._ends[-1] + len(line))

    def close(self) -> None:
        """Closes the file; the entries stay readable."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
