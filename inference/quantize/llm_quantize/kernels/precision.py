"""Numbers in fewer bits: products in TF32 and half precision, and scales that a cast keeps.

This module knows tensors only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from llm_quantize.kernels.launcher import (
    jit,
    jit_for_any,
    launch,
    need_contiguous_rows,
    on_triton,
    tl,
    triton,
)

# ----------------------------------------------------------------------------------------------------------
# TF32: the inputs of a float32 product rounded to ten bits of mantissa, for several times the speed.

# PyTorch allows TF32 by one setting for the whole process. It is on for the length of one library call; the lock makes
# threads take turns, since the second would otherwise save, and later put back, what the first has set. Both functions
# spell that out: they are called some thousand times a block, and a context manager would double what they cost.
# The public setting takes 6 microseconds a product, its accessors below it 1: that is 2 % of AWQ on a fast GPU.
_TF32_LOCK = Lock()
_SETTINGS = torch.backends.cuda.matmul
if hasattr(torch._C, "_set_fp32_precision_setter") and hasattr(torch._C, "_get_fp32_precision_getter"):
    _ALLOWED: str | bool = "tf32"
    _get: Callable[[], Any] = partial(torch._C._get_fp32_precision_getter, "cuda", "matmul")
    _set: Callable[[Any], Any] = partial(torch._C._set_fp32_precision_setter, "cuda", "matmul")
elif hasattr(_SETTINGS, "fp32_precision"):
    _ALLOWED = "tf32"
    _get, _set = partial(getattr, _SETTINGS, "fp32_precision"), partial(setattr, _SETTINGS, "fp32_precision")
else:
    _ALLOWED = True
    _get, _set = partial(getattr, _SETTINGS, "allow_tf32"), partial(setattr, _SETTINGS, "allow_tf32")


def tf32_addmm_(out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: float = 1.0) -> None:
    """Compute `out <- beta out + alpha a b` in place, with TF32 inputs where a GPU has them.

    out: (m, n), a: (m, k), b: (k, n). On the CPU this is `out.addmm_`.

    For the updates of rounding and descent, whose inputs are rounding errors themselves: TF32 changes no result there
    that can be measured (benchmarks/quality.md). Not for a factorization, which needs every bit.
    """
    if not _has_tf32(out):
        out.addmm_(a, b, alpha=alpha, beta=beta)
        return
    with _TF32_LOCK:
        before = _get()
        _set(_ALLOWED)
        try:
            out.addmm_(a, b, alpha=alpha, beta=beta)
        finally:
            _set(before)


def tf32_matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return `a @ b`, (m, k) by (k, n), with TF32 inputs where a GPU has them; see `tf32_addmm_`."""
    if not _has_tf32(a):
        return a @ b
    with _TF32_LOCK:
        before = _get()
        _set(_ALLOWED)
        try:
            return a @ b
        finally:
            _set(before)


def _has_tf32(tensor: Tensor) -> bool:
    """Return whether the setting of TF32 matters for products on the device of `tensor`."""
    return tensor.is_cuda


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split `x` (m, n) into `high + low`, exactly.

    x: float32, in row-major or column-major order. Returns two float32 tensors in the same order, without gaps: `high`
    has the ten bits of mantissa that TF32 holds, `low` the rest, of which TF32 loses little.
    """
    if x.stride(1) != 1 and x.stride(0) == 1:
        high, low = split(x.T)
        return high.T, low.T
    high, low = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    run = _split_triton if on_triton(x) and x.stride(1) == 1 else _split_torch
    run(x, high, low)
    return high, low


def _split_triton(x: Tensor, high: Tensor, low: Tensor) -> None:
    rows, columns = x.shape
    grid = (rows, triton.cdiv(columns, 1024))
    launch(_split_kernel, grid, x, high, low, columns, x.stride(0), high.stride(0), warps=4, N=1024)


def _split_torch(x: Tensor, high: Tensor, low: Tensor) -> None:
    bits = high.view(torch.int32)
    torch.add(x.view(torch.int32), 0x1000, out=bits)
    bits.bitwise_and_(-0x2000)
    torch.sub(x, high, out=low)


@jit
def to_tf32(x):  # type: ignore[no-untyped-def]
    """Round float32 to the nearest number that TF32 holds."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@jit
def _split_kernel(x, high, low, columns, x_stride, stride, N: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * N + tl.arange(0, N)
    inside = column < columns
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    kept = to_tf32(value)
    tl.store(high + row * stride + column, kept, mask=inside)
    tl.store(low + row * stride + column, value - kept, mask=inside)


# ----------------------------------------------------------------------------------------------------------
# Half precision, for numbers that powers of two bring into its range: as many bits as TF32, at twice its speed.

HALF_MAX = 65504.0


def split_fourfold(x: Tensor, out: Tensor, factor: float) -> None:
    """Split `factor x` into `high + low` of float16 and write `[high, low, high, high]` to `out`.

    x: float32 (m, n). out: float16 (m, 4 n).

    Of two such matrices, the last three quarters of one times the first three of the other give
    `low high + high low + high high` in one product: all terms that matter of the product in float32.
    """
    n = x.shape[1]
    if on_triton(x) and x.stride(1) == 1 and out.stride(1) == 1:
        grid = (x.shape[0], triton.cdiv(n, 1024))
        launch(_fourfold_kernel, grid, x, out, n, x.stride(0), out.stride(0), factor, warps=4, N=1024)
        return
    scaled = x * factor
    high = scaled.to(torch.float16)
    for at, part in enumerate((high, (scaled - high).to(torch.float16), high, high)):
        out[:, at * n : (at + 1) * n] = part


@jit
def _fourfold_kernel(x, out, columns, x_stride, stride, factor, N: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * N + tl.arange(0, N)
    inside = column < columns
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0) * factor
    high = value.to(tl.float16)
    to = out + row * stride + column
    tl.store(to, high, mask=inside)
    tl.store(to + columns, (value - high.to(tl.float32)).to(tl.float16), mask=inside)
    tl.store(to + 2 * columns, high, mask=inside)
    tl.store(to + 3 * columns, high, mask=inside)


def power_of_two(x: Tensor) -> Tensor:
    """Return the largest power of two not above each number of `x`, float32 and positive.

    A multiplication by a power of two is exact.
    """
    return (x.clamp(min=1e-30).view(torch.int32) & 0x7F800000).view(torch.float32)


def halved(x: Tensor, rows: Tensor, columns: Tensor | None = None, minus: Tensor | None = None) -> Tensor:
    """Return `(x - minus) rows[:, None] columns` as float16 (m, n), clamped to float16's range.

    x, minus: float32 (m, n). rows: float32 (m). columns: float32 (n). `minus` and `columns` may be left out.
    """
    out = torch.empty(x.shape, dtype=torch.float16, device=x.device)
    if on_triton(x) and x.stride(1) == 1 and (minus is None or minus.stride(1) == 1):
        m, n = x.shape
        other = x if minus is None else minus
        launch(
            _halved_kernel, (m, triton.cdiv(n, 1024)),
            x, other, rows, rows if columns is None else columns, out, n, x.stride(0), other.stride(0), warps=4,
            MINUS=minus is not None, COLUMNS=columns is not None, N=1024,
        )  # fmt: skip
        return out
    value = (x if minus is None else x - minus) * rows[:, None]
    return out.copy_((value if columns is None else value * columns).clamp_(-HALF_MAX, HALF_MAX))


@jit
def to_half(value):  # type: ignore[no-untyped-def]
    """Cast to float16, clamped to its range."""
    return tl.minimum(tl.maximum(value, -65504.0), 65504.0).to(tl.float16)


@jit
def _halved_kernel(  # type: ignore[no-untyped-def]
    x, minus, rows, columns, out, n, x_stride, minus_stride, MINUS: tl.constexpr, COLUMNS: tl.constexpr,
    N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * N + tl.arange(0, N)
    inside = column < n
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    if MINUS:
        value -= tl.load(minus + row * minus_stride + column, mask=inside, other=0.0)
    value *= tl.load(rows + row)
    if COLUMNS:
        value *= tl.load(columns + column, mask=inside, other=1.0)
    tl.store(out + row * n + column, to_half(value), mask=inside)


# ----------------------------------------------------------------------------------------------------------
# Values of integers.


def dequantize_groups(q: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return the values `(q - zero) * scale` of integers, float32 (out, in).

    q: uint8 (out, in). scale, zero: float32 (out, groups), for `groups` groups of `in / groups` columns each.
    """
    steps = q.reshape(len(q), scale.shape[1], -1) - zero.unsqueeze(2)
    return steps.mul_(scale.unsqueeze(2)).reshape(q.shape)


def halved_error(W: Tensor, q: Tensor, scale: Tensor, zero: Tensor, size: int, columns: Tensor) -> Tensor:
    """Return `(W - V)^T columns` as float16 (in, out), clamped to float16's range, where `V` are the values of `q`.

    W: float32 (out, in). q, scale, zero: as `dequantize_groups` takes them, in groups of `size` columns. columns:
    float32 (out).
    """
    if on_triton(W):
        out, width = W.shape
        need_contiguous_rows(W, q, scale, zero)
        result = torch.empty(width, out, dtype=torch.float16, device=W.device)
        launch(
            _error_kernel, (triton.cdiv(out, 64), triton.cdiv(width, 64)),
            W, q, scale, zero, columns, result, out, width, size, W.stride(0), q.stride(0), scale.stride(0),
            zero.stride(0), warps=4, N=64,
        )  # fmt: skip
        return result
    return halved(W - dequantize_groups(q, scale, zero), columns).T


# The strides are numbers of groups, which are a multiple of 16 for some linears and not for others.
@jit_for_any("scale_stride", "zero_stride")
def _error_kernel(  # type: ignore[no-untyped-def]
    W, q, scale, zero, columns, result, out, width, size, W_stride, q_stride, scale_stride, zero_stride,
    N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    column = tl.program_id(1).to(tl.int64) * N + tl.arange(0, N)
    inside, within = row < out, column < width
    mask = inside[:, None] & within[None, :]
    group = column // size
    s = tl.load(scale + row[:, None] * scale_stride + group[None, :], mask=mask, other=1.0)
    z = tl.load(zero + row[:, None] * zero_stride + group[None, :], mask=mask, other=0.0)
    steps = tl.load(q + row[:, None] * q_stride + column[None, :], mask=mask, other=0).to(tl.float32) - z
    value = tl.load(W + row[:, None] * W_stride + column[None, :], mask=mask, other=0.0) - steps * s
    value *= tl.load(columns + row, mask=inside, other=1.0)[:, None]
    tl.store(
        result + column[:, None] * out + row[None, :],
        tl.trans(to_half(value)),
        mask=within[:, None] & inside[None, :],
    )


# ----------------------------------------------------------------------------------------------------------
# Scales that a cast keeps.


def representable(scale: Tensor, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """Round float32 scales, of any shape and sign, to values that each of `dtypes` holds exactly; never to zero."""
    tiny = 2.0**-14  # the smallest normal float16: smaller scales would lose precision
    sign = torch.where(scale < 0, -1.0, 1.0)
    magnitude = scale.abs().clamp(min=tiny, max=65000.0)
    for dtype in dtypes:
        magnitude = magnitude.to(dtype).to(torch.float32)
    return magnitude * sign


def casts(dtypes: tuple[torch.dtype, ...]) -> tuple[bool, bool]:
    """Return whether `to_representable` has to cast to float16, and then to bfloat16, to do as `representable`."""
    fp16, bf16 = torch.float16 in dtypes, torch.bfloat16 in dtypes
    if fp16 and bf16:  # a bfloat16 within the range of `representable` is a float16 too
        fp16 = dtypes.index(torch.float16) < dtypes.index(torch.bfloat16)
    return fp16, bf16


@jit
def to_representable(scale, TO_FP16: tl.constexpr, TO_BF16: tl.constexpr):  # type: ignore[no-untyped-def]
    """Round scales as `representable` does, with the casts that `casts` returned."""
    magnitude = tl.minimum(tl.maximum(tl.abs(scale), 0.00006103515625), 65000.0)
    if TO_FP16:
        magnitude = magnitude.to(tl.float16).to(tl.float32)
    if TO_BF16:
        # To bfloat16 and back, on the bits: to nearest, ties to even.
        bits = magnitude.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        magnitude = bits.to(tl.float32, bitcast=True)
    return tl.where(scale < 0, -magnitude, magnitude)
