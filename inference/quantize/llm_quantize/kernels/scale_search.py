"""Search for the scales and zero points of groups, each group on its own.

The search tries candidates and keeps the one with the least squared error, weighed with the group's diagonal block of
the Hessian. The kernel's PyTorch twin is in `solver/qparams.py`.

This module knows tensors only.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from llm_quantize.kernels.launcher import jit, launch, on_triton, tl, triton
from llm_quantize.kernels.precision import casts, to_representable
from llm_quantize.kernels.tiling import nearest

GROUPS = (32, 64, 128)  # group sizes that the kernel takes
# Factors of the best scale, tried with the zero points next to the best.
NEIGHBOURS = (0.92, 0.96, 1.0, 1.04, 1.08)


def can_search(W: Tensor, M: Tensor, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Return whether `search_groups` takes these arguments.

    It takes `W` (out, G, g) on a GPU with `g` in `GROUPS`, and `M` (G, g, g), full blocks and not diagonals alone.
    """
    known = (torch.float16, torch.bfloat16, torch.float32)
    return (
        on_triton(W) and W.shape[2] in GROUPS and M.shape[1] == W.shape[2] and all(d in known for d in dtypes)
    )


@jit
def _steps(W, scale, zero, qmax):  # type: ignore[no-untyped-def]
    """Round to nearest: return the integers less the zero point, `q - z` (rows, g)."""
    z = zero[:, None]
    # One division a row instead of one a weight; it changes an integer only where a weight lies within 2^-23 of a tie.
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    return nearest(W * inverse[:, None], -z, qmax - z)


@jit
def _offer(  # type: ignore[no-untyped-def]
    W, M, loss, best, zero, scale, candidate, qmax,
    TO_FP16: tl.constexpr, TO_BF16: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Try `scale` with the zero point `candidate`; return loss, scale and zero of the better of it and the best."""
    scale = to_representable(scale, TO_FP16, TO_BF16)
    E = W - _steps(W, scale, candidate, qmax) * scale[:, None]
    fresh = tl.sum(tl.dot(E, M, input_precision=PRECISION) * E, axis=1)
    better = fresh < loss
    return tl.where(better, fresh, loss), tl.where(better, scale, best), tl.where(better, candidate, zero)


@jit
def _search_kernel(  # type: ignore[no-untyped-def]
    weights, blocks, factors, losses, scales, zeros, rows, row_stride, group_stride, block_stride, qmax,
    middle, zero_min, sweep, refits, neighbours, SYMMETRIC: tl.constexpr, TO_FP16: tl.constexpr,
    TO_BF16: tl.constexpr, PRECISION: tl.constexpr, g: tl.constexpr, B: tl.constexpr,
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
    # The block is symmetric, and tensor cores read its transpose without a shuffle.
    M = tl.trans(tl.load(blocks + group * block_stride + k[:, None] * g + k[None, :]))
    low, high = tl.min(W, axis=1), tl.max(W, axis=1)
    loss = tl.full((B,), float("inf"), tl.float32)
    best = tl.full((B,), 1.0, tl.float32)
    zero = tl.zeros((B,), tl.float32)
    if SYMMETRIC:
        # The integers reach one step further on the side of q = 0. The larger extreme is put on that side first, then
        # on the other.
        span = tl.div_rn(tl.maximum(high, -low), tl.zeros_like(low) + middle)
        span = tl.where(high > -low, -span, span)
        candidate = tl.zeros((B,), tl.float32) + middle
        for i in range(2 * sweep):
            factor = tl.load(factors + i % sweep)
            scale = tl.where(i < sweep, span, -span) * factor
            loss, best, zero = _offer(
                W, M, loss, best, zero, scale, candidate, qmax, TO_FP16, TO_BF16, PRECISION
            )
    else:
        low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
        span = tl.div_rn(high - low, tl.zeros_like(low) + qmax)
        for i in range(sweep):
            scale = span * tl.load(factors + i)
            candidate = tl.div_rn(-(low + high), 2.0 * tl.maximum(scale, 1e-30)) + middle
            candidate = nearest(candidate, zero_min, qmax)
            loss, best, zero = _offer(
                W, M, loss, best, zero, scale, candidate, qmax, TO_FP16, TO_BF16, PRECISION
            )
        start = best
        candidate = zero
        for i in range(2 * neighbours):
            # The zero point below the best, then the one above. Each side starts from the best so far and keeps this
            # start, since `best` changes meanwhile.
            first = i % neighbours == 0
            start = tl.where(first, best, start)
            shift = tl.where(i < neighbours, -1.0, 1.0)
            candidate = tl.where(first, tl.minimum(tl.maximum(zero + shift, zero_min), qmax), candidate)
            scale = start * tl.load(factors + sweep + i % neighbours)
            loss, best, zero = _offer(
                W, M, loss, best, zero, scale, candidate, qmax, TO_FP16, TO_BF16, PRECISION
            )
    for _ in range(refits):
        # The least-squares scale for the integers of the best: u^T M w / u^T M u.
        U = _steps(W, best, zero, qmax)
        UM = tl.dot(U, M, input_precision=PRECISION)
        scale = tl.div_rn(tl.sum(UM * W, axis=1), tl.maximum(tl.sum(UM * U, axis=1), 1e-30))
        scale = tl.where(scale == 0.0, best, scale)
        loss, best, zero = _offer(W, M, loss, best, zero, scale, zero, qmax, TO_FP16, TO_BF16, PRECISION)
    to = group * rows + row
    tl.store(losses + to, loss, mask=inside)
    tl.store(scales + to, best, mask=inside)
    tl.store(zeros + to, zero, mask=inside)


def _search_tile(W: Tensor, precision: str) -> tuple[int, int]:
    """Return rows and warps of a tile: as many as fit in the shared memory beside the block of `M`."""
    if not W.is_cuda:  # in Triton's interpreter
        return 64, 4
    roomy = torch.cuda.get_device_properties(W.device).shared_memory_per_block_optin >= 200_000
    if not roomy:
        return 32, 4
    return (128, 8) if precision == "tf32" else (64, 4)


@lru_cache(maxsize=16)
def _table(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """Return `numbers` as a tensor on `device`, kept: each copy to a device may wait for its pending work."""
    return torch.tensor(numbers, device=device)


def search_groups(
    W: Tensor, M: Tensor, factors: list[float], *, qmax: int, symmetric: bool, zero_min: int,
    dtypes: tuple[torch.dtype, ...], refits: int, precision: str = "tf32",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Search the scale and zero point of each group and row with the least error `e^T M e`, `e = w - v`.

    W: float32 (out, G, g), `g` in `GROUPS`, contiguous along `g`. M: float32 (G, g, g), symmetric, the diagonal blocks
    of the Hessian. factors: of the scale that spans a group's weights, tried in turn. zero_min: the smallest zero point
    allowed. dtypes: what scales are cast to, in turn, without loss. refits: how often the least-squares scale for the
    chosen integers is tried at the end. precision: of the products. "tf32" changes an error by less than a thousandth:
    it may choose another of two candidates that are nearly equal, and refine that one; single groups end better or
    worse, the mean error is the same to 1e-4. "tf32x3" agrees with float32 in all but one of ten thousand groups, in
    twice the time.

    Returns scale, zero and error, each float32 (G, out). Raises ValueError if `W` is not contiguous along `g`.
    """
    out, groups, g = W.shape
    if W.stride(2) != 1:
        raise ValueError(f"the kernel needs contiguous groups, not strides {W.stride()}")
    M = M.contiguous()
    loss, scale, zero = torch.empty(3, groups, out, device=W.device).unbind(0)
    fp16, bf16 = casts(dtypes)
    table = _table((*factors, *NEIGHBOURS), W.device)
    B, warps = _search_tile(W, precision)
    launch(
        _search_kernel, (triton.cdiv(out, B), groups),
        W, M, table, loss, scale, zero, out, W.stride(0), W.stride(1), M.stride(0), float(qmax),
        float((qmax + 1) // 2) if symmetric else qmax / 2, float(zero_min), len(factors), refits,
        len(NEIGHBOURS), warps=warps, SYMMETRIC=symmetric, TO_FP16=fp16, TO_BF16=bf16,
        PRECISION=precision, g=g, B=B,
    )  # fmt: skip
    return scale, zero, loss
