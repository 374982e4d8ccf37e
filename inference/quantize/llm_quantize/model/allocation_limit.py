"""A limit on what building a model may take, where its config comes from anyone. Knows tensors only."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class TooLarge(Exception):
    """A config asks for more than its weights hold: one line."""


class AllocationLimit(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While entered, no tensor may be made with more than `elements`, nor more than `operations` of them.

    The size of a result is learnt on the meta device first, so that what is refused never takes memory. Raises
    `TooLarge`.
    """

    def __init__(self, elements: int, operations: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.elements = elements
        self.operations = operations
        self.filled = 0  # elements of tensors that hold values; empty ones take no memory before they do
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.count += 1
        if self.count > self.operations:
            raise TooLarge("config.json asks for more modules than the weights have tensors for")
        size = _result_size(func, args, kwargs)
        if "empty" not in str(func):
            self.filled += size
        if size > self.elements or self.filled > max(self.elements, 1 << 30):
            raise TooLarge(
                f"config.json asks for a tensor of {size:,} elements, more than all weights together hold"
            )
        return func(*args, **kwargs)


def _result_size(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Elements of the new tensors that `func` would make in memory; 0 where it makes none."""
    tensors = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    asked = kwargs.get("device")
    made_here = asked is not None and str(asked) != "meta"
    if asked is not None and not made_here:
        return 0
    if (not made_here and (not tensors or any(t.is_meta for t in tensors))) or func._schema.is_mutable:
        return 0
    # A list of sizes is told without asking; negative ones are the library's to refuse.
    sizes = next((a for a in args if isinstance(a, list | tuple) and all(type(n) is int for n in a)), None)
    if not tensors and sizes is not None:
        return math.prod(max(n, 0) for n in sizes)
    away = tree_map_only(Tensor, lambda t: torch.empty_like(t, device="meta"), (args, kwargs))
    if made_here:
        away[1]["device"] = torch.device("meta")
    try:
        result = func(*away[0], **away[1])
    except Exception:
        return 0  # it needs values, or fails: then it fails for real too
    found = result if isinstance(result, list | tuple) else (result,)
    return sum(t.numel() for t in found if isinstance(t, Tensor))
