"""Streams of a GPU on which independent work runs at the same time: the kernels of one solver seldom fill the device.

This module knows tensors only.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, Self

import torch


class StreamPool:
    """Run independent work on numbered streams.

    A pool without streams, for the CPU or where memory is short, runs all work in the caller's order.

    A context manager: at its end the caller's stream waits for all streams of the pool. Inside it, the caller must keep
    each tensor that a stream still uses.
    """

    def __init__(self, streams: tuple[Any, ...] = ()) -> None:
        self._streams = streams

    @classmethod
    def create(cls, device: torch.device, count: int) -> StreamPool:
        """Return a pool of `count` streams of a GPU, or a pool without streams on the CPU.

        All pools of the same size share their streams, since PyTorch keeps freed memory for each stream separately.
        """
        return cls(_pool_streams(device, count) if device.type == "cuda" else ())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for index in range(len(self._streams)):
            self.join(index)

    @contextmanager
    def use(self, index: int, after: Iterable[int] = ()) -> Iterator[None]:
        """Run what is launched inside on stream `index`.

        It starts after all work launched so far on this stream, on the caller's stream and on the streams `after`.
        """
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
        """Make the caller's stream wait for stream `index`."""
        if self._streams:
            stream = self._streams[index]
            torch.cuda.current_stream(stream.device).wait_stream(stream)


class SideStream:
    """Run work of high priority at the same time as the caller's stream; on the CPU, in the caller's order.

    A context manager: at its end the caller's stream waits for the side stream. Memory allocated inside `use` must be
    used on the side stream alone.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream: Any = None
        if device.type == "cuda":
            self._stream = _side_stream(device, torch.cuda.current_stream(device).cuda_stream)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.join()

    @contextmanager
    def use(self, *, behind: bool = True) -> Iterator[None]:
        """Run what is launched inside on the side stream.

        behind: start after all work launched so far on the caller's stream; otherwise after that of the side stream
        alone.
        """
        if self._stream is None:
            yield
            return
        if behind:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield

    def join(self) -> None:
        """Make the caller's stream wait for the side stream."""
        if self._stream is not None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


@lru_cache(maxsize=64)
def _side_stream(device: torch.device, stream: int) -> Any:
    """Return the side stream of the stream with the handle `stream`, always the same, which reuses its memory.

    It has a high priority, since the caller's stream waits for its results.
    """
    return torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]


@lru_cache(maxsize=8)
def _pool_streams(device: torch.device, count: int) -> tuple[Any, ...]:
    """Return `count` streams, always the same, which reuse their memory."""
    return tuple(torch.cuda.Stream(device) for _ in range(count))  # type: ignore[no-untyped-call]


class Timestamp:
    """Record a point in the work of the current stream of a GPU, or the current time on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._event: Any = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))
        self._time = time.perf_counter()

    def since(self, earlier: Timestamp) -> float:
        """Return the seconds from `earlier` to this one, after a wait until the GPU has reached this one."""
        if self._event is None:
            return self._time - earlier._time
        self._event.synchronize()
        milliseconds: float = earlier._event.elapsed_time(self._event)
        return milliseconds / 1000
