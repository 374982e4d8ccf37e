"""Factor large matrices by Cholesky, in place; nearly all of it is matrix products, at about float32's accuracy.

Some GPUs multiply TF32 on their tensor cores several times as fast as they multiply float32. There a product takes
three products of TF32: each matrix is the sum of two that TF32 holds, and of the four products of these parts the
smallest is below what float32 rounds away (Markidis et al., "NVIDIA Tensor Core Programmability, Performance &
Precision", arXiv:1803.04014, section V, for half precision). Half precision has as many bits of mantissa as TF32, twice
the speed and a smaller range: it is used where the numbers are known to be in its range.

This module knows tensors only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from llm_quantize.kernels.precision import split, split_fourfold, tf32_addmm_
from llm_quantize.kernels.streams import SideStream

PANEL = 1024  # columns of a panel; the library factors its triangle on the diagonal
WIDE = 4096  # columns that one update takes
ROWS = 32768  # rows of a panel that are worked on at a time, which bounds the memory
WHOLE = 4096  # columns of a matrix that a GPU's library factors as a whole: it launches few kernels
LEAF = 64  # columns of a triangle that is inverted by substitution
DEPTH = 2048  # inner columns of a product that are split at a time, which bounds the memory
LARGE = 1 << 31  # multiplications from which on a product is worth splitting

# Compute capabilities whose TF32 is many times as fast as float32; on other GPUs with TF32 it is not.
FAST_TF32 = {(8, 0), (9, 0), (10, 0), (10, 3)}

UNIT = 2.0**14  # what half precision stores for a one: far from both ends of its range

Parts = tuple[Tensor, Tensor]  # a matrix as `split` returns it: high and low


def has_half_products(tensor: Tensor) -> bool:
    """Return whether `half_product_` works on the device of `tensor`: on a GPU, with torch 2.8 and later."""
    return tensor.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out")


def half_product_(out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: float = 1.0) -> None:
    """Compute `out <- beta out + alpha a b` in place, with exact products and float32 sums.

    out: float32 (m, n). a: (m, k), b: (k, n), both float16 or both bfloat16.
    """
    if beta == 0 and alpha == 1:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.addmm(out, a, b, out_dtype=torch.float32, alpha=alpha, beta=beta, out=out)


def product_(out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: float = 1.0) -> None:
    """Compute `out <- beta out + alpha a b` in place, to about the accuracy of the dtype, the fastest way.

    out: (m, n), which must not overlap the others. a: (m, k). b: (k, n). Needs memory for at most four times `DEPTH`
    more columns of the larger of `a` and `b`.
    """
    if not _threefold(a, b):
        out.addmm_(a, b, alpha=alpha, beta=beta)
        return
    for start in range(0, a.shape[1], DEPTH):
        stop = start + DEPTH
        _multiply_parts_(out, split(a[:, start:stop]), split(b[start:stop]), alpha, beta)
        beta = 1.0


def _multiply_parts_(out: Tensor, a: Parts, b: Parts, alpha: float, beta: float) -> None:
    """Compute `out <- beta out + alpha (a_high + a_low) (b_high + b_low)`, without the product of the low parts."""
    # The small products first, while the sum is small too.
    tf32_addmm_(out, a[1], b[0], alpha=alpha, beta=beta)
    tf32_addmm_(out, a[0], b[1], alpha=alpha)
    tf32_addmm_(out, a[0], b[0], alpha=alpha)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return `a b` as `product_` computes it."""
    result = a.new_empty(a.shape[0], b.shape[1])
    product_(result, a, b, beta=0.0)
    return result


def _threefold(a: Tensor, b: Tensor) -> bool:
    """Return whether `a @ b` is worth three products in TF32."""
    if not a.is_cuda or torch.version.hip or a.dtype != torch.float32:
        return False
    return a.numel() * b.shape[1] >= LARGE and torch.cuda.get_device_capability(a.device) in FAST_TF32


def cholesky_(A: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Replace a symmetric matrix by its lower Cholesky factor.

    A: float32 or float64 (n, n), whose lower triangle is read; above the diagonal it becomes zero. Its diagonal must be
    about one, and at most four, as that of a matrix of correlations is.

    Returns whether the factorization failed and the inverses of the factor's diagonal blocks of `PANEL` columns. The
    former is a boolean scalar on the device, computed asynchronously; if it is true, `A` is worthless. A factor of NaN
    may count as a success: NaN is then on its diagonal.
    """
    if A.is_cuda and A.shape[0] <= WHOLE:
        return _library_cholesky_(A)
    n = A.shape[0]
    infos = torch.zeros(-(-n // PANEL), dtype=torch.int32, device=A.device)
    eye = torch.eye(min(n, PANEL), dtype=A.dtype, device=A.device)

    def factor_triangle(a: int, b: int) -> None:
        block = A[a:b, a:b]
        L, info = torch.linalg.cholesky_ex(block)
        infos[a // PANEL].copy_(info)
        block.copy_(L)
        inverses[a // PANEL].copy_(torch.linalg.solve_triangular(L, eye[: b - a, : b - a], upper=False))

    starts = range(0, n, PANEL)
    inverses = [A.new_empty(min(PANEL, n - a), min(PANEL, n - a)) for a in starts]
    deferred: list[Callable[[], None]] = []  # updates of columns that the next two panels do not read
    # A panel has the columns from a to b, the next two end at c and d. Each triangle on the diagonal needs only the
    # triangle before it and the block below that. Few of a GPU's processors factor the triangles, on the side stream;
    # the others work on the rest of the panel before.
    with SideStream(A.device) as side:
        with side.use():
            factor_triangle(0, min(PANEL, n))
        for a, inverse in zip(starts, inverses, strict=True):
            b, c, d = (min(a + i * PANEL, n) for i in (1, 2, 3))
            with side.use():
                if b < n:
                    below = product(A[b:c, a:b], inverse.T)
                    A[b:c, a:b] = below
                    product_(A[b:c, b:c], below, below.T, alpha=-1.0)
                    del below
            while deferred:
                deferred.pop(0)()
            side.join()
            if b == n:
                break
            with side.use(behind=False):
                factor_triangle(b, c)
            A[a:b, b:] = 0
            parts = None
            if has_half_products(A) and _threefold(A[b:, a:b], inverse):
                parts = A.new_empty(n - b, 4 * (b - a), dtype=torch.float16)
                split_fourfold(A[b:c, a:b], parts[: c - b], UNIT)
            for r in range(c, n, ROWS):
                rest = A[r : min(r + ROWS, n), a:b]
                panel = product(rest, inverse.T)
                rest.copy_(panel)
                if parts is not None:
                    split_fourfold(panel, parts[r - b : r - b + len(panel)], UNIT)
                del panel
            # The columns of the next two panels first, then as many at a time as suit a product.
            edges = [b, c, d, *range(d + WIDE, n, WIDE), n]
            deferred = [
                partial(_update_, A, parts, a, b, max(c, e), e, f) for e, f in pairwise(edges) if e < f
            ]
            del parts
            for update in deferred[:2]:
                update()
            del deferred[:2]
    return infos.ne(0).any(), inverses


def _update_(A: Tensor, parts: Tensor | None, a: int, b: int, r: int, c: int, d: int) -> None:
    """Subtract what the factor's columns `a:b` contribute to the columns `c:d`, in the rows from `r` on.

    A: (n, n), which holds the factor in its columns `a:b`. parts: float16 (n - b, 4 (b - a)), these columns in the rows
    from `b` on as `split_fourfold` writes them, times `UNIT`; None to read them from `A`.
    """
    out = A[r:, c:d]
    if parts is None:
        product_(out, A[r:, a:b], A[c:d, a:b].T, alpha=-1.0)
        return
    # low high + high low + high high, in one product: the small ones first, while the sum is small too.
    depth = b - a
    half_product_(out, parts[r - b :, depth:], parts[c - b : d - b, : 3 * depth].T, alpha=-1 / UNIT**2)


def _library_cholesky_(A: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Do the work of `cholesky_` by the library's Cholesky of the whole matrix."""
    L, info = torch.linalg.cholesky_ex(A)
    A.copy_(L)
    X = _inverses(L, PANEL)
    starts = range(0, len(X), PANEL)
    return info.ne(0), [X[a : a + PANEL, a : a + PANEL] for a in starts]


def _inverses(L: Tensor, largest: int) -> Tensor:
    """Return the inverses of the diagonal blocks of a lower triangle, each in its place in a matrix (n, n).

    L: (n, n), lower. largest: columns of a block, `LEAF` times a power of two; if `n` is smaller, one block is all of
    `L`. What lies outside the blocks has no meaning.

    Inverts leaves by substitution, all at once, then doubles the blocks. Each doubling is a few products over all pairs
    of blocks: on a GPU the time depends on how many kernels are launched.
    """
    n = L.shape[0]
    block = LEAF
    while block < min(n, largest):
        block *= 2
    full = -(-n // block) * block
    X = torch.eye(full, dtype=L.dtype, device=L.device)
    X[:n, :n] = L
    leaves = _diagonal_blocks(X, LEAF)
    eye = torch.eye(LEAF, dtype=L.dtype, device=L.device).expand_as(leaves)
    leaves.copy_(torch.linalg.solve_triangular(leaves, eye, upper=False))
    size = LEAF
    while size < block:
        # The inverse of [[first, 0], [corner, second]] has the corner - second^-1 corner first^-1.
        pairs = _diagonal_blocks(X, 2 * size)
        corners, first, second = pairs[:, size:, :size], pairs[:, :size, :size], pairs[:, size:, size:]
        torch.bmm(second, torch.baddbmm(corners, corners, first, beta=0, alpha=-1), out=corners)
        size *= 2
    return X[:n, :n]


def _diagonal_blocks(X: Tensor, size: int) -> Tensor:
    """Return the diagonal blocks of `X` (n, n) as a view (n / size, size, size)."""
    count = X.shape[0] // size
    return X.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
