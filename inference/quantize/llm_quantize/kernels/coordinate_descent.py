"""Change one integer after another, and the scales, to lower a layer's output error: coordinate descent.

For weights `w` and the values `v` of integers, the error of a row is `(w - v)^T H (w - v)`, with the Hessian `H`. Each
change of one integer, or of one scale, is the best with all others held, so the error never grows.

This module knows tensors only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_quantize.kernels.launcher import jit, launch, need_contiguous_rows, on_triton, tl, triton
from llm_quantize.kernels.precision import (
    HALF_MAX,
    casts,
    representable,
    tf32_addmm_,
    tf32_matmul,
    to_half,
    to_representable,
)
from llm_quantize.kernels.tiling import SUB, add_product, nearest, padded, rows_of_tile, take_part, take_row


@dataclass(frozen=True, slots=True)
class Descent:
    """Hold the tensors of a descent, in which each column of the weights is a row.

    gradient: float32 (c, out), `H (w - v)`, which the descent reads only. scale, zero: float32 (groups, out); `scale`
    is changed in place if `refit`. H: float32 (c, c), symmetric. q: uint8 (c, out), changed in place: the integers,
    from 0 to `qmax`. delta: (d, out), written: the changes of the values, from which the caller updates the gradient.
    refit: the dtypes that hold the scales; with it, each group's scale is first set to the best for its integers,
    except where rounding to these dtypes makes that worse; None leaves the scales. size: the group size.

    units: None for a `delta` of float32. Else `delta` is float16, and powers of two bring all into its range: `a`,
    float32 (c), and `b`, float32 (out). The true gradient is then `gradient_kr a_k / b_r`, the pending update is in the
    same units, and `delta_kr` is the change of the value times `b_r`. coupled: the matrix by which changes act on the
    gradient in these units, `H_kl / a_k`, in the dtype of `delta`; needed where one kernel takes several pieces.
    """

    gradient: Tensor
    scale: Tensor
    zero: Tensor
    H: Tensor
    qmax: int
    q: Tensor
    delta: Tensor
    refit: tuple[torch.dtype, ...] | None
    size: int
    units: tuple[Tensor, Tensor] | None = None
    coupled: Tensor | None = None


def descend_columns(state: Descent, part: slice, first: int, pending: Tensor | None = None) -> None:
    """Pass once over the columns `part`.

    part: at most `COLUMNS` columns of one group. first: the column to which the first row of `delta` belongs. pending:
    float32 (columns, out), the update that the gradient of these columns has not received yet; it is subtracted.
    Written: `q`, `delta` and, with `refit`, `scale` of these columns.
    """
    run = _descend_triton if on_triton(state.gradient) else _descend_torch
    run(state, part, first, pending)


def are_even(pieces: list[slice]) -> bool:
    """Return whether one kernel can take all `pieces`: of equally many columns, a power of two that a tile holds."""
    widths = {piece.stop - piece.start for piece in pieces}
    return len(widths) == 1 and padded(min(widths)) in widths


def descend_pieces(state: Descent, pieces: list[slice]) -> None:
    """Pass once over consecutive `pieces` of columns, each as `descend_columns` takes it, without a pending update.

    pieces: the first row of `delta` belongs to the first column of the first piece. Several pieces are allowed where
    `tiling.spans_several_blocks` and `are_even`: one kernel then takes them one after another and computes the pending
    update of a piece, from the changes of those before, when it reaches the piece.
    """
    first = pieces[0].start
    if on_triton(state.gradient) and are_even(pieces):
        _descend_triton(state, slice(first, pieces[-1].stop), first, None, pieces[0].stop - first)
    else:
        (part,) = pieces
        descend_columns(state, part, first)


def _descend_torch(state: Descent, part: slice, first: int, pending: Tensor | None) -> None:
    index = part.start // state.size
    gradient, H, q, qmax, refit = (
        state.gradient[part],
        state.H[part, part],
        state.q[part],
        state.qmax,
        state.refit,
    )
    scale, zero, delta = (
        state.scale[index],
        state.zero[index],
        state.delta[part.start - first : part.stop - first],
    )
    units = None if state.units is None else (state.units[0][part], state.units[1])
    columns = q.shape[0]
    g = gradient.clone() if pending is None else gradient - pending
    if units is not None:
        g *= units[0][:, None] / units[1]
    u = q.to(g.dtype) - zero
    before = scale.clone()
    if refit is not None:
        Hu = tf32_matmul(H, u)
        slope, curve = (u * g).sum(0), (u * Hu).sum(0)
        fresh = representable(before + slope / curve.clamp(min=1e-30), refit)
        change = fresh - before
        # To round the best scale may move it too far: keep it only where the error falls.
        scale.copy_(torch.where(2 * change * slope - change * change * curve > 0, fresh, before))
        g -= Hu * (scale - before)
    # In units of the scale only the integers count, and the loop needs no division.
    g *= 1 / scale
    for start in range(0, columns, SUB):
        stop = min(start + SUB, columns)
        inverse = (1 / H.diagonal()[start:stop])[:, None]
        block = H[start:stop, start:stop] * inverse
        old = u[start:stop]
        target = old + g[start:stop] * inverse
        steps = torch.empty_like(target)
        for j in range(stop - start):
            steps[j] = torch.round(torch.minimum(torch.maximum(target[j], -zero), qmax - zero)) - old[j]
            target[j + 1 :].addr_(block[j + 1 :, j], steps[j], alpha=-1.0)
        new = old + steps
        q[start:stop] = (new + zero).to(torch.uint8)
        change = new * scale - old * before
        if units is not None:
            change = (change * units[1]).clamp_(-HALF_MAX, HALF_MAX)
        delta[start:stop] = change
        if stop < columns:
            tf32_addmm_(g[stop:], H[stop:, start:stop], steps, alpha=-1.0)


@jit
def _descend_kernel(  # type: ignore[no-untyped-def]
    gradient, pending, q, delta, scale, zero, H, coupled, column_units, row_units, begin, end, delta_begin, columns,
    size, out, gradient_stride, pending_stride, q_stride, delta_stride, scale_stride, zero_stride, H_stride,
    coupled_stride, qmax, PENDING: tl.constexpr, SEVERAL: tl.constexpr, UNITS: tl.constexpr, REFIT: tl.constexpr,
    TO_FP16: tl.constexpr, TO_BF16: tl.constexpr, C: tl.constexpr, S: tl.constexpr, B: tl.constexpr,
    K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = row < out
    k = tl.arange(0, C)
    i = tl.arange(0, S)
    in_piece = k < columns
    mask = in_piece[:, None] & inside[None, :]
    for first in range(begin, end, columns):
        at = tl.cast(first, tl.int64)
        G, Q = gradient + at * gradient_stride, q + at * q_stride
        D = delta + (at - delta_begin) * delta_stride
        M = H + at * (H_stride + 1)
        scales, zeros = scale + at // size * scale_stride, zero + at // size * zero_stride
        tile = tl.load(G + k[:, None] * gradient_stride + row[None, :], mask=mask, other=0.0)
        if PENDING:
            tile -= tl.load(pending + k[:, None] * pending_stride + row[None, :], mask=mask, other=0.0)
        if SEVERAL:
            # The pending update of this piece, from the changes of the earlier pieces of this kernel.
            accumulated = tl.zeros((C, B), tl.float32)
            for earlier in range(0, first - begin, K):
                e = earlier + tl.arange(0, K)
                coupling = tl.load(
                    coupled + (at + k)[:, None] * coupled_stride + (begin + e)[None, :],
                    mask=in_piece[:, None],
                    other=0.0,
                )
                changes = tl.load(
                    delta + e[:, None] * delta_stride + row[None, :], mask=inside[None, :], other=0.0
                )
                accumulated = tl.dot(coupling, changes, accumulated, input_precision="tf32")
            tile -= accumulated
        if UNITS:
            unit = tl.load(row_units + row, mask=inside, other=1.0)
            tile *= tl.load(column_units + at + k, mask=in_piece, other=1.0)[:, None]
            tile *= tl.div_rn(tl.full((B,), 1.0, tl.float32), unit)[None, :]
        before = tl.load(scales + row, mask=inside, other=1.0)
        z = tl.load(zeros + row, mask=inside, other=0.0)
        s = before
        if REFIT:
            Hu = tl.zeros((C, B), tl.float32)
            for start in range(0, C, S):
                part = start + i
                in_step = part < columns
                panel = tl.load(
                    M + k[:, None] * H_stride + part[None, :],
                    mask=in_piece[:, None] & in_step[None, :],
                    other=0.0,
                )
                step_mask = in_step[:, None] & inside[None, :]
                step_q = tl.load(Q + part[:, None] * q_stride + row[None, :], mask=step_mask, other=0).to(
                    tl.float32
                )
                Hu = add_product(Hu, panel, tl.where(step_mask, step_q - z[None, :], 0.0))
            u = tl.load(Q + k[:, None] * q_stride + row[None, :], mask=mask, other=0).to(tl.float32)
            u = tl.where(mask, u - z[None, :], 0.0)
            slope, curve = tl.sum(u * tile, axis=0), tl.sum(u * Hu, axis=0)
            fresh = to_representable(before + tl.div_rn(slope, tl.maximum(curve, 1e-30)), TO_FP16, TO_BF16)
            change = fresh - before
            # To round the best scale may move it too far: keep it only where the error falls.
            s = tl.where(2 * change * slope - change * change * curve > 0, fresh, before)
            tile -= Hu * (s - before)[None, :]
            tl.store(scales + row, s, mask=inside)
        # In units of the scale only the integers count, and the loop needs no division.
        tile *= tl.div_rn(tl.full((B,), 1.0, tl.float32), s)[None, :]
        low, high = -z[None, :], qmax - z[None, :]
        for start in range(0, C, S):
            part = start + i
            in_step = part < columns
            step_mask = in_step[:, None] & inside[None, :]
            diagonal = tl.load(M + part * (H_stride + 1), mask=in_step, other=1.0)
            later = (part[:, None] > part[None, :]) & in_step[:, None]
            block = tl.load(M + part[:, None] * H_stride + part[None, :], mask=later, other=0.0)
            old = tl.load(Q + part[:, None] * q_stride + row[None, :], mask=step_mask, other=0).to(tl.float32)
            after = (k[:, None] >= start + S) & in_piece[:, None] & in_step[None, :]
            panel = tl.load(M + k[:, None] * H_stride + part[None, :], mask=after, other=0.0)
            old = tl.where(step_mask, old - z[None, :], 0.0)
            inverse = tl.div_rn(tl.full((S,), 1.0, tl.float32), diagonal)[:, None]
            block *= inverse
            target = old + take_part(tile, start // S, C, S, B) * inverse
            for j in tl.static_range(S):
                own = i == j
                # All columns of the step are rounded, which costs less than to pick one first; only column j counts.
                change_j = take_row(nearest(target, low, high) - old, own)
                target -= tl.sum(tl.where(own[None, :], block, 0.0), axis=1)[:, None] * change_j[None, :]
            # A column does not change after its own turn: `target` still holds what each was when it was rounded.
            new = nearest(target, low, high)
            tl.store(
                Q + part[:, None] * q_stride + row[None, :], (new + z[None, :]).to(tl.uint8), mask=step_mask
            )
            step = new * s[None, :] - old * before[None, :]
            if UNITS:
                step = to_half(step * unit[None, :])
            tl.store(D + part[:, None] * delta_stride + row[None, :], step, mask=step_mask)
            tile = add_product(tile, -panel, new - old)
        if SEVERAL:
            tl.debug_barrier()  # the next piece reads changes that other threads have written


def _descend_triton(
    state: Descent, part: slice, first: int, pending: Tensor | None, columns: int | None = None
) -> None:
    """Launch the kernel on whole tensors and offsets: to slice them would take as long as the kernel itself.

    columns: of each piece, where `part` is several pieces for one kernel; None where it is one piece.
    """
    gradient, scale, zero, H, q, delta = (
        state.gradient,
        state.scale,
        state.zero,
        state.H,
        state.q,
        state.delta,
    )
    # A kernel takes a tensor for each pointer, also for one that it does not read.
    subtracted, coupled = gradient if pending is None else pending, H
    depth, width = SUB, part.stop - part.start
    if columns is not None:
        assert state.coupled is not None
        coupled, width = state.coupled, columns
        depth = min(columns, 64 if coupled.dtype == torch.float16 else 32)
    need_contiguous_rows(gradient, subtracted, H, coupled, q, delta, scale, zero)
    fp16, bf16 = casts(state.refit or ())
    B = rows_of_tile(small=True)
    launch(
        _descend_kernel, (triton.cdiv(q.shape[1], B),),
        gradient, subtracted, q, delta, scale, zero, H, coupled, *(state.units or (H, H)), part.start, part.stop, first,
        width, state.size, q.shape[1], gradient.stride(0), subtracted.stride(0), q.stride(0), delta.stride(0),
        scale.stride(0), zero.stride(0), H.stride(0), coupled.stride(0), float(state.qmax), warps=1,
        PENDING=pending is not None, SEVERAL=columns is not None, UNITS=state.units is not None,
        REFIT=state.refit is not None, TO_FP16=fp16, TO_BF16=bf16, C=padded(width), S=SUB, B=B, K=depth,
    )  # fmt: skip
