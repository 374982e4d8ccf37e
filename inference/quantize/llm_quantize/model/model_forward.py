"""What lies around the blocks: the embedding before them, and the output head after them.

The model's own forward pass runs with its blocks replaced by stand-ins. So it works for every architecture that calls
its blocks one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from llm_quantize.errors import InputError, one_line
from llm_quantize.model.block_forward import BlockKwargs, PerWindow, StopForward
from llm_quantize.model.source import Model
from llm_quantize.model.states import States, make_states

OnCall = Callable[[int, Tensor, BlockKwargs], Tensor]
_CACHES = ("past_key_values", "past_key_value", "layer_past", "cache", "use_cache", "output_attentions")
_TOKENS_TOGETHER = 65536  # that are embedded at once


class _Output(Tensor):
    """States as any model takes them from a block: as a tensor, or as the first item of a tuple.

    Which of them a model expects cannot be seen from outside. What is computed with it is a plain tensor.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __getitem__(self, index: Any) -> Tensor:
        states = self.as_subclass(Tensor)
        return states if index == 0 else states[index]

    def __iter__(self) -> Iterator[Any]:
        return iter((self[0], None))


class _StandIn(nn.Module):
    """Takes a block's place: calls `on_call(index, hidden, kwargs)` and returns what that returns."""

    def __init__(self, block: nn.Module, index: int, on_call: OnCall) -> None:
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
def _stand_ins(model: Model, on_call: OnCall) -> Iterator[None]:
    blocks = model.modules
    originals = list(blocks)
    for index, block in enumerate(originals):
        blocks[index] = _StandIn(block, index, on_call)
    try:
        yield
    finally:
        for index, block in enumerate(originals):
            blocks[index] = block


@torch.no_grad()
def embed(
    model: Model,
    tokens: Tensor,
    storage: torch.device,
    device: torch.device,
    dtype: torch.dtype,
    loading: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> tuple[States, list[BlockKwargs]]:
    """Compute the states that enter block 0 for `tokens`, int64 (windows, length), and each block's other arguments.

    storage: where the states are kept. loading: entered while weights are read. Raises InputError for a token that the
    model has no embedding of (on a GPU it would end the process), for a block whose arguments depend on tokens, and
    where the model's own code fails.
    """
    _check_tokens(model, tokens)
    base = model.skeleton.base_model
    prefix = model.list_name.split(".")[0] if base is not model.skeleton else ""
    with loading():
        loaded = _load_around(model, base, prefix, device, dtype)
    with _failures_told(model):
        kwargs = _record_kwargs(model, base, tokens[:1].to(device))
    states = _embed_windows(model, base, tokens, storage, device)
    for module in loaded:
        model.release(module)
    return states, kwargs


@contextmanager
def _failures_told(model: Model) -> Iterator[None]:
    """Tell a failure of the model's own code, in its first forward pass, as one of its config."""
    try:
        yield
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        if isinstance(error, torch.cuda.OutOfMemoryError) or "CUDA" in str(error):
            raise
        raise InputError(
            f"{type(model.skeleton).__name__} cannot compute ({type(error).__name__}: {one_line(error)}): "
            "take the config.json that came with the weights"
        ) from None


def _check_tokens(model: Model, tokens: Tensor) -> None:
    known = model.skeleton.get_input_embeddings().weight.shape[0]
    if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < known:
        raise InputError(
            f"the tokenizer gives token {int(tokens.max())} and the model has {known}: "
            "give it the tokenizer that belongs to it"
        )


def _record_kwargs(model: Model, base: Any, window: Tensor) -> list[BlockKwargs]:
    """Each block's arguments for any window, from calls with one window, another one, and two."""
    calls: list[BlockKwargs] = []

    def record(index: int, hidden: Tensor, kwargs: BlockKwargs) -> Tensor:
        calls.append({k: v for k, v in kwargs.items() if k not in _CACHES})
        return hidden

    with _stand_ins(model, record):
        for some in (window, window.flip(1), window.expand(2, -1)):
            base(input_ids=some, use_cache=False)
    blocks = len(model.modules)
    return [_for_any_window(block, *calls[i::blocks]) for i, block in enumerate(model.modules)]


def _embed_windows(
    model: Model, base: Any, tokens: Tensor, storage: torch.device, device: torch.device
) -> States:
    """The states that enter block 0, a portion of windows at a time."""
    count, length = tokens.shape
    states: States | None = None
    step = max(1, _TOKENS_TOGETHER // length)
    for start in range(0, count, step):
        caught: list[Tensor] = []

        def catch(index: int, hidden: Tensor, kwargs: BlockKwargs, caught: list[Tensor] = caught) -> Tensor:
            caught.append(hidden)
            raise StopForward

        batch = tokens[start : start + step].to(device)
        with _stand_ins(model, catch), suppress(StopForward):
            base(input_ids=batch, use_cache=False)
        name = type(model.skeleton).__name__
        if not caught:
            raise InputError(f"{name} does not call its blocks: not supported")
        if caught[0].shape[:2] != batch.shape:
            raise InputError(
                f"{name} gives its blocks states of {tuple(caught[0].shape[:2])} for tokens of {tuple(batch.shape)}: "
                "not supported"
            )
        if states is None:
            states = make_states((count, length, caught[0].shape[-1]), caught[0].dtype, storage, device)
        states.put(start, start + batch.shape[0], caught[0])
    assert states is not None
    return states


def _for_any_window(block: nn.Module, one: BlockKwargs, other: BlockKwargs, two: BlockKwargs) -> BlockKwargs:
    """A block's arguments from those for one window, for another one, and for two.

    Raises InputError where they depend on the window's tokens, which only the states may.
    """
    for name, value in one.items():
        if not _equal(value, other.get(name)):
            raise InputError(
                f"{type(block).__name__} takes {name} for every token beside its states: not supported"
            )

    def per_window(a: Any, b: Any) -> bool:
        return isinstance(a, Tensor) and a.ndim > 0 and a.shape[0] > 1 and b.shape[0] == 2 * a.shape[0]

    # What has one row fits any number of windows.
    return {k: PerWindow(v) if per_window(v, two.get(k)) else v for k, v in one.items()}


def _equal(a: Any, b: Any) -> bool:
    """Whether two arguments hold the same tensors; what is no tensor is taken for equal."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and all(_equal(v, b.get(k)) for k, v in a.items())
    if isinstance(a, (tuple, list)):
        return isinstance(b, (tuple, list)) and len(a) == len(b) and all(map(_equal, a, b))
    return True


def _load_around(
    model: Model,
    root: nn.Module,
    prefix: str,
    device: torch.device,
    dtype: torch.dtype,
    without: nn.Module | None = None,
) -> list[nn.Module]:
    """Load every module of `root` but `without`, the blocks and what holds them; return those that were loaded."""
    loaded: list[nn.Module] = []

    def visit(module: nn.Module, name: str) -> None:
        if module is model.modules or module is without:
            return
        if not any(child is model.modules for child in module.modules()):
            model.load(module, name, device, dtype)
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
def output_head(
    model: Model, device: torch.device, dtype: torch.dtype
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Give a function from last states (windows, length, width) to logits (windows, length, vocabulary)."""
    # What enters the first block is thrown away: the embedding, often the largest tensor, need not be there.
    embedding = model.skeleton.get_input_embeddings()
    loaded = _load_around(model, model.skeleton, "", device, dtype, without=embedding)
    width = embedding.weight.shape[1]

    def logits(hidden: Tensor) -> Tensor:
        nothing = hidden.new_zeros((*hidden.shape[:2], width))
        with _stand_ins(model, lambda index, _, kwargs: hidden), torch.no_grad():
            result: Tensor = model.skeleton(inputs_embeds=nothing, use_cache=False).logits
        return result

    try:
        yield logits
    finally:
        for module in loaded:
            model.release(module)
