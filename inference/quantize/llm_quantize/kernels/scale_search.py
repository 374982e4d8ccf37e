"""The search for scales and zero points, group by group; its twin is `grid._search`."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from llm_quantize.kernels.launcher import jit, launch, on_triton, tl, triton
from llm_quantize.kernels.precision import casts, to_representable
from llm_quantize.kernels.tiling import nearest

GROUPS = (32, 64, 128)  # group sizes that the kernel holds
NEIGHBOURS = (0.92, 0.96, 1.0, 1.04, 1.08)  # on the best scale, for the zero points beside the best


def can_search(W: Tensor, M: Tensor, dtypes: tuple[torch.dtype, ...]) -> bool:
    """Whether `search_groups` takes these: W (out, G, g) on a GPU, `M` the full blocks of a size it holds."""
    known = (torch.float16, torch.bfloat16, torch.float32)
    return (
        on_triton(W) and W.shape[2] in GROUPS and M.shape[1] == W.shape[2] and all(d in known for d in dtypes)
    )


@jit
def _steps(W, scale, zero, qmax):  # type: ignore[no-untyped-def]
    """Signed steps `q - z` of rounding to nearest: (rows, g)."""
    z = zero[:, None]
    # One division a row and not one a weight: another integer only where a weight lies within 2^-23 of a tie.
    inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    return nearest(W * inverse[:, None], -z, qmax - z)


@jit
def _offer(  # type: ignore[no-untyped-def]
    W, M, loss, best, zero, scale, candidate, qmax,
    HALF: tl.constexpr, BRAIN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(loss, scale, zero) after trying `scale`, `candidate` against the best so far."""
    scale = to_representable(scale, HALF, BRAIN)
    E = W - _steps(W, scale, candidate, qmax) * scale[:, None]
    fresh = tl.sum(tl.dot(E, M, input_precision=PRECISION) * E, axis=1)
    better = fresh < loss
    return tl.where(better, fresh, loss), tl.where(better, scale, best), tl.where(better, candidate, zero)


@jit
def _search_kernel(  # type: ignore[no-untyped-def]
    weights, metric, factors, losses, scales, zeros, rows, row_stride, group_stride, metric_stride, qmax,
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
            loss, best, zero = _offer(W, M, loss, best, zero, scale, centre, qmax, HALF, BRAIN, PRECISION)
    else:
        low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
        span = tl.div_rn(high - low, tl.zeros_like(low) + qmax)
        for i in range(sweep):
            scale = span * tl.load(factors + i)
            centre = tl.div_rn(-(low + high), 2.0 * tl.maximum(scale, 1e-30)) + middle
            centre = nearest(centre, zero_min, qmax)
            loss, best, zero = _offer(W, M, loss, best, zero, scale, centre, qmax, HALF, BRAIN, PRECISION)
        start = best
        centre = zero
        for i in range(2 * neighbours):
            # Both sides start from the best so far, as it was when the side began.
            first = i % neighbours == 0
            start = tl.where(first, best, start)
            shift = tl.where(i < neighbours, -1.0, 1.0)
            centre = tl.where(first, tl.minimum(tl.maximum(zero + shift, zero_min), qmax), centre)
            scale = start * tl.load(factors + sweep + i % neighbours)
            loss, best, zero = _offer(W, M, loss, best, zero, scale, centre, qmax, HALF, BRAIN, PRECISION)
    for _ in range(refits):
        # The least-squares scale for the integers at hand: u^T M w / u^T M u.
        U = _steps(W, best, zero, qmax)
        UM = tl.dot(U, M, input_precision=PRECISION)
        scale = tl.div_rn(tl.sum(UM * W, axis=1), tl.maximum(tl.sum(UM * U, axis=1), 1e-30))
        scale = tl.where(scale == 0.0, best, scale)
        loss, best, zero = _offer(W, M, loss, best, zero, scale, zero, qmax, HALF, BRAIN, PRECISION)
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
    W: Tensor, M: Tensor, factors: list[float], *, qmax: int, symmetric: bool, zero_min: int,
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
    half, brain = casts(dtypes)
    table = _table((*factors, *NEIGHBOURS), W.device)
    B, warps = _search_tile(W, precision)
    launch(
        _search_kernel, (triton.cdiv(out, B), groups),
        W, M, table, loss, scale, zero, out, W.stride(0), W.stride(1), M.stride(0), float(qmax),
        float((qmax + 1) // 2) if symmetric else qmax / 2, float(zero_min), len(factors), refits,
        len(NEIGHBOURS), warps=warps, SYMMETRIC=symmetric, HALF=half, BRAIN=brain,
        PRECISION=precision, g=g, B=B,
    )  # fmt: skip
    return scale, zero, loss
