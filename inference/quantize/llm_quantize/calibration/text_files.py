"""Open plain and gzip files as text, and tell their encoding.

A file may come from anyone, so its lines and the growth of compressed files are bounded.
"""

from __future__ import annotations

import codecs
import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from llm_quantize.errors import InputError

LINE = 64 << 20  # characters; a longer line is refused
# A compressed file may grow to GROWTH times its size plus GROWTH_FREE bytes. Text usually shrinks to a third, and
# repetitive text to a twentieth.
GROWTH, GROWTH_FREE = 100, 64 << 20
SAMPLE = 1 << 16  # bytes by which the encoding is told
# Byte order marks, the longer ones first: UTF-32's begins as UTF-16's does.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def open_text(path: Path, newline: str | None = None) -> IO[str]:
    """Open a plain or gzip file as text in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    newline: as in `open`.

    Raises InputError where the file holds null characters and is neither UTF-16 nor UTF-32; OSError. Reading raises
    UnicodeError for other encodings, and InputError where a gzip file grows far more than text does.
    """
    with _open_bytes(path) as file:
        encoding = encoding_of(file.read(SAMPLE))
    if encoding is None:
        raise InputError(f"cannot read {path}: it holds null characters, as no text does: save it as UTF-8")
    return io.TextIOWrapper(_open_bytes(path), encoding=encoding, newline=newline)


def lines(file: IO[str], path: Path, limit: int = LINE) -> Iterator[str]:
    """Yield the lines of a file. path: its name, for messages.

    Raises InputError for a line of more than `limit` characters, and for null characters.
    """
    number = 0
    while line := file.readline(limit + 1):
        number += 1
        if len(line) > limit:
            raise InputError(f"cannot read {path}: line {number} is longer than {limit >> 20} MiB")
        yield without_nulls(line, path)


def without_nulls(text: str, path: Path) -> str:
    """Return `text`. Raises InputError where it holds null characters: another encoding, or no text at all."""
    if "\0" in text:
        raise InputError(f"cannot read {path}: it holds null characters, as no text does: save it as UTF-8")
    return text


def encoding_of(sample: bytes) -> str | None:
    """Tell the encoding of a text by its first bytes; None where they hold nulls and fit none of those known.

    Without a byte order mark, UTF-32 is told by its validity, and UTF-16 by its nulls: all Latin letters, digits,
    blanks and line ends have one, on the same side. What has no nulls is taken for UTF-8.
    """
    for mark, name in _MARKS:
        if sample.startswith(mark):
            return name
    if b"\0" not in sample:
        return "utf-8-sig"
    whole = sample[: len(sample) // 4 * 4]
    for name in ("utf-32-le", "utf-32-be"):
        if whole and _is_text(whole, name):
            return name
    nulls = {"utf-16-be": sample[::2].count(0), "utf-16-le": sample[1::2].count(0)}
    name, many = max(nulls.items(), key=lambda item: item[1])
    few = min(nulls.values())
    # The text of other scripts still has blanks: one in ten characters or so. Some of their characters have their null
    # on the other side. In other files, nulls are rarer or on both sides.
    clear = many >= len(sample) // 2 / 40 and few <= many / 16
    return name if clear and _is_text(sample[: len(sample) // 2 * 2], name) else None


def _is_text(sample: bytes, encoding: str) -> bool:
    """Return whether bytes are valid in an encoding, and without control characters other than white space."""
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(sample)
    except UnicodeError:
        return False
    return not any(c < " " and not c.isspace() for c in text)


def _open_bytes(path: Path) -> io.BufferedReader:
    if path.suffix.lower() != ".gz":
        return open(path, "rb")
    return io.BufferedReader(_Unpacked(path), 1 << 16)


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
