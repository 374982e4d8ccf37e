"""Read files of a directory that may come from anyone, and check the sizes that its config claims.

All that is read or copied from the directory of a model or of data goes through `open_guarded`. This module does not
read weights, run code or import heavy packages. Every refusal is an `InputError` of one line.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from llm_quantize.errors import InputError, one_line

# Files that this program or a tokenizer's class reads as a whole. The largest published ones have some 35 MB.
READ_WHOLE = {".json", ".model", ".txt", ".jinja", ".tiktoken", ".py"}
LARGEST_READ = 512 << 20  # bytes of such a file
LARGEST_JSON = 64 << 20  # bytes of a JSON file that this program reads
LARGEST_COUNT = 10_000  # of layers, experts or blocks: several times that of any model
_COUNTS = re.compile(r"(layers?|blocks?|depth|stages|experts)$")
_LAYERS = re.compile(r"(num_hidden_layers|num_layers|n_layers?)$")
_LARGEST_LABELS = 100_000
_PIECE = 1 << 20  # bytes copied at a time
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth"}


def stays_inside(path: Path, inside: Path | None = None) -> bool:
    """Return whether `path` is a regular file inside the directory `inside`, links resolved.

    inside: the directory; None: the one that `path` lies in. A snapshot in the hub's cache holds links into `blobs`
    of the same repository; these count as inside.
    """
    real = Path(os.path.realpath(path))
    return real.is_file() and _holds(path.parent if inside is None else inside, real)


def _holds(directory: Path, real: Path) -> bool:
    """Return whether a path without links lies in a directory, or in the blobs of its repository."""
    root = directory.resolve()
    roots = [root]
    if root.parent.name == "snapshots":
        roots.append(root.parent.parent / "blobs")  # not resolved: as a link it could lead anywhere
    return any(each in real.parents for each in roots)


def check_files(directory: Path, inside: Path | None = None) -> None:
    """Refuse a directory with links that lead out of it, pipes, devices or files that are far too large.

    Only files that a run may read are checked: weights, tokenizer, configs, templates, code, model card.
    inside: the directory that links may not leave; None: `directory`.

    Raises InputError naming the file.
    """
    for path in entries_of(directory):
        if not is_read(path.name) and path.suffix not in _WEIGHTS:
            continue
        try:
            status = path.stat()
        except OSError:
            continue  # a broken link: reported where the file is needed
        if stat.S_ISDIR(status.st_mode):
            continue
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path.name} in {directory} is neither a file nor a directory: remove it")
        if not stays_inside(path, inside):
            raise InputError(
                f"{path.name} in {directory} is a link that leads out of it: put a copy in its place"
            )
        if is_read(path.name) and status.st_size > LARGEST_READ:
            raise InputError(
                f"{path.name} in {directory} is larger than {LARGEST_READ >> 20} MiB: not a file of its kind"
            )


def entries_of(directory: Path) -> list[Path]:
    """Return what lies in a directory, sorted by name. Raises InputError naming the directory."""
    try:
        return sorted(directory.iterdir())
    except OSError as error:
        raise InputError(f"cannot look into {directory}: {error.strerror}") from None


def is_read(name: str) -> bool:
    """Return whether a run may read a file of this name, other than weights."""
    return name == "README.md" or Path(name).suffix in READ_WHOLE


def check_is_text(path: Path) -> None:
    """Refuse a path that is not UTF-8, which libraries in Rust cannot open. Raises InputError."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise InputError(
            f"the name {path} is not UTF-8, so that no safetensors file there can be opened: rename it"
        ) from None


def open_guarded(path: Path, limit: int, inside: Path | None) -> BinaryIO:
    """Open a regular file of at most `limit` bytes. The one way by which files of strangers are opened.

    inside: the directory that must hold the file, as `stays_inside` says; None: it may lie anywhere.

    What is checked is the open file, so that nothing can be put in its place after the check. A pipe is not waited
    for, and a device is not opened.

    Raises InputError: not a regular file, larger, or outside; OSError.
    """
    refusal = InputError(f"{path.name} is not a regular file: put a copy in its place")
    if not stat.S_ISREG(path.stat().st_mode):
        raise refusal
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise refusal
        if status.st_size > limit:
            raise _too_large(path, limit)
        if inside is not None:
            real = Path(os.path.realpath(path))
            if not (_holds(inside, real) and os.path.samestat(status, real.lstat())):
                raise InputError(f"{path.name} is a link that leads out of {inside}: put a copy in its place")
        return open(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_limited(path: Path, limit: int, inside: Path | None = None) -> bytes:
    """Read a file that `open_guarded` opens. Raises what it raises."""
    with open_guarded(path, limit, inside) as file:
        data = file.read(limit + 1)
    if len(data) > limit:  # it has grown since
        raise _too_large(path, limit)
    return data


def copy_limited(path: Path, into: Path, limit: int, inside: Path | None = None) -> str:
    """Copy a file that `open_guarded` opens to the new file `into`; return the hash of what was copied, in hex.

    The hash is xxh3 of 128 bits.

    Raises InputError: `path` is refused, or cannot be read; OSError: the copy cannot be stored.
    """
    digest = xxhash.xxh3_128()
    with open(into, "xb") as copy:
        for piece in _pieces(path, limit, inside):
            digest.update(piece)
            copy.write(piece)
    return digest.hexdigest()


def _pieces(path: Path, limit: int, inside: Path | None) -> Iterator[bytes]:
    left = limit
    try:
        with open_guarded(path, limit, inside) as file:
            while piece := file.read(_PIECE):
                left -= len(piece)
                if left < 0:  # it has grown since
                    raise _too_large(path, limit)
                yield piece
    except OSError as error:
        raise InputError(f"cannot read {path.name}: {error.strerror}") from None


def _too_large(path: Path, limit: int) -> InputError:
    return InputError(f"{path.name} is larger than {limit >> 20} MiB: not a file of this kind")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of at most `LARGEST_JSON` bytes in its directory.

    Raises InputError naming the file.
    """
    try:
        found = json.loads(read_limited(path, LARGEST_JSON, path.parent).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, endless digits
        raise InputError(f"cannot read {path.name}: {type(error).__name__}: {one_line(error)}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path.name} holds no JSON object")
    return found


def check_counts(config: dict[str, Any], tensors: int) -> None:
    """Refuse a config that counts more layers, experts or labels than a model of `tensors` tensors can have.

    The classes of transformers build lists of that length before any module exists.

    Raises InputError naming the entry.
    """
    for key, value in _numbers(config):
        limit = math.inf
        if _LAYERS.search(key):
            limit = min(max(tensors, 64), LARGEST_COUNT)
        elif _COUNTS.search(key):
            limit = LARGEST_COUNT
        elif key == "num_labels":
            limit = _LARGEST_LABELS
        if value > limit:
            shown = str(value) if value < 10**18 else "a huge number"
            raise InputError(
                f"config.json says {one_line(key, 60)} {shown} beside {tensors} tensors of weights: "
                "take the config.json that came with them"
            )


def _numbers(config: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield every whole number in a config with its key, at any depth."""
    pending: list[Any] = [config]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            for key, inner in value.items():
                if isinstance(inner, int) and not isinstance(inner, bool):
                    yield str(key), inner
                else:
                    pending.append(inner)
        elif isinstance(value, list):
            pending.extend(value)
