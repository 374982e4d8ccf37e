"""Forward passes over a block that wait ahead of a linear, and resume once it has been rounded.

So each linear is rounded for the inputs that its predecessors, rounded, really make, and the block runs once and not
twice. Each micro-batch's pass is a greenlet, which can wait anywhere, for any architecture; what it has computed so far
stays in memory. Where there is no room for that the pass is given up, and begun again when it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from llm_quantize.device import Device
from llm_quantize.errors import WorkError
from llm_quantize.io.pinned_copies import available_memory
from llm_quantize.model import block_forward
from llm_quantize.model.block_forward import BlockKwargs, MicroBatch
from llm_quantize.model.states import States

SHARE = 0.6  # of the memory that is free beside what solving takes


class _Pass(greenlet):
    """One pass over windows `start` to `stop`. target: the stop that it waits at next, None for the block's end."""

    def __init__(self, owner: SuspendedForwards, start: int, stop: int) -> None:
        super().__init__(self._forward)
        self.owner, self.start, self.stop = owner, start, stop
        self.target: int | None = None
        self.reached = 0  # stops, in their order
        self.kept: dict[str | None, Tensor] = {}  # what entered the modules that are watched
        self.held = 0  # bytes

    def _forward(self) -> Tensor:
        owner = self.owner
        hidden = owner.states.get(self.start, self.stop)
        following = (self.stop, self.stop + owner.batch.windows)
        if following not in owner._suspended:
            owner.states.prefetch(*following)
        if None in owner.watched:
            self.kept[None] = hidden
        return block_forward.forward(owner.block, hidden, owner.kwargs)


class SuspendedForwards:
    """The forward passes of all windows over one block. A context manager.

    stops: paths of the linears that passes wait at, in the order in which the block reaches them.
    residuals: for some stops, by index, the module whose input is wanted too (None: the block's own), which is entered
        earlier.
    budget: bytes that waiting passes may hold.
    """

    def __init__(
        self,
        block: nn.Module,
        states: States,
        kwargs: BlockKwargs,
        stops: Sequence[str],
        batch: MicroBatch,
        budget: float,
        residuals: Mapping[int, str | None] | None = None,
    ) -> None:
        self.block, self.states, self.kwargs, self.batch = block, states, kwargs, batch
        self.stops = list(stops)
        self.residuals = dict(residuals or {})
        self.watched = set(self.residuals.values())
        self._budget = budget
        self._suspended: dict[tuple[int, int], _Pass] = {}
        self._handles = [
            block.get_submodule(path).register_forward_pre_hook(self._keeper(path))
            for path in self.watched
            if path is not None
        ]
        self._handles += [
            block.get_submodule(path).register_forward_pre_hook(self._suspender(index))
            for index, path in enumerate(self.stops)
        ]

    def __enter__(self) -> SuspendedForwards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up all passes and leave the block as it was."""
        self.drop()
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _current(self) -> _Pass | None:
        """The pass that runs now, if it is one of these."""
        current = getcurrent()
        return current if isinstance(current, _Pass) and current.owner is self else None

    def _keeper(self, path: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            current = self._current()
            if current is not None:
                current.kept[path] = args[0]

        return hook

    def _suspender(self, index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            current = self._current()
            if current is None or current.target is None or index < current.reached:
                return
            if index > current.reached:
                raise WorkError(
                    f"{self.stops[index]} comes before {self.stops[current.reached]} for windows {current.start} to "
                    f"{current.stop}: this architecture is not supported"
                )
            current.reached += 1
            if index == current.target:
                assert current.parent is not None
                current.parent.switch(args[0])

        return hook

    def _run(self, start: int, stop: int, target: int | None) -> tuple[_Pass, Tensor]:
        """Run a pass on to its target, or to the end; it comes with the target's input, or the block's output.

        Raises WorkError where the pass ended without reaching its target.
        """
        found = self._suspended.pop((start, stop), None)
        running = _Pass(self, start, stop) if found is None else found
        running.target = target
        device = self.states.device
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        # The parent is whoever waits for it now.
        running.parent = getcurrent()
        value: Tensor = running.switch()
        if target is not None and running.dead:
            raise WorkError(
                f"{self.stops[target]} is not reached for windows {start} to {stop}: this architecture is not "
                "supported"
            )
        if device.type == "cuda":
            running.held += torch.cuda.memory_allocated(device) - before
        else:
            running.held = value.nbytes  # nothing counts there; about what is needed to resume
        return running, value

    def resume(self, start: int, stop: int, index: int) -> tuple[Tensor, Tensor | None]:
        """What enters stop `index` for windows `start` to `stop`, and the residual stream if it is wanted.

        Both (tokens, width). The pass waits there, if the budget allows. Raises WorkError where it is not reached.
        """
        running, x = self._run(start, stop, index)
        residual = running.kept[self.residuals[index]] if index in self.residuals else None
        if sum(each.held for each in self._suspended.values()) + running.held > self._budget:
            _give_up(running)
        else:
            self._suspended[start, stop] = running
        flat = None if residual is None else residual.reshape(-1, residual.shape[-1])
        return x.reshape(-1, x.shape[-1]), flat

    def drop(self) -> bool:
        """Give up the passes that wait; False where none does."""
        dropped = bool(self._suspended)
        while self._suspended:
            _give_up(self._suspended.popitem()[1])
        return dropped

    def keep_only(self, batches: Sequence[tuple[int, int]]) -> None:
        """Give up the passes over other windows than these."""
        for key in set(self._suspended) - set(batches):
            _give_up(self._suspended.pop(key))

    @torch.no_grad()
    def finish(self, name: str) -> None:
        """Replace the states by what the block makes of them. Raises FinalError as `block_forward.replay`."""
        self.keep_only(micro_batches(len(self.states), self.batch.windows))
        block_forward.replay(
            self.block, name, self.states, self.kwargs, self.batch, run=self._output, spare=self.drop
        )

    def _output(self, start: int, stop: int) -> Tensor:
        return self._run(start, stop, None)[1]


def _give_up(suspended: _Pass) -> None:
    suspended.parent = getcurrent()
    suspended.throw(GreenletExit)
    suspended.kept.clear()


def micro_batches(windows: int, size: int) -> list[tuple[int, int]]:
    """The micro-batches of `size` windows: the first window of each, and the one after its last."""
    return [(start, min(start + size, windows)) for start in range(0, windows, size)]


@torch.no_grad()
def resume_together(
    forwards: Sequence[SuspendedForwards], index: int
) -> Iterator[list[tuple[Tensor, Tensor | None] | None]]:
    """Resume several models' passes over the same windows to stop `index`, one micro-batch at a time.

    Yields what each reaches, as `resume` gives it; None, or fewer tokens, for one with fewer windows than the first.
    Where memory runs out, waiting passes are given up, then micro-batches get smaller, then states go to host memory.
    No window comes twice.
    """
    batch, count = forwards[0].batch, len(forwards[0].states)
    for each in forwards:
        each.keep_only(micro_batches(len(each.states), batch.windows))
    start = 0
    while start < count:
        stop = min(start + batch.windows, count)
        try:
            reached = [
                each.resume(start, min(stop, len(each.states)), index) if start < len(each.states) else None
                for each in forwards
            ]
        except torch.cuda.OutOfMemoryError:
            spared = [each.drop() for each in forwards]
            if not any(spared) and not batch.halve():
                moved = [each.states.to_host() for each in forwards]
                if not any(moved):
                    raise
            torch.cuda.empty_cache()
            continue
        yield reached
        del reached  # not held while the next micro-batch runs
        start = stop


def suspension_budget(device: Device, widest: int, largest: int) -> float:
    """Bytes that waiting passes may hold beside what solving takes.

    widest: input channels of the widest linear. largest: weights that are rounded together.
    """
    if device.is_gpu:
        # The Hessian, its factor, and itself in half precision; weights, rounded weights, errors and integers.
        solving = 4 * (2.5 * widest**2 + 6 * largest)
        return SHARE * max(0.0, device.free_memory() - solving)
    return available_memory() / 4
