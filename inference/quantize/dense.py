"""Cholesky of large matrices, in place: nearly all of it matrix products, and those at about float32's accuracy.

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

PANEL = 1024  # columns of one step of Cholesky
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
    """`out <- beta out + alpha a b`; on the tensor cores, which the caller has allowed."""
    out.addmm_(a, b, alpha=alpha, beta=beta)


def _multiply_(out: Tensor, a: Parts, b: Parts, alpha: float, beta: float) -> None:
    if len(a) == 1:
        out.addmm_(a[0], b[0], alpha=alpha, beta=beta)
        return
    with loops.tensor_cores():
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


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a b`, as `product_`."""
    result = a.new_empty(a.shape[0], b.shape[1])
    product_(result, a, b, beta=0.0)
    return result


def cholesky_(A: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Replaces a symmetric matrix (n, n), of which the lower triangle is read, by its lower Cholesky factor.

    What lies above the diagonal becomes zero. Returns whether there is no factor, a boolean scalar on the device that
    nobody has waited for (the matrix is then worthless), and the inverses of the factor's blocks of `PANEL` on the
    diagonal. NaN may pass for a factor, and is on its diagonal.
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
        panel = product(below, inverse.T)
        below.copy_(panel)
        parts = loops.split(panel) if _threefold(panel, inverse) else (panel,)
        del panel
        for c in range(b, n, PANEL):
            d = min(c + PANEL, n)
            rows, turned = (tuple(p[c - b :] for p in parts), tuple(p[c - b : d - b].T for p in parts))
            _multiply_(A[c:, c:d], rows, turned, -1.0, 1.0)
    return torch.stack(infos).ne(0).any(), inverses


def _small_inverse(L: Tensor) -> Tensor:
    """The inverse of a lower triangle (n, n) that is not large: leaves by substitution, all at once, then doubling.

    Each step is a few products over all pairs of blocks: on a GPU what counts is how many kernels are started.
    """
    n = L.shape[0]
    full = LEAF
    while full < n:
        full *= 2
    X = torch.eye(full, dtype=L.dtype, device=L.device)
    X[:n, :n] = L
    leaves = _on_diagonal(X, LEAF)
    eye = torch.eye(LEAF, dtype=L.dtype, device=L.device).expand_as(leaves)
    leaves.copy_(torch.linalg.solve_triangular(leaves, eye, upper=False))
    size = LEAF
    while size < full:
        pairs = _on_diagonal(X, 2 * size)
        corners, first, second = pairs[:, size:, :size], pairs[:, :size, :size], pairs[:, size:, size:]
        corners.copy_(second @ torch.baddbmm(corners, corners, first, beta=0, alpha=-1))
        size *= 2
    return X[:n, :n]


def _on_diagonal(X: Tensor, size: int) -> Tensor:
    """The blocks on the diagonal of `X` (n, n): (n / size, size, size), the memory of `X`."""
    count = X.shape[0] // size
    return X.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
