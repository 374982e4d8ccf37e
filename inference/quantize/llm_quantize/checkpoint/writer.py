"""The files of a checkpoint: planned, filled while the work goes on, and journaled step by step.

A step (`commit`) is on disk before the journal lists it, so that a run that was interrupted continues after the last
step that is listed and intact. Knows nothing of models, methods or formats.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm_quantize.checkpoint.background import BackgroundWriter
from llm_quantize.errors import WorkError
from llm_quantize.io import safetensors_files
from llm_quantize.io.atomic_directory import GIB, AtomicDirectory, fsync_path, write_error
from llm_quantize.io.journal import Journal
from llm_quantize.io.json_text import as_json
from llm_quantize.io.manifest import Part, whole
from llm_quantize.io.safetensors_files import PlannedTensor, ShardFile

INDEX = "model.safetensors.index.json"


def digest(host: Tensor) -> str:
    """A 128-bit hash, in hex, of dtype, shape and bytes of a contiguous tensor in host memory."""
    hasher = xxhash.xxh3_128(_prefix(host.dtype, tuple(host.shape)))
    hasher.update(safetensors_files.raw_bytes(host))
    return hasher.hexdigest()


def _prefix(dtype: torch.dtype, shape: tuple[int, ...]) -> bytes:
    return f"{dtype} {shape}".encode()


class CheckpointWriter:
    """Fills the content of an atomic directory with the planned tensors. A context manager; it does not publish.

    tensors: every tensor there will be, in the order in which files are filled.
    first: the journal's first entry, which says what the run is; entries under another one are begun anew.
    keep: whether a run that fails keeps its steps for the next one.

    steps: what the steps that were done at the start were committed with. planned, shards: the tensors and files.
    digests: of the tensors handed in, by name; layers: of what was remembered, by layer.
    Every method raises WorkError, for an earlier write too.
    """

    def __init__(
        self,
        output: AtomicDirectory,
        tensors: Sequence[PlannedTensor],
        first: dict[str, Any],
        *,
        keep: bool = True,
        shard_bytes: int = 2 * GIB,
    ) -> None:
        if not tensors:
            raise WorkError("nothing to write: the checkpoint has no tensors")
        self.directory = output.content
        self.steps: list[Any] = []
        self.planned = {tensor.name: tensor for tensor in tensors}
        self.shards: list[ShardFile] = safetensors_files.plan_shards(tensors, shard_bytes)
        self.digests: dict[str, str] = {}  # filled by the thread
        self.layers: dict[str, list[str]] = {}
        self._output = output
        self._first = first
        self._keep = keep
        self._handles: list[int] = []
        self._places: dict[str, tuple[int, int]] = {}  # descriptor and offset of each tensor
        self._journal = Journal(output.work / "journal")
        self._step: list[str] = []  # tensors added since the last commit
        self._step_layers: list[str] = []
        self._background = BackgroundWriter(output.target.parent)

    def __enter__(self) -> Self:
        try:
            self._open()
        except OSError as error:
            self._close()
            raise write_error(error, self._output.target.parent) from None
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        self._background.close()
        for handle in self._handles:
            os.close(handle)
        self._handles = []
        self._journal.close()

    # -- opening

    def _open(self) -> None:
        done = self._intact_entries()
        if done == 0:
            self._output.clear()
            self._handles = [safetensors_files.create(shard, self.directory) for shard in self.shards]
            if len(self.shards) > 1:
                self._output.write(INDEX, self._index().encode())
            for path in (*self.directory.iterdir(), self.directory):
                fsync_path(path)
            self._journal.keep(0)
            self._journal.append(self._first)
        else:
            self._handles = [
                os.open(self.directory / shard.file, os.O_RDWR | os.O_CLOEXEC) for shard in self.shards
            ]
            self._journal.keep(done)
            # Side files that an earlier start wrote are written again, as the source has them now.
            self._output.keep_only({INDEX, *(shard.file for shard in self.shards)})
            if len(self.shards) > 1:
                self._output.manifest.add(INDEX, whole(self._index().encode()))
        for handle, shard in zip(self._handles, self.shards, strict=True):
            self._places |= {name: (handle, offset) for name, offset in shard.offsets.items()}
        self.steps = [entry["data"] for entry in self._journal.entries[1:]]
        self._output.keep = self._keep and bool(self.steps)

    def _intact_entries(self) -> int:
        """How many of the journal's entries hold: the first is this run's, and the files have what they list."""
        entries = self._journal.entries
        if not entries or entries[0] != self._first or not self._intact_files():
            return 0
        files = {name: shard.file for shard in self.shards for name in shard.offsets}
        for number, entry in enumerate(entries[1:], 1):
            listed, layers = entry.get("tensors"), entry.get("layers")
            if not isinstance(listed, dict) or not isinstance(layers, dict) or "data" not in entry:
                return number
            for name, expected in listed.items():
                if name not in files or self._stored_digest(name, files[name]) != expected:
                    return number
            self.digests |= listed
            self.layers |= layers
        return len(entries)

    def _intact_files(self) -> bool:
        """Whether all files are there with their lengths and headers."""
        for shard in self.shards:
            path = self.directory / shard.file
            if not path.is_file() or path.stat().st_size != shard.size:
                return False
            with path.open("rb") as file:
                if file.read(len(shard.header)) != shard.header:
                    return False
        index = self.directory / INDEX
        return len(self.shards) == 1 or (index.is_file() and index.read_bytes() == self._index().encode())

    def _stored_digest(self, name: str, file: str) -> str | None:
        try:
            with safe_open(self.directory / file, framework="pt") as stored:
                return digest(stored.get_tensor(name))
        except (SafetensorError, OSError):
            return None

    def _index(self) -> str:
        weight_map = {name: shard.file for shard in self.shards for name in shard.offsets}
        return as_json(
            {"metadata": {"total_size": self.tensor_bytes}, "weight_map": dict(sorted(weight_map.items()))}
        )

    # -- tensors

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all planned tensors."""
        return sum(tensor.nbytes for tensor in self.planned.values())

    def add(self, name: str, tensor: Tensor, *, fixed: bool = False) -> None:
        """Take a tensor from any device, to be written. Raises ValueError where it is not as planned.

        A copy is taken, but of a tensor in host memory that is `fixed`. Waits for room, not for the device.
        """
        planned = self.planned.get(name)
        if planned is None or (tensor.dtype, tuple(tensor.shape)) != (planned.dtype, planned.shape):
            raise ValueError(
                f"{name}: {tensor.dtype} {tuple(tensor.shape)} is not what was planned, {planned}"
            )
        if name in self.digests or name in self._step:
            raise ValueError(f"{name} is there already")
        self._step.append(name)
        self._background.hand_over(tensor, lambda host: self._write(name, host), fixed=fixed)

    def remember(self, layer: str, parts: Sequence[Tensor]) -> None:
        """Keep the digests of what reading `layer` back must give, in order; not the tensors themselves."""
        digests: list[str] = []
        self.layers[layer] = digests
        self._step_layers.append(layer)
        for part in parts:  # one thread: in this order
            self._background.hand_over(part, lambda host: digests.append(digest(host)))

    def forget(self) -> None:
        """Drop what was added since the last commit: it will be added again."""
        self.wait()
        for name in self._step:
            del self.digests[name]
        for layer in self._step_layers:
            del self.layers[layer]
        self._step, self._step_layers = [], []

    def commit(self, data: Any) -> None:
        """End a step: all that was added is on disk, and then listed with `data` (JSON values) in the journal."""
        names, layers = self._step, {name: self.layers[name] for name in self._step_layers}
        self._step, self._step_layers = [], []

        def write() -> None:
            for handle in {self._places[name][0] for name in names}:
                os.fsync(handle)
            listed = {name: self.digests[name] for name in names}
            self._journal.append({"tensors": listed, "layers": layers, "data": data})
            self._output.keep = self._keep

        self._background.submit(write)

    def wait(self) -> None:
        """Return when everything handed in is written."""
        self._background.wait()

    def settle(self) -> None:
        """Say, when all tensors are written, what `publish` must find in every file: what was handed in."""
        self.wait()
        for shard in self.shards:
            parts = list(whole(shard.header))
            for name in sorted(shard.offsets, key=lambda name: shard.offsets[name]):
                planned = self.planned[name]
                parts.append(Part(planned.nbytes, self.digests[name], _prefix(planned.dtype, planned.shape)))
            self._output.manifest.add(shard.file, parts)

    def _write(self, name: str, host: Tensor) -> None:
        handle, offset = self._places[name]
        safetensors_files.write_at(handle, safetensors_files.raw_bytes(host), offset)
        self.digests[name] = digest(host)
