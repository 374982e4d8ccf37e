"""The inner loops: Triton kernels, each beside a PyTorch twin that tests it and runs where Triton cannot.

Every kernel keeps a tile in registers while its loop runs, so each weight is read and written once. Divisions
are rounded correctly and ties go to even, as in PyTorch: both ways give the same integers but where a sum,
taken in another order, falls on the other side of a tie.

Knows tensors only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no build for this platform
    triton = None

GROUPS = (32, 64, 128)  # group sizes that the search kernel holds


def on_triton(tensor: Tensor) -> bool:
    """Whether the kernels run for this tensor (else their twins do)."""
    return triton is not None and tensor.is_cuda


def _jit_for_any(*names: str) -> Callable[[Any], Any]:
    """`_jit` that does not compile anew for these numbers being a multiple of 16, or one, or not."""
    return lambda function: function if triton is None else triton.jit(do_not_specialize=names)(function)


_jit = _jit_for_any()
_COMPILED: dict[Any, Any] = {}
_ONLY_COMPILED: ContextVar[bool] = ContextVar("only_compiled", default=False)


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int, **constants: Any) -> None:
    """`kernel[grid](*args, num_warps=warps, **constants)`, `constants` in the order of the signature.

    Triton asks anew at each launch what its arguments are like, which takes longer than many of these kernels do. What
    it would find is known from what stands in the key; it compiles for nothing else. Of a number that is whole, it asks
    whether it is one, a multiple of 16, and how wide.
    """
    if _ONLY_COMPILED.get():
        kernel.warmup(*args, grid=grid, num_warps=warps, **constants)
        return
    # Since 3.3 a compiled kernel is launched with all arguments, constants too. The interpreter's has no names of them.
    if not _triton_since(3, 3) or not hasattr(kernel, "arg_names"):
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


def compile_together(work: Callable[[], object]) -> None:
    """Compiles the kernels that `work` would start, all at once on all cores, and starts none of them.

    `work` goes on with whatever is in memory where their results would be; its errors, and the compiler's, are passed
    over: what fails fails again when it is wanted. Nothing is done, `work` neither, where kernels are interpreted or
    Triton is older than 3.5, which does not say that it may be used from several threads.
    """
    if triton is None or not hasattr(_split_kernel, "arg_names") or not _triton_since(3, 5):
        return
    token = _ONLY_COMPILED.set(True)
    try:
        with suppress(Exception), ThreadPoolExecutor() as pool, triton.AsyncCompileMode(pool):
            work()
    finally:
        _ONLY_COMPILED.reset(token)


@lru_cache(maxsize=8)
def _triton_since(*version: int) -> bool:
    """Whether this Triton is that version or newer."""
    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= version


# ----------------------------------------------------------------------------------------------------------
# Products.


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
        _launch(_fourfold_kernel, grid, x, out, n, x.stride(0), out.stride(0), factor, warps=4, N=1024)
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


@_jit
def _tf32(x):  # type: ignore[no-untyped-def]
    """The nearest number that TF32 holds."""
    return ((x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)


@_jit
def _split_kernel(x, high, low, columns, x_stride, stride, N: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * N + tl.arange(0, N)
    inside = column < columns
    value = tl.load(x + row * x_stride + column, mask=inside, other=0.0)
    kept = _tf32(value)
    tl.store(high + row * stride + column, kept, mask=inside)
    tl.store(low + row * stride + column, value - kept, mask=inside)


@_jit
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
    _launch(_split_kernel, grid, x, high, low, columns, x.stride(0), high.stride(0), warps=4, N=1024)


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
        _launch(
            _halved_kernel, (m, triton.cdiv(n, 1024)),
            x, other, rows, rows if columns is None else columns, out, n, x.stride(0), other.stride(0), warps=4,
            MINUS=minus is not None, COLUMNS=columns is not None, N=1024,
        )  # fmt: skip
        return out
    value = (x if minus is None else x - minus) * rows[:, None]
    return out.copy_((value if columns is None else value * columns).clamp_(-HALF_MAX, HALF_MAX))


@_jit
def _half(value):  # type: ignore[no-untyped-def]
    return tl.minimum(tl.maximum(value, -65504.0), 65504.0).to(tl.float16)


@_jit
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
    tl.store(out + row * n + column, _half(value), mask=inside)


def halved_error(W: Tensor, q: Tensor, scale: Tensor, zero: Tensor, size: int, columns: Tensor) -> Tensor:
    """`(W - V)^T columns` as float16 (in, out), what is past its range as its largest number.

    W: (out, in); V: what the integers `q`, uint8 (out, in), stand for in groups of `size`, whose scales and zeros
    are (out, groups).
    """
    if on_triton(W):
        out, width = W.shape
        _contiguous_rows(W, q, scale, zero)
        result = torch.empty(width, out, dtype=torch.float16, device=W.device)
        _launch(
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


@_jit_for_any("scale_stride", "zero_stride")  # groups, of which linears have a multiple of 16 or not
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
        tl.trans(_half(value)),
        mask=within[:, None] & inside[None, :],
    )


# ----------------------------------------------------------------------------------------------------------
# Matrices in another order, and divided: each number is read once and written once.

STRIP = 1024  # rows of a large matrix that are moved at a time, where no kernel does


def transposed(x: Tensor, order: Tensor | None = None) -> Tensor:
    """`x.T`, its rows in `order` (a permutation, int64) where it is given; contiguous."""
    if not on_triton(x) or x.stride(1) != 1:
        return x.T.contiguous() if order is None else x.T[order].contiguous()
    return _transpose_triton(x, x.new_empty(x.shape[1], x.shape[0]), to=_inverse(order))


def transposed_back(y: Tensor, order: Tensor) -> Tensor:
    """The `x` of which `y` is `transposed(x, order)`; contiguous."""
    if not on_triton(y) or y.stride(1) != 1:
        restored = torch.empty_like(y)
        restored[order] = y
        return restored.T.contiguous()
    return _transpose_triton(y, y.new_empty(y.shape[1], y.shape[0]), taken=_inverse(order))


def _inverse(order: Tensor | None) -> Tensor | None:
    if order is None:
        return None
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


@_jit
def _transpose_kernel(  # type: ignore[no-untyped-def]
    x, y, index, rows, columns, x_stride, y_stride, TAKEN: tl.constexpr, TO: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    column = tl.program_id(1).to(tl.int64) * N + tl.arange(0, N)
    inside, within = row < rows, column < columns
    source, target = row, column
    if TAKEN:
        source = tl.load(index + row, mask=inside, other=0)
    if TO:
        target = tl.load(index + column, mask=within, other=0)
    tile = tl.load(x + source[:, None] * x_stride + column[None, :], mask=inside[:, None] & within[None, :])
    tl.store(
        y + target[:, None] * y_stride + row[None, :], tl.trans(tile), mask=within[:, None] & inside[None, :]
    )


def _transpose_triton(x: Tensor, y: Tensor, taken: Tensor | None = None, to: Tensor | None = None) -> Tensor:
    """`y[to] = x[taken].T`; either is a permutation, or as it is."""
    index = taken if taken is not None else to
    _launch(
        _transpose_kernel, (triton.cdiv(x.shape[0], 64), triton.cdiv(x.shape[1], 64)),
        x, y, x if index is None else index, *x.shape, x.stride(0), y.stride(0), warps=4,
        TAKEN=taken is not None, TO=to is not None, N=64,
    )  # fmt: skip
    return y


def permute(H: Tensor, order: Tensor, factor: Tensor, out: Tensor) -> None:
    """`out_ij <- H_kl factor_i factor_j` where `k = order_i`, `l = order_j`: (n, n), `out` of any dtype."""
    if on_triton(H) and H.stride(1) == 1 and out.stride(1) == 1:
        n = len(order)
        strides = H.stride(0), out.stride(0)
        _launch(_permute_kernel, (n,), H, out, order, factor, n, *strides, warps=16, N=2048)
        return
    for start in range(0, len(order), STRIP):
        part = slice(start, start + STRIP)
        out[part] = H[order[part]][:, order] * factor[part, None] * factor


@_jit
def _permute_kernel(x, y, order, factor, n, x_stride, y_stride, N: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    by = tl.load(factor + row)
    x += tl.load(order + row) * x_stride
    y += row * y_stride
    # One program has the whole row, so that what it takes in disorder lies in its cache.
    for start in range(0, n, N):
        column = start + tl.arange(0, N)
        inside = column < n
        source = tl.load(order + column, mask=inside, other=0)
        value = tl.load(x + source, mask=inside, other=0.0) * by
        value *= tl.load(factor + column, mask=inside, other=1.0)
        tl.store(y + column, value.to(y.dtype.element_ty), mask=inside)


def turn_(A: Tensor, factor: Tensor) -> None:
    """`A <- factor[:, None] A.flip(0, 1)`, (n, n), in place."""
    n = A.shape[0]
    if on_triton(A) and A.is_contiguous():
        _launch(_turn_kernel, (triton.cdiv(n, 2), triton.cdiv(n, 1024)), A, factor, n, warps=4, N=1024)
        return
    # A strip and its mirror image at a time.
    for a in range(0, n, STRIP):
        b = min(a + STRIP, n)
        if a >= n - b:
            middle = A[a : n - a].flip(0, 1)
            A[a : n - a] = middle
            break
        upper = A[a:b].flip(0, 1)
        A[a:b] = A[n - b : n - a].flip(0, 1)
        A[n - b : n - a] = upper
    A.mul_(factor[:, None])


@_jit
def _turn_kernel(A, factor, n, N: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * N + tl.arange(0, N)
    # The middle row is its own mirror image: half of it takes the other half's place.
    inside = column < tl.where(2 * row + 1 == n, (n + 1) // 2, n)
    here, there = A + row * n + column, A + (n - 1 - row) * n + (n - 1 - column)
    first, last = tl.load(here, mask=inside), tl.load(there, mask=inside)
    tl.store(here, last * tl.load(factor + row), mask=inside)
    tl.store(there, first * tl.load(factor + (n - 1 - row)), mask=inside)


def divide_(H: Tensor, scale: Tensor) -> None:
    """`H_ij <- H_ij / (scale_i scale_j)`, (n, n), in place."""
    if on_triton(H) and H.stride(1) == 1:
        n = H.shape[0]
        _launch(_divide_kernel, (n, triton.cdiv(n, 1024)), H, scale, n, H.stride(0), warps=4, N=1024)
        return
    for start in range(0, H.shape[0], STRIP):
        part = slice(start, start + STRIP)
        H[part] /= scale[part, None] * scale


@_jit
def _divide_kernel(H, scale, n, stride, N: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * N + tl.arange(0, N)
    inside = column < n
    value = tl.load(H + row * stride + column, mask=inside, other=0.0)
    by = tl.load(scale + row) * tl.load(scale + column, mask=inside, other=1.0)
    tl.store(H + row * stride + column, tl.div_rn(value, by), mask=inside)


# ----------------------------------------------------------------------------------------------------------
# What the loops over columns share. They go in steps of `SUB` columns: inside a step only its own columns hear of each
# other at once, in registers; a product then tells the rest of the piece.

COLUMNS = 128  # of a piece, at most: what a tile holds
FEW = 8192  # rows of weights at most that one kernel takes through several pieces
TOGETHER = 512  # columns at most that it rounds so, and tells each other of
SUB = 16  # columns of a step: the least depth that a product on the tensor cores takes
ROWS = 16  # rows of the weights in a tile, for one warp
# The same where few rows are to be had, or a tile has much in registers: twice as many tiles are at work.
HALF_ROWS = 8


@_jit
def _nearest(x, low, high):  # type: ignore[no-untyped-def]
    """To the nearest whole number within whole bounds, ties to even: 1.5 * 2^23 more leaves no bit for a fraction."""
    x = tl.minimum(tl.maximum(x, low), high)
    return (x + 12582912.0) - 12582912.0


@_jit
def _row(tile, at):  # type: ignore[no-untyped-def]
    """The one row of `tile` where `at` is true."""
    return tl.sum(tl.where(at[:, None], tile, 0.0), axis=0)


@_jit
def _part(tile, step, C: tl.constexpr, S: tl.constexpr, B: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows `[step * S, step * S + S)` of `tile` (C, B)."""
    if C == S:
        return tile
    at = tl.arange(0, C // S) == step
    return tl.sum(tl.where(at[:, None, None], tl.reshape(tile, (C // S, S, B)), 0.0), axis=0)


@_jit
def _add_product(total, a, whole):  # type: ignore[no-untyped-def]
    """`total + a @ whole`, for whole numbers of at most ten bits, which TF32 holds; `a` as the sum of two it holds."""
    high = _tf32(a)
    total = tl.dot(a - high, whole, total, input_precision="tf32")
    return tl.dot(high, whole, total, input_precision="tf32")


def _contiguous_rows(*tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.stride(1) != 1:
            raise ValueError(f"the kernel needs contiguous rows, not strides {tensor.stride()}")


def _rows_of_tile(small: bool) -> int:
    """Rows of the weights in a tile. `tl.dot` takes fewer than sixteen since Triton 3.5, on NVIDIA's GPUs."""
    return HALF_ROWS if small and torch.version.hip is None and _triton_since(3, 5) else ROWS


def _padded(columns: int) -> int:
    """Columns of the tile that holds these."""
    return max(SUB, int(triton.next_power_of_2(columns)))


# ----------------------------------------------------------------------------------------------------------
# Rounding with error compensation.


def compensate_columns(
    work: Tensor,
    scale: Tensor,
    zero: Tensor,
    group: Tensor,
    R: Tensor,
    levels: int,
    q: Tensor,
    errors: Tensor,
    part: slice | None = None,
) -> None:
    """Rounds `c` columns one after another, each error spread over the columns after it: at most `COLUMNS`, or several
    times as many where `takes_several`, which then tell each other with TF32's digits.

    work: float32 (c, out), a column of W a row, overwritten with the rounded values. scale, zero: (groups,
    out). group: int64 (c), each column's group. R: (c, c) upper; what lies below is not read. Written: q, uint8
    (c, out), and errors, float32 (c, out): the errors over `R_jj`, for the update of all later columns.

    part: which columns of all these are meant, where there are more: cutting them out takes as long as a kernel.
    """
    if on_triton(work):
        _compensate_columns_triton(work, scale, zero, group, R, levels, q, errors, part)
        return
    if part is not None:
        work, group, R, q, errors = work[part], group[part], R[part, part], q[part], errors[part]
    _compensate_columns_torch(work, scale, zero, group, R, levels, q, errors)


def takes_several(tensor: Tensor, rows: int) -> bool:
    """Whether kernels do well with several pieces of so many rows of weights at once, where `tensor` is.

    With few rows a kernel has little to do in a piece: waiting takes longer, for its own start and for the library's
    product before it. With many, that product is better than the kernel's own.
    """
    return on_triton(tensor) and rows <= FEW


def _compensate_columns_torch(
    work: Tensor,
    scale: Tensor,
    zero: Tensor,
    group: Tensor,
    R: Tensor,
    levels: int,
    q: Tensor,
    errors: Tensor,
) -> None:
    columns = work.shape[0]
    diagonal = R.diagonal()
    s_all, z_all = scale[group], zero[group]
    for start in range(0, columns, SUB):
        stop = min(start + SUB, columns)
        part = slice(start, stop)
        # With weights in steps of their grids, and each row of R over its diagonal, no division is left in the loop.
        s, z = s_all[part], z_all[part]
        low, high = -z, levels - z
        block = R[part, part] / diagonal[part, None]
        y, inverse = work[part] / s, 1 / s
        u = torch.empty_like(y)
        for j in range(stop - start):
            u[j] = torch.round(torch.minimum(torch.maximum(y[j], low[j]), high[j]))
            error = (y[j] - u[j]) * s[j]
            y[j + 1 :] -= block[j, j + 1 :, None] * error * inverse[j + 1 :]
        q[part] = (u + z).to(torch.uint8)
        work[part] = u * s
        errors[part] = (y - u) * s / diagonal[part, None]
        if stop < columns:
            work[stop:].addmm_(R[start:stop, stop:].T, errors[start:stop], alpha=-1.0)


@_jit
def _compensate_kernel(  # type: ignore[no-untyped-def]
    work, errors, q, scale, zero, group, R, begin, end, out, work_stride, errors_stride, q_stride, scale_stride,
    zero_stride, R_stride, levels, SPAN: tl.constexpr, C: tl.constexpr, S: tl.constexpr, B: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = row < out
    k = tl.arange(0, C)
    i = tl.arange(0, S)
    for first in range(begin, end, C):
        at = tl.cast(first, tl.int64)
        columns = end - first
        W, E, Q, G = work + at * work_stride, errors + at * errors_stride, q + at * q_stride, group + at
        there = k < columns
        tile = tl.load(
            W + k[:, None] * work_stride + row[None, :], mask=there[:, None] & inside[None, :], other=0.0
        )
        if SPAN:
            heard = tl.zeros((C, B), tl.float32)
            for earlier in range(begin, first, K):
                e = earlier + tl.arange(0, K)
                told = tl.load(R + e[None, :] * R_stride + (at + k)[:, None], mask=there[:, None], other=0.0)
                left = tl.load(
                    errors + e[:, None] * errors_stride + row[None, :], mask=inside[None, :], other=0.0
                )
                heard = tl.dot(told, left, heard, input_precision="tf32")
            tile -= heard
        D = R + at * (R_stride + 1)
        for start in range(0, C, S):
            part = start + i
            present = part < columns
            mask = present[:, None] & inside[None, :]
            # All that the loop needs is in registers before it starts; R is read turned round, (later, earlier).
            index = tl.load(G + part, mask=present, other=0).to(tl.int64)
            s = tl.load(scale + index[:, None] * scale_stride + row[None, :], mask=mask, other=1.0)
            z = tl.load(zero + index[:, None] * zero_stride + row[None, :], mask=mask, other=0.0)
            diagonal = tl.load(D + part * (R_stride + 1), mask=present, other=1.0)
            later = (part[:, None] > part[None, :]) & present[:, None]
            block = tl.load(D + part[None, :] * R_stride + part[:, None], mask=later, other=0.0)
            after = (k[:, None] >= start + S) & there[:, None]
            panel = tl.load(D + part[None, :] * R_stride + k[:, None], mask=after, other=0.0)
            # With weights in steps of their grids, and each row of R over its diagonal, no division is left in the
            # loop.
            block = tl.div_rn(block, tl.zeros_like(block) + diagonal[None, :])
            inverse = tl.div_rn(tl.full((S, B), 1.0, tl.float32), s)
            y = tl.div_rn(_part(tile, start // S, C, S, B), s)
            low, high = -z, levels - z
            for j in range(S):
                own = i == j
                # All of the step is rounded, as one row would be at a greater cost; its own row is what counts.
                error = _row((y - _nearest(y, low, high)) * s, own)
                y -= tl.sum(tl.where(own[None, :], block, 0.0), axis=1)[:, None] * error[None, :] * inverse
            # A row is left alone after its own turn, so that here each is what it was then.
            u = _nearest(y, low, high)
            over = tl.div_rn((y - u) * s, tl.zeros_like(y) + diagonal[:, None])
            tl.store(Q + part[:, None] * q_stride + row[None, :], (u + z).to(tl.uint8), mask=mask)
            tl.store(W + part[:, None] * work_stride + row[None, :], u * s, mask=mask)
            tl.store(E + part[:, None] * errors_stride + row[None, :], over, mask=mask)
            tile = tl.dot(-panel, over, tile, input_precision="tf32x3")
        if SPAN:
            tl.debug_barrier()  # what one thread wrote of the errors the others read


def _compensate_columns_triton(
    work: Tensor,
    scale: Tensor,
    zero: Tensor,
    group: Tensor,
    R: Tensor,
    levels: int,
    q: Tensor,
    errors: Tensor,
    part: slice | None = None,
) -> None:
    rows, out = work.shape
    start, stop = (0, rows) if part is None else (part.start, part.stop)
    whole = stop - start > COLUMNS
    B = _rows_of_tile(small=whole)
    _contiguous_rows(work, scale, zero, R, q, errors)
    _launch(
        _compensate_kernel, (triton.cdiv(out, B),),
        work, errors, q, scale, zero, group.contiguous(), R, start, stop, out, work.stride(0), errors.stride(0),
        q.stride(0), scale.stride(0), zero.stride(0), R.stride(0), float(levels), warps=1, SPAN=whole,
        C=COLUMNS if whole else _padded(stop - start), S=SUB, B=B, K=32,
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------
# Coordinate descent.


@dataclass(frozen=True, slots=True)
class Descent:
    """What a coordinate descent works on, all tensors a column a row; `scale`, `q` and `delta` are changed in place.

    gradient: float32 (c, out), `H (w - v)`, not changed. scale, zero: (groups, out). H: (c, c), symmetric. q: uint8 (c,
    out). delta: float32 or float16, as many rows as columns are told of at once: the change of the values, for the
    gradient. refit: what a scale must survive a cast to; a group's is then set first to the best for the integers, but
    where rounding it would lose. size: columns of a group.

    units: `a`, float32 (c), and `b` (out), powers of two: `gradient`, and what is missing of it, are to be taken times
    `a_k / b_r`, and delta is told times `b_r`. coupled: `H` as the products between pieces take it, for a gradient in
    `units`.
    """

    gradient: Tensor
    scale: Tensor
    zero: Tensor
    H: Tensor
    levels: int
    q: Tensor
    delta: Tensor
    refit: tuple[torch.dtype, ...] | None
    size: int
    units: tuple[Tensor, Tensor] | None = None
    coupled: Tensor | None = None


def descend_columns(state: Descent, part: slice, first: int, missing: Tensor | None = None) -> None:
    """One pass over the columns `part`, at most `COLUMNS` of one group. Written: `delta`, of these columns too.

    first: the column that `delta` begins with. missing: (columns, out), what is to be taken from the gradient.
    """
    run = _descend_triton if on_triton(state.gradient) else _descend_torch
    run(state, part, first, missing)


def _descend_torch(state: Descent, part: slice, first: int, missing: Tensor | None) -> None:
    index = part.start // state.size
    gradient, H, q, levels, refit = (
        state.gradient[part],
        state.H[part, part],
        state.q[part],
        state.levels,
        state.refit,
    )
    scale, zero, delta = (
        state.scale[index],
        state.zero[index],
        state.delta[part.start - first : part.stop - first],
    )
    units = None if state.units is None else (state.units[0][part], state.units[1])
    columns = q.shape[0]
    g = gradient.clone() if missing is None else gradient - missing
    if units is not None:
        g *= units[0][:, None] / units[1]
    u = q.to(g.dtype) - zero
    before = scale.clone()
    if refit is not None:
        Hu = H @ u
        slope, curve = (u * g).sum(0), (u * Hu).sum(0)
        fresh = representable(before + slope / curve.clamp(min=1e-30), refit)
        change = fresh - before
        # A rounded step may overshoot: keep it only where the quadratic form falls.
        scale.copy_(torch.where(2 * change * slope - change * change * curve > 0, fresh, before))
        g -= Hu * (scale - before)
    # In steps of the grid the integers are all that counts, and no division is left.
    g *= 1 / scale
    for start in range(0, columns, SUB):
        stop = min(start + SUB, columns)
        inverse = (1 / H.diagonal()[start:stop])[:, None]
        block = H[start:stop, start:stop] * inverse
        old = u[start:stop]
        target = old + g[start:stop] * inverse
        steps = torch.empty_like(target)
        for j in range(stop - start):
            steps[j] = torch.round(torch.minimum(torch.maximum(target[j], -zero), levels - zero)) - old[j]
            target[j + 1 :].addr_(block[j + 1 :, j], steps[j], alpha=-1.0)
        new = old + steps
        q[start:stop] = (new + zero).to(torch.uint8)
        change = new * scale - old * before
        if units is not None:
            change = (change * units[1]).clamp_(-HALF_MAX, HALF_MAX)
        delta[start:stop] = change
        if stop < columns:
            g[stop:].addmm_(H[stop:, start:stop], steps, alpha=-1.0)


@_jit
def _descend_kernel(  # type: ignore[no-untyped-def]
    gradient, missing, q, delta, scale, zero, H, coupled, column_units, row_units, begin, end, told, columns, size,
    out, gradient_stride, missing_stride, q_stride, delta_stride, scale_stride, zero_stride, H_stride,
    coupled_stride, levels, MISSING: tl.constexpr, SPAN: tl.constexpr, UNITS: tl.constexpr, REFIT: tl.constexpr,
    HALF: tl.constexpr, BRAIN: tl.constexpr, C: tl.constexpr, S: tl.constexpr, B: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = row < out
    k = tl.arange(0, C)
    i = tl.arange(0, S)
    there = k < columns
    mask = there[:, None] & inside[None, :]
    for first in range(begin, end, columns):
        at = tl.cast(first, tl.int64)
        G, Q, D = gradient + at * gradient_stride, q + at * q_stride, delta + (at - told) * delta_stride
        M = H + at * (H_stride + 1)
        scales, zeros = scale + at // size * scale_stride, zero + at // size * zero_stride
        tile = tl.load(G + k[:, None] * gradient_stride + row[None, :], mask=mask, other=0.0)
        if MISSING:
            tile -= tl.load(missing + k[:, None] * missing_stride + row[None, :], mask=mask, other=0.0)
        if SPAN:
            # What the earlier pieces of the span changed.
            heard = tl.zeros((C, B), tl.float32)
            for earlier in range(0, first - begin, K):
                e = earlier + tl.arange(0, K)
                few = tl.load(
                    coupled + (at + k)[:, None] * coupled_stride + (begin + e)[None, :],
                    mask=there[:, None],
                    other=0.0,
                )
                made = tl.load(
                    delta + e[:, None] * delta_stride + row[None, :], mask=inside[None, :], other=0.0
                )
                heard = tl.dot(few, made, heard, input_precision="tf32")
            tile -= heard
        if UNITS:
            unit = tl.load(row_units + row, mask=inside, other=1.0)
            tile *= tl.load(column_units + at + k, mask=there, other=1.0)[:, None]
            tile *= tl.div_rn(tl.full((B,), 1.0, tl.float32), unit)[None, :]
        before = tl.load(scales + row, mask=inside, other=1.0)
        z = tl.load(zeros + row, mask=inside, other=0.0)
        s = before
        if REFIT:
            Hu = tl.zeros((C, B), tl.float32)
            for start in range(0, C, S):
                part = start + i
                present = part < columns
                panel = tl.load(
                    M + k[:, None] * H_stride + part[None, :],
                    mask=there[:, None] & present[None, :],
                    other=0.0,
                )
                some = present[:, None] & inside[None, :]
                some_q = tl.load(Q + part[:, None] * q_stride + row[None, :], mask=some, other=0).to(
                    tl.float32
                )
                Hu = _add_product(Hu, panel, tl.where(some, some_q - z[None, :], 0.0))
            u = tl.load(Q + k[:, None] * q_stride + row[None, :], mask=mask, other=0).to(tl.float32)
            u = tl.where(mask, u - z[None, :], 0.0)
            slope, curve = tl.sum(u * tile, axis=0), tl.sum(u * Hu, axis=0)
            fresh = _representable(before + tl.div_rn(slope, tl.maximum(curve, 1e-30)), HALF, BRAIN)
            change = fresh - before
            # A rounded step may overshoot: keep it only where the quadratic form falls.
            s = tl.where(2 * change * slope - change * change * curve > 0, fresh, before)
            tile -= Hu * (s - before)[None, :]
            tl.store(scales + row, s, mask=inside)
        # In steps of the grid the integers are all that counts, and no division is left.
        tile *= tl.div_rn(tl.full((B,), 1.0, tl.float32), s)[None, :]
        low, high = -z[None, :], levels - z[None, :]
        for start in range(0, C, S):
            part = start + i
            present = part < columns
            some = present[:, None] & inside[None, :]
            diagonal = tl.load(M + part * (H_stride + 1), mask=present, other=1.0)
            later = (part[:, None] > part[None, :]) & present[:, None]
            block = tl.load(M + part[:, None] * H_stride + part[None, :], mask=later, other=0.0)
            old = tl.load(Q + part[:, None] * q_stride + row[None, :], mask=some, other=0).to(tl.float32)
            after = (k[:, None] >= start + S) & there[:, None] & present[None, :]
            panel = tl.load(M + k[:, None] * H_stride + part[None, :], mask=after, other=0.0)
            old = tl.where(some, old - z[None, :], 0.0)
            inverse = tl.div_rn(tl.full((S,), 1.0, tl.float32), diagonal)[:, None]
            block *= inverse
            target = old + _part(tile, start // S, C, S, B) * inverse
            for j in tl.static_range(S):
                own = i == j
                # All of the step is rounded, as one row would be at a greater cost; its own row is what counts.
                change_j = _row(_nearest(target, low, high) - old, own)
                target -= tl.sum(tl.where(own[None, :], block, 0.0), axis=1)[:, None] * change_j[None, :]
            # A row is left alone after its own turn, so that here each is what it was then.
            new = _nearest(target, low, high)
            tl.store(Q + part[:, None] * q_stride + row[None, :], (new + z[None, :]).to(tl.uint8), mask=some)
            step = new * s[None, :] - old * before[None, :]
            if UNITS:
                step = _half(step * unit[None, :])
            tl.store(D + part[:, None] * delta_stride + row[None, :], step, mask=some)
            tile = _add_product(tile, -panel, new - old)
        if SPAN:
            tl.debug_barrier()  # what one thread wrote of the changes the others read


def _descend_triton(
    state: Descent, part: slice, first: int, missing: Tensor | None, columns: int | None = None
) -> None:
    """columns: of a piece of `part`, where there are several, which then hear of each other.

    Nothing is cut out for the kernel: that takes as long as it does itself.
    """
    gradient, scale, zero, H, q, delta = (
        state.gradient,
        state.scale,
        state.zero,
        state.H,
        state.q,
        state.delta,
    )
    other, couple = gradient if missing is None else missing, H
    deep, whole = SUB, part.stop - part.start
    if columns is not None:
        assert state.coupled is not None
        couple, whole = state.coupled, columns
        deep = min(columns, 64 if couple.dtype == torch.float16 else 32)
    _contiguous_rows(gradient, other, H, couple, q, delta, scale, zero)
    half, brain = _casts(state.refit or ())
    B = _rows_of_tile(small=True)
    _launch(
        _descend_kernel, (triton.cdiv(q.shape[1], B),),
        gradient, other, q, delta, scale, zero, H, couple, *(state.units or (H, H)), part.start, part.stop, first,
        whole, state.size, q.shape[1], gradient.stride(0), other.stride(0), q.stride(0), delta.stride(0),
        scale.stride(0), zero.stride(0), H.stride(0), couple.stride(0), float(state.levels), warps=1,
        MISSING=missing is not None, SPAN=columns is not None, UNITS=state.units is not None,
        REFIT=state.refit is not None, HALF=half, BRAIN=brain, C=_padded(whole), S=SUB, B=B, K=deep,
    )  # fmt: skip


def are_even(pieces: list[slice]) -> bool:
    """Whether a kernel takes these pieces at once: all of as many columns, a power of two that a tile holds."""
    widths = {piece.stop - piece.start for piece in pieces}
    return len(widths) == 1 and _padded(min(widths)) in widths


def descend_pieces(state: Descent, pieces: list[slice]) -> None:
    """`descend_columns` for a piece with which `delta` begins; or for several one after another, where `takes_several`
    and `are_even`: what one misses of the gradient, for the changes of those before, is computed when its turn comes.
    """
    first = pieces[0].start
    if on_triton(state.gradient) and are_even(pieces):
        _descend_triton(state, slice(first, pieces[-1].stop), first, None, pieces[0].stop - first)
    else:
        (part,) = pieces
        descend_columns(state, part, first)


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


def _casts(dtypes: tuple[torch.dtype, ...]) -> tuple[bool, bool]:
    """Whether the kernels' `_representable` is to cast to float16, and then to bfloat16, for what `dtypes` does."""
    half, brain = torch.float16 in dtypes, torch.bfloat16 in dtypes
    if half and brain:  # a bfloat16 in float16's range is a float16 too
        half = dtypes.index(torch.float16) < dtypes.index(torch.bfloat16)
    return half, brain


@_jit
def _representable(scale, HALF: tl.constexpr, BRAIN: tl.constexpr):  # type: ignore[no-untyped-def]
    magnitude = tl.minimum(tl.maximum(tl.abs(scale), 0.00006103515625), 65000.0)
    if HALF:
        magnitude = magnitude.to(tl.float16).to(tl.float32)
    if BRAIN:
        # To bfloat16 and back, on the bits: to nearest, ties to even.
        bits = magnitude.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        magnitude = bits.to(tl.float32, bitcast=True)
    return tl.where(scale < 0, -magnitude, magnitude)


# ----------------------------------------------------------------------------------------------------------
# The search for scales and zero points; its twin is `grid._search`.

NEIGHBOURS = (0.92, 0.96, 1.0, 1.04, 1.08)  # on the best scale, for the zero points beside the best


def can_search(W: Tensor, M: Tensor, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether `search_groups` takes these: W (out, G, g) on a GPU, `M` the full blocks of a size it holds."""
    known = (torch.float16, torch.bfloat16, torch.float32)
    return (
        on_triton(W) and W.shape[2] in GROUPS and M.shape[1] == W.shape[2] and all(d in known for d in dtypes)
    )


@_jit
def _steps(W, scale, zero, levels):  # type: ignore[no-untyped-def]
    """Signed steps `q - z` of rounding to nearest: (rows, g)."""
    z = zero[:, None]
    # One division a row and not one a weight: another integer only where a weight lies within 2^-23 of a tie.
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    return _nearest(W * inverse[:, None], -z, levels - z)


@_jit
def _offer(  # type: ignore[no-untyped-def]
    W, M, loss, best, zero, scale, candidate, levels,
    HALF: tl.constexpr, BRAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(loss, scale, zero) after trying `scale`, `candidate` against the best so far."""
    scale = _representable(scale, HALF, BRAIN)
    E = W - _steps(W, scale, candidate, levels) * scale[:, None]
    fresh = tl.sum(tl.dot(E, M, input_precision=PRECISION) * E, axis=1)
    better = fresh < loss
    return tl.where(better, fresh, loss), tl.where(better, scale, best), tl.where(better, candidate, zero)


@_jit
def _search_kernel(  # type: ignore[no-untyped-def]
    weights, metric, factors, losses, scales, zeros, rows, row_stride, group_stride, metric_stride, levels,
    middle, zero_min, sweep, refits, neighbours, SYMMETRIC: tl.constexpr, HALF: tl.constexpr,
    BRAIN: tl.constexpr, PRECISION: tl.constexpr, g: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    group = tl.program_id(1).to(tl.int64)
    inside = row < rows
    k = tl.arange(0, g)
    W = tl.load(
        weights + group * group_stride + row[:, None] * row_stride + k[None, :],
        mask=inside[:, None],
        other=0.0,
    )
    # The block is symmetric; its transpose is what the tensor cores read without a shuffle.
    M = tl.trans(tl.load(metric + group * metric_stride + k[:, None] * g + k[None, :]))
    low, high = tl.min(W, axis=1), tl.max(W, axis=1)
    loss = tl.full((B,), float("inf"), tl.float32)
    best = tl.full((B,), 1.0, tl.float32)
    zero = tl.zeros((B,), tl.float32)
    if SYMMETRIC:
        # The long side of the grid, q = 0, goes to the larger extreme; then the other way is tried too.
        span = tl.div_rn(tl.maximum(high, -low), tl.zeros_like(low) + middle)
        span = tl.where(high > -low, -span, span)
        centre = tl.zeros((B,), tl.float32) + middle
        for i in range(2 * sweep):
            factor = tl.load(factors + i % sweep)
            scale = tl.where(i < sweep, span, -span) * factor
            loss, best, zero = _offer(W, M, loss, best, zero, scale, centre, levels, HALF, BRAIN, PRECISION)
    else:
        low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
        span = tl.div_rn(high - low, tl.zeros_like(low) + levels)
        for i in range(sweep):
            scale = span * tl.load(factors + i)
            centre = tl.div_rn(-(low + high), 2.0 * tl.maximum(scale, 1e-30)) + middle
            centre = _nearest(centre, zero_min, levels)
            loss, best, zero = _offer(W, M, loss, best, zero, scale, centre, levels, HALF, BRAIN, PRECISION)
        start = best
        centre = zero
        for i in range(2 * neighbours):
            # Both sides start from the best so far, as it was when the side began.
            first = i % neighbours == 0
            start = tl.where(first, best, start)
            shift = tl.where(i < neighbours, -1.0, 1.0)
            centre = tl.where(first, tl.minimum(tl.maximum(zero + shift, zero_min), levels), centre)
            scale = start * tl.load(factors + sweep + i % neighbours)
            loss, best, zero = _offer(W, M, loss, best, zero, scale, centre, levels, HALF, BRAIN, PRECISION)
    for _ in range(refits):
        # The least-squares scale for the integers at hand: u^T M w / u^T M u.
        U = _steps(W, best, zero, levels)
        UM = tl.dot(U, M, input_precision=PRECISION)
        scale = tl.div_rn(tl.sum(UM * W, axis=1), tl.maximum(tl.sum(UM * U, axis=1), 1e-30))
        scale = tl.where(scale == 0.0, best, scale)
        loss, best, zero = _offer(W, M, loss, best, zero, scale, zero, levels, HALF, BRAIN, PRECISION)
    to = group * rows + row
    tl.store(losses + to, loss, mask=inside)
    tl.store(scales + to, best, mask=inside)
    tl.store(zeros + to, zero, mask=inside)


def _search_tile(W: Tensor, precision: str) -> tuple[int, int]:
    """Rows and warps of a tile of the search: what the shared memory holds beside the block of `M`."""
    if not W.is_cuda:
        return 64, 4
    roomy = torch.cuda.get_device_properties(W.device).shared_memory_per_block_optin >= 200_000
    if not roomy:
        return 32, 4
    return (128, 8) if precision == "tf32" else (64, 4)


@lru_cache(maxsize=16)
def _table(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """On the device once and for all: every copy to it may wait for what it is doing."""
    return torch.tensor(numbers, device=device)


def search_groups(
    W: Tensor, M: Tensor, factors: list[float], *, levels: int, symmetric: bool, zero_min: int,
    dtypes: tuple[torch.dtype, ...], refits: int, precision: str = "tf32",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The best scale and zero of each group and row, and the error there: three float32 (G, out).

    W: float32 (out, G, g), g of `GROUPS`, contiguous along g; M: float32 (G, g, g), symmetric. factors: of
    the sweep, on the spanning scale. dtypes: what scales survive a cast to, in turn. precision: of the
    products' inputs. "tf32" moves an error by less than a thousandth, so it may choose another of
    two near equals, and refine from there: single groups end better or worse, the mean is the same to 1e-4.
    "tf32x3" agrees with float32 but for one group in ten thousand, at twice the time.
    """
    out, groups, g = W.shape
    if W.stride(2) != 1:
        raise ValueError(f"the kernel needs contiguous groups, not strides {W.stride()}")
    M = M.contiguous()
    loss, scale, zero = torch.empty(3, groups, out, device=W.device).unbind(0)
    half, brain = _casts(dtypes)
    table = _table((*factors, *NEIGHBOURS), W.device)
    B, warps = _search_tile(W, precision)
    _launch(
        _search_kernel, (triton.cdiv(out, B), groups),
        W, M, table, loss, scale, zero, out, W.stride(0), W.stride(1), M.stride(0), float(levels),
        float((levels + 1) // 2) if symmetric else levels / 2, float(zero_min), len(factors), refits,
        len(NEIGHBOURS), warps=warps, SYMMETRIC=symmetric, HALF=half, BRAIN=brain,
        PRECISION=precision, g=g, B=B,
    )  # fmt: skip
    return scale, zero, loss
