"""Coordinate descent on integers and scales: the loop over columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_quantize.kernels.launcher import jit, launch, need_contiguous_rows, on_triton, tl, triton
from llm_quantize.kernels.precision import HALF_MAX, casts, representable, to_half, to_representable
from llm_quantize.kernels.tiling import SUB, add_product, nearest, padded, rows_of_tile, take_part, take_row


@dataclass(frozen=True, slots=True)
class Descent:
    """What a coordinate descent works on, all tensors a column a row; `scale`, `q` and `delta` are changed in place.

    gradient: float32 (c, out), `H (w - v)`, not changed. scale, zero: (groups, out). H: (c, c), symmetric. q: uint8 (c,
    out). delta: float32 or float16, as many rows as columns are told of at once: the change of the values, for the
    gradient. refit: what a scale must survive a cast to; a group's is then set first to the best for the integers, but
    where rounding it would lose. size: columns of a group.

    units: `a`, float32 (c), and `b` (out), powers of two: `gradient`, and what is missing of it, are to be taken times
    `a_k / b_r`, and delta is told times `b_r`. coupled: `H` as the products between pieces take it, for a gradient in
    `units`.
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


def descend_columns(state: Descent, part: slice, first: int, missing: Tensor | None = None) -> None:
    """One pass over the columns `part`, at most `COLUMNS` of one group. Written: `delta`, of these columns too.

    first: the column that `delta` begins with. missing: (columns, out), what is to be taken from the gradient.
    """
    run = _descend_triton if on_triton(state.gradient) else _descend_torch
    run(state, part, first, missing)


def _descend_torch(state: Descent, part: slice, first: int, missing: Tensor | None) -> None:
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
    g = gradient.clone() if missing is None else gradient - missing
    if units is not None:
        g *= units[0][:, None] / units[1]
    u = q.to(g.dtype) - zero
    before = scale.clone()
    if refit is not None:
        Hu = H @ u
        slope, curve = (u * g).sum(0), (u * Hu).sum(0)
        fresh = representable(before + slope / curve.clamp(min=1e-30), refit)
        change = fresh - before
        # A rounded step may overshoot: keep it only where the quadratic form falls.
        scale.copy_(torch.where(2 * change * slope - change * change * curve > 0, fresh, before))
        g -= Hu * (scale - before)
    # In steps of the grid the integers are all that counts, and no division is left.
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
            g[stop:].addmm_(H[stop:, start:stop], steps, alpha=-1.0)


@jit
def _descend_kernel(  # type: ignore[no-untyped-def]
    gradient, missing, q, delta, scale, zero, H, coupled, column_units, row_units, begin, end, told, columns, size,
    out, gradient_stride, missing_stride, q_stride, delta_stride, scale_stride, zero_stride, H_stride,
    coupled_stride, qmax, MISSING: tl.constexpr, SPAN: tl.constexpr, UNITS: tl.constexpr, REFIT: tl.constexpr,
    HALF: tl.constexpr, BRAIN: tl.constexpr, C: tl.constexpr, S: tl.constexpr, B: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * B + tl.arange(0, B)
    inside = row < out
    k = tl.arange(0, C)
    i = tl.arange(0, S)
    there = k < columns
    mask = there[:, None] & inside[None, :]
    for first in range(begin, end, columns):
        at = tl.cast(first, tl.int64)
        G, Q, D = gradient + at * gradient_stride, q + at * q_stride, delta + (at - told) * delta_stride
        M = H + at * (H_stride + 1)
        scales, zeros = scale + at // size * scale_stride, zero + at // size * zero_stride
        tile = tl.load(G + k[:, None] * gradient_stride + row[None, :], mask=mask, other=0.0)
        if MISSING:
            tile -= tl.load(missing + k[:, None] * missing_stride + row[None, :], mask=mask, other=0.0)
        if SPAN:
            # What the earlier pieces of the span changed.
            heard = tl.zeros((C, B), tl.float32)
            for earlier in range(0, first - begin, K):
                e = earlier + tl.arange(0, K)
                few = tl.load(
                    coupled + (at + k)[:, None] * coupled_stride + (begin + e)[None, :],
                    mask=there[:, None],
                    other=0.0,
                )
                made = tl.load(
                    delta + e[:, None] * delta_stride + row[None, :], mask=inside[None, :], other=0.0
                )
                heard = tl.dot(few, made, heard, input_precision="tf32")
            tile -= heard
        if UNITS:
            unit = tl.load(row_units + row, mask=inside, other=1.0)
            tile *= tl.load(column_units + at + k, mask=there, other=1.0)[:, None]
            tile *= tl.div_rn(tl.full((B,), 1.0, tl.float32), unit)[None, :]
        before = tl.load(scales + row, mask=inside, other=1.0)
        z = tl.load(zeros + row, mask=inside, other=0.0)
        s = before
        if REFIT:
            Hu = tl.zeros((C, B), tl.float32)
            for start in range(0, C, S):
                part = start + i
                present = part < columns
                panel = tl.load(
                    M + k[:, None] * H_stride + part[None, :],
                    mask=there[:, None] & present[None, :],
                    other=0.0,
                )
                some = present[:, None] & inside[None, :]
                some_q = tl.load(Q + part[:, None] * q_stride + row[None, :], mask=some, other=0).to(
                    tl.float32
                )
                Hu = add_product(Hu, panel, tl.where(some, some_q - z[None, :], 0.0))
            u = tl.load(Q + k[:, None] * q_stride + row[None, :], mask=mask, other=0).to(tl.float32)
            u = tl.where(mask, u - z[None, :], 0.0)
            slope, curve = tl.sum(u * tile, axis=0), tl.sum(u * Hu, axis=0)
            fresh = to_representable(before + tl.div_rn(slope, tl.maximum(curve, 1e-30)), HALF, BRAIN)
            change = fresh - before
            # A rounded step may overshoot: keep it only where the quadratic form falls.
            s = tl.where(2 * change * slope - change * change * curve > 0, fresh, before)
            tile -= Hu * (s - before)[None, :]
            tl.store(scales + row, s, mask=inside)
        # In steps of the grid the integers are all that counts, and no division is left.
        tile *= tl.div_rn(tl.full((B,), 1.0, tl.float32), s)[None, :]
        low, high = -z[None, :], qmax - z[None, :]
        for start in range(0, C, S):
            part = start + i
            present = part < columns
            some = present[:, None] & inside[None, :]
            diagonal = tl.load(M + part * (H_stride + 1), mask=present, other=1.0)
            later = (part[:, None] > part[None, :]) & present[:, None]
            block = tl.load(M + part[:, None] * H_stride + part[None, :], mask=later, other=0.0)
            old = tl.load(Q + part[:, None] * q_stride + row[None, :], mask=some, other=0).to(tl.float32)
            after = (k[:, None] >= start + S) & there[:, None] & present[None, :]
            panel = tl.load(M + k[:, None] * H_stride + part[None, :], mask=after, other=0.0)
            old = tl.where(some, old - z[None, :], 0.0)
            inverse = tl.div_rn(tl.full((S,), 1.0, tl.float32), diagonal)[:, None]
            block *= inverse
            target = old + take_part(tile, start // S, C, S, B) * inverse
            for j in tl.static_range(S):
                own = i == j
                # All of the step is rounded, as one row would be at a greater cost; its own row is what counts.
                change_j = take_row(nearest(target, low, high) - old, own)
                target -= tl.sum(tl.where(own[None, :], block, 0.0), axis=1)[:, None] * change_j[None, :]
            # A row is left alone after its own turn, so that here each is what it was then.
            new = nearest(target, low, high)
            tl.store(Q + part[:, None] * q_stride + row[None, :], (new + z[None, :]).to(tl.uint8), mask=some)
            step = new * s[None, :] - old * before[None, :]
            if UNITS:
                step = to_half(step * unit[None, :])
            tl.store(D + part[:, None] * delta_stride + row[None, :], step, mask=some)
            tile = add_product(tile, -panel, new - old)
        if SPAN:
            tl.debug_barrier()  # what one thread wrote of the changes the others read


def _descend_triton(
    state: Descent, part: slice, first: int, missing: Tensor | None, columns: int | None = None
) -> None:
    """columns: of a piece of `part`, where there are several, which then hear of each other.

    Nothing is cut out for the kernel: that takes as long as it does itself.
    """
    gradient, scale, zero, H, q, delta = (
        state.gradient,
        state.scale,
        state.zero,
        state.H,
        state.q,
        state.delta,
    )
    other, couple = gradient if missing is None else missing, H
    deep, whole = SUB, part.stop - part.start
    if columns is not None:
        assert state.coupled is not None
        couple, whole = state.coupled, columns
        deep = min(columns, 64 if couple.dtype == torch.float16 else 32)
    need_contiguous_rows(gradient, other, H, couple, q, delta, scale, zero)
    half, brain = casts(state.refit or ())
    B = rows_of_tile(small=True)
    launch(
        _descend_kernel, (triton.cdiv(q.shape[1], B),),
        gradient, other, q, delta, scale, zero, H, couple, *(state.units or (H, H)), part.start, part.stop, first,
        whole, state.size, q.shape[1], gradient.stride(0), other.stride(0), q.stride(0), delta.stride(0),
        scale.stride(0), zero.stride(0), H.stride(0), couple.stride(0), float(state.qmax), warps=1,
        MISSING=missing is not None, SPAN=columns is not None, UNITS=state.units is not None,
        REFIT=state.refit is not None, HALF=half, BRAIN=brain, C=padded(whole), S=SUB, B=B, K=deep,
    )  # fmt: skip


def are_even(pieces: list[slice]) -> bool:
    """Whether a kernel takes these pieces at once: all of as many columns, a power of two that a tile holds."""
    widths = {piece.stop - piece.start for piece in pieces}
    return len(widths) == 1 and padded(min(widths)) in widths


def descend_pieces(state: Descent, pieces: list[slice]) -> None:
    """`descend_columns` for a piece with which `delta` begins; or for several one after another, where `takes_several`
    and `are_even`: what one misses of the gradient, for the changes of those before, is computed when its turn comes.
    """
    first = pieces[0].start
    if on_triton(state.gradient) and are_even(pieces):
        _descend_triton(state, slice(first, pieces[-1].stop), first, None, pieces[0].stop - first)
    else:
        (part,) = pieces
        descend_columns(state, part, first)
