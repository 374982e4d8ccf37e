"""Runs one block over hidden states: which linears share an input, what enters them, what the block makes of it.

All windows have one length and no padding, so that a block's other arguments are the same for every micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llm_quantize.device import Device
from llm_quantize.errors import FinalError
from llm_quantize.model.states import States

BlockKwargs = dict[str, Any]  # a block's arguments beside its states


class StopForward(Exception):
    """Leaves a forward pass as soon as what was wanted is there."""


@dataclass(frozen=True, slots=True)
class PerWindow:
    """An argument that has its rows once for each window: what they are for one (BLOOM's `alibi`)."""

    one: Tensor

    def of(self, windows: int) -> Tensor:
        """The argument for so many windows."""
        return self.one.repeat(windows, *[1] * (self.one.ndim - 1))


def linear_at(block: nn.Module, path: str) -> nn.Linear:
    """The linear layer at `path` in a block."""
    module = block.get_submodule(path)
    assert isinstance(module, nn.Linear)
    return module


def forward(block: nn.Module, hidden: Tensor, kwargs: BlockKwargs) -> Tensor:
    """Run one block over states (windows, length, width)."""
    windows = len(hidden)
    out = block(hidden, **{k: v.of(windows) if isinstance(v, PerWindow) else v for k, v in kwargs.items()})
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


class MicroBatch:
    """How many windows run at once: from free memory at first, halved when memory runs out.

    length: tokens of a window. widest: the most channels of a linear. tokens: at once, instead of asking the device.
    """

    def __init__(self, device: Device, length: int, widest: int, tokens: int | None = None) -> None:
        if tokens is None:
            tokens = 8192
            if device.is_gpu:
                # Beside a Hessian, a token costs half a dozen half-precision values of the widest layer.
                free = device.free_memory() - 4 * widest**2
                tokens = int(min(65536, max(0.0, 0.7 * free) / (widest * 2 * 6)))
        self.windows = max(1, tokens // length)

    def halve(self) -> bool:
        """Take fewer windows from now on; False where one is already all."""
        if self.windows == 1:
            return False
        self.windows //= 2
        return True


@torch.no_grad()
def distinct_inputs(
    block: nn.Module, states: States, kwargs: BlockKwargs, paths: Collection[str] | None = None
) -> list[list[str]]:
    """Which linears of a block see the very same tensor: their paths in groups, in the order the block reaches them.

    paths: of the linears that are asked for; all of the block's without. A linear that one window does not reach is in
    no group.
    """
    seen: dict[tuple[Any, ...], list[str]] = {}
    keep: list[Tensor] = []  # freed memory could be handed out again under the same address
    handles = []
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear) and (paths is None or path in paths):

            def hook(_: nn.Module, args: tuple[Any, ...], path: str = path) -> None:
                x = args[0]
                keep.append(x)
                seen.setdefault((x.data_ptr(), tuple(x.shape), x.stride(), x._version), []).append(path)

            handles.append(module.register_forward_pre_hook(hook))
    try:
        forward(block, states.get(0, 1), kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return list(seen.values())


@torch.no_grad()
def capture_inputs(
    block: nn.Module,
    states: States,
    kwargs: BlockKwargs,
    groups: list[list[str]],
    batch: MicroBatch,
    on_input: Callable[[int, Tensor], None],
) -> None:
    """Call `on_input(group, x)` with the input of every group for all states; the last linear does not run.

    groups: from `distinct_inputs`. Where memory runs out, the windows in hand are run again in smaller portions, and
    then with the states in host memory. No group sees a window twice.
    """
    seen = [0] * len(groups)  # windows that each group has had
    start = stop = 0

    def hook_for(index: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if seen[index] < stop:
                x = args[0].reshape(stop - start, -1, args[0].shape[-1])
                on_input(index, x[max(seen[index] - start, 0) :])
                seen[index] = stop
            if index == len(groups) - 1:
                raise StopForward

        return hook

    handles = [
        block.get_submodule(paths[0]).register_forward_pre_hook(hook_for(index))
        for index, paths in enumerate(groups)
    ]
    try:
        while start < len(states):
            stop = min(start + batch.windows, len(states))
            try:
                hidden = states.get(start, stop)
                states.prefetch(stop, stop + batch.windows)
                forward(block, hidden, kwargs)
            except StopForward:
                pass
            except torch.cuda.OutOfMemoryError:
                if not batch.halve() and not states.to_host():
                    raise
                torch.cuda.empty_cache()
                continue
            start = stop
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def replay(
    block: nn.Module,
    name: str,
    states: States,
    kwargs: BlockKwargs,
    batch: MicroBatch,
    *,
    run: Callable[[int, int], Tensor] | None = None,
    spare: Callable[[], bool] = lambda: False,
) -> None:
    """Replace the states by what the block makes of them. Raises FinalError where they are not finite.

    run: gives what the block makes of windows `start` to `stop`, where that is known otherwise. spare: gives up memory
    that can be done without when it runs out; False where nothing is left.
    """
    if run is None:

        def run(start: int, stop: int) -> Tensor:
            hidden = states.get(start, stop)
            states.prefetch(stop, stop + batch.windows)
            return forward(block, hidden, kwargs)

    finite = torch.ones((), dtype=torch.bool, device=states.device)
    start = 0
    while start < len(states):
        stop = min(start + batch.windows, len(states))
        try:
            result = run(start, stop)
        except torch.cuda.OutOfMemoryError:
            if not spare() and not batch.halve() and not states.to_host():
                raise
            torch.cuda.empty_cache()
            continue
        finite &= torch.isfinite(result.sum(dtype=torch.float32))  # a half-precision sum overflows by itself
        states.put(start, stop, result)
        start = stop
    if not bool(finite):
        raise FinalError(
            f"the states after {name} are not finite: the model overflows {states.data.dtype}; "
            "use a BF16 copy of the model, or --device cpu (which computes in FP32)"
        )


@torch.no_grad()
def residual_writers(block: nn.Module, states: States, kwargs: BlockKwargs) -> dict[str, str | None]:
    """Which linears add their output to the residual stream, and the module that the stream enters before each.

    None stands for the block itself. Found by numbers, not names: output and stream together give exactly what enters a
    later module or leaves the block.
    """
    hidden = states.get(0, 1)
    entered: list[tuple[str | None, Tensor]] = [(None, hidden)]
    made: list[tuple[str, Tensor, int]] = []  # linear, output, how many inputs had been seen before

    def enter(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].shape == hidden.shape:
                entered.append((path, args[0].clone()))

        return hook

    def leave(path: str) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
            if out.shape == hidden.shape:
                made.append((path, out.clone(), len(entered)))

        return hook

    handles = []
    for path, module in block.named_modules():
        if path:
            handles.append(module.register_forward_pre_hook(enter(path)))
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_hook(leave(path)))
    try:
        result = forward(block, hidden, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, str | None] = {}
    for path, out, seen in made:
        after = [x for _, x in entered[seen:]] + [result]
        for before, stream in entered[:seen]:
            total = stream + out
            if any(torch.equal(total, x) for x in after):
                found[path] = before
                break
    return found
