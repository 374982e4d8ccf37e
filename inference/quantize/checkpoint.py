"""A checkpoint directory that is complete or absent: written aside, read back, then renamed into place.

Shards are written by one background thread while the work goes on; one shard is being filled and at most one
is being written. Knows nothing of models or methods.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from errors import InputError, WorkError
from packing import SUFFIXES, unpack

GIB = 1 << 30


# ------------------------------------------------------------------------------------------------------------
# Before the work


def check_target(path: Path, overwrite: bool, bytes_needed: int = 0, source: Path | None = None) -> None:
    """Raises `InputError` if a checkpoint of about `bytes_needed` bytes could not be published at `path`."""
    path = Path(path)
    target = Path(os.path.realpath(path))
    if source is not None:
        origin = Path(os.path.realpath(source))
        if target == origin or origin in target.parents:
            raise InputError(
                f"{path} is the source model's directory or inside it: choose another --output_path"
            )
        if target in origin.parents and target.exists():
            raise InputError(f"{path} holds the source model: choose another --output_path")
    if target.exists():
        if not target.is_dir():
            raise InputError(f"{path} exists and is not a directory: choose another --output_path")
        if not overwrite:
            raise InputError(f"{path} exists: use --overwrite, or choose another --output_path")
        if target.parent == target or target.is_mount():
            raise InputError(f"{path} is a mount point, which cannot be replaced: name a directory inside it")
        try:
            replaceable = (target / "config.json").is_file() or not any(target.iterdir())
        except OSError as error:
            raise InputError(f"cannot look into {path}: {error.strerror}") from None
        if not replaceable:
            raise InputError(
                f"{path} holds files but no config.json, so it is no checkpoint that --overwrite may delete: "
                "choose another --output_path"
            )
    parent = target.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"{parent} is not a directory: choose another --output_path")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"{parent} is not writable: choose another --output_path")
    free = shutil.disk_usage(parent).free
    if free < bytes_needed:
        raise InputError(
            f"too little disk at {parent}: about {_size(bytes_needed)} needed, {_size(free)} free: "
            f"free {_size(bytes_needed - free)} or choose another --output_path"
        )


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count >= GIB // 8 else f"{-(-count // 1024)} KiB"


# ------------------------------------------------------------------------------------------------------------
# What was written


class Record(NamedTuple):
    """What a tensor must look like when it is read back."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    digest: bytes


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def record(host: Tensor) -> Record:
    """dtype, shape and a 128-bit hash of dtype, shape and bytes of a contiguous tensor in host memory."""
    shape = tuple(host.shape)
    hasher = xxhash.xxh3_128(f"{host.dtype} {shape}".encode())
    hasher.update(host.reshape(-1).view(torch.uint8).numpy().data)
    return Record(host.dtype, shape, hasher.digest())


@dataclass(slots=True)
class _Shard:
    file: Path
    tensors: dict[str, Tensor] = field(default_factory=dict)
    size: int = 0


@dataclass(frozen=True, slots=True)
class Published:
    """What `finish` put in place: tensor bytes, shards, and side files left out (links that lead away)."""

    tensor_bytes: int
    shards: tuple[str, ...]
    skipped: tuple[str, ...]


class CheckpointWriter:
    """Context manager: `add` tensors, `remember` some layers, `finish`. Left before that, it leaves nothing.

    `check_target` is asked again on entry. With `overwrite` an old checkpoint stays until the new one is
    verified. Errors: `InputError` for the target, `WorkError` for everything later.
    """

    def __init__(self, target: Path, *, overwrite: bool, shard_bytes: int = 2 * GIB) -> None:
        self.shown = Path(target)
        self.target = Path(os.path.realpath(target))
        self.overwrite = overwrite
        self.shard_bytes = shard_bytes
        self.partial = self.target.parent / f".{self.target.name}.partial-{secrets.token_hex(4)}"
        self._made: list[Path] = []  # parents that were not there before
        self._records: dict[str, Record] = {}
        self._layers: dict[str, tuple[Record, Record, Record]] = {}
        self._shards: list[_Shard] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._published = False

    def __enter__(self) -> Self:
        check_target(self.shown, self.overwrite)
        try:
            missing = [p for p in self.target.parents if not p.exists()]
            for parent in reversed(missing):
                parent.mkdir()
                self._made.append(parent)
            self.partial.mkdir()
        except OSError as error:
            self._abort()
            raise InputError(f"cannot write to {self.target.parent}: {error.strerror}") from None
        except BaseException:
            self._abort()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._published:
            self._thread.shutdown()
        else:
            self._abort()

    def _abort(self) -> None:
        try:
            # The thread may be inside a file: let it end, so that it cannot write into what is being removed.
            self._thread.shutdown(wait=True, cancel_futures=True)
        finally:
            shutil.rmtree(self.partial, ignore_errors=True)
            for parent in reversed(self._made):
                with suppress(OSError):
                    parent.rmdir()

    # -- tensors

    def add(self, name: str, tensor: Tensor) -> None:
        """Copies a tensor from any device to the current shard; starts writing the shard when it is full.

        Errors: `WorkError` also for an earlier shard that could not be written.
        """
        if self._pending is not None and self._pending.done():
            self._pending.result()
        if name in self._records:
            raise ValueError(f"{name} is there already")
        host = _on_host(tensor)
        if self._shards and self._shards[-1].size + host.nbytes > self.shard_bytes:
            self._flush()
        if not self._shards or not self._shards[-1].tensors:
            self._shards.append(_Shard(self.partial / f"shard-{len(self._shards) + 1}"))
        self._records[name] = record(host)
        self._shards[-1].tensors[name] = host
        self._shards[-1].size += host.nbytes

    def remember(self, layer: str, q: Tensor, scale: Tensor, zero: Tensor) -> None:
        """What `unpack` must give for `layer` when the files are read back; hashes are kept, not the tensors.

        q: uint8 (out, in); scale, zero: float32 (out, G).
        """
        self._layers[layer] = (record(_on_host(q)), record(_on_host(scale)), record(_on_host(zero)))

    def _flush(self) -> None:
        """Hands the current shard to the thread, after the one before has been written."""
        if self._pending is not None:
            self._pending.result()
        if self._shards and self._shards[-1].tensors:
            shard = self._shards[-1]
            self._pending = self._thread.submit(self._write, shard.file, shard.tensors, shard.size)
            shard.tensors = {}  # the thread holds them now, until they are on disk

    def _write(self, file: Path, tensors: dict[str, Tensor], size: int) -> None:
        try:
            file.touch()
            mode = file.stat().st_mode  # the umask's; safetensors makes files for their owner alone
            save_file(tensors, file, metadata={"format": "pt"})
            file.chmod(mode)
            _sync(file)
        except (OSError, SafetensorError) as error:
            file.unlink(missing_ok=True)
            raise self._failure(error, size) from None

    def _failure(self, error: Exception, size: int) -> WorkError:
        """One line for an error in writing about `size` bytes (0: few)."""
        text = (
            getattr(error, "strerror", None) or str(error).strip().partition("\n")[0] or type(error).__name__
        )
        # safetensors words an error of the system as text, with its number.
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or any(
            f"os error {number})" in text for number in (errno.ENOSPC, errno.EDQUOT)
        )
        if not full:
            return WorkError(f"cannot write to {self.target.parent}: {text}")
        if not size:
            return WorkError(f"disk full at {self.target.parent}: free some space and run again")
        free = shutil.disk_usage(self.target.parent).free
        missing = f"{_size(size - free)} more" if size > free else "space (a quota may be reached)"
        return WorkError(
            f"disk full at {self.target.parent}: {_size(size)} to write, {_size(free)} free: "
            f"free {missing} and run again"
        )

    # -- the end

    def finish(
        self,
        config: dict[str, Any],
        side_files: Sequence[Path],
        extra_json: dict[str, dict[str, Any]],
        *,
        layout: str,
        bits: int,
        group_size: int,
        accept: Callable[[Path], None] | None = None,
    ) -> Published:
        """Writes what is left, reads everything back, and renames the directory into place.

        `config` becomes config.json; `extra_json` maps plain file names to their contents; `side_files` are
        copied from the source's directory unless one of that name has been written. `layout`, `bits` and
        `group_size` tell how to unpack what `remember` was given. `accept` is called with the complete,
        verified directory before it is published, and may raise to prevent that. Errors: `WorkError`, naming
        tensor or file.
        """
        self._flush()
        if self._pending is not None:
            self._pending.result()
        if not self._records:
            raise WorkError("nothing to write: the checkpoint has no tensors")
        try:
            self._name_shards()
            skipped = self._write_others(config, side_files, extra_json)
            self._verify(layout, bits, group_size)
            if accept is not None:
                accept(self.partial)
            _sync(self.partial)
            self._publish()
        except OSError as error:
            raise self._failure(error, 0) from None
        total = sum(shard.size for shard in self._shards)
        return Published(total, tuple(shard.file.name for shard in self._shards), skipped)

    def _name_shards(self) -> None:
        count = len(self._shards)
        for number, shard in enumerate(self._shards, 1):
            name = f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
            shard.file = shard.file.rename(self.partial / name)

    def _write_others(
        self, config: dict[str, Any], side_files: Sequence[Path], extra_json: dict[str, dict[str, Any]]
    ) -> tuple[str, ...]:
        # Where the source lay is nobody's business.
        documents = {"config.json": {k: v for k, v in config.items() if k != "_name_or_path"}, **extra_json}
        if len(self._shards) > 1:
            weight_map = {name: shard.file.name for shard in self._shards for name in _names(shard.file)}
            documents["model.safetensors.index.json"] = {
                "metadata": {"total_size": sum(shard.size for shard in self._shards)},
                "weight_map": dict(sorted(weight_map.items())),
            }
        for name, content in documents.items():
            if Path(name).name != name:
                raise ValueError(f"not a plain file name: {name}")
            file = self.partial / name
            file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
            _sync(file)
        skipped = []
        for path in side_files:
            file = self.partial / path.name
            if file.exists():
                continue
            if not _stays_inside(path):
                skipped.append(path.name)
                continue
            shutil.copyfile(path, file)
            _sync(file)
        return tuple(skipped)

    def _verify(self, layout: str, bits: int, group_size: int) -> None:
        """Reads every shard back and compares it with what was handed in."""
        missing = set(self._records)
        parts: dict[str, dict[str, Tensor]] = {layer: {} for layer in self._layers}
        for shard in self._shards:
            try:
                with safe_open(shard.file, framework="pt") as stored:
                    for name in stored.keys():  # noqa: SIM118 (not a mapping)
                        tensor = stored.get_tensor(name)
                        self._compare(name, tensor, shard.file.name)
                        missing.discard(name)
                        layer, _, suffix = name.rpartition(".")
                        if layer in parts and suffix in SUFFIXES[layout]:
                            parts[layer][suffix] = tensor
            except SafetensorError as error:
                raise WorkError(
                    f"{shard.file.name} cannot be read back ({error}): check the disk and run again"
                ) from None
        if missing:
            raise WorkError(f"{min(missing)} is missing in the files written: check the disk and run again")
        for layer, tensors in parts.items():
            try:
                found = unpack(layout, tensors, bits, group_size)
            except (KeyError, ValueError) as error:
                raise WorkError(f"{layer} cannot be unpacked from the files written: {error}") from None
            for what, tensor, expected in zip(
                ("integers", "scales", "zero points"), found, self._layers[layer], strict=True
            ):
                if record(tensor) != expected:
                    raise WorkError(f"{layer}: the {what} in the files are not those that were computed")

    def _compare(self, name: str, tensor: Tensor, file: str) -> None:
        expected = self._records.get(name)
        if expected is None:
            raise WorkError(f"{name} in {file} was never written: check the disk and run again")
        found = record(tensor)
        if found[:2] != expected[:2]:
            raise WorkError(
                f"{name} in {file} is {found.dtype} {found.shape}, not {expected.dtype} {expected.shape}: "
                "check the disk and run again"
            )
        if found.digest != expected.digest:
            raise WorkError(f"{name} in {file} differs from what was written: check the disk and run again")
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise WorkError(f"{name} has NaN or infinite values: the checkpoint is not published")

    def _publish(self) -> None:
        old: Path | None = None
        if self.target.exists():
            check_target(self.shown, self.overwrite)  # it may have appeared or changed since
            old = self.target.parent / f".{self.target.name}.old-{secrets.token_hex(4)}"
        try:
            if old is not None:
                self.target.rename(old)
            self.partial.rename(self.target)
        except BaseException:
            if old is not None and old.exists() and not self.target.exists():
                old.rename(self.target)
            raise
        self._published = True
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
        _sync(self.target.parent)


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as stored:
        return list(stored.keys())


def _sync(path: Path) -> None:
    """fsync of a file or directory."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _stays_inside(path: Path) -> bool:
    """Whether a side file is a regular file of its own directory.

    A hub cache's snapshot holds links into `blobs` of the same repository: those count.
    """
    home = path.parent.resolve()
    real = path.resolve()
    roots = [home]
    if home.parent.name == "snapshots":
        roots.append(home.parent.parent / "blobs")
    return real.is_file() and any(root in real.parents for root in roots)
