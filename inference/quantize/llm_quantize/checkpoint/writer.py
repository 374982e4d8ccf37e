"""The files of a checkpoint: planned, filled while the work goes on, journaled step by step, read back.

One background thread hashes and writes; what waits for it is bounded. Tensors on a GPU are copied to the host without
the caller waiting for it, in pinned memory that is bounded too. A step (`commit`) is on disk before the journal
lists it, so that a run that was interrupted continues after the last step that is listed and intact. Knows nothing of
models or methods.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm_quantize.errors import WorkError
from llm_quantize.formats.packing import SUFFIXES, unpack
from llm_quantize.io import safetensors_files
from llm_quantize.io.atomic_directory import GIB, AtomicDirectory, as_json, failure, sync
from llm_quantize.io.journal import Journal
from llm_quantize.io.pinned_copies import DeviceToHostCopier
from llm_quantize.io.safetensors_files import Planned

_WAITING = 512 << 20  # bytes that may wait for the thread
_READERS = 4  # threads that compare what is read back
_PIECE = 1 << 22  # values looked at together


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _lies_ready(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.is_contiguous()


def digest(host: Tensor) -> str:
    """A 128-bit hash, in hex, of dtype, shape and bytes of a contiguous tensor in host memory."""
    hasher = xxhash.xxh3_128(f"{host.dtype} {tuple(host.shape)}".encode())
    hasher.update(safetensors_files.raw(host))
    return hasher.hexdigest()


class CheckpointWriter:
    """Fills `staging.content` with the planned tensors. Context manager; leaves publishing to `staging`.

    `tensors`: every tensor there will be, in the order in which files are filled. `first`: the journal's first
    entry, which says what the run is; entries under another one are begun anew. `keep`: a run that fails keeps its
    steps for the next one. `steps`: what the steps that were done at the start were committed with. Errors:
    `WorkError` everywhere, for an earlier write too.
    """

    def __init__(
        self,
        output_dir: AtomicDirectory,
        tensors: Sequence[Planned],
        first: dict[str, Any],
        *,
        keep: bool = True,
        shard_bytes: int = 2 * GIB,
    ) -> None:
        if not tensors:
            raise WorkError("nothing to write: the checkpoint has no tensors")
        self.directory = output_dir.content
        self.steps: list[Any] = []
        self._output_dir = output_dir
        self._first = first
        self._keep = keep
        self._plan = {tensor.name: tensor for tensor in tensors}
        self._shards = safetensors_files.plan(tensors, shard_bytes)
        self._handles: list[int] = []
        self._places: dict[str, tuple[int, int]] = {}  # descriptor and offset of each tensor
        self._journal = Journal(output_dir.work / "journal")
        self._digests: dict[str, str] = {}  # of what was handed in, filled by the thread
        self._layers: dict[str, list[str]] = {}
        self._step: list[str] = []  # what was added since the last commit
        self._step_layers: list[str] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._copier = DeviceToHostCopier()
        self._error: WorkError | None = None

    def __enter__(self) -> Self:
        try:
            self._open()
        except OSError as error:
            self._close()
            raise failure(error, self._output_dir.target.parent) from None
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        self._thread.shutdown(wait=True)
        for handle in self._handles:
            os.close(handle)
        self._handles = []
        self._journal.close()

    # -- opening

    def _open(self) -> None:
        done = self._intact()
        if done == 0:
            self._output_dir.clear()
            self._handles = [safetensors_files.create(shard, self.directory) for shard in self._shards]
            self._write_index()
            for path in (*self.directory.iterdir(), self.directory):
                sync(path)
            self._journal.keep(0)
            self._journal.append(self._first)
        else:
            self._handles = [
                os.open(self.directory / shard.file, os.O_RDWR | os.O_CLOEXEC) for shard in self._shards
            ]
            self._journal.keep(done)
        for handle, shard in zip(self._handles, self._shards, strict=True):
            self._places |= {name: (handle, offset) for name, offset in shard.offsets.items()}
        self.steps = [entry["data"] for entry in self._journal.entries[1:]]
        self._output_dir.keep = self._keep and bool(self.steps)

    def _intact(self) -> int:
        """How many of the journal's entries hold: the first is this run's, and the files have what they list."""
        entries = self._journal.entries
        if not entries or entries[0] != self._first:
            return 0
        for shard in self._shards:
            path = self.directory / shard.file
            if not path.is_file() or path.stat().st_size != shard.size:
                return 0
            with path.open("rb") as file:
                if file.read(len(shard.header)) != shard.header:
                    return 0
        index = self.directory / "model.safetensors.index.json"
        if len(self._shards) > 1 and (
            not index.is_file() or index.read_text(encoding="utf-8") != self._index()
        ):
            return 0
        files = {name: shard.file for shard in self._shards for name in shard.offsets}
        for number, entry in enumerate(entries[1:], 1):
            listed, layers = entry.get("tensors"), entry.get("layers")
            if not isinstance(listed, dict) or not isinstance(layers, dict) or "data" not in entry:
                return number
            for name, expected in listed.items():
                if name not in files or self._read(name, files[name]) != expected:
                    return number
            self._digests |= listed
            self._layers |= layers
        return len(entries)

    def _read(self, name: str, file: str) -> str | None:
        try:
            with safe_open(self.directory / file, framework="pt") as stored:
                return digest(stored.get_tensor(name))
        except (SafetensorError, OSError):
            return None

    def _index(self) -> str:
        weight_map = {name: shard.file for shard in self._shards for name in shard.offsets}
        total = sum(tensor.nbytes for tensor in self._plan.values())
        return as_json({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})

    def _write_index(self) -> None:
        if len(self._shards) > 1:
            (self.directory / "model.safetensors.index.json").write_text(self._index(), encoding="utf-8")

    # -- tensors

    @property
    def tensor_bytes(self) -> int:
        """What all planned tensors take."""
        return sum(tensor.nbytes for tensor in self._plan.values())

    def add(self, name: str, tensor: Tensor, *, fixed: bool = False) -> None:
        """Takes a tensor from any device, to be written. `ValueError` where it is not as planned.

        A copy is taken, but of one in host memory that is `fixed`: nobody will change that, and it takes no room here.
        Waits for room, not for the device.
        """
        planned = self._plan.get(name)
        if planned is None or (tensor.dtype, tuple(tensor.shape)) != (planned.dtype, planned.shape):
            raise ValueError(
                f"{name}: {tensor.dtype} {tuple(tensor.shape)} is not what was planned, {planned}"
            )
        if name in self._digests or name in self._step:
            raise ValueError(f"{name} is there already")
        self._step.append(name)
        self._hand_over(tensor, lambda host: self._write(name, host), fixed)

    def remember(self, layer: str, q: Tensor, scale: Tensor, zero: Tensor) -> None:
        """What `unpack` must give for `layer` when the files are read back; hashes are kept, not the tensors.

        q: uint8 (out, in); scale, zero: float32 (out, G).
        """
        digests: list[str] = []
        self._layers[layer] = digests
        self._step_layers.append(layer)
        for part in (q, scale, zero):  # one thread: in this order
            self._hand_over(part, lambda host: digests.append(digest(host)))

    def forget(self) -> None:
        """Drops what was added since the last commit: it will be added again."""
        self.wait()
        for name in self._step:
            del self._digests[name]
        for layer in self._step_layers:
            del self._layers[layer]
        self._step, self._step_layers = [], []

    def commit(self, data: Any) -> None:
        """Ends a step: all that was added is on disk, and then listed with `data` (JSON values) in the journal."""
        names, layers = self._step, {name: self._layers[name] for name in self._step_layers}
        self._step, self._step_layers = [], []

        def write() -> None:
            for handle in {self._places[name][0] for name in names}:
                os.fsync(handle)
            listed = {name: self._digests[name] for name in names}
            self._journal.append({"tensors": listed, "layers": layers, "data": data})
            self._output_dir.keep = self._keep

        self._make_room(0)
        self._submit(write, 0)

    def _write(self, name: str, host: Tensor) -> None:
        handle, offset = self._places[name]
        safetensors_files.write_at(handle, safetensors_files.raw(host), offset)
        self._digests[name] = digest(host)

    def _hand_over(self, tensor: Tensor, work: Callable[[Tensor], object], fixed: bool = False) -> None:
        """Has the thread do `work` with what is in `tensor` now, contiguous in host memory."""
        if fixed and _lies_ready(tensor):
            host = tensor.detach()
            self._make_room(0)
            self._submit(lambda: work(host), host.nbytes, held=0)
            return
        self._make_room(tensor.nbytes)
        landing = self._copier.take(tensor)
        if landing is not None:
            self._submit(lambda: work(landing.wait()), tensor.nbytes, landing.release)
            return
        copy = _on_host(tensor)
        self._submit(lambda: work(copy), copy.nbytes)

    def _make_room(self, size: int) -> None:
        """Waits until `size` more bytes may wait. Errors: that of an earlier write."""
        self._raise()
        while self._waiting and (
            self._waiting[0][0].done() or sum(count for _, count in self._waiting) + size > _WAITING
        ):
            self._waiting.popleft()[0].result()
            self._raise()

    def _submit(
        self,
        work: Callable[[], object],
        size: int,
        after: Callable[[], object] = lambda: None,
        held: int | None = None,
    ) -> None:
        """Has the thread do `work` on `size` bytes, unless an earlier one failed, and `after` in any case.

        held: bytes of memory that are held until then, where those are not all.
        """

        def guarded() -> None:
            try:
                if self._error is None:  # nothing may be listed after a write that failed
                    work()
            except OSError as error:
                self._error = failure(error, self._output_dir.target.parent, size)
            finally:
                after()

        self._waiting.append((self._thread.submit(guarded), size if held is None else held))

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def wait(self) -> None:
        """Returns when everything handed in is written."""
        while self._waiting:
            self._waiting.popleft()[0].result()
        self._raise()

    # -- the end

    def complete(self, layout: str, bits: int, group_size: int, device: torch.device | str = "cpu") -> None:
        """Waits, reads every shard back, compares it with what was handed in, and makes it durable.

        device: where remembered layers are unpacked.
        """
        self.wait()
        missing = set(self._plan) - set(self._digests)
        if missing:
            raise WorkError(f"{min(missing)} was never written: report this as a fault of the program")
        parts: dict[str, dict[str, Tensor]] = {layer: {} for layer in self._layers}
        for shard in self._shards:
            try:
                with (
                    safe_open(self.directory / shard.file, framework="pt") as stored,
                    ThreadPoolExecutor(_READERS, thread_name_prefix="read-back") as readers,
                ):
                    found = set(stored.keys())
                    for name in shard.offsets:
                        if name not in found:
                            raise WorkError(
                                f"{name} is missing in {shard.file}: check the disk and run again"
                            )
                    tensors = {name: stored.get_tensor(name) for name in shard.offsets}
                    compared = [
                        readers.submit(self._compare, name, tensor, shard.file)
                        for name, tensor in tensors.items()
                    ]
                    try:
                        for future in compared:
                            future.result()
                    finally:
                        readers.shutdown(wait=True, cancel_futures=True)
                    for name, tensor in tensors.items():
                        layer, _, suffix = name.rpartition(".")
                        if layer in parts and suffix in SUFFIXES[layout]:
                            parts[layer][suffix] = tensor
            except (SafetensorError, OSError) as error:
                raise WorkError(
                    f"{shard.file} cannot be read back ({error}): check the disk and run again"
                ) from None
        for layer, packed in parts.items():
            try:
                unpacked = unpack(
                    layout, {suffix: tensor.to(device) for suffix, tensor in packed.items()}, bits, group_size
                )
            except (KeyError, ValueError) as error:
                raise WorkError(f"{layer} cannot be unpacked from the files written: {error}") from None
            for what, tensor, expected in zip(
                ("integers", "scales", "zero points"), unpacked, self._layers[layer], strict=True
            ):
                if digest(tensor.cpu()) != expected:
                    raise WorkError(f"{layer}: the {what} in the files are not those that were computed")
        try:
            sync(self.directory)
        except OSError as error:
            raise failure(error, self._output_dir.target.parent) from None

    def _compare(self, name: str, tensor: Tensor, file: str) -> None:
        planned = self._plan[name]
        if (tensor.dtype, tuple(tensor.shape)) != (planned.dtype, planned.shape):
            raise WorkError(
                f"{name} in {file} is {tensor.dtype} {tuple(tensor.shape)}, not {planned.dtype} "
                f"{planned.shape}: check the disk and run again"
            )
        if digest(tensor) != self._digests[name]:
            raise WorkError(f"{name} in {file} differs from what was written: check the disk and run again")
        # In pieces: what is asked of each value takes memory, of an embedding more than is held of it.
        if tensor.is_floating_point() and not all(
            bool(torch.isfinite(piece).all()) for piece in torch.split(tensor.reshape(-1), _PIECE)
        ):
            raise WorkError(f"{name} has NaN or infinite values: the checkpoint is not published")
