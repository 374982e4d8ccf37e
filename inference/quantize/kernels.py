"""The inner loops: Triton kernels, each beside a PyTorch twin that tests it and runs where Triton cannot.

Every kernel keeps a tile in registers while its loop runs, so each weight is read and written once. Divisions
are rounded correctly and ties go to even, as in PyTorch: both ways give the same integers but where a sum,
taken in another order, falls on the other side of a tie.

Knows tensors only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no build for this platform
    triton = None

GROUPS = (32, 64, 128)  # group sizes that the search kernel holds
STRIPS = 8


def on_triton(tensor: Tensor) -> bool:
    """Whether the kernels run for this tensor (else their twins do)."""
    return triton is not None and tensor.is_cuda


def _jit(function: Any) -> Any:
    return function if triton is None else triton.jit(function)


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


# ----------------------------------------------------------------------------------------------------------
# The inverse of a triangle: matrix products alone.


def lower_inverse_(L: Tensor) -> None:
    """Replaces a lower triangular matrix (n, n) by its inverse: two half-size inverses and two products, by halving.

    Nearly all of the arithmetic is in matrix products. What lies above the diagonal must be zero, and stays it.
    """
    _invert(L, 0, L.shape[0])


def _invert(L: Tensor, start: int, stop: int) -> None:
    if stop - start <= 512:
        block = L[start:stop, start:stop]
        eye = torch.eye(stop - start, dtype=L.dtype, device=L.device)
        block.copy_(torch.linalg.solve_triangular(block, eye, upper=False))
        return
    middle = start + ((stop - start) // 2 + 127) // 128 * 128
    _invert(L, start, middle)
    _invert(L, middle, stop)
    corner, first, second = (
        L[middle:stop, start:middle],
        L[start:middle, start:middle],
        L[middle:stop, middle:stop],
    )
    below = torch.empty_like(corner, memory_format=torch.contiguous_format)
    # Strips skip most of the zeros of a triangular factor, for nearly half of the arithmetic.
    step = max(256, -(-first.shape[0] // STRIPS))
    for a in range(0, first.shape[0], step):
        b = min(a + step, first.shape[0])
        torch.mm(corner[:, a:], first[a:, a:b], out=below[:, a:b])
    below.neg_()
    for a in range(0, second.shape[0], step):
        b = min(a + step, second.shape[0])
        torch.mm(second[a:b, :b], below[:b], out=corner[a:b])


# ----------------------------------------------------------------------------------------------------------
# Rounding with error compensation.


def compensate_columns(
    work: Tensor, scale: Tensor, zero: Tensor, group: Tensor, R: Tensor, levels: int, q: Tensor
) -> Tensor:
    """Rounds `c` columns (at most 128) one after another, each error spread over the columns after it.

    work: float32 (c, out), a column of W a row, overwritten with the rounded values. scale, zero: (groups,
    out). group: int64 (c), each column's group. R: (c, c) upper. q: uint8 (c, out), written. Returns the
    errors over `R_jj`, float32 (c, out), for the update of all later columns.
    """
    if on_triton(work):
        return _compensate_columns_triton(work, scale, zero, group, R, levels, q)
    return _compensate_columns_torch(work, scale, zero, group, R, levels, q)


def _compensate_columns_torch(
    work: Tensor, scale: Tensor, zero: Tensor, group: Tensor, R: Tensor, levels: int, q: Tensor
) -> Tensor:
    errors = torch.empty_like(work)
    diagonal = R.diagonal().tolist()
    s_all, z_all = scale[group], zero[group]
    for j in range(work.shape[0]):
        s, z = s_all[j], z_all[j]
        integer = (torch.round(work[j] / s) + z).clamp_(0, levels)
        q[j] = integer.to(torch.uint8)
        value = (integer - z) * s
        error = (work[j] - value) / diagonal[j]
        work[j + 1 :].addr_(R[j, j + 1 :], error, alpha=-1.0)
        work[j] = value
        errors[j] = error
    return errors


@_jit
def _nearest(x):  # type: ignore[no-untyped-def]
    """To the nearest whole number, ties to even: adding 1.5 * 2^23 leaves no bit for a fraction."""
    # The bounds lie far outside any grid, and are small enough for the trick.
    x = tl.minimum(tl.maximum(x, -1048576.0), 1048576.0)
    return (x + 12582912.0) - 12582912.0


@_jit
def _compensate_kernel(  # type: ignore[no-untyped-def]
    work, errors, q, scale, zero, group, R, columns, out, work_stride, errors_stride, q_stride, scale_stride,
    zero_stride, R_stride, levels, C: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = row < out
    k = tl.arange(0, C)
    there = k < columns
    tile = tl.load(
        work + k[:, None] * work_stride + row[None, :], mask=there[:, None] & inside[None, :], other=0.0
    )
    index = tl.load(group).to(tl.int64)
    s = tl.load(scale + index * scale_stride + row, mask=inside, other=1.0)
    z = tl.load(zero + index * zero_stride + row, mask=inside, other=0.0)
    r = tl.load(R + k, mask=there, other=0.0)
    diagonal = tl.load(R)
    index = tl.load(group + tl.minimum(1, columns - 1)).to(tl.int64)
    for j in range(columns):
        # What the next step needs is asked for now, to arrive while this one computes.
        ahead = tl.minimum(j + 1, columns - 1)
        next_r = tl.load(R + ahead * R_stride + k, mask=there, other=0.0)
        next_diagonal = tl.load(R + ahead * R_stride + ahead)
        next_s = tl.load(scale + index * scale_stride + row, mask=inside, other=1.0)
        next_z = tl.load(zero + index * zero_stride + row, mask=inside, other=0.0)
        index = tl.load(group + tl.minimum(j + 2, columns - 1)).to(tl.int64)
        w = tl.sum(tl.where((k == j)[:, None], tile, 0.0), axis=0)
        integer = tl.minimum(tl.maximum(_nearest(tl.div_rn(w, s)) + z, 0.0), levels)
        v = (integer - z) * s
        error = tl.div_rn(w - v, tl.zeros_like(w) + diagonal)
        # R is upper: columns before j see zero, column j itself is done with.
        tile -= tl.where(k > j, r, 0.0)[:, None] * error[None, :]
        tl.store(q + j * q_stride + row, integer.to(tl.uint8), mask=inside)
        tl.store(work + j * work_stride + row, v, mask=inside)
        tl.store(errors + j * errors_stride + row, error, mask=inside)
        s, z, r, diagonal = next_s, next_z, next_r, next_diagonal


def _tile(out: int) -> tuple[int, int]:
    """Rows of a tile: one warp each, enough of them for every scheduler."""
    return (32, 1) if out >= 8192 else (16, 1)


def _rows(*tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.stride(1) != 1:
            raise ValueError(f"the kernel needs contiguous rows, not strides {tensor.stride()}")


def _compensate_columns_triton(
    work: Tensor, scale: Tensor, zero: Tensor, group: Tensor, R: Tensor, levels: int, q: Tensor
) -> Tensor:
    columns, out = work.shape
    _rows(work, scale, zero, R, q)
    errors = torch.empty_like(work)
    B, warps = _tile(out)
    _compensate_kernel[(triton.cdiv(out, B),)](
        work, errors, q, scale, zero, group.contiguous(), R, columns, out, work.stride(0), errors.stride(0),
        q.stride(0), scale.stride(0), zero.stride(0), R.stride(0), float(levels),
        C=triton.next_power_of_2(columns), B=B, num_warps=warps,
    )  # fmt: skip
    return errors


# ----------------------------------------------------------------------------------------------------------
# Coordinate descent.


def descend_columns(
    gradient: Tensor, value: Tensor, scale: Tensor, zero: Tensor, H: Tensor, levels: int, q: Tensor
) -> None:
    """One pass of coordinate descent over `c` columns (at most 128), all tensors a column a row.

    gradient: `H (w - v)` for these columns, float32 (c, out), kept current among them; value: `v`, updated;
    scale, zero: (out); H: (c, c), symmetric; q: uint8 (c, out), updated.
    """
    if on_triton(gradient):
        _descend_columns_triton(gradient, value, scale, zero, H, levels, q)
    else:
        _descend_columns_torch(gradient, value, scale, zero, H, levels, q)


def _descend_columns_torch(
    gradient: Tensor, value: Tensor, scale: Tensor, zero: Tensor, H: Tensor, levels: int, q: Tensor
) -> None:
    for j in range(value.shape[0]):
        target = value[j] + gradient[j] / H[j, j]
        integer = (torch.round(target / scale) + zero).clamp_(0, levels)
        fresh = (integer - zero) * scale
        delta = fresh - value[j]
        value[j] = fresh
        q[j] = integer.to(torch.uint8)
        gradient.addr_(H[j], delta, alpha=-1.0)


@_jit
def _descend_kernel(  # type: ignore[no-untyped-def]
    gradient, value, q, scale, zero, H, columns, out, gradient_stride, value_stride, q_stride, H_stride,
    levels, C: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = row < out
    k = tl.arange(0, C)
    there = k < columns
    place = gradient + k[:, None] * gradient_stride + row[None, :]
    tile = tl.load(place, mask=there[:, None] & inside[None, :], other=0.0)
    s = tl.load(scale + row, mask=inside, other=1.0)
    z = tl.load(zero + row, mask=inside, other=0.0)
    v = tl.load(value + row, mask=inside, other=0.0)
    h = tl.load(H + k, mask=there, other=0.0)
    diagonal = tl.load(H)
    for j in range(columns):
        ahead = tl.minimum(j + 1, columns - 1)
        next_v = tl.load(value + ahead * value_stride + row, mask=inside, other=0.0)
        next_h = tl.load(H + ahead * H_stride + k, mask=there, other=0.0)
        next_diagonal = tl.load(H + ahead * H_stride + ahead)
        g = tl.sum(tl.where((k == j)[:, None], tile, 0.0), axis=0)
        target = v + tl.div_rn(g, tl.zeros_like(g) + diagonal)
        integer = tl.minimum(tl.maximum(_nearest(tl.div_rn(target, s)) + z, 0.0), levels)
        fresh = (integer - z) * s
        tile -= h[:, None] * (fresh - v)[None, :]
        tl.store(q + j * q_stride + row, integer.to(tl.uint8), mask=inside)
        tl.store(value + j * value_stride + row, fresh, mask=inside)
        v, h, diagonal = next_v, next_h, next_diagonal
    tl.store(place, tile, mask=there[:, None] & inside[None, :])


def _descend_columns_triton(
    gradient: Tensor, value: Tensor, scale: Tensor, zero: Tensor, H: Tensor, levels: int, q: Tensor
) -> None:
    columns, out = value.shape
    _rows(gradient, value, H, q)
    B, warps = _tile(out)
    _descend_kernel[(triton.cdiv(out, B),)](
        gradient, value, q, scale.contiguous(), zero.contiguous(), H, columns, out, gradient.stride(0),
        value.stride(0), q.stride(0), H.stride(0), float(levels),
        C=triton.next_power_of_2(columns), B=B, num_warps=warps,
    )  # fmt: skip


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


@_jit
def _steps(W, scale, zero, levels):  # type: ignore[no-untyped-def]
    """Signed steps `q - z` of rounding to nearest: (rows, g)."""
    z = zero[:, None]
    # One division a row and not one a weight: another integer only where a weight lies within 2^-23 of a tie.
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    return tl.minimum(tl.maximum(_nearest(W * inverse[:, None]) + z, 0.0), levels) - z


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
            centre = _nearest(tl.div_rn(-(low + high), 2.0 * tl.maximum(scale, 1e-30)) + middle)
            centre = tl.minimum(tl.maximum(centre, zero_min), levels)
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
    half = torch.float16 in dtypes
    brain = torch.bfloat16 in dtypes
    if half and brain:  # a bfloat16 in float16's range is a float16 too
        half = dtypes.index(torch.float16) < dtypes.index(torch.bfloat16)
    table = torch.tensor([*factors, *NEIGHBOURS], device=W.device)
    B, warps = _search_tile(W, precision)
    _search_kernel[(triton.cdiv(out, B), groups)](
        W, M, table, loss, scale, zero, out, W.stride(0), W.stride(1), M.stride(0), float(levels),
        float((levels + 1) // 2) if symmetric else levels / 2, float(zero_min), len(factors), refits,
        len(NEIGHBOURS), SYMMETRIC=symmetric, HALF=half, BRAIN=brain,
        PRECISION=precision, g=g, B=B, num_warps=warps,
    )  # fmt: skip
    return scale, zero, loss
