"""Triton kernels: whether they run here, how they are compiled and launched.

Every kernel of this project stands beside a PyTorch twin that tests it and runs where Triton cannot. A kernel keeps a
tile in registers while its loop runs, so that each weight is read and written once. Divisions are rounded correctly and
ties go to even, as in PyTorch: both ways give the same integers but where a sum, taken in another order, falls on the
other side of a tie.

Knows tensors only.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no build for this platform
    triton = tl = None

__all__ = [
    "compile_together",
    "jit",
    "jit_for_any",
    "launch",
    "need_contiguous_rows",
    "on_triton",
    "tl",
    "triton",
    "triton_since",
]


def on_triton(tensor: Tensor) -> bool:
    """Whether the kernels run for this tensor (else their twins do)."""
    return triton is not None and tensor.is_cuda


def jit_for_any(*names: str) -> Callable[[Any], Any]:
    """A `jit` that does not compile anew for these numbers being a multiple of 16, or one, or not."""
    return lambda function: function if triton is None else triton.jit(do_not_specialize=names)(function)


jit = jit_for_any()
_COMPILED: dict[Any, Any] = {}
# Where a list is, kernels that would be launched are compiled alone, and added to it.
_COMPILED_ONLY: ContextVar[list[Any] | None] = ContextVar("compiled_only", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int, **constants: Any) -> None:
    """`kernel[grid](*args, num_warps=warps, **constants)`, `constants` in the order of the signature.

    Triton asks anew at each launch what its arguments are like, which takes longer than many of these kernels do. What
    it would find is known from what stands in the key; it compiles for nothing else. Of a number that is whole, it asks
    whether it is one, a multiple of 16, and how wide.
    """
    compiled_only = _COMPILED_ONLY.get()
    if compiled_only is not None:
        compiled_only.append(kernel.warmup(*args, grid=grid, num_warps=warps, **constants))
        return
    # Since 3.3 a compiled kernel is launched with all arguments, constants too. The interpreter's has no names of them.
    if not triton_since(3, 3) or not hasattr(kernel, "arg_names"):
        kernel[grid](*args, num_warps=warps, **constants)
        return
    kinds = [
        (a.dtype, a.data_ptr() % 16 == 0)
        if isinstance(a, Tensor)
        else (a == 1, a % 16 == 0, a >= 1 << 31)
        if isinstance(a, int)
        else None
        for a in args
    ]
    key = (kernel, args[0].device, warps, *kinds, *constants.values())
    compiled = _COMPILED.get(key)
    if compiled is None:
        compiled = kernel[grid](*args, num_warps=warps, **constants)
        if kernel.arg_names[len(args) :] == list(constants):
            _COMPILED[key] = compiled
        return
    compiled[(*grid, 1, 1)[:3]](*args, *constants.values())


def compile_together(work: Callable[[], object], device: torch.device) -> None:
    """Compiles the kernels that `work` would start, and loads them on `device`, a GPU; all at once on all cores, and
    starts none of them.

    `work` goes on with whatever is in memory where their results would be; its errors, and the compiler's, are passed
    over: what fails fails again when it is wanted. Nothing is done, `work` neither, where kernels are interpreted or
    Triton is older than 3.5, which does not say that it may be used from several threads.
    """
    if triton is None or not triton_since(3, 5) or triton.knobs.runtime.interpret:
        return
    kernels: list[Any] = []
    token = _COMPILED_ONLY.set(kernels)
    try:
        with (
            suppress(Exception),
            ThreadPoolExecutor(initializer=torch.cuda.set_device, initargs=(device,)) as pool,
        ):
            with suppress(Exception), triton.AsyncCompileMode(pool):
                work()
            # To load one, a launcher is compiled too, in C: it is there when the kernel is asked how it is run.
            list(pool.map(_load, {id(kernel): kernel for kernel in kernels}.values()))
    finally:
        _COMPILED_ONLY.reset(token)


def _load(kernel: Any) -> None:
    """kernel: compiled, or what was given for it before it was."""
    kernel = kernel.result() if hasattr(kernel, "result") else kernel
    _ = kernel.run


@lru_cache(maxsize=8)
def triton_since(*version: int) -> bool:
    """Whether this Triton is that version or newer."""
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= version


def need_contiguous_rows(*tensors: Tensor) -> None:
    """Raises ValueError where one of them, two-dimensional, has gaps in its rows: a kernel is told of one stride."""
    for tensor in tensors:
        if tensor.stride(1) != 1:
            raise ValueError(f"the kernel needs contiguous rows, not strides {tensor.stride()}")
