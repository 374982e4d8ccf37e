"""Seconds by stage of a run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from llm_quantize.device import Device


class StageTimes:
    """Adds up the time of stages, which may lie inside each other. seconds: by stage, in the order they begin."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self.seconds: dict[str, float] = {}
        self._inside: float | None = (
            None  # seconds of the stages inside the one that runs; None where none does
        )

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time inside to stage `name`, less that of the stages inside it.

        Device work belongs to the outermost stage that started it, or to the one inside that waited for it.
        """
        self.seconds.setdefault(name, 0.0)
        outer, self._inside, start = self._inside, 0.0, time.perf_counter()
        try:
            yield
            if outer is None:
                self._device.synchronize()
        finally:
            seconds = time.perf_counter() - start
            self.seconds[name] += seconds - self._inside
            self._inside = None if outer is None else outer + seconds
