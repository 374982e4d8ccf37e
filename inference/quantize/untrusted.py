"""What a source directory may be before anything of it is believed: its files, and the sizes its config claims.

A model may come from anyone. Nothing here reads weights or runs code; every refusal is one line.
"""

from __future__ import annotations

import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from errors import InputError, one_line

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


def shard_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a safetensors file's tensors, its header checked against its size.

    The library refuses a header that is cut, overlaps, leaves holes, or promises other sizes than there are.
    Errors: `InputError`.
    """
    if not stays_inside(path):
        raise InputError(f"{path.name} is a link that leads out of {path.parent}: put a copy in its place")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, OverflowError) as error:
        raise InputError(f"{path.name} is damaged ({one_line(error)}): download the model again") from None


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
                f"config.json says {one_line(key, 60)} {shown} beside {tensors} tensors of weights: the two do "
                "not belong together"
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


class TooLarge(Exception):
    """A config asks for more than its weights hold: one line."""


class AllocationLimit(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, no tensor may be made with more than `elements`, nor more than `operations` of them.

    The size of a result is learnt on the meta device first, so that what is refused never takes memory. Raises
    `TooLarge`.
    """

    def __init__(self, elements: int, operations: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = elements
        self.operations = operations
        self.filled = 0  # elements of tensors that hold values; empty ones take no memory before they do
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.count += 1
        if self.count > self.operations:
            raise TooLarge("config.json asks for more modules than the weights have tensors for")
        size = _result_size(func, args, kwargs)
        if "empty" not in str(func):
            self.filled += size
        if size > self.elements or self.filled > max(self.elements, 1 << 30):
            raise TooLarge(
                f"config.json asks for a tensor of {size:,} elements, more than all weights together hold"
            )
        return func(*args, **kwargs)


def _result_size(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Elements of the new tensors that `func` would make in memory; 0 where it makes none."""
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    asked = kwargs.get("device")
    made_here = asked is not None and str(asked) != "meta"
    if asked is not None and not made_here:
        return 0
    if (not made_here and (not tensors or any(t.is_meta for t in tensors))) or func._schema.is_mutable:
        return 0
    # A list of sizes is told without asking; negative ones are the library's to refuse.
    sizes = next((a for a in args if isinstance(a, list | tuple) and all(type(n) is int for n in a)), None)
    if not tensors and sizes is not None:
        return math.prod(max(n, 0) for n in sizes)
    away = tree_map_only(Tensor, lambda t: torch.empty_like(t, device="meta"), (args, kwargs))
    if made_here:
        away[1]["device"] = torch.device("meta")
    try:
        result = func(*away[0], **away[1])
    except Exception:
        return 0  # it needs values, or fails: then it fails for real too
    found = result if isinstance(result, list | tuple) else (result,)
    return sum(t.numel() for t in found if isinstance(t, Tensor))
