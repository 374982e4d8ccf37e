"""Tensors on their way between host and device, without anybody waiting for them: pinned memory, bounded, used again.

Pinning memory is slow and unpinned memory makes a copy wait, so each way has one piece of pinned memory for all that
passes. Where the system gives none, the caller copies as it would without this module. Knows tensors only.
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

POOL = 256 << 20  # bytes that may be on their way out
LARGEST = 2 << 30  # bytes that are read ahead at most
SPARE = 4  # times what is read ahead must be free
_ALIGN = 512


def pinned(size: int) -> Tensor | None:
    """uint8 (size) in page-locked host memory, None where the system does not give it."""
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except (RuntimeError, MemoryError):  # no device, or a limit on locked memory
        return None


def available() -> int:
    """Bytes of host memory that can be had without swapping; a great many where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) << 10
    except (OSError, ValueError, IndexError):
        pass
    return 1 << 60


def _aligned(size: int) -> int:
    return -(-size // _ALIGN) * _ALIGN


def _part(memory: Tensor, start: int, like: Tensor) -> Tensor:
    """A contiguous tensor of the shape and dtype of `like`, at byte `start` of `memory`."""
    return memory[start : start + like.nbytes].view(like.dtype).view(like.shape)


# ------------------------------------------------------------------------------------------------------------
# Out of the device


class PendingCopy:
    """One tensor on its way: `wait` gives it, in host memory that is its own until `release`."""

    def __init__(self, host: Tensor, done: Callable[[], object], release: Callable[[], None]) -> None:
        self._host, self._done = host, done
        self.release = release

    def wait(self) -> Tensor:
        self._done()
        return self._host


class _Place:
    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop, self.free = start, stop, False


class DeviceToHostCopier:
    """Copies tensors from a GPU into a ring of `size` bytes of pinned memory, on a stream of its own.

    One thread takes, any thread releases. The tensors may be changed or dropped as soon as `take` returns: that is
    ordered behind the copy, on the device.
    """

    def __init__(self, size: int = POOL, allocate: Callable[[int], Tensor | None] = pinned) -> None:
        self._size, self._allocate = size, allocate
        self._memory: Tensor | None = None
        self._none = False  # there is no such memory
        self._places: deque[_Place] = deque()  # in the order in which they were given
        self._change = threading.Condition()
        self._stream: Any = None

    def serves(self, tensor: Tensor) -> bool:
        """Whether tensors there need this."""
        return tensor.is_cuda

    def take(self, tensor: Tensor) -> PendingCopy | None:
        """Begins to copy `tensor`; waits for room alone. None where it does not fit at all, or is in host memory.

        Who waits for room relies on others to release: nobody may hold two that could be released.
        """
        need = _aligned(tensor.nbytes)
        if self._none or not self.serves(tensor) or not 0 < need <= self._size:
            return None
        if self._memory is None:
            self._memory = self._allocate(self._size)
            if self._memory is None:
                self._none = True
                return None
        tensor = tensor.detach().contiguous()
        with self._change:
            while (start := self._room(need)) is None:
                self._change.wait()
            place = _Place(start, start + need)
            self._places.append(place)
        host = _part(self._memory, place.start, tensor)
        try:
            done = self.launch(host, tensor)
        except BaseException:
            self._release(place)
            raise
        return PendingCopy(host, done, lambda: self._release(place))

    def launch(self, host: Tensor, tensor: Tensor) -> Callable[[], object]:
        """Begins the copy; the result waits for its end."""
        if self._stream is None:
            self._stream = torch.cuda.Stream(tensor.device)  # type: ignore[no-untyped-call]
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is not given to others before the copy has ended
        done: Any = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        done.record(stream)
        wait: Callable[[], object] = done.synchronize
        return wait

    def _room(self, need: int) -> int | None:
        """Where `need` bytes are free, one after another."""
        if not self._places:
            return 0
        first, last = self._places[0].start, self._places[-1].stop
        if last <= first:  # gone round: what is free lies between
            return last if last + need <= first else None
        if last + need <= self._size:
            return last
        return 0 if need <= first else None

    def _release(self, place: _Place) -> None:
        with self._change:
            place.free = True
            while self._places and self._places[0].free:
                self._places.popleft()
            self._change.notify_all()


# ------------------------------------------------------------------------------------------------------------
# Into the device


class _Batch:
    def __init__(self, names: Iterable[str]) -> None:
        self.found: dict[str, Future[Tensor | None]] = {name: Future() for name in names}  # for the thread
        self.left = set(self.found)  # for the one who takes


class Prefetcher:
    """Reads tensors ahead, in a thread, into one piece of pinned memory as large as the largest batch.

    read: gives a tensor in host memory, as far as can be without reading it (mapped); may be called in the thread.
    """

    def __init__(
        self, read: Callable[[str], Tensor], allocate: Callable[[int], Tensor | None] = pinned
    ) -> None:
        self._read, self._allocate = read, allocate
        self._memory: Tensor | None = None
        self._batch = _Batch(())
        self._thread: ThreadPoolExecutor | None = None
        self._used: Any = None  # the last copy out of the memory

    def serves(self, device: torch.device) -> bool:
        """Whether reading ahead pays for tensors that go there."""
        return device.type == "cuda"

    def begin(self, names: Iterable[str]) -> None:
        """Reads these from now on; what was begun before and not taken is dropped."""
        self._batch = batch = _Batch(names)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="ahead")
        self._thread.submit(self._fill, batch)

    def take(self, name: str, device: torch.device) -> Tensor | None:
        """The tensor `name` on `device`, in memory of its own; None where it was not read ahead, or has been taken.

        Errors: what `read` raised for it.
        """
        if not self.serves(device) or name not in self._batch.left:
            return None
        self._batch.left.remove(name)
        host = self._batch.found[name].result()
        if host is None:
            return None
        if device.type != "cuda":
            return host.clone()
        tensor = host.to(device, non_blocking=True)
        used: Any = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        used.record(torch.cuda.current_stream(device))
        self._used = used
        return tensor

    def _fill(self, batch: _Batch) -> None:
        left = dict(batch.found)
        try:
            mapped: dict[str, Tensor] = {}
            for name, future in batch.found.items():
                try:
                    mapped[name] = self._read(name)
                except Exception as error:
                    left.pop(name)
                    future.set_exception(error)
            memory = self._room(sum(_aligned(tensor.nbytes) for tensor in mapped.values()))
            if memory is None:
                return
            if self._used is not None:
                self._used.synchronize()
            start = 0
            for name, tensor in mapped.items():
                if batch is not self._batch:
                    return
                if tensor.nbytes == 0:
                    continue
                host = _part(memory, start, tensor)
                host.copy_(tensor)
                start += _aligned(tensor.nbytes)
                left.pop(name).set_result(host)
        finally:
            for future in left.values():  # whoever asks reads for himself
                future.set_result(None)

    def _room(self, size: int) -> Tensor | None:
        if not 0 < size <= LARGEST:
            return None
        if self._memory is None or self._memory.numel() < size:
            self._memory = None
            if available() < SPARE * size:
                return None
            self._memory = self._allocate(size)
        return self._memory
