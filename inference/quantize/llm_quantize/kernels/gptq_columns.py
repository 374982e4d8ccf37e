"""Rounding with error compensation: the loop over columns of GPTQ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_quantize.kernels.launcher import jit, launch, need_contiguous_rows, on_triton, tl, triton
from llm_quantize.kernels.tiling import COLUMNS, SUB, nearest, padded, rows_of_tile, take_part, take_row


@dataclass(frozen=True, slots=True)
class Rounding:
    """What a rounding works on, all tensors a column a row; `work`, `q` and `errors` are written in place.

    work: float32 (c, out), the weights, which become the rounded values. scale, zero: (groups, out). group: int64 (c),
    each column's group. R: (c, c) upper; what lies below is not read. q: uint8 (c, out). errors: float32 (c, out), the
    errors over `R_jj`, for the update of all later columns.
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
    """Rounds the columns `part` one after another, each error spread over those after it: at most `COLUMNS`, or several
    times as many where `takes_several`, which then tell each other with TF32's digits.
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
        # With weights in steps of their grids, and each row of R over its diagonal, no division is left in the loop.
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
            work[stop:].addmm_(R[start:stop, stop:].T, errors[start:stop], alpha=-1.0)


@jit
def _compensate_kernel(  # type: ignore[no-untyped-def]
    work, errors, q, scale, zero, group, R, begin, end, out, work_stride, errors_stride, q_stride, scale_stride,
    zero_stride, R_stride, qmax, SPAN: tl.constexpr, C: tl.constexpr, S: tl.constexpr, B: tl.constexpr,
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
        there = k < columns
        tile = tl.load(
            W + k[:, None] * work_stride + row[None, :], mask=there[:, None] & inside[None, :], other=0.0
        )
        if SPAN:
            heard = tl.zeros((C, B), tl.float32)
            for earlier in range(begin, first, K):
                e = earlier + tl.arange(0, K)
                told = tl.load(R + e[None, :] * R_stride + (at + k)[:, None], mask=there[:, None], other=0.0)
                left = tl.load(
                    errors + e[:, None] * errors_stride + row[None, :], mask=inside[None, :], other=0.0
                )
                heard = tl.dot(told, left, heard, input_precision="tf32")
            tile -= heard
        D = R + at * (R_stride + 1)
        for start in range(0, C, S):
            part = start + i
            present = part < columns
            mask = present[:, None] & inside[None, :]
            # All that the loop needs is in registers before it starts; R is read turned round, (later, earlier).
            index = tl.load(G + part, mask=present, other=0).to(tl.int64)
            s = tl.load(scale + index[:, None] * scale_stride + row[None, :], mask=mask, other=1.0)
            z = tl.load(zero + index[:, None] * zero_stride + row[None, :], mask=mask, other=0.0)
            diagonal = tl.load(D + part * (R_stride + 1), mask=present, other=1.0)
            later = (part[:, None] > part[None, :]) & present[:, None]
            block = tl.load(D + part[None, :] * R_stride + part[:, None], mask=later, other=0.0)
            after = (k[:, None] >= start + S) & there[:, None]
            panel = tl.load(D + part[None, :] * R_stride + k[:, None], mask=after, other=0.0)
            # With weights in steps of their grids, and each row of R over its diagonal, no division is left in the
            # loop.
            block = tl.div_rn(block, tl.zeros_like(block) + diagonal[None, :])
            inverse = tl.div_rn(tl.full((S, B), 1.0, tl.float32), s)
            y = tl.div_rn(take_part(tile, start // S, C, S, B), s)
            low, high = -z, qmax - z
            for j in range(S):
                own = i == j
                # All of the step is rounded, as one row would be at a greater cost; its own row is what counts.
                error = take_row((y - nearest(y, low, high)) * s, own)
                y -= tl.sum(tl.where(own[None, :], block, 0.0), axis=1)[:, None] * error[None, :] * inverse
            # A row is left alone after its own turn, so that here each is what it was then.
            u = nearest(y, low, high)
            over = tl.div_rn((y - u) * s, tl.zeros_like(y) + diagonal[:, None])
            tl.store(Q + part[:, None] * q_stride + row[None, :], (u + z).to(tl.uint8), mask=mask)
            tl.store(W + part[:, None] * work_stride + row[None, :], u * s, mask=mask)
            tl.store(E + part[:, None] * errors_stride + row[None, :], over, mask=mask)
            tile = tl.dot(-panel, over, tile, input_precision="tf32x3")
        if SPAN:
            tl.debug_barrier()  # what one thread wrote of the errors the others read


def _compensate_triton(state: Rounding, part: slice) -> None:
    """Nothing is cut out for the kernel: that takes as long as it does itself."""
    work, scale, zero, R, q, errors = state.work, state.scale, state.zero, state.R, state.q, state.errors
    out, count = work.shape[1], part.stop - part.start
    whole = count > COLUMNS
    B = rows_of_tile(small=whole)
    need_contiguous_rows(work, scale, zero, R, q, errors)
    launch(
        _compensate_kernel, (triton.cdiv(out, B),),
        work, errors, q, scale, zero, state.group.contiguous(), R, part.start, part.stop, out, work.stride(0),
        errors.stride(0), q.stride(0), scale.stride(0), zero.stride(0), R.stride(0), float(state.qmax), warps=1,
        SPAN=whole, C=COLUMNS if whole else padded(count), S=SUB, B=B, K=32,
    )  # fmt: skip
