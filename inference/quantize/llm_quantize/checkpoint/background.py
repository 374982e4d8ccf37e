"""One background thread that is handed tensors from any device and does work on them in host memory, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from llm_quantize.errors import WorkError
from llm_quantize.io.atomic_directory import write_error
from llm_quantize.io.pinned_copies import DeviceToHostCopier

WAITING_BYTES = 512 << 20  # that may wait for the thread


class BackgroundWriter:
    """Does work in the order in which it was handed over. What waits is bounded.

    where: the directory that errors name. After an error nothing more is done, and every method raises it: WorkError.
    """

    def __init__(self, where: Path) -> None:
        self._where = where
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._waiting: deque[tuple[Future[None], int]] = deque()
        self._copier = DeviceToHostCopier()
        self._error: WorkError | None = None

    def close(self) -> None:
        """Wait for the thread and end it."""
        self._thread.shutdown(wait=True)

    def submit(self, work: Callable[[], object]) -> None:
        """Do `work` after all that was handed over before."""
        self._make_room(0)
        self._submit(work, 0)

    def hand_over(self, tensor: Tensor, work: Callable[[Tensor], object], *, fixed: bool = False) -> None:
        """Do `work` with what is in `tensor` now, contiguous in host memory. Waits for room, not for the device.

        A copy is taken, but of a tensor in host memory that is `fixed`: it will not change, and takes no room here.
        """
        if fixed and tensor.device.type == "cpu" and tensor.is_contiguous():
            host = tensor.detach()
            self._make_room(0)
            self._submit(lambda: work(host), host.nbytes, held=0)
            return
        self._make_room(tensor.nbytes)
        pending = self._copier.take(tensor)
        if pending is not None:
            self._submit(lambda: work(pending.wait()), tensor.nbytes, pending.release)
            return
        copy = tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        self._submit(lambda: work(copy), copy.nbytes)

    def wait(self) -> None:
        """Return when everything is done."""
        while self._waiting:
            self._waiting.popleft()[0].result()
        self._raise()

    def _make_room(self, size: int) -> None:
        """Wait until `size` more bytes may wait."""
        self._raise()
        while self._waiting and (
            self._waiting[0][0].done() or sum(count for _, count in self._waiting) + size > WAITING_BYTES
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
        """Have the thread do `work` on `size` bytes, unless an earlier one failed, and `after` in any case.

        held: bytes of memory that are held until then, where those are not all.
        """

        def guarded() -> None:
            try:
                if self._error is None:  # nothing may be listed after a write that failed
                    work()
            except OSError as error:
                self._error = write_error(error, self._where, size)
            finally:
                after()

        self._waiting.append((self._thread.submit(guarded), size if held is None else held))

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error
