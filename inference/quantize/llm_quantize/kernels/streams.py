"""Streams of a GPU on which independent work runs side by side: one solver's kernels seldom fill the device.

Knows tensors only.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import TracebackType
from typing import Any, Self

import torch


class StreamPool:
    """Streams by number; without any (on the CPU, or where memory is short) all work is done in the caller's order.

    A context manager: at its end the caller's stream waits for all of them. Inside, nothing of the caller's may be
    dropped that a lane still works with.
    """

    def __init__(self, streams: tuple[Any, ...] = ()) -> None:
        self._streams = streams

    @classmethod
    def on(cls, device: torch.device, count: int) -> StreamPool:
        """`count` of them on a GPU, always the same ones: each keeps memory for its own next use. None on the CPU."""
        return cls(_streams(device, count) if device.type == "cuda" else ())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for index in range(len(self._streams)):
            self.join(index)

    @contextmanager
    def stream(self, index: int, after: Iterable[int] = ()) -> Iterator[None]:
        """What is begun inside runs on lane `index`, behind all that it, the lanes `after` and the caller's stream have
        been given."""
        if not self._streams:
            yield
            return
        stream = self._streams[index]
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        for other in after:
            stream.wait_stream(self._streams[other])
        with torch.cuda.stream(stream):
            yield

    def join(self, index: int) -> None:
        """The caller's stream goes on after lane `index`."""
        if self._streams:
            stream = self._streams[index]
            torch.cuda.current_stream(stream.device).wait_stream(stream)


class SideStream:
    """One more stream, beside the current one of a GPU, for what its caller need not wait for at once.

    A context manager: at its end the caller's stream waits for the other. Memory that is taken inside `stream` must be
    used there alone.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = _beside(device, torch.cuda.current_stream(device).cuda_stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.join()

    @contextmanager
    def stream(self, *, behind: bool = True) -> Iterator[None]:
        """What is begun inside runs beside the caller's stream; with `behind`, after all that it has been given."""
        if self._stream is None:
            yield
            return
        if behind:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """The caller's stream goes on after the other."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


@lru_cache(maxsize=64)
def _beside(device: torch.device, stream: int) -> Any:
    """Always the same one beside a stream: it keeps memory for its own next use. The others wait for what it does."""
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


@lru_cache(maxsize=8)
def _streams(device: torch.device, count: int) -> tuple[Any, ...]:
    return tuple(torch.cuda.Stream(device) for _ in range(count))  # type: ignore[no-untyped-call]


class Timestamp:
    """A moment in what the current stream does, or on the CPU a moment."""

    def __init__(self, device: torch.device) -> None:
        self._event: Any = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))
        self._time = time.perf_counter()

    def since(self, earlier: Timestamp) -> float:
        """Seconds from `earlier` to this. Waits for this."""
        if self._event is None:
            return self._time - earlier._time
        self._event.synchronize()
        milliseconds: float = earlier._event.elapsed_time(self._event)
        return milliseconds / 1000
