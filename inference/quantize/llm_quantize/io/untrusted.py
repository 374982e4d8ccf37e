"""Check the files of a model directory, and the sizes that its config claims, before they are trusted.

A model may come from anyone. This module does not read weights, run code or import heavy packages. Every refusal is
an `InputError` of one line.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm_quantize.errors import InputError, one_line

# Files that this program or a tokenizer's class reads as a whole. The largest published ones have some 35 MB.
READ_WHOLE = {".json", ".model", ".txt", ".jinja", ".tiktoken", ".py"}
LARGEST_READ = 512 << 20  # bytes of such a file
LARGEST_JSON = 64 << 20  # bytes of a JSON file that this program reads
LARGEST_COUNT = 10_000  # of layers, experts or blocks: several times that of any model
_COUNTS = re.compile(r"(layers?|blocks?|depth|stages|experts)$")
_LAYERS = re.compile(r"(num_hidden_layers|num_layers|n_layers?)$")
_LARGEST_LABELS = 100_000
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth"}


def stays_inside(path: Path) -> bool:
    """Return whether a file of a model's directory is a regular file inside that directory, links resolved.

    A snapshot in the hub's cache holds links into `blobs` of the same repository; these count as inside.
    """
    directory = path.parent.resolve()
    roots = [directory]
    if directory.parent.name == "snapshots":
        roots.append(directory.parent.parent / "blobs")
    real = path.resolve()
    return real.is_file() and any(root in real.parents for root in roots)


def check_files(directory: Path) -> None:
    """Refuse a directory with links that lead out of it, pipes, devices or files that are far too large.

    Only files that a run may read are checked: weights, tokenizer, configs, templates, code.

    Raises InputError naming the file.
    """
    try:
        entries = sorted(directory.iterdir())
    except OSError as error:
        raise InputError(f"cannot look into {directory}: {error.strerror}") from None
    for path in entries:
        if path.suffix not in READ_WHOLE | _WEIGHTS:
            continue
        try:
            status = path.stat()
        except OSError:
            continue  # a broken link: reported where the file is needed
        if stat.S_ISDIR(status.st_mode):
            continue
        if not stat.S_ISREG(status.st_mode):
            raise InputError(f"{path.name} in {directory} is neither a file nor a directory: remove it")
        if not stays_inside(path):
            raise InputError(
                f"{path.name} in {directory} is a link that leads out of it: put a copy in its place"
            )
        if path.suffix in READ_WHOLE and status.st_size > LARGEST_READ:
            raise InputError(
                f"{path.name} in {directory} is larger than {LARGEST_READ >> 20} MiB: not a file of its kind"
            )


def read_limited(path: Path, limit: int) -> bytes:
    """Read a regular file of at most `limit` bytes.

    The file is opened without blocking, because opening a pipe without a writer would wait for ever.

    Raises InputError: not a regular file, or larger; OSError.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise InputError(f"{path.name} is not a regular file: put a copy in its place")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise InputError(f"{path.name} is larger than {limit >> 20} MiB: not a file of this kind")
    return data


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file of at most `LARGEST_JSON` bytes. Raises InputError naming the file."""
    try:
        found = json.loads(read_limited(path, LARGEST_JSON).decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, endless digits
        raise InputError(f"cannot read {path.name}: {type(error).__name__}: {one_line(error)}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path.name} holds no JSON object")
    return found


def without_paths(value: Any, paths: tuple[str, ...]) -> Any:
    """Return a JSON value in which each string that is one of `paths`, or below one, is cut to its last part."""
    if isinstance(value, dict):
        return {key: without_paths(inner, paths) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_paths(inner, paths) for inner in value]
    if isinstance(value, str) and any(value == p or value.startswith(p + "/") for p in paths):
        return value.rstrip("/").rpartition("/")[2]
    return value


def paths_of_this_machine(directory: Path) -> tuple[str, ...]:
    """Return the paths that no published file may hold: those of the model `directory` and the user's home."""
    found = {str(directory), str(directory.absolute()), str(directory.resolve()), str(Path.home())}
    return tuple(sorted(path for path in found if path.startswith("/") and path != "/"))


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
