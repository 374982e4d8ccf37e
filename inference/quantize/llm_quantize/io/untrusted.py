"""What a source directory may be before anything of it is believed: its files, and the sizes its config claims.

A model may come from anyone. Nothing here reads weights, runs code or imports anything heavy; every refusal is
one line.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm_quantize.errors import InputError, one_line

# Read whole, by us or by a tokenizer's classes; the largest that are published have some 35 MB.
READ_WHOLE = {".json", ".model", ".txt", ".jinja", ".tiktoken", ".py"}
LARGEST_READ = 512 << 20
LARGEST_COUNT = 10_000  # of layers, experts, blocks: several times that of any model
_COUNTS = re.compile(r"(layers?|blocks?|depth|stages|experts)$")
_LAYERS = re.compile(r"(num_hidden_layers|num_layers|n_layers?)$")
_LARGEST_LABELS = 100_000
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth"}


def stays_inside(path: Path) -> bool:
    """Whether a file of a model's directory is a regular file of that directory, links resolved.

    A hub cache's snapshot holds links into `blobs` of the same repository: those count.
    """
    home = path.parent.resolve()
    roots = [home]
    if home.parent.name == "snapshots":
        roots.append(home.parent.parent / "blobs")
    real = path.resolve()
    return real.is_file() and any(root in real.parents for root in roots)


def check_files(directory: Path) -> None:
    """Refuses a directory whose files are not its own: links that lead out, pipes, devices, absurd sizes.

    Only what is read counts: weights, tokenizer, configs, templates, code. Errors: `InputError`.
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
            continue  # a link to nothing: told where the file is needed
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
    """The bytes of a regular file of at most `limit` bytes. Errors: `InputError` where it is larger, `OSError`.

    Opened without waiting, so that a pipe nobody writes to cannot hold the run.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise InputError(f"{path.name} is not a regular file: put a copy in its place")
        data = file.read(limit + 1)
    if len(data) > limit:
        raise InputError(f"{path.name} is larger than {limit >> 20} MiB: not a file of this kind")
    return data


def without_places(value: Any, places: tuple[str, ...]) -> Any:
    """A JSON value in which each string that is a path at or below one of `places` is that path's last part."""
    if isinstance(value, dict):
        return {key: without_places(inner, places) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_places(inner, places) for inner in value]
    if isinstance(value, str) and any(value == p or value.startswith(p + "/") for p in places):
        return value.rstrip("/").rpartition("/")[2]
    return value


def places_of_this_machine(directory: Path) -> tuple[str, ...]:
    """What may not be told of this machine: where the model `directory` lies, and the user's home."""
    found = {str(directory), str(directory.absolute()), str(directory.resolve()), str(Path.home())}
    return tuple(sorted(place for place in found if place.startswith("/") and place != "/"))


def check_counts(config: dict[str, Any], tensors: int) -> None:
    """Refuses a config that counts more layers, experts or labels than `tensors` stored tensors can make up.

    Configs build lists of that length before any module exists. Errors: `InputError`.
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
    """Every whole number in a config with its key, at any depth."""
    open_: list[Any] = [config]
    while open_:
        value = open_.pop()
        if isinstance(value, dict):
            for key, inner in value.items():
                if isinstance(inner, int) and not isinstance(inner, bool):
                    yield str(key), inner
                else:
                    open_.append(inner)
        elif isinstance(value, list):
            open_.extend(value)
