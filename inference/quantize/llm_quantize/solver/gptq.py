"""GPTQ: rounding with error compensation over a fixed grid, and coordinate descent after it.

Frantar et al., "GPTQ" (arXiv:2210.17323), sections 3.2-3.4. For a linear `y = x W^T` with second moment
`H = sum x x^T`, the squared output error of integers is `tr((W - V) H (W - V)^T)`. The recursion rounds one column
after another and lets the columns to its right make up for what was lost. GPTQ spreads a column's error by the upper
`R` with `H^-1 = R^T R`. Chee et al., "QuIP" (arXiv:2307.13304), section 3, show that the same follows from what all
columns before have lost, `W - V`, and the factor of `H` itself: the upper `U = R^-1` with `H = U U^T`, which one
Cholesky of the order-reversed `H` gives. So here `R` is needed inside spans of columns alone, `U` between them.

Knows tensors only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_quantize.kernels import cholesky
from llm_quantize.kernels.coordinate_descent import Descent, are_even, descend_columns, descend_pieces
from llm_quantize.kernels.gptq_columns import Rounding, compensate_columns
from llm_quantize.kernels.permutation import permute, transposed, transposed_back, turn_
from llm_quantize.kernels.precision import halved, halved_error, power_of_two, tensor_cores
from llm_quantize.kernels.tiling import COLUMNS, TOGETHER, spans_several_blocks
from llm_quantize.solver.qparams import QParams, QuantScheme, dequantize

OUTLIER = 10.0  # times the median of the diagonal
SPAN = 1024  # columns after which all the others are told: a product this deep is not bound by memory
# For half precision: over the norms of two channels, which are powers of two at or below them, `H` is below four.
HEADROOM = 2.0**13


class NotFactorizable(ArithmeticError):
    """No damping up to the largest made the second moment positive definite."""


@dataclass(frozen=True, slots=True)
class Factor:
    """`U`: float32 (in, in), upper, `H_damped = U U^T` in the processing order; `order`: int64 (in).

    `order[k]` is the input channel processed at step k. `inverses`: of the blocks of `U` on its diagonal, which cover
    it in order; upper, of any size. `norms`: of the rows of `U`, to a factor of two, powers of two; float32 (in).
    `damping`: the fraction of the mean diagonal added.
    """

    U: Tensor
    inverses: list[Tensor]
    order: Tensor
    norms: Tensor
    damping: float

    def spans(self) -> Iterator[tuple[slice, Tensor]]:
        """The columns of each block on the diagonal, and its inverse."""
        start = 0
        for R in self.inverses:
            yield slice(start, start + len(R)), R
            start += len(R)


def condition_(H: Tensor, damping: float) -> None:
    """Floors dead channels of `H` (in, in) and adds `damping` times the mean diagonal, in place.

    A *dead* channel (zero on the diagonal) carried no signal: any weight would do, and a one on the diagonal makes
    it round to nearest. An *outlier*, a channel far over the median, counts for `OUTLIER` medians in the mean: a few
    of them would otherwise damp away all that is known of the others. The device is not waited for.
    """
    diagonal = H.diagonal()
    live = diagonal > 0
    middle = (live.sum(0, keepdim=True) - 1).clamp(min=0) // 2
    median = torch.where(live, diagonal, torch.inf).sort().values.index_select(0, middle)
    floor = torch.where(live.any(), torch.minimum(diagonal, OUTLIER * median).mean(), 1.0)
    diagonal.copy_(torch.where(diagonal <= 0, floor, diagonal))
    diagonal.add_(damping * floor)


def activation_order(H: Tensor) -> Tensor:
    """Channels by falling second moment: int64 (in). Ties keep their order."""
    return torch.sort(H.diagonal(), descending=True, stable=True).indices


class Factorization:
    """The factor of `H` (in, in) on its way: begun at once, asked for with `finish`; a GPU is not waited for before.

    `H` is left damped, in place, by as much as it took: the damping is raised tenfold at a time where Cholesky fails,
    float64 is tried before that. Beside `H` and the factor it needs two fifths of a large `H` more, and a small one two
    and a half times.
    """

    def __init__(self, H: Tensor, damping: float, *, act_order: bool, largest: float = 10.0) -> None:
        self._H, self._damping, self._largest = H, damping, largest
        self._order = activation_order(H) if act_order else torch.arange(H.shape[0], device=H.device)
        self._plain = H.diagonal().clone()
        self._attempt(torch.float32)

    def _attempt(self, dtype: torch.dtype) -> None:
        if dtype == torch.float32:
            condition_(self._H, self._damping)
        self._dtype = dtype
        self._norms = norms(self._H)
        self._U, self._inverses, self._failed = _factor(self._H, self._order.flip(0), self._norms, dtype)

    def finish(self) -> Factor:
        """Waits for it. Errors: `NotFactorizable`, with `H` as it was."""
        while bool(self._failed):
            del self._U, self._inverses
            if self._dtype == torch.float32:
                self._attempt(torch.float64)
                continue
            self._H.diagonal().copy_(self._plain)
            if self._damping >= self._largest:
                raise NotFactorizable("the second moment has no Cholesky factor at any damping")
            self._damping = max(self._damping * 10, 1e-3)
            self._attempt(torch.float32)
        return Factor(self._U, self._inverses, self._order, self._norms[self._order], self._damping)


def factorize(H: Tensor, damping: float, *, act_order: bool, largest: float = 10.0) -> Factor:
    """The factor of `H`: what `Factorization` does, at once."""
    return Factorization(H, damping, act_order=act_order, largest=largest).finish()


def aim(W: Tensor, missed: Tensor, factor: Factor) -> Tensor:
    """The weights that come closest to a target which `W` misses because its inputs have changed: float32 (out, in).

    For inputs `x` where the target is `W x + e`, the least squares of `(W + C) x` against it, damped towards `C = 0`,
    is `C = E[e x^T] H^-1`. missed: `E[e x^T]`, (out, in); factor: of the second moment of `x`. With the inputs `x~` of
    a model that was not quantized, `e = W (x~ - x)`: the aim of GPTAQ (arXiv:2504.02692), here all columns at once.
    """
    # C = M U^-T U^-1: one triangle solved from its end, then one from its beginning.
    C = missed[:, factor.order]
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


def norms(H: Tensor) -> Tensor:
    """The roots of the diagonal of `H` (in, in), each the power of two at or below it: float32 (in)."""
    return power_of_two(H.diagonal().to(torch.float32).sqrt())


def _factor(
    H: Tensor, reverse: Tensor, norms: Tensor, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor], Tensor]:
    """`U` and `inverses` of the `Factor`, from a Cholesky in `dtype`, and whether there is none: a boolean scalar on
    the device. norms: what channels are divided by for it, in their own order.

    One new (in, in), worked on in place.
    """
    width = H.shape[0]
    A = torch.empty(width, width, dtype=dtype, device=H.device)
    reversed_norms = norms[reverse]
    permute(H, reverse, 1 / reversed_norms, A)
    failed, inverses = cholesky.cholesky_(A)
    if not A.is_cuda and bool(failed):  # known already: the rest would be for nothing
        return A, inverses, failed
    diagonals = torch.cat([A.diagonal(), *(inverse.diagonal() for inverse in inverses)])
    failed = failed | ~torch.isfinite(diagonals).all()
    U = A.to(torch.float32)
    del A
    ordered = reversed_norms.flip(0)
    turn_(U, ordered)
    blocks = torch.split(1 / ordered, [len(inverse) for inverse in reversed(inverses)])
    turned = [
        inverse.to(torch.float32).flip(0, 1).mul_(columns)
        for inverse, columns in zip(reversed(inverses), blocks, strict=True)
    ]
    return U, turned, failed


@tensor_cores()
def compensate(W: Tensor, grid: QParams, spec: QuantScheme, factor: Factor) -> Tensor:
    """GPTQ's recursion over the static groups of `grid`: integers, uint8 (out, in), in the channels' own order.

    W: float32 (out, in).
    """
    out, width = W.shape
    order, U = factor.order, factor.U
    group = torch.div(order, spec.group_size, rounding_mode="floor")
    # (in, out), a column of W a contiguous row: W, and what is done of W - V.
    lost = transposed(W, order)
    scale, zero = grid.scale.T.contiguous(), grid.zero.T.contiguous()  # (groups, out)
    q = torch.empty(width, out, dtype=torch.uint8, device=W.device)
    first = len(factor.inverses[0])
    told = torch.empty(width - first, out, device=W.device)  # what the columns after the first span are told
    unit = None
    if cholesky.has_half_products(W):
        largest = factor.norms.new_zeros(len(scale)).scatter_reduce_(0, group, factor.norms, "amax")
        unit = _unit(scale * largest[:, None], spec.qmax)
    for span, R in factor.spans():
        work = lost[span].clone()
        if span.start:
            heard = told[span.start - first : span.stop - first]
            work.addmm_(R.T, heard if unit is None else heard.div_(unit))
        _compensate_span(
            Rounding(work, scale, zero, group[span], R, spec.qmax, q[span], torch.empty_like(work))
        )
        if span.stop < width:
            later, rest = told[span.stop - first :], U[span, span.stop :]
            again = float(span.start > 0)
            if unit is None:
                lost[span] -= work
                later.addmm_(rest.T, lost[span], beta=again)
            else:
                by = factor.norms[span]
                lost_half = halved(lost[span], by, unit, minus=work)
                cholesky.half_product_(later, halved(rest, 1 / by).T, lost_half, beta=again)
    return transposed_back(q, order)


def _unit(scale: Tensor, qmax: int) -> Tensor:
    """Powers of two, float32 (out): times them, errors on a grid of `scale` (groups, out) are in the range of half
    precision."""
    # No weight is eight times as far from a grid as the grid is wide.
    return power_of_two(4096 / qmax / scale.abs().amax(0).clamp(min=1e-30))


def _compensate_span(state: Rounding) -> None:
    """Rounds all columns of `state`."""
    work, turned, columns = state.work, state.R.T, len(state.work)
    step = TOGETHER if spans_several_blocks(work, work.shape[1]) else COLUMNS
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        if start:
            # What the earlier pieces left, all at once.
            work[start:stop].addmm_(turned[start:stop, :start], state.errors[:start], alpha=-1.0)
        compensate_columns(state, slice(start, stop))


@tensor_cores()
def descend(
    W: Tensor, q: Tensor, grid: QParams, spec: QuantScheme, H: Tensor, *, sweeps: int, refit: bool
) -> tuple[Tensor, QParams]:
    """Coordinate descent on the integers, and with `refit` on the scales too, from where `compensate` ended.

    Each step sets one group's scale, then one integer at a time, to what minimizes the whole quadratic form with
    everything else held; the error never grows. H: the damped second moment (in, in), in the channels' own order.
    """
    out, width = W.shape
    size = spec.group_size
    scale, zero = grid.scale.T.contiguous(), grid.zero.T.contiguous()
    # What the products take for `H`: its rows in the norms of their channels, so that what is small only beside other
    # rows keeps its bits. The gradient's rows are too, and all errors are in units of their own.
    coupled, units = H, None
    multiply_: Callable[..., object] = Tensor.addmm_
    if cholesky.has_half_products(W):
        by, unit, multiply_ = norms(H), _unit(scale, spec.qmax), cholesky.half_product_
        most = by.amax(0, keepdim=True) / HEADROOM
        coupled, units = halved(H, 1 / (by * most)), (by * most, unit)
        error = halved_error(W, q, grid.scale, grid.zero, size, unit)
    else:
        error = (W - dequantize(q, grid, size)).T
    gradient = torch.empty(width, out, device=W.device)
    multiply_(gradient, coupled, error, beta=0.0)
    del error
    integers = transposed(q)
    dtypes = spec.scale_dtypes if refit and size <= COLUMNS else None
    spans = _spans(width, size)
    deepest = max(span[-1].stop - span[0].start for span in spans)
    changes = torch.empty(deepest, out, dtype=coupled.dtype, device=W.device)
    missing = torch.empty(min(COLUMNS, size), out, device=W.device)

    state = Descent(gradient, scale, zero, H, spec.qmax, integers, changes, dtypes, size, units, coupled)
    several = spans_several_blocks(W, out) and are_even(spans[0])
    for sweep in range(sweeps):
        for span in spans:
            first, last = span[0].start, span[-1].stop
            for pieces in [span] if several else [[piece] for piece in span]:
                part = pieces[0]
                if part.start == first:
                    descend_pieces(state, pieces)
                    continue
                # The gradient hears of a span when it ends, and a piece before its turn of what it missed.
                late = missing[: part.stop - part.start]
                multiply_(late, coupled[part, first : part.start], changes[: part.start - first], beta=0.0)
                descend_columns(state, part, first, late)
            # In the last sweep no one asks any more about the columns that are done.
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


@tensor_cores()
def output_forms(W: Tensor, V: Tensor, H: Tensor) -> Tensor:
    """`tr((W - V) H (W - V)^T)` and `tr(W H W^T)`: float64 (2), on the device, which is not waited for."""
    both = torch.cat((W - V, W))
    forms = torch.sum((both @ H).mul_(both), dim=1, dtype=torch.float64)
    return forms.reshape(2, -1).sum(1)


def relative(forms: Tensor) -> float:
    """The relative squared output error of a layer, from `output_forms`. Waits for the device."""
    lost, whole = forms.tolist()
    return lost / whole if whole > 0 else 0.0


def output_error(W: Tensor, V: Tensor, H: Tensor) -> float:
    """The relative squared output error of a layer whose weights are `V` instead of `W`, both (out, in)."""
    return relative(output_forms(W, V, H))
