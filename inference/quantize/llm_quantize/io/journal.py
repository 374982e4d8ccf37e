"""Keep an append-only file of JSON objects, one per line, each with a checksum.

A step of the work is appended after it is on disk. When the file is opened again, the first damaged line, such as one
cut by a crash, and everything after it are dropped.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import xxhash

from llm_quantize.io.atomic_directory import fsync_path

MAX_BYTES = 256 << 20  # a larger file is not read


def _line(entry: dict[str, Any]) -> bytes:
    text = json.dumps(entry, separators=(",", ":"), sort_keys=True).encode()
    return xxhash.xxh3_64_hexdigest(text).encode() + b" " + text + b"\n"


def _entry(line: bytes) -> dict[str, Any] | None:
    """Return the object of one line, given without its line end; None where the line is damaged."""
    digest, space, text = line.partition(b" ")
    if not space or xxhash.xxh3_64_hexdigest(text).encode() != digest:
        return None
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


class Journal:
    """Read the intact entries of a journal, and append new ones durably.

    entries: the intact objects, in order; none where there is no file or it is larger than `MAX_BYTES`.

    All methods raise OSError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        self._ends = [0]  # offset in the file after each entry's line, from 0
        self._handle = -1
        if path.is_file() and path.stat().st_size <= MAX_BYTES:
            for line in path.read_bytes().split(b"\n")[:-1]:
                entry = _entry(line)
                if entry is None:
                    break
                self.entries.append(entry)
                self._ends.append(self._ends[-1] + len(line) + 1)

    def keep(self, count: int) -> None:
        """Open the file for `append` and drop all entries but the first `count`, in the file too."""
        self.close()
        del self.entries[count:], self._ends[count + 1 :]
        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        os.ftruncate(self._handle, self._ends[-1])
        os.lseek(self._handle, 0, os.SEEK_END)
        os.fsync(self._handle)
        fsync_path(self.path.parent)

    def append(self, entry: dict[str, Any]) -> None:
        """Append one object of JSON values; it is on disk on return. `keep` must have been called before."""
        line = _line(entry)
        written = 0
        while written < len(line):
            written += os.write(self._handle, line[written:])
        os.fsync(self._handle)
        self.entries.append(entry)
        self._ends.append(self._ends[-1] + len(line))

    def close(self) -> None:
        """Close the file; `entries` stay readable."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1
