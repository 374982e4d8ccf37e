"""Permute, transpose, turn and scale matrices; each number is read once and written once.

This module knows tensors only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_quantize.kernels.launcher import jit, launch, on_triton, tl, triton

STRIP = 1024  # rows of a large matrix that a twin takes at a time, which bounds its memory


def transposed(x: Tensor, order: Tensor | None = None) -> Tensor:
    """Return `x.T`, or `x.T[order]`, contiguous.

    x: (m, n), of any dtype. order: a permutation, int64 (n).
    """
    if not on_triton(x) or x.stride(1) != 1:
        return x.T.contiguous() if order is None else x.T[order].contiguous()
    return _transpose_triton(x, x.new_empty(x.shape[1], x.shape[0]), target=_inverse(order))


def transposed_back(y: Tensor, order: Tensor) -> Tensor:
    """Return the `x` (m, n), contiguous, for which `transposed(x, order)` is `y` (n, m)."""
    if not on_triton(y) or y.stride(1) != 1:
        restored = torch.empty_like(y)
        restored[order] = y
        return restored.T.contiguous()
    return _transpose_triton(y, y.new_empty(y.shape[1], y.shape[0]), source=_inverse(order))


def _inverse(order: Tensor | None) -> Tensor | None:
    """Return the inverse permutation."""
    if order is None:
        return None
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


@jit
def _transpose_kernel(  # type: ignore[no-untyped-def]
    x, y, index, rows, columns, x_stride, y_stride, SOURCE: tl.constexpr, TARGET: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    column = tl.program_id(1).to(tl.int64) * N + tl.arange(0, N)
    inside, within = row < rows, column < columns
    source, target = row, column
    if SOURCE:
        source = tl.load(index + row, mask=inside, other=0)
    if TARGET:
        target = tl.load(index + column, mask=within, other=0)
    tile = tl.load(x + source[:, None] * x_stride + column[None, :], mask=inside[:, None] & within[None, :])
    tl.store(
        y + target[:, None] * y_stride + row[None, :], tl.trans(tile), mask=within[:, None] & inside[None, :]
    )


def _transpose_triton(
    x: Tensor, y: Tensor, *, source: Tensor | None = None, target: Tensor | None = None
) -> Tensor:
    """Write `y[target] = x[source].T` and return `y`.

    x: (m, n). y: (n, m). source: a permutation, int64 (m). target: a permutation, int64 (n). At most one of the two is
    given; the other order stays as it is.
    """
    index = source if source is not None else target
    launch(
        _transpose_kernel, (triton.cdiv(x.shape[0], 64), triton.cdiv(x.shape[1], 64)),
        x, y, x if index is None else index, *x.shape, x.stride(0), y.stride(0), warps=4,
        SOURCE=source is not None, TARGET=target is not None, N=64,
    )  # fmt: skip
    return y


def permute(H: Tensor, order: Tensor, factor: Tensor, out: Tensor) -> None:
    """Write `out_ij = H_kl factor_i factor_j` where `k = order_i` and `l = order_j`.

    H: float32 (n, n). order: a permutation, int64 (n). factor: float32 (n). out: (n, n), of any floating dtype.
    """
    if on_triton(H) and H.stride(1) == 1 and out.stride(1) == 1:
        n = len(order)
        strides = H.stride(0), out.stride(0)
        launch(_permute_kernel, (n,), H, out, order, factor, n, *strides, warps=16, N=2048)
        return
    for start in range(0, len(order), STRIP):
        part = slice(start, start + STRIP)
        out[part] = H[order[part]][:, order] * factor[part, None] * factor


@jit
def _permute_kernel(x, y, order, factor, n, x_stride, y_stride, N: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    by = tl.load(factor + row)
    x += tl.load(order + row) * x_stride
    y += row * y_stride
    # One program takes the whole row, so that its reads in arbitrary order hit its cache.
    for start in range(0, n, N):
        column = start + tl.arange(0, N)
        inside = column < n
        source = tl.load(order + column, mask=inside, other=0)
        value = tl.load(x + source, mask=inside, other=0.0) * by
        value *= tl.load(factor + column, mask=inside, other=1.0)
        tl.store(y + column, value.to(y.dtype.element_ty), mask=inside)


def turn_(A: Tensor, factor: Tensor) -> None:
    """Compute `A <- factor[:, None] A.flip(0, 1)` in place.

    A: float32 (n, n). factor: float32 (n).
    """
    n = A.shape[0]
    if on_triton(A) and A.is_contiguous():
        launch(_turn_kernel, (triton.cdiv(n, 2), triton.cdiv(n, 1024)), A, factor, n, warps=4, N=1024)
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


@jit
def _turn_kernel(A, factor, n, N: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * N + tl.arange(0, N)
    # The middle row is its own mirror image: here its first half is exchanged with its second.
    inside = column < tl.where(2 * row + 1 == n, (n + 1) // 2, n)
    here, there = A + row * n + column, A + (n - 1 - row) * n + (n - 1 - column)
    first, last = tl.load(here, mask=inside), tl.load(there, mask=inside)
    tl.store(here, last * tl.load(factor + row), mask=inside)
    tl.store(there, first * tl.load(factor + (n - 1 - row)), mask=inside)


def divide_(H: Tensor, scale: Tensor) -> None:
    """Compute `H_ij <- H_ij / (scale_i scale_j)` in place.

    H: float32 (n, n). scale: float32 (n).
    """
    if on_triton(H) and H.stride(1) == 1:
        n = H.shape[0]
        launch(_divide_kernel, (n, triton.cdiv(n, 1024)), H, scale, n, H.stride(0), warps=4, N=1024)
        return
    for start in range(0, H.shape[0], STRIP):
        part = slice(start, start + STRIP)
        H[part] /= scale[part, None] * scale


@jit
def _divide_kernel(H, scale, n, stride, N: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * N + tl.arange(0, N)
    inside = column < n
    value = tl.load(H + row * stride + column, mask=inside, other=0.0)
    by = tl.load(scale + row) * tl.load(scale + column, mask=inside, other=1.0)
    tl.store(H + row * stride + column, tl.div_rn(value, by), mask=inside)
