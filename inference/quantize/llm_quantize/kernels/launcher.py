"""Triton kernels: find out whether they run here, compile and launch them.

Every kernel of this project stands beside its PyTorch *twin*, which tests the kernel and runs where Triton cannot. A
kernel keeps a tile in registers while its loop runs, so it reads and writes each weight once. Kernels round divisions
correctly and round ties to even, as PyTorch does. Kernel and twin therefore return the same integers, except where they
add numbers in another order and a sum falls on the other side of a tie.

This module knows tensors only.
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
except ImportError:  # Triton has no build for this platform
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
    """Return whether the kernels run for `tensor`; if not, their twins do."""
    return triton is not None and tensor.is_cuda


def jit_for_any(*names: str) -> Callable[[Any], Any]:
    """Return a `jit` that compiles once for all values of the integer arguments `names`.

    By default Triton compiles a kernel again where an integer is one, or a multiple of 16.
    """
    return lambda function: function if triton is None else triton.jit(do_not_specialize=names)(function)


jit = jit_for_any()
# While this is a list, `launch` compiles kernels and appends them to it, and starts none.
_COMPILE_ONLY: ContextVar[list[Any] | None] = ContextVar("compile_only", default=None)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int, **constants: Any) -> None:
    """Launch `kernel[grid](*args, num_warps=warps, **constants)`.

    kernel: a function under `jit`. grid: up to three numbers of programs. args: tensors, integers and floats.
    constants: the `constexpr` arguments.
    """
    compile_only = _COMPILE_ONLY.get()
    if compile_only is not None:
        compile_only.append(kernel.warmup(*args, grid=grid, num_warps=warps, **constants))
        return
    kernel[grid](*args, num_warps=warps, **constants)


def compile_together(work: Callable[[], object], device: torch.device) -> None:
    """Compile all kernels that `work` launches, on all cores at once, and load them on `device`; start none of them.

    work: calls `launch`. It continues with whatever the memory of its results holds. device: a GPU.

    Errors of `work` and of the compiler are ignored: what fails here fails again when its result is needed. The
    function returns at once, without a call of `work`, where kernels are interpreted or where Triton is older than 3.5,
    the first version documented to compile from several threads.
    """
    if triton is None or not triton_since(3, 5) or triton.knobs.runtime.interpret:
        return
    kernels: list[Any] = []
    token = _COMPILE_ONLY.set(kernels)
    try:
        with (
            suppress(Exception),
            ThreadPoolExecutor(initializer=torch.cuda.set_device, initargs=(device,)) as pool,
        ):
            with suppress(Exception), triton.AsyncCompileMode(pool):
                work()
            # Loading a kernel also compiles its launcher, in C, which takes long enough to share among threads.
            list(pool.map(_load, {id(kernel): kernel for kernel in kernels}.values()))
    finally:
        _COMPILE_ONLY.reset(token)


def _load(kernel: Any) -> None:
    """Load a kernel on the current device.

    kernel: compiled, or a future of a compiled kernel.
    """
    kernel = kernel.result() if hasattr(kernel, "result") else kernel
    _ = kernel.run  # the property loads the kernel


@lru_cache(maxsize=8)
def triton_since(*version: int) -> bool:
    """Return whether this Triton is of `version` (major, minor) or newer."""
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= version


def need_contiguous_rows(*tensors: Tensor) -> None:
    """Raise ValueError if the rows of a tensor (m, n) are not contiguous: kernels take one stride per tensor."""
    for tensor in tensors:
        if tensor.stride(1) != 1:
            raise ValueError(f"the kernel needs contiguous rows, not strides {tensor.stride()}")
