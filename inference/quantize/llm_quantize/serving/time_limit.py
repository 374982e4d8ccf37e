"""A limit on the time that a computation may take, for regexes from anyone, of which some take centuries."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class TooSlow(Exception):
    """The computation took longer than it may."""


@contextmanager
def limited_seconds(seconds: float) -> Iterator[None]:
    """Raise `TooSlow` inside the block after `seconds`; Python's regexes let signals through while they match.

    Without effect outside the main thread, and on systems without interval timers. A timer that runs already goes on
    afterwards.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise TooSlow

    try:
        previous = signal.signal(signal.SIGALRM, interrupt)
    except (AttributeError, ValueError):
        yield
        return
    started = time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        if left:
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - started), 0.001), interval)
