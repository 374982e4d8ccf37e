"""Matrices in another order, and divided: each number is read once and written once; tensors only."""

from __future__ import annotations

import torch
from torch import Tensor

from llm_quantize.kernels.launcher import jit, launch, on_triton, tl, triton

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


@jit
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
    launch(
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
