"""Cholesky of large matrices, in place: nearly all of it matrix products, and those at about float32's accuracy.

On a GPU whose tensor cores multiply TF32 several times as fast as its other units multiply float32, a product takes
three of theirs: each matrix is the sum of two that TF32 holds, and of the four products of the parts the smallest is
below what float32 would round. So says Markidis et al., "NVIDIA Tensor Core Programmability, Performance & Precision"
(arXiv:1803.04014), section V, of half precision, which has as many digits, at twice the speed, and a smaller range: it
serves where numbers are known to be in it.

Knows tensors only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from llm_quantize.kernels.precision import split, split_fourfold, tensor_cores
from llm_quantize.kernels.streams import SideStream

PANEL = 1024  # columns of a triangle on the diagonal, which the library's Cholesky takes
WIDE = 4096  # columns that are told of a panel at a time
ROWS = 32768  # of a panel that are worked on at a time, which bounds the memory
WHOLE = 4096  # columns of a matrix that a GPU's library takes as it is: few kernels to start
LEAF = 64  # a triangle that is inverted by substitution
DEPTH = 2048  # of what is split at a time, which bounds the memory
LARGE = 1 << 31  # multiplications of a product that is worth splitting

# Where TF32 is many times as fast as float32; on the other GPUs that have it, it is not.
FAST_TF32 = {(8, 0), (9, 0), (10, 0), (10, 3)}

Parts = tuple[Tensor, ...]  # a matrix, or two whose sum it is
UNIT = 2.0**14  # what half precision takes a one for: far from both ends of its range


def has_half_products(tensor: Tensor) -> bool:
    """Whether matrices of half precision are multiplied into float32 where `tensor` is: torch 2.8 and later, a GPU."""
    return tensor.is_cuda and hasattr(torch.ops.aten.addmm, "dtype_out")


def half_product_(out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: float = 1.0) -> None:
    """`out <- beta out + alpha a b`: `a`, `b` float16 or bfloat16, whose products are exact in float32, as `out` is."""
    if beta == 0 and alpha == 1:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        torch.addmm(out, a, b, out_dtype=torch.float32, alpha=alpha, beta=beta, out=out)


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
    with tensor_cores():
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
        _multiply_(out, split(a[:, start:stop]), split(b[start:stop]), alpha, beta)
        beta = 1.0


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a b`, as `product_`."""
    result = a.new_empty(a.shape[0], b.shape[1])
    product_(result, a, b, beta=0.0)
    return result


def cholesky_(A: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Replaces a symmetric matrix (n, n), of which the lower triangle is read, by its lower Cholesky factor.

    Its diagonal is to be about one, and at most four, as in a matrix of correlations. What lies above the diagonal
    becomes zero. Returns whether there is no factor, a boolean scalar on the device that nobody has waited for (the
    matrix is then worthless), and the inverses of the factor's blocks of `PANEL` on the diagonal. NaN may pass for a
    factor, and is on its diagonal.
    """
    if A.is_cuda and A.shape[0] <= WHOLE:
        return _by_the_library_(A)
    n = A.shape[0]
    infos = torch.zeros(-(-n // PANEL), dtype=torch.int32, device=A.device)
    eye = torch.eye(min(n, PANEL), dtype=A.dtype, device=A.device)

    def triangle(a: int, b: int) -> None:
        block = A[a:b, a:b]
        L, info = torch.linalg.cholesky_ex(block)
        infos[a // PANEL].copy_(info)
        block.copy_(L)
        inverses[a // PANEL].copy_(torch.linalg.solve_triangular(L, eye[: b - a, : b - a], upper=False))

    starts = range(0, n, PANEL)
    inverses = [A.new_empty(min(PANEL, n - a), min(PANEL, n - a)) for a in starts]
    later: list[Callable[[], None]] = []  # updates of columns that neither of the next panels waits for
    # One triangle follows from the one before and the block below that. Few of a GPU's processors work on them, on a
    # stream of their own; the others do the rest of the panel before.
    with SideStream(A.device) as beside:
        with beside.stream():
            triangle(0, min(PANEL, n))
        for a, inverse in zip(starts, inverses, strict=True):
            b, c, d = (min(a + i * PANEL, n) for i in (1, 2, 3))
            with beside.stream():
                if b < n:
                    near = product(A[b:c, a:b], inverse.T)
                    A[b:c, a:b] = near
                    product_(A[b:c, b:c], near, near.T, alpha=-1.0)
                    del near
            while later:
                later.pop(0)()
            beside.join()
            if b == n:
                break
            with beside.stream(behind=False):
                triangle(b, c)
            A[a:b, b:] = 0
            parts = None
            if has_half_products(A) and _threefold(A[b:, a:b], inverse):
                parts = A.new_empty(n - b, 4 * (b - a), dtype=torch.float16)
                split_fourfold(A[b:c, a:b], parts[: c - b], UNIT)
            for r in range(c, n, ROWS):
                below = A[r : min(r + ROWS, n), a:b]
                panel = product(below, inverse.T)
                below.copy_(panel)
                if parts is not None:
                    split_fourfold(panel, parts[r - b : r - b + len(panel)], UNIT)
                del panel
            # The columns of the next two panels alone, then as many at a time as a product does well with.
            edges = [b, c, d, *range(d + WIDE, n, WIDE), n]
            later = [partial(_update_, A, parts, a, b, max(c, e), e, f) for e, f in pairwise(edges) if e < f]
            del parts
            for update in later[:2]:
                update()
            del later[:2]
    return infos.ne(0).any(), inverses


def _update_(A: Tensor, parts: Tensor | None, a: int, b: int, r: int, c: int, d: int) -> None:
    """Takes what the factor's columns from `a` to `b` explain from those from `c` to `d`, in the rows from `r` on.

    parts: of those columns in the rows from `b` on, as `split_fourfold` lays them out; None: as `A` holds them.
    """
    out = A[r:, c:d]
    if parts is None:
        product_(out, A[r:, a:b], A[c:d, a:b].T, alpha=-1.0)
        return
    # low high + high low + high high, in one product: the small ones first, while the sum is small too.
    depth = b - a
    half_product_(out, parts[r - b :, depth:], parts[c - b : d - b, : 3 * depth].T, alpha=-1 / UNIT**2)


def _by_the_library_(A: Tensor) -> tuple[Tensor, list[Tensor]]:
    L, info = torch.linalg.cholesky_ex(A)
    A.copy_(L)
    X = _inverses(L, PANEL)
    starts = range(0, len(X), PANEL)
    return info.ne(0), [X[a : a + PANEL, a : a + PANEL] for a in starts]


def _inverses(L: Tensor, largest: int) -> Tensor:
    """The inverses of the blocks of `largest` on the diagonal of a lower triangle (n, n), each in its place; one for
    all where `n` is less. What lies beside the blocks means nothing.

    Leaves by substitution, all at once, then doubling: each step is a few products over all pairs of blocks, since on a
    GPU what counts is how many kernels are started.
    """
    n = L.shape[0]
    block = LEAF
    while block < min(n, largest):
        block *= 2
    full = -(-n // block) * block
    X = torch.eye(full, dtype=L.dtype, device=L.device)
    X[:n, :n] = L
    leaves = _on_diagonal(X, LEAF)
    eye = torch.eye(LEAF, dtype=L.dtype, device=L.device).expand_as(leaves)
    leaves.copy_(torch.linalg.solve_triangular(leaves, eye, upper=False))
    size = LEAF
    while size < block:
        pairs = _on_diagonal(X, 2 * size)
        corners, first, second = pairs[:, size:, :size], pairs[:, :size, :size], pairs[:, size:, size:]
        torch.bmm(second, torch.baddbmm(corners, corners, first, beta=0, alpha=-1), out=corners)
        size *= 2
    return X[:n, :n]


def _on_diagonal(X: Tensor, size: int) -> Tensor:
    """The blocks on the diagonal of `X` (n, n): (n / size, size, size), the memory of `X`."""
    count = X.shape[0] // size
    return X.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
