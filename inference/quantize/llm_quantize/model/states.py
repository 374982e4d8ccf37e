"""Hidden states of all calibration windows, on the device or in host memory."""

from __future__ import annotations

import torch
from torch import Tensor


class States:
    """Hidden states, (windows, length, width), on the device or in pinned host memory.

    storage: the device where they are kept. device: the one that works with them.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, storage: torch.device, device: torch.device
    ) -> None:
        pin = storage.type == "cpu" and device.type == "cuda"
        self.data = torch.empty(shape, dtype=dtype, device=storage, pin_memory=pin)
        self.device = device
        self._copies: torch.cuda.Stream | None = None  # a side stream for copies
        self._prefetched: tuple[int, int, Tensor] | None = None

    def __len__(self) -> int:
        return self.data.shape[0]

    @property
    def length(self) -> int:
        """Tokens of a window."""
        return self.data.shape[1]

    def get(self, start: int, stop: int) -> Tensor:
        """The states of windows `start` to `stop` on the device; a view where they are kept there."""
        if not self.data.is_pinned():
            return self.data[start:stop].to(self.device)
        self.prefetch(start, stop)
        assert self._prefetched is not None
        assert self._copies is not None
        found, self._prefetched = self._prefetched[2], None
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._copies)
        found.record_stream(current)
        return found

    def prefetch(self, start: int, stop: int) -> None:
        """Begin to copy to the device what `get` will be asked for next, if it is in host memory."""
        stop = min(stop, len(self))
        known = self._prefetched is not None and self._prefetched[:2] == (start, stop)
        if not self.data.is_pinned() or start >= stop or known:
            return
        with torch.cuda.stream(self._side_stream()):
            self._prefetched = (start, stop, self.data[start:stop].to(self.device, non_blocking=True))

    def put(self, start: int, stop: int, value: Tensor) -> None:
        """Replace the states of windows `start` to `stop`. Asynchronous where they are kept in host memory."""
        if not self.data.is_pinned():
            self.data[start:stop].copy_(value)
            return
        side = self._side_stream()
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            self.data[start:stop].copy_(value, non_blocking=True)
        value.record_stream(side)

    def to_host(self) -> bool:
        """Move the states from the device to host memory; False where they are there, or it cannot hold them."""
        if self.data.device.type == "cpu":
            return False
        try:
            host = torch.empty(self.data.shape, dtype=self.data.dtype, pin_memory=True)
        except (RuntimeError, MemoryError):
            return False
        host.copy_(self.data)
        self.data = host
        return True

    def copy(self, windows: int) -> States:
        """The states of the first `windows` once more, kept in the same place."""
        data = self.data
        made = States((windows, *data.shape[1:]), data.dtype, data.device, self.device)
        made.data.copy_(data[:windows])
        return made

    def _side_stream(self) -> torch.cuda.Stream:
        if self._copies is None:
            self._copies = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        return self._copies


def make_states(
    shape: tuple[int, int, int], dtype: torch.dtype, storage: torch.device, device: torch.device
) -> States:
    """States in `storage`, or in host memory where there is no room."""
    try:
        return States(shape, dtype, storage, device)
    except torch.cuda.OutOfMemoryError:
        return States(shape, dtype, torch.device("cpu"), device)
