"""Forward passes over a block that halt ahead of a linear, and go on once it has been rounded.

So each linear is rounded for the inputs that its predecessors, rounded, really make, and the block runs once and not
twice: a pass goes on where it halted. Each micro-batch's pass is a greenlet, which can halt anywhere, for any
architecture; what it has computed so far stays in memory while it waits. Where there is no room for that it is given
up, and begun again when it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from llm_quantize.io import pinned_copies
from llm_quantize.model import block_forward

SHARE = 0.6  # of the memory that is free beside what solving takes


class _Pass(greenlet):
    """One pass over windows `start` to `stop`; `target`: which stop it halts at next, None for the end."""

    def __init__(self, owner: SuspendedForwards, start: int, stop: int) -> None:
        super().__init__(self._forward)
        self.owner, self.start, self.stop = owner, start, stop
        self.target: int | None = None
        self.kept: dict[str | None, Tensor] = {}  # what entered the modules that are watched
        self.held = 0  # bytes

    def _forward(self) -> Tensor:
        owner = self.owner
        hidden = owner.states.get(self.start, self.stop)
        following = (self.stop, self.stop + owner.batch.windows)
        if following not in owner._halted:
            owner.states.prefetch(*following)
        if None in owner.watched:
            self.kept[None] = hidden
        return block_forward.forward(owner.block, hidden, owner.kwargs)


class SuspendedForwards:
    """The passes of all windows over one block.

    stops: the linears that passes halt at, in the order in which the block reaches them; before: for some of them, by
    number, the module whose input is wanted too (None: the block itself), which is entered earlier. `room`: bytes
    that halted passes may hold. Context manager.
    """

    def __init__(
        self,
        block: nn.Module,
        states: block_forward.States,
        kwargs: dict[str, Any],
        stops: Sequence[str],
        batch: block_forward.MicroBatch,
        suspension_budget: float,
        before: Mapping[int, str | None] | None = None,
    ) -> None:
        self.block, self.states, self.kwargs, self.batch = block, states, kwargs, batch
        self.before = dict(before or {})
        self.watched = set(self.before.values())
        self._room = suspension_budget
        self._halted: dict[tuple[int, int], _Pass] = {}
        self._handles = [
            block.get_submodule(path).register_forward_pre_hook(self._keeper(path))
            for path in self.watched
            if path is not None
        ]
        self._handles += [
            block.get_submodule(path).register_forward_pre_hook(self._halter(index))
            for index, path in enumerate(stops)
        ]

    def __enter__(self) -> SuspendedForwards:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives up all passes and leaves the block as it was."""
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

    def _halter(self, index: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            current = self._current()
            if current is not None and current.target == index:
                assert current.parent is not None
                current.parent.switch(args[0])

        return hook

    def _go_on(self, start: int, stop: int, target: int | None) -> tuple[_Pass, Tensor]:
        """A pass and what it hands over: the input of its target, or the block's output."""
        found = self._halted.pop((start, stop), None)
        running = _Pass(self, start, stop) if found is None else found
        running.target = target
        device = self.states.device
        before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        # The parent is whoever waits for it now.
        running.parent = getcurrent()
        value: Tensor = running.switch()
        if device.type == "cuda":
            running.held += torch.cuda.memory_allocated(device) - before
        else:
            running.held = value.nbytes  # nobody counts there; about what is needed to go on
        return running, value

    def resume(self, start: int, stop: int, index: int) -> tuple[Tensor, Tensor | None]:
        """What enters stop `index` for windows `start` to `stop`, and what entered the module before it, if one is
        wanted: (tokens, width). The pass waits there, if there is room."""
        running, x = self._go_on(start, stop, index)
        stream = running.kept[self.before[index]] if index in self.before else None
        if sum(each.held for each in self._halted.values()) + running.held > self._room:
            _end(running)
        else:
            self._halted[start, stop] = running
        return x.reshape(-1, x.shape[-1]), None if stream is None else stream.reshape(-1, stream.shape[-1])

    def drop(self) -> bool:
        """Gives up what is halted; False where nothing is."""
        dropped = bool(self._halted)
        while self._halted:
            _end(self._halted.popitem()[1])
        return dropped

    def keep_only(self, pieces: Sequence[tuple[int, int]]) -> None:
        """Gives up the passes over other windows than these."""
        for key in set(self._halted) - set(pieces):
            _end(self._halted.pop(key))

    @torch.no_grad()
    def advance(self, name: str) -> None:
        """Replaces the states by what the block makes of them. Errors: as `block_forward.replay`."""
        self.keep_only(pieces(len(self.states), self.batch.windows))
        block_forward.replay(
            self.block, name, self.states, self.kwargs, self.batch, run=self._result, spare=self.drop
        )

    def _result(self, start: int, stop: int) -> Tensor:
        return self._go_on(start, stop, None)[1]


def _end(halted: _Pass) -> None:
    halted.parent = getcurrent()
    halted.throw(GreenletExit)
    halted.kept.clear()


def pieces(windows: int, size: int) -> list[tuple[int, int]]:
    """The micro-batches: first and last window but one of each."""
    return [(start, min(start + size, windows)) for start in range(0, windows, size)]


@torch.no_grad()
def resume_together(
    together: Sequence[SuspendedForwards], index: int
) -> Iterator[list[tuple[Tensor, Tensor | None] | None]]:
    """Brings passes over the same windows, of one micro-batch, to stop `index`, and hands over what each reaches: None
    and less of it where one has fewer windows than the first.

    Where memory runs out, halted passes are given up, then micro-batches get smaller, then states go to host memory;
    no window is handed over twice.
    """
    batch, count = together[0].batch, len(together[0].states)
    for passes in together:
        passes.keep_only(pieces(len(passes.states), batch.windows))
    start = 0
    while start < count:
        stop = min(start + batch.windows, count)
        try:
            reached = [
                passes.resume(start, min(stop, len(passes.states)), index)
                if start < len(passes.states)
                else None
                for passes in together
            ]
        except torch.cuda.OutOfMemoryError:
            spared = [passes.drop() for passes in together]
            if not any(spared) and not batch.halve():
                moved = [passes.states.to_host() for passes in together]
                if not any(moved):
                    raise
            torch.cuda.empty_cache()
            continue
        yield reached
        del reached  # not held while the next piece runs
        start = stop


def suspension_budget(device: torch.device, limit: float | None, widest: int, largest: int) -> float:
    """Bytes that halted passes may hold beside what solving takes.

    `limit` as for `block_forward.free_memory`; widest: input channels; largest: weights that are rounded together.
    """
    if device.type == "cuda":
        # The second moment, its factor, and itself in half precision; weights, rounded weights, errors and integers.
        solving = 4 * (2.5 * widest**2 + 6 * largest)
        return SHARE * max(0.0, block_forward.free_memory(device, limit) - solving)
    return pinned_copies.available() / 4
