"""Numbers in fewer bits: products of TF32 and of half precision, and scales that survive a cast; tensors only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Inside it, float32 products on a GPU round their inputs to TF32's ten bits, for several times the speed.

    For the updates of rounding and descent, whose inputs are themselves errors of rounding: there it changes nothing
    that can be measured (benchmarks/quality.md). Not for a factorization, which needs every bit.
    """
    settings = torch.backends.cuda.matmul
    name, value = ("fp32_precision", "tf32") if hasattr(settings, "fp32_precision") else ("allow_tf32", True)
    before = getattr(settings, name)
    setattr(settings, name, value)
    try:
        yield
    finally:
        setattr(settings, name, before)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two matrices whose sum is `x`, float32: TF32's ten bits of it, and the rest, of which TF32 loses little.

    Laid out as `x` is, but without gaps.
    """
    if x.stride(1) != 1 and x.stride(0) == 1:
        high, low = split(x.T)
        return high.T, low.T
    high, low = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    run = _split_triton if on_triton(x) and x.stride(1) == 1 else _split_torch
    run(x, high, low)
    return high, low


def split_fourfold(x: Tensor, out: Tensor, factor: float) -> None:
    """`out` (m, 4 n), float16, becomes `[high, low, high, high]` of `factor x`, of `x` (m, n), as the sum of two.

    The products of the parts that count, low high + high low + high high, are then one product: of the last three
    quarters with the first three.
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


def _split_torch(x: Tensor, high: Tensor, low: Tensor) -> None:
    bits = high.view(torch.int32)
    torch.add(x.view(torch.int32), 0x1000, out=bits)
    bits.bitwise_and_(-0x2000)
    torch.sub(x, high, out=low)


@jit
def to_tf32(x):  # type: ignore[no-untyped-def]
    """The nearest number that TF32 holds."""
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


def _split_triton(x: Tensor, high: Tensor, low: Tensor) -> None:
    rows, columns = x.shape
    grid = (rows, triton.cdiv(columns, 1024))
    launch(_split_kernel, grid, x, high, low, columns, x.stride(0), high.stride(0), warps=4, N=1024)


# ----------------------------------------------------------------------------------------------------------
# Half precision, of numbers brought to its range by powers of two: as many bits as TF32 has, at twice its speed.

HALF_MAX = 65504.0


def power_of_two(x: Tensor) -> Tensor:
    """The power of two at or below each number; float32, positive. By it a number is multiplied without rounding."""
    return (x.clamp(min=1e-30).view(torch.int32) & 0x7F800000).view(torch.float32)


def halved(x: Tensor, rows: Tensor, columns: Tensor | None = None, minus: Tensor | None = None) -> Tensor:
    """`(x - minus) rows[:, None] columns`, (m, n), as float16; what is past its range becomes its largest number."""
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


def halved_error(W: Tensor, q: Tensor, scale: Tensor, zero: Tensor, size: int, columns: Tensor) -> Tensor:
    """`(W - V)^T columns` as float16 (in, out), what is past its range as its largest number.

    W: (out, in); V: what the integers `q`, uint8 (out, in), stand for in groups of `size`, whose scales and zeros
    are (out, groups).
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
    return halved(W - dequantized(q, scale, zero, size), columns).T


def dequantized(q: Tensor, scale: Tensor, zero: Tensor, size: int) -> Tensor:
    """What integers (out, in) stand for in groups of `size`, whose scales and zeros are (out, groups)."""
    steps = q.reshape(len(q), -1, size) - zero.unsqueeze(2)
    return steps.mul_(scale.unsqueeze(2)).reshape(q.shape)


@jit_for_any("scale_stride", "zero_stride")  # groups, of which linears have a multiple of 16 or not
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
# Scales that survive a cast.


def representable(scale: Tensor, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    """Rounds float32 scales to values that every dtype of `dtypes` holds exactly, never to zero."""
    tiny = 2.0**-14  # the smallest normal float16: below it a step loses its precision
    sign = torch.where(scale < 0, -1.0, 1.0)
    magnitude = scale.abs().clamp(min=tiny, max=65000.0)
    for dtype in dtypes:
        magnitude = magnitude.to(dtype).to(torch.float32)
    return magnitude * sign


def casts(dtypes: tuple[torch.dtype, ...]) -> tuple[bool, bool]:
    """Whether the kernels' `to_representable` is to cast to float16, and then to bfloat16, for what `dtypes` does."""
    half, brain = torch.float16 in dtypes, torch.bfloat16 in dtypes
    if half and brain:  # a bfloat16 in float16's range is a float16 too
        half = dtypes.index(torch.float16) < dtypes.index(torch.bfloat16)
    return half, brain


@jit
def to_representable(scale, HALF: tl.constexpr, BRAIN: tl.constexpr):  # type: ignore[no-untyped-def]
    magnitude = tl.minimum(tl.maximum(tl.abs(scale), 0.00006103515625), 65000.0)
    if HALF:
        magnitude = magnitude.to(tl.float16).to(tl.float32)
    if BRAIN:
        # To bfloat16 and back, on the bits: to nearest, ties to even.
        bits = magnitude.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        magnitude = bits.to(tl.float32, bitcast=True)
    return tl.where(scale < 0, -magnitude, magnitude)
