"""What every file of a directory must hold, and the comparison of the directory with it.

Knows nothing of what the files mean.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import xxhash

from llm_quantize.errors import WorkError, one_line

READERS = 4  # threads
_PIECE = 1 << 20  # bytes read at a time: they stay in the processor's cache until they are hashed


class Part(NamedTuple):
    """A part of a file: its length in bytes, and the xxh3 hash of 128 bits, in hex, of `prefix` and its bytes."""

    size: int
    digest: str
    prefix: bytes = b""


def whole(data: bytes) -> tuple[Part, ...]:
    """Return the parts of a file that holds `data`: one."""
    return (Part(len(data), xxhash.xxh3_128_hexdigest(data)),)


class Manifest:
    """The files that a directory must have, each with its parts in order, from the first byte to the last."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[Part, ...]] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def clear(self) -> None:
        """Forget all files."""
        self._files.clear()

    def add(self, name: str, parts: Iterable[Part]) -> None:
        """Say what file `name` must hold: a path inside the directory, with `/`."""
        self._files[name] = tuple(parts)

    def add_as_it_is(self, directory: Path, name: str) -> None:
        """Say that file `name` must hold what it holds now in `directory`. Raises OSError."""
        size = (directory / name).stat().st_size
        self.add(name, (Part(size, _digests(directory / name, (Part(size, ""),))[0]),))

    def compare(self, directory: Path) -> None:
        """Compare every file of `directory`. Raises WorkError naming the first one that differs, is missing or odd."""
        try:
            found = {path.relative_to(directory).as_posix() for path in files_below(directory)}
        except OSError as error:
            raise WorkError(
                f"{directory} cannot be read back ({error.strerror}): check the disk and run again"
            ) from None
        for name in sorted(self._files.keys() - found):
            raise WorkError(f"{name} is missing in {directory}: check the disk and run again")
        for name in sorted(found - self._files.keys()):
            raise WorkError(
                f"{one_line(name, 100)} in {directory} is none of the files that were written: take it away and run "
                "again"
            )
        with ThreadPoolExecutor(READERS, thread_name_prefix="compare") as readers:
            work = {
                name: readers.submit(_compare, directory / name, self._files[name]) for name in sorted(found)
            }
            try:
                for name, future in work.items():
                    if not future.result():
                        raise WorkError(
                            f"{name} in {directory} differs from what was written: check the disk and run again"
                        )
            except OSError as error:
                raise WorkError(
                    f"{name} in {directory} cannot be read back ({error.strerror}): check the disk and run again"
                ) from None
            finally:
                readers.shutdown(wait=True, cancel_futures=True)


def files_below(directory: Path) -> list[Path]:
    """Return all that lies below a directory: files, links, whatever else there is, and directories without content.

    Raises OSError.
    """
    found = []
    for path in directory.iterdir():
        inner = files_below(path) if path.is_dir() and not path.is_symlink() else []
        found += inner or [path]
    return sorted(found)


def _compare(path: Path, parts: Sequence[Part]) -> bool:
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_size != sum(part.size for part in parts):
        return False
    return _digests(path, parts) == [part.digest for part in parts]


def _digests(path: Path, parts: Sequence[Part]) -> list[str]:
    """Return the digest of each part as the file has it. Raises OSError."""
    found = []
    buffer = memoryview(bytearray(_PIECE))
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0))
    with open(handle, "rb", buffering=0) as file:
        for part in parts:
            hasher = xxhash.xxh3_128(part.prefix)
            left = part.size
            while left and (count := file.readinto(buffer[: min(left, _PIECE)])):
                hasher.update(buffer[:count])
                left -= count
            found.append(hasher.hexdigest())
    return found
