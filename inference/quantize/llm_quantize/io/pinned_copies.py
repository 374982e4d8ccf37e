"""Copy tensors between host and device asynchronously, through bounded pinned memory that is reused.

Pinning memory is slow, and a copy from or to unpinned memory blocks the caller. Each direction therefore has one
pinned buffer for all its copies. Where the system gives no pinned memory, the caller makes a plain copy instead.
This module knows tensors only: no files, no models.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

RING_BYTES = 256 << 20  # pinned memory for pending copies to the host
LARGEST_PREFETCH = 2 << 30  # bytes; a larger batch is not prefetched
FREE_FACTOR = 4  # prefetch only if this many times the batch's bytes are available
_ALIGN = 512  # bytes


def pinned_memory(size: int) -> Tensor | None:
    """Allocate `size` bytes of page-locked host memory.

    Returns uint8 (size), or None where the system does not give it.
    """
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except (RuntimeError, MemoryError):  # no device, or a limit on locked memory
        return None


def available_memory() -> int:
    """Return the bytes of host memory available without swapping; 2**60 where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        pass
    return 1 << 60


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _view(memory: Tensor, start: int, like: Tensor) -> Tensor:
    """Return a view of `memory` from byte `start`, contiguous, with the shape and dtype of `like`."""
    return memory[start : start + like.nbytes].view(like.dtype).view(like.shape)


# ------------------------------------------------------------------------------------------------------------
# Device to host


class PendingCopy:
    """Hold a copy to the host that may still be under way.

    The host memory belongs to this copy until the holder calls `release`, once.
    """

    def __init__(self, host: Tensor, done: Callable[[], object], release: Callable[[], None]) -> None:
        self._host, self._done = host, done
        self.release = release

    def wait(self) -> Tensor:
        """Wait until the copy is complete; return the tensor in host memory. May be called again."""
        self._done()
        return self._host


class _Slot:
    """A range of bytes in the ring: `start` to `stop`. `free`: its copy has been released."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop, self.free = start, stop, False


class DeviceToHostCopier:
    """Copy tensors from a GPU into a ring of `size` bytes of pinned memory, on a side stream.

    One thread calls `take`; any thread may call `release` on a copy. The caller may change or drop a tensor as soon
    as `take` returns: the device runs such work after the copy.

    allocate: returns uint8 (size) of pinned memory, or None where there is none.
    """

    def __init__(
        self, size: int = RING_BYTES, allocate: Callable[[int], Tensor | None] = pinned_memory
    ) -> None:
        self._size, self._allocate = size, allocate
        self._memory: Tensor | None = None
        self._unavailable = False  # the system gave no pinned memory: do not ask again
        self._slots: deque[_Slot] = deque()  # in the order in which they were taken
        self._changed = threading.Condition()
        self._stream: Any = None

    def serves(self, tensor: Tensor) -> bool:
        """Return whether this copier helps with `tensor`: only with one on a GPU."""
        return tensor.is_cuda

    def take(self, tensor: Tensor) -> PendingCopy | None:
        """Start to copy `tensor` to the host, contiguous; wait for a free slot if need be, not for the device.

        Returns None where the tensor is empty, larger than the ring or in host memory already, or where there is no
        pinned memory.

        A slot becomes free only when others release their copies. To avoid a deadlock, no thread may hold two
        copies that it could release.
        """
        need = _aligned(tensor.nbytes)
        if self._unavailable or not self.serves(tensor) or not 0 < need <= self._size:
            return None
        if self._memory is None:
            self._memory = self._allocate(self._size)
            if self._memory is None:
                self._unavailable = True
                return None
        tensor = tensor.detach().contiguous()
        with self._changed:
            while (start := self._free_offset(need)) is None:
                self._changed.wait()
            slot = _Slot(start, start + need)
            self._slots.append(slot)
        host = _view(self._memory, slot.start, tensor)
        try:
            done = self.start_copy(host, tensor)
        except BaseException:
            self._release(slot)
            raise
        return PendingCopy(host, done, lambda: self._release(slot))

    def start_copy(self, host: Tensor, tensor: Tensor) -> Callable[[], object]:
        """Start to copy `tensor` into `host`; return a function that waits until the copy is complete."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # the allocator must not reuse its memory before the copy is complete
        done: Any = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(stream)
        wait: Callable[[], object] = done.synchronize
        return wait

    def _free_offset(self, need: int) -> int | None:
        """Return an offset at which `need` consecutive bytes of the ring are free, or None."""
        if not self._slots:
            return 0
        first, last = self._slots[0].start, self._slots[-1].stop
        if last <= first:  # the used part wraps around: the free bytes lie between its end and its start
            return last if last + need <= first else None
        if last + need <= self._size:
            return last
        return 0 if need <= first else None

    def _release(self, slot: _Slot) -> None:
        with self._changed:
            slot.free = True
            while self._slots and self._slots[0].free:
                self._slots.popleft()
            self._changed.notify_all()


# ------------------------------------------------------------------------------------------------------------
# Host to device


class _Batch:
    """The tensors of one `start`: `futures` are filled by the thread, `not_taken` belongs to the caller."""

    def __init__(self, names: Iterable[str]) -> None:
        self.futures: dict[str, Future[Tensor | None]] = {name: Future() for name in names}
        self.not_taken = set(self.futures)


class Prefetcher:
    """Read tensors into pinned memory in a background thread, before they are needed on the device.

    The pinned buffer is as large as the largest batch so far.

    read: returns the tensor of a name in host memory, memory-mapped where possible, so that the pages are read only
    when this class copies them. The background thread calls it.
    allocate: returns uint8 (size) of pinned memory, or None where there is none.
    """

    def __init__(
        self, read: Callable[[str], Tensor], allocate: Callable[[int], Tensor | None] = pinned_memory
    ) -> None:
        self._read, self._allocate = read, allocate
        self._memory: Tensor | None = None
        self._batch = _Batch(())
        self._thread: ThreadPoolExecutor | None = None
        self._last_copy: Any = None  # event: the last copy from the buffer to the device

    def serves(self, device: torch.device) -> bool:
        """Return whether prefetch helps with tensors for `device`: only for a GPU."""
        return device.type == "cuda"

    def start(self, names: Iterable[str]) -> None:
        """Start to read the tensors `names`; drop those of the batch before that were not taken."""
        self._batch = batch = _Batch(names)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._thread.submit(self._fill, batch)

    def take(self, name: str, device: torch.device) -> Tensor | None:
        """Return the tensor `name` on `device`, in memory of its own; wait until it has been read.

        Returns None where the tensor was not prefetched or has been taken: the caller reads it then.
        Raises what `read` raised for this name.
        """
        if not self.serves(device) or name not in self._batch.not_taken:
            return None
        self._batch.not_taken.remove(name)
        host = self._batch.futures[name].result()
        if host is None:
            return None
        if device.type != "cuda":
            return host.clone()
        tensor = host.to(device, non_blocking=True)
        copied: Any = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        copied.record(torch.cuda.current_stream(device))
        self._last_copy = copied
        return tensor

    def _fill(self, batch: _Batch) -> None:
        """Read the tensors of `batch` into the buffer, in order, and complete all its futures."""
        unread = dict(batch.futures)
        try:
            mapped: dict[str, Tensor] = {}
            for name, future in batch.futures.items():
                try:
                    mapped[name] = self._read(name)
                except Exception as error:
                    unread.pop(name)
                    future.set_exception(error)
            memory = self._buffer(sum(_aligned(tensor.nbytes) for tensor in mapped.values()))
            if memory is None:
                return
            if self._last_copy is not None:  # the device may still read the batch before
                self._last_copy.synchronize()
            start = 0
            for name, tensor in mapped.items():
                if batch is not self._batch:
                    return
                if tensor.nbytes == 0:
                    continue
                host = _view(memory, start, tensor)
                host.copy_(tensor)
                start += _aligned(tensor.nbytes)
                unread.pop(name).set_result(host)
        finally:
            for future in unread.values():  # None: the caller reads the tensor itself
                future.set_result(None)

    def _buffer(self, size: int) -> Tensor | None:
        """Return pinned memory of at least `size` bytes, or None where `size` is 0 or memory is short."""
        if not 0 < size <= LARGEST_PREFETCH:
            return None
        if self._memory is None or self._memory.numel() < size:
            self._memory = None
            if available_memory() < FREE_FACTOR * size:
                return None
            self._memory = self._allocate(size)
        return self._memory
