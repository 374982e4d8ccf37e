"""Cholesky and the inverse of a triangle for large matrices, in place: nearly all of it matrix products.

On a GPU whose tensor cores multiply TF32 several times as fast as its other units multiply float32, a product takes
three of theirs: each matrix is the sum of two that TF32 holds, and of the four products of the parts the smallest is
below what float32 would round. So says Markidis et al., "NVIDIA Tensor Core Programmability, Performance & Precision"
(arXiv:1803.04014), section V, of half precision.

Knows tensors only.
"""

from __future__ import annotations

import torch
from torch import Tensor

import loops

PANEL = 1024  # columns of one step of Cholesky, and of a triangle that is multiplied as if it were full
LEAF = 64  # a triangle that is inverted by substitution
DEPTH = 2048  # of what is split at a time, which bounds the memory
LARGE = 1 << 31  # multiplications of a product that is worth splitting

# Where TF32 is many times as fast as float32; on the other GPUs that have it, it is not.
FAST_TF32 = {(8, 0), (9, 0), (10, 0), (10, 3)}

Parts = tuple[Tensor, ...]  # a matrix, or two whose sum it is


def _threefold(a: Tensor, b: Tensor) -> bool:
    """Whether `a @ b` is worth three products."""
    if not a.is_cuda or torch.version.hip or a.dtype != torch.float32:
        return False
    return a.numel() * b.shape[1] >= LARGE and torch.cuda.get_device_capability(a.device) in FAST_TF32


def _tf32_(out: Tensor, a: Tensor, b: Tensor, alpha: float, beta: float) -> None:
    """`out <- beta out + alpha a b` on the tensor cores."""
    with loops.tensor_cores():
        out.addmm_(a, b, alpha=alpha, beta=beta)


def _multiply_(out: Tensor, a: Parts, b: Parts, alpha: float, beta: float) -> None:
    if len(a) == 1:
        out.addmm_(a[0], b[0], alpha=alpha, beta=beta)
        return
    # The small ones first, while the sum is small too.
    _tf32_(out, a[1], b[0], alpha, beta)
    _tf32_(out, a[0], b[1], alpha, 1.0)
    _tf32_(out, a[0], b[0], alpha, 1.0)


def product_(out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: float = 1.0) -> None:
    """`out <- beta out + alpha a b`, (m, k) by (k, n), to about the accuracy of the dtype, the fastest way here.

    `out` must not overlap the others. Needs at most four times `DEPTH` columns more of memory, of the larger side.
    """
    if not _threefold(a, b):
        _multiply_(out, (a,), (b,), alpha, beta)
        return
    for start in range(0, a.shape[1], DEPTH):
        stop = start + DEPTH
        _multiply_(out, loops.split(a[:, start:stop]), loops.split(b[start:stop]), alpha, beta)
        beta = 1.0


def cholesky_(A: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Replaces a symmetric matrix (n, n), of which the lower triangle is read, by its lower Cholesky factor.

    What lies above the diagonal becomes zero. Returns whether there is no factor, a boolean scalar on the device that
    nobody has waited for (the matrix is then worthless), and what `lower_inverse_` takes: the inverses of the blocks
    of `PANEL` on the diagonal. NaN may pass for a factor, and is on its diagonal.
    """
    n = A.shape[0]
    infos, inverses = [], []
    for a in range(0, n, PANEL):
        b = min(a + PANEL, n)
        block = A[a:b, a:b]
        L, info = torch.linalg.cholesky_ex(block)
        infos.append(info)
        block.copy_(L)
        inverse = _small_inverse(L)
        inverses.append(inverse)
        if b == n:
            break
        A[a:b, b:] = 0
        below = A[b:, a:b]
        panel = torch.empty_like(below, memory_format=torch.contiguous_format)
        product_(panel, below, inverse.T, beta=0.0)
        below.copy_(panel)
        parts = loops.split(panel) if _threefold(panel, inverse) else (panel,)
        del panel
        for c in range(b, n, PANEL):
            d = min(c + PANEL, n)
            rows, turned = (tuple(p[c - b :] for p in parts), tuple(p[c - b : d - b].T for p in parts))
            _multiply_(A[c:, c:d], rows, turned, -1.0, 1.0)
    return torch.stack(infos).ne(0).any(), inverses


def _small_inverse(L: Tensor) -> Tensor:
    """The inverse of a lower triangle (n, n) that is not large: leaves by substitution, all at once, then doubling."""
    n = L.shape[0]
    full = LEAF
    while full < n:
        full *= 2
    T = torch.eye(full, dtype=L.dtype, device=L.device)
    T[:n, :n] = L
    pairs = torch.arange(full // LEAF, device=L.device)
    leaves = T.view(len(pairs), LEAF, len(pairs), LEAF)[pairs, :, pairs]
    eye = torch.eye(LEAF, dtype=L.dtype, device=L.device).expand_as(leaves)
    inverse = torch.linalg.solve_triangular(leaves, eye, upper=False)
    size = LEAF
    while size < full:
        pairs = pairs[: len(pairs) // 2]
        corners = T.view(len(pairs), 2, size, len(pairs), 2, size)[pairs, 1, :, pairs, 0]
        first, second = inverse[0::2], inverse[1::2]
        whole = L.new_zeros(len(pairs), 2 * size, 2 * size)
        whole[:, :size, :size] = first
        whole[:, size:, size:] = second
        whole[:, size:, :size] = (second @ corners @ first).neg_()
        inverse, size = whole, 2 * size
    result: Tensor = inverse[0, :n, :n]
    return result


def lower_inverse_(L: Tensor, inverses: list[Tensor]) -> None:
    """Replaces a lower triangular matrix (n, n) by its inverse: two half-size inverses and two products, by halving.

    What lies above the diagonal must be zero, and stays it. `inverses`: of the blocks on the diagonal, by `cholesky_`.
    """
    if len(inverses) == 1:
        L.copy_(inverses[0])
        return
    half = len(inverses) // 2
    middle = half * PANEL
    first, corner, second = L[:middle, :middle], L[middle:, :middle], L[middle:, middle:]
    lower_inverse_(first, inverses[:half])
    lower_inverse_(second, inverses[half:])
    _times_lower_(corner, first, -1.0)
    _lower_times_(second, corner)


def _middle(n: int) -> int:
    return (n // 2 + 63) // 64 * 64


def _times_lower_(C: Tensor, T: Tensor, alpha: float) -> None:
    """`C <- alpha C T`, `T` lower triangular: in halves, each in place once no one needs what was there."""
    if T.shape[0] <= PANEL:
        result = torch.empty_like(C, memory_format=torch.contiguous_format)
        product_(result, C, T, alpha=alpha, beta=0.0)
        C.copy_(result)
        return
    m = _middle(T.shape[0])
    _times_lower_(C[:, :m], T[:m, :m], alpha)
    product_(C[:, :m], C[:, m:], T[m:, :m], alpha=alpha)
    _times_lower_(C[:, m:], T[m:, m:], alpha)


def _lower_times_(T: Tensor, C: Tensor) -> None:
    """`C <- T C`, `T` lower triangular, in the same way."""
    if T.shape[0] <= PANEL:
        result = torch.empty_like(C, memory_format=torch.contiguous_format)
        product_(result, T, C, beta=0.0)
        C.copy_(result)
        return
    m = _middle(T.shape[0])
    _lower_times_(T[m:, m:], C[m:])
    product_(C[m:], T[m:, :m], C[:m])
    _lower_times_(T[:m, :m], C[:m])
