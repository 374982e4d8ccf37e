"""Round columns with error compensation: the inner loop of GPTQ.

Frantar et al., "GPTQ" (arXiv:2210.17323), section 3: after column `j` is rounded, the later columns are updated by its
error over `R_jj` times row `j` of `R`, the upper factor of the inverse Hessian, `H^-1 = R^T R`.

This module knows tensors only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_quantize.kernels.launcher import jit, launch, need_contiguous_rows, on_triton, tl, triton
from llm_quantize.kernels.precision import tf32_addmm_
from llm_quantize.kernels.tiling import COLUMNS, SUB, nearest, padded, rows_of_tile, take_part, take_row


@dataclass(frozen=True, slots=True)
class Rounding:
    """Hold the tensors of a rounding, in which each column of the weights is a row.

    work: float32 (c, out), the weights; replaced by the rounded values. scale, zero: float32 (groups, out). group:
    int64 (c), the group of each column. R: float32 (c, c), of which only the upper triangle is read. q: uint8 (c, out),
    written: the integers, from 0 to `qmax`. errors: float32 (c, out), written: the errors over `R_jj`, from which the
    caller updates columns outside this rounding.
    """

    work: Tensor
    scale: Tensor
    zero: Tensor
    group: Tensor
    R: Tensor
    qmax: int
    q: Tensor
    errors: Tensor


def compensate_columns(state: Rounding, part: slice) -> None:
    """Round the columns `part` one after another and spread the error of each over the later ones of `part`.

    part: at most `COLUMNS` columns; or, where `tiling.spans_several_blocks`, at most `TOGETHER`, in pieces that update
    each other by products in TF32. Written: `work`, `q` and `errors` of these columns.
    """
    run = _compensate_triton if on_triton(state.work) else _compensate_torch
    run(state, part)


def _compensate_torch(state: Rounding, part: slice) -> None:
    work, group, R, q, errors = (
        state.work[part],
        state.group[part],
        state.R[part, part],
        state.q[part],
        state.errors[part],
    )
    columns = work.shape[0]
    diagonal = R.diagonal()
    s_all, z_all = state.scale[group], state.zero[group]
    for start in range(0, columns, SUB):
        stop = min(start + SUB, columns)
        step = slice(start, stop)
        # With weights in units of their scale, and rows of R over their diagonal, the loop needs no division.
        s, z = s_all[step], z_all[step]
        low, high = -z, state.qmax - z
        block = R[step, step] / diagonal[step, None]
        y, inverse = work[step] / s, 1 / s
        u = torch.empty_like(y)
        for j in range(stop - start):
            u[j] = torch.round(torch.minimum(torch.maximum(y[j], low[j]), high[j]))
            error = (y[j] - u[j]) * s[j]
            y[j + 1 :] -= block[j, j + 1 :, None] * error * inverse[j + 1 :]
        q[step] = (u + z).to(torch.uint8)
        work[step] = u * s
        errors[step] = (y - u) * s / diagonal[step, None]
        if stop < columns:
            tf32_addmm_(work[stop:], R[start:stop, stop:].T, errors[start:stop], alpha=-1.0)


@jit
def _compensate_kernel(  # type: ignore[no-untyped-def]
    work, errors, q, scale, zero, group, R, begin, end, out, work_stride, errors_stride, q_stride, scale_stride,
    zero_stride, R_stride, qmax, SEVERAL: tl.constexpr, C: tl.constexpr, S: tl.constexpr, B: tl.constexpr,
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
        in_piece = k < columns
        tile = tl.load(
            W + k[:, None] * work_stride + row[None, :], mask=in_piece[:, None] & inside[None, :], other=0.0
        )
        if SEVERAL:
            # The update by the earlier pieces of this kernel.
            accumulated = tl.zeros((C, B), tl.float32)
            for earlier in range(begin, first, K):
                e = earlier + tl.arange(0, K)
                R_earlier = tl.load(
                    R + e[None, :] * R_stride + (at + k)[:, None], mask=in_piece[:, None], other=0.0
                )
                E_earlier = tl.load(
                    errors + e[:, None] * errors_stride + row[None, :], mask=inside[None, :], other=0.0
                )
                accumulated = tl.dot(R_earlier, E_earlier, accumulated, input_precision="tf32")
            tile -= accumulated
        D = R + at * (R_stride + 1)
        for start in range(0, C, S):
            part = start + i
            in_step = part < columns
            mask = in_step[:, None] & inside[None, :]
            # All that the loop needs is in registers before it starts. R is read transposed: (later, earlier).
            index = tl.load(G + part, mask=in_step, other=0).to(tl.int64)
            s = tl.load(scale + index[:, None] * scale_stride + row[None, :], mask=mask, other=1.0)
            z = tl.load(zero + index[:, None] * zero_stride + row[None, :], mask=mask, other=0.0)
            diagonal = tl.load(D + part * (R_stride + 1), mask=in_step, other=1.0)
            later = (part[:, None] > part[None, :]) & in_step[:, None]
            block = tl.load(D + part[None, :] * R_stride + part[:, None], mask=later, other=0.0)
            after = (k[:, None] >= start + S) & in_piece[:, None]
            panel = tl.load(D + part[None, :] * R_stride + k[:, None], mask=after, other=0.0)
            # With weights in units of their scale, and rows of R over their diagonal, the loop needs no division.
            block = tl.div_rn(block, tl.zeros_like(block) + diagonal[None, :])
            inverse = tl.div_rn(tl.full((S, B), 1.0, tl.float32), s)
            y = tl.div_rn(take_part(tile, start // S, C, S, B), s)
            low, high = -z, qmax - z
            for j in range(S):
                own = i == j
                # All columns of the step are rounded, which costs less than to pick one first; only column j counts.
                error = take_row((y - nearest(y, low, high)) * s, own)
                y -= tl.sum(tl.where(own[None, :], block, 0.0), axis=1)[:, None] * error[None, :] * inverse
            # A column does not change after its own turn: `y` still holds what each was when it was rounded.
            u = nearest(y, low, high)
            over = tl.div_rn((y - u) * s, tl.zeros_like(y) + diagonal[:, None])
            tl.store(Q + part[:, None] * q_stride + row[None, :], (u + z).to(tl.uint8), mask=mask)
            tl.store(W + part[:, None] * work_stride + row[None, :], u * s, mask=mask)
            tl.store(E + part[:, None] * errors_stride + row[None, :], over, mask=mask)
            tile = tl.dot(-panel, over, tile, input_precision="tf32x3")
        if SEVERAL:
            tl.debug_barrier()  # the next piece reads errors that other threads have written


def _compensate_triton(state: Rounding, part: slice) -> None:
    """Launch the kernel on whole tensors and offsets: to slice them would take as long as the kernel itself."""
    work, scale, zero, R, q, errors = state.work, state.scale, state.zero, state.R, state.q, state.errors
    out, count = work.shape[1], part.stop - part.start
    several = count > COLUMNS
    B = rows_of_tile(small=several)
    need_contiguous_rows(work, scale, zero, R, q, errors)
    launch(
        _compensate_kernel, (triton.cdiv(out, B),),
        work, errors, q, scale, zero, state.group.contiguous(), R, part.start, part.stop, out, work.stride(0),
        errors.stride(0), q.stride(0), scale.stride(0), zero.stride(0), R.stride(0), float(state.qmax), warps=1,
        SEVERAL=several, C=COLUMNS if several else padded(count), S=SUB, B=B, K=32,
    )  # fmt: skip
