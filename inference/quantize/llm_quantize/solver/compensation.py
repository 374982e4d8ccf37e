"""Rounding with error compensation, coordinate descent after it, and the error that is left.

For a linear `y = x W^T` whose inputs have the Hessian `H`, the squared output error of integers that stand for `V` is
`tr((W - V) H (W - V)^T)`. GPTQ (Frantar et al., arXiv:2210.17323, sections 3.2 to 3.4) rounds one column after another
and lets the columns to its right make up for the error. Groups are static: their parameters are fixed before.

Knows tensors only.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llm_quantize.kernels import cholesky
from llm_quantize.kernels.coordinate_descent import Descent, are_even, descend_columns, descend_pieces
from llm_quantize.kernels.gptq_columns import Rounding, compensate_columns
from llm_quantize.kernels.permutation import transposed, transposed_back
from llm_quantize.kernels.precision import halved, halved_error, power_of_two, tf32_addmm_, tf32_matmul
from llm_quantize.kernels.tiling import COLUMNS, TOGETHER, spans_several_blocks
from llm_quantize.solver.factorization import Factor, diagonal_norms
from llm_quantize.solver.qparams import QParams, dequantize
from llm_quantize.types import QuantScheme

SPAN = 1024  # columns between two updates of all others: a product this deep is not bound by memory
# For half precision: `H` over the norms of two channels, which are powers of two at or below them, is below four.
HEADROOM = 2.0**13


def compensate(W: Tensor, qparams: QParams, scheme: QuantScheme, factor: Factor) -> Tensor:
    """Round `W`, float32 (out, in), column by column with compensation: integers, uint8 (out, in)."""
    out, width = W.shape
    order, U = factor.order, factor.U
    group = torch.div(order, scheme.group_width(width), rounding_mode="floor")
    # (in, out), a column of W a contiguous row: W, and where it is done, W - V.
    error = transposed(W, order)
    scale, zero = qparams.scale.T.contiguous(), qparams.zero.T.contiguous()  # (groups, out)
    q = torch.empty(width, out, dtype=torch.uint8, device=W.device)
    first = len(factor.inverses[0])
    update = torch.empty(
        width - first, out, device=W.device
    )  # accumulated, for the columns after the first span
    unit = None
    if cholesky.has_half_products(W):
        largest = factor.norms.new_zeros(len(scale)).scatter_reduce_(0, group, factor.norms, "amax")
        unit = _error_unit(scale * largest[:, None], scheme.qmax)
    for span, R in factor.spans():
        work = error[span].clone()
        if span.start:
            accumulated = update[span.start - first : span.stop - first]
            tf32_addmm_(work, R.T, accumulated if unit is None else accumulated.div_(unit))
        _compensate_span(
            Rounding(work, scale, zero, group[span], R, scheme.qmax, q[span], torch.empty_like(work))
        )
        if span.stop < width:
            later, rest = update[span.stop - first :], U[span, span.stop :]
            keep = float(span.start > 0)
            if unit is None:
                error[span] -= work
                tf32_addmm_(later, rest.T, error[span], beta=keep)
            else:
                norms = factor.norms[span]
                halved_span = halved(error[span], norms, unit, minus=work)
                cholesky.half_product_(later, halved(rest, 1 / norms).T, halved_span, beta=keep)
    return transposed_back(q, order)


def _error_unit(scale: Tensor, qmax: int) -> Tensor:
    """Powers of two, float32 (out), by which rounding errors come into the range of half precision.

    scale: (groups, out).
    """
    # No weight lies farther from the values of its group than eight times as far as they reach.
    return power_of_two(4096 / qmax / scale.abs().amax(0).clamp(min=1e-30))


def _compensate_span(state: Rounding) -> None:
    """Round all columns of `state`."""
    work, turned, columns = state.work, state.R.T, len(state.work)
    step = TOGETHER if spans_several_blocks(work, work.shape[1]) else COLUMNS
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        if start:
            # The pending update of the pieces before, all at once.
            tf32_addmm_(work[start:stop], turned[start:stop, :start], state.errors[:start], alpha=-1.0)
        compensate_columns(state, slice(start, stop))


def descend(
    W: Tensor, q: Tensor, qparams: QParams, scheme: QuantScheme, H: Tensor, *, sweeps: int, refit: bool
) -> tuple[Tensor, QParams]:
    """Improve integers by coordinate descent, and with `refit` the scales too.

    Each step sets one group's scale, then one integer at a time, to what minimizes the output error with everything
    else held. The error never grows. W: float32 (out, in). q: uint8 (out, in), from `compensate`. H: the damped Hessian
    (in, in), in the channels' own order.
    """
    out, width = W.shape
    size = scheme.group_width(width)
    scale, zero = qparams.scale.T.contiguous(), qparams.zero.T.contiguous()
    # For the products, the rows of `H` are divided by the norms of their channels, so that what is small only beside
    # other rows keeps its bits. The rows of the gradient are too, and all errors are in units of their own.
    coupled, units = H, None
    multiply_: Callable[..., object] = tf32_addmm_
    if cholesky.has_half_products(W):
        norms, unit, multiply_ = diagonal_norms(H), _error_unit(scale, scheme.qmax), cholesky.half_product_
        most = norms.amax(0, keepdim=True) / HEADROOM
        coupled, units = halved(H, 1 / (norms * most)), (norms * most, unit)
        error = halved_error(W, q, qparams.scale, qparams.zero, size, unit)
    else:
        error = (W - dequantize(q, qparams)).T
    gradient = torch.empty(width, out, device=W.device)
    multiply_(gradient, coupled, error, beta=0.0)
    del error
    integers = transposed(q)
    dtypes = scheme.scale_dtypes if refit and size <= COLUMNS else None
    spans = _spans(width, size)
    deepest = max(span[-1].stop - span[0].start for span in spans)
    changes = torch.empty(deepest, out, dtype=coupled.dtype, device=W.device)
    pending = torch.empty(min(COLUMNS, size), out, device=W.device)

    state = Descent(gradient, scale, zero, H, scheme.qmax, integers, changes, dtypes, size, units, coupled)
    several = spans_several_blocks(W, out) and are_even(spans[0])
    for sweep in range(sweeps):
        for span in spans:
            first, last = span[0].start, span[-1].stop
            for pieces in [span] if several else [[piece] for piece in span]:
                part = pieces[0]
                if part.start == first:
                    descend_pieces(state, pieces)
                    continue
                # The gradient is updated when a span ends; until then a piece takes its pending update apart.
                late = pending[: part.stop - part.start]
                multiply_(late, coupled[part, first : part.start], changes[: part.start - first], beta=0.0)
                descend_columns(state, part, first, late)
            # In the last sweep nothing depends any more on the columns that are done.
            rest = slice(last if sweep == sweeps - 1 else 0, width)
            if rest.start < width:
                multiply_(gradient[rest], coupled[rest, first:last], changes[: last - first], alpha=-1.0)
    return transposed(integers), QParams(scale.T.contiguous(), zero.T.contiguous())


def _spans(width: int, size: int) -> list[list[slice]]:
    """All columns in pieces of at most `COLUMNS`, the pieces in spans of `SPAN` or a little less.

    A piece never crosses a group's border: its columns share one scale.
    """
    spans: list[list[slice]] = []
    for group in range(0, width, size):
        for start in range(group, group + size, COLUMNS):
            piece = slice(start, min(start + COLUMNS, group + size))
            if not spans or piece.stop - spans[-1][0].start > SPAN:
                spans.append([])
            spans[-1].append(piece)
    return spans


def toward_target(W: Tensor, residual: Tensor, factor: Factor) -> Tensor:
    """The weights, float32 (out, in), whose outputs come closest to a target that `W` misses by `e`.

    For inputs `x` and the target `W x + e`, the least squares of `(W + C) x` against it, damped towards `C = 0`, is
    `C = E[e x^T] H^-1`. With `e = W (x~ - x)`, for the inputs `x~` of the model as it was, this is the target of GPTAQ
    (Li et al., arXiv:2504.02692), here for all columns at once.

    residual: `E[e x^T]`, float32 (out, in). factor: of the Hessian of `x`.
    """
    # C = M U^-T U^-1: one triangle solved from its end, then one from its beginning.
    C = residual[:, factor.order]
    spans = list(factor.spans())
    for span, R in reversed(spans):
        cholesky.product_(C[:, span], C[:, span.stop :], factor.U[span, span.stop :].T, alpha=-1.0)
        C[:, span] = cholesky.product(C[:, span], R.T)
    for span, R in spans:
        cholesky.product_(C[:, span], C[:, : span.start], factor.U[: span.start, span], alpha=-1.0)
        C[:, span] = cholesky.product(C[:, span], R)
    correction = torch.empty_like(C)
    correction[:, factor.order] = C
    return correction.add_(W)


def output_forms(W: Tensor, V: Tensor, H: Tensor) -> Tensor:
    """`tr((W - V) H (W - V)^T)` and `tr(W H W^T)`: float64 (2), on the device. Asynchronous."""
    both = torch.cat((W - V, W))
    forms = torch.sum(tf32_matmul(both, H).mul_(both), dim=1, dtype=torch.float64)
    return forms.reshape(2, -1).sum(1)


def relative_error(forms: Tensor) -> float:
    """The relative squared output error of a linear, from `output_forms`. Waits for the device."""
    error, whole = forms.tolist()
    return error / whole if whole > 0 else 0.0
