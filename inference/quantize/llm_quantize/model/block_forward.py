"""Runs blocks over the calibration states: what enters each linear, and what the block makes of the states.

All windows have one length and no padding, so what a block is called with beside the states (masks, positions) is
the same for every micro-batch: it is recorded once, from the model's own forward pass with its blocks replaced by
stand-ins, and works for every architecture that calls its blocks one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from llm_quantize.errors import FinalError, InputError
from llm_quantize.model.source import Source


class _Stop(Exception):
    """Leaves a forward pass as soon as what was wanted is there."""


class _Output(Tensor):
    """States as any model takes them from a block: as a tensor, or as the first item of a tuple.

    Which of them a model expects cannot be seen from outside; what is computed with it is a plain tensor.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __getitem__(self, index: Any) -> Tensor:
        states = self.as_subclass(Tensor)
        return states if index == 0 else states[index]

    def __iter__(self) -> Iterator[Any]:
        return iter((self[0], None))


class _StandIn(nn.Module):
    """Takes a block's place: calls `on_call(index, hidden, kwargs)` and hands on what it returns."""

    def __init__(
        self, block: nn.Module, index: int, on_call: Callable[[int, Tensor, dict[str, Any]], Tensor]
    ) -> None:
        super().__init__()
        self.__dict__["block"] = block
        self.__dict__["index"] = index
        self.__dict__["on_call"] = on_call

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        block = self.__dict__["block"]
        parameters = signature(block.forward).parameters.values()
        names = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD] or ["hidden_states"]
        if len(args) > len(names):
            raise InputError(f"{type(block).__name__} takes arguments without names: not supported")
        given = dict(zip(names, args, strict=False)) | kwargs
        hidden = given.pop(names[0])
        states: Tensor = self.__dict__["on_call"](self.__dict__["index"], hidden, given)
        return states.as_subclass(_Output)


@contextmanager
def _stand_ins(source: Source, on_call: Callable[[int, Tensor, dict[str, Any]], Tensor]) -> Iterator[None]:
    blocks = source.modules
    originals = list(blocks)
    for index, block in enumerate(originals):
        blocks[index] = _StandIn(block, index, on_call)
    try:
        yield
    finally:
        for index, block in enumerate(originals):
            blocks[index] = block


class States:
    """Hidden states of all windows, (windows, length, width), on the device or in (pinned) host memory."""

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, storage: torch.device, device: torch.device
    ) -> None:
        pin = storage.type == "cpu" and device.type == "cuda"
        self.data = torch.empty(shape, dtype=dtype, device=storage, pin_memory=pin)
        self.device = device
        self._copies: torch.cuda.Stream | None = None  # where states travel, beside the work
        self._ahead: tuple[int, int, Tensor] | None = None

    def __len__(self) -> int:
        return self.data.shape[0]

    @property
    def length(self) -> int:
        return self.data.shape[1]

    def get(self, start: int, stop: int) -> Tensor:
        """The states of windows `start` to `stop` on the device; a view where they live there."""
        if not self.data.is_pinned():
            return self.data[start:stop].to(self.device)
        self.prefetch(start, stop)
        assert self._ahead is not None
        assert self._copies is not None
        found, self._ahead = self._ahead[2], None
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self._copies)
        found.record_stream(current)
        return found

    def prefetch(self, start: int, stop: int) -> None:
        """Begins to bring what `get` will be asked for next, if it is elsewhere."""
        stop = min(stop, len(self))
        if not self.data.is_pinned() or start >= stop or (self._ahead and self._ahead[:2] == (start, stop)):
            return
        with torch.cuda.stream(self._side()):
            self._ahead = (start, stop, self.data[start:stop].to(self.device, non_blocking=True))

    def _side(self) -> torch.cuda.Stream:
        if self._copies is None:
            self._copies = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        return self._copies

    def to_host(self) -> bool:
        """Moves the states from the device to host memory; False where they are there, or it cannot hold them."""
        if self.data.device.type == "cpu":
            return False
        try:
            host = torch.empty(self.data.shape, dtype=self.data.dtype, pin_memory=True)
        except (RuntimeError, MemoryError):
            return False
        host.copy_(self.data)
        self.data = host
        return True

    def put(self, start: int, stop: int, value: Tensor) -> None:
        """Replaces them; in host memory they are there once the device has been waited for."""
        if not self.data.is_pinned():
            self.data[start:stop].copy_(value)
            return
        side = self._side()
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            self.data[start:stop].copy_(value, non_blocking=True)
        value.record_stream(side)


def copied(states: States, windows: int) -> States:
    """The states of the first `windows` once more, in the same place."""
    data = states.data
    copy = States((windows, *data.shape[1:]), data.dtype, data.device, states.device)
    copy.data.copy_(data[:windows])
    return copy


@dataclass(slots=True)
class BlockKwargs:
    """The keyword arguments that each block is called with beside its states."""

    kwargs: list[dict[str, Any]]


@torch.no_grad()
def embed(
    source: Source,
    tokens: Tensor,
    storage: torch.device,
    device: torch.device,
    dtype: torch.dtype,
    loading: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[States, BlockKwargs]:
    """The states that enter block 0 for `tokens` (windows, length), and every block's other arguments.

    `loading` is entered while weights are read. Errors: `InputError` for a token that the model has no embedding of
    (on a GPU it would end the process).
    """
    known = source.skeleton.get_input_embeddings().weight.shape[0]
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < known:
        raise InputError(
            f"the tokenizer gives token {int(tokens.max())} and the model has {known}: "
            "give it the tokenizer that belongs to it"
        )
    base = source.skeleton.base_model
    prefix = source.list_name.split(".")[0] if base is not source.skeleton else ""
    with loading():
        loaded = _load_around(source, base, prefix, device, dtype)
    calls: list[dict[str, Any]] = []
    shape = (tokens.shape[0], tokens.shape[1])
    states: States | None = None

    def record(index: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        calls.append({k: v for k, v in kwargs.items() if k not in _CACHES})
        return hidden

    one = tokens[:1].to(device)
    with _stand_ins(source, record):
        for some in (one, one.flip(1), one.expand(2, -1)):
            base(input_ids=some, use_cache=False)
    blocks = len(source.modules)
    calls = [_of_any_window(block, *calls[i::blocks]) for i, block in enumerate(source.modules)]
    step = max(1, 65536 // shape[1])
    for start in range(0, shape[0], step):
        caught: list[Tensor] = []

        def catch(
            index: int, hidden: Tensor, kwargs: dict[str, Any], caught: list[Tensor] = caught
        ) -> Tensor:
            caught.append(hidden)
            raise _Stop

        batch = tokens[start : start + step].to(device)
        with _stand_ins(source, catch), suppress(_Stop):
            base(input_ids=batch, use_cache=False)
        if states is None:
            states = _make_states((*shape, caught[0].shape[-1]), caught[0].dtype, storage, device)
        states.put(start, start + batch.shape[0], caught[0])
    for module in loaded:
        Source.release(module)
    assert states is not None
    return states, BlockKwargs(calls)


@dataclass(frozen=True, slots=True)
class _PerWindow:
    """An argument that has its rows once for each window: what they are for one (BLOOM's `alibi`)."""

    one: Tensor

    def of(self, windows: int) -> Tensor:
        return self.one.repeat(windows, *[1] * (self.one.ndim - 1))


def _of_any_window(
    block: nn.Module, one: dict[str, Any], other: dict[str, Any], two: dict[str, Any]
) -> dict[str, Any]:
    """A block's arguments from those for one window, for another one, and for two.

    Errors: `InputError` where they depend on the window's tokens, which only the states may.
    """
    for name, value in one.items():
        if not _equal(value, other.get(name)):
            raise InputError(
                f"{type(block).__name__} takes {name} for every token beside its states: not supported"
            )

    def per_window(a: Any, b: Any) -> bool:
        return isinstance(a, Tensor) and a.ndim > 0 and a.shape[0] > 1 and b.shape[0] == 2 * a.shape[0]

    # What has one row fits any number of windows.
    return {k: _PerWindow(v) if per_window(v, two.get(k)) else v for k, v in one.items()}


def _equal(a: Any, b: Any) -> bool:
    """Whether two arguments hold the same tensors; what is no tensor is taken for equal."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and all(_equal(v, b.get(k)) for k, v in a.items())
    if isinstance(a, (tuple, list)):
        return isinstance(b, (tuple, list)) and len(a) == len(b) and all(map(_equal, a, b))
    return True


def _make_states(
    shape: tuple[int, int, int], dtype: torch.dtype, storage: torch.device, device: torch.device
) -> States:
    try:
        return States(shape, dtype, storage, device)
    except torch.cuda.OutOfMemoryError:
        return States(shape, dtype, torch.device("cpu"), device)


_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache", "use_cache", "output_attentions")


def _load_around(
    source: Source,
    root: nn.Module,
    prefix: str,
    device: torch.device,
    dtype: torch.dtype,
    without: nn.Module | None = None,
) -> list[nn.Module]:
    """Loads every module of `root` but `without` and the blocks and what holds them; returns them."""
    loaded: list[nn.Module] = []

    def visit(module: nn.Module, name: str) -> None:
        if module is source.modules or module is without:
            return
        if not any(child is source.modules for child in module.modules()):
            source.load(module, name, device, dtype)
            loaded.append(module)
            return
        own = [n for n, _ in module.named_parameters(recurse=False)]
        if own:
            raise InputError(
                f"{type(module).__name__} has parameters beside its blocks ({own[0]}): not supported"
            )
        for leaf, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[leaf] = buffer.to(device)
        for leaf, child in module.named_children():
            visit(child, f"{name}.{leaf}" if name else leaf)

    visit(root, prefix)
    return loaded


@contextmanager
def head(source: Source, device: torch.device, dtype: torch.dtype) -> Iterator[Callable[[Tensor], Tensor]]:
    """A function from last states (n, length, width) to logits (n, length, vocabulary): the model's own code."""
    # What enters the first block is thrown away: the embedding, often the largest tensor, need not be there.
    embedding = source.skeleton.get_input_embeddings()
    loaded = _load_around(source, source.skeleton, "", device, dtype, without=embedding)
    width = embedding.weight.shape[1]

    def logits(hidden: Tensor) -> Tensor:
        nothing = hidden.new_zeros((*hidden.shape[:2], width))
        with _stand_ins(source, lambda index, _, kwargs: hidden), torch.no_grad():
            result: Tensor = source.skeleton(inputs_embeds=nothing, use_cache=False).logits
        return result

    try:
        yield logits
    finally:
        for module in loaded:
            Source.release(module)


def linear_at(block: nn.Module, path: str) -> nn.Linear:
    """The linear at `path` in a block."""
    module = block.get_submodule(path)
    assert isinstance(module, nn.Linear)
    return module


def forward(block: nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """One block over states (n, length, width)."""
    windows = len(hidden)
    out = block(hidden, **{k: v.of(windows) if isinstance(v, _PerWindow) else v for k, v in kwargs.items()})
    result: Tensor = out[0] if isinstance(out, tuple) else out
    return result


@torch.no_grad()
def distinct_inputs(block: nn.Module, states: States, kwargs: dict[str, Any]) -> list[list[str]]:
    """Which linears of a block see the very same tensor: paths grouped, in the order the block reaches them.

    A linear that one window does not reach is in no group.
    """
    seen: dict[tuple[Any, ...], list[str]] = {}
    keep: list[Tensor] = []  # freed memory could be handed out again under the same address
    handles = []
    for path, module in block.named_modules():
        if isinstance(module, nn.Linear):

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


def free_memory(device: torch.device, limit: float | None) -> float:
    """Bytes of `device` that are free to this process, which may use `limit` GiB in all (None: what there is)."""
    used = torch.cuda.memory_allocated(device)
    free = float(torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - used)
    return free if limit is None else max(0.0, min(free, limit * 2**30 - used))


class MicroBatch:
    """How many windows run at once: from free memory at first, halved when memory runs out."""

    def __init__(
        self,
        device: torch.device,
        length: int,
        widest: int,
        tokens: int | None = None,
        limit: float | None = None,
    ) -> None:
        if tokens is None:
            tokens = 8192
            if device.type == "cuda":
                # Beside a second moment, a token costs half a dozen half-precision values of the widest layer.
                free = free_memory(device, limit) - 4 * widest**2
                tokens = int(min(65536, max(0.0, 0.7 * free) / (widest * 2 * 6)))
        self.windows = max(1, tokens // length)

    def halve(self) -> bool:
        """Takes fewer windows from now on; False where one is already all."""
        if self.windows == 1:
            return False
        self.windows //= 2
        return True


@torch.no_grad()
def capture(
    block: nn.Module,
    states: States,
    kwargs: dict[str, Any],
    groups: list[list[str]],
    batch: MicroBatch,
    on_input: Callable[[int, Tensor], None],
) -> None:
    """Hands the input of every group to `on_input(group, x)` for all states; stops before the last linear runs.

    Where memory runs out the windows in hand are run again in smaller portions, and then with the states in host
    memory; no group sees any twice.
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
                raise _Stop

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
            except _Stop:
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
    kwargs: dict[str, Any],
    batch: MicroBatch,
    *,
    run: Callable[[int, int], Tensor] | None = None,
    spare: Callable[[], bool] = lambda: False,
) -> None:
    """Replaces the states by what the block makes of them. Errors: `FinalError` where they are not finite.

    run: what the block makes of windows `start` to `stop`, where somebody else has that; spare: gives up what can be
    done without when memory runs out, False where nothing is left.
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
def residual_writers(block: nn.Module, states: States, kwargs: dict[str, Any]) -> dict[str, str | None]:
    """Linears whose output is added to the stream of states, and where the stream can be seen ahead of each: the module
    that it enters, or None for the block itself.

    Found by numbers, not names: output and stream give exactly what enters a later module or leaves the block.
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
