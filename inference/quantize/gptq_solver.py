"""GPTQ: rounding with error compensation over a fixed grid, and coordinate descent after it.

Frantar et al., "GPTQ" (arXiv:2210.17323), sections 3.2-3.4. For a linear `y = x W^T` with second moment
`H = sum x x^T`, the squared output error of integers is `tr((W - V) H (W - V)^T)`. The recursion rounds one column
after another and lets the columns to its right make up for what was lost; it needs the upper `R` with
`H^-1 = R^T R`, which one Cholesky of the order-reversed `H` and one triangular inverse give.

Knows tensors only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import kernels
from grid import Grid, GridSpec, dequantize

OUTLIER = 10.0  # times the median of the diagonal
COLUMNS = 128  # columns of one step of the blocked recursion
STRIP = 1024  # rows of a large matrix that are moved at a time


class NotFactorizable(ArithmeticError):
    """No damping up to the largest made the second moment positive definite."""


@dataclass(frozen=True, slots=True)
class Factor:
    """`R`: float32 (in, in), upper, `H_damped^-1 = R^T R` in the processing order; `order`: int64 (in).

    `order[k]` is the input channel processed at step k. `damping`: the fraction of the mean diagonal added.
    """

    R: Tensor
    order: Tensor
    damping: float


def condition_(H: Tensor, damping: float) -> None:
    """Floors dead channels of `H` (in, in) and adds `damping` times the mean diagonal, in place.

    A *dead* channel (zero on the diagonal) carried no signal: any weight would do, and a one on the diagonal makes
    it round to nearest. An *outlier*, a channel far over the median, counts for `OUTLIER` medians in the mean: a few
    of them would otherwise damp away all that is known of the others.
    """
    diagonal = H.diagonal()
    live = diagonal[diagonal > 0]
    floor = torch.ones((), dtype=H.dtype, device=H.device)
    if len(live):
        floor = torch.minimum(diagonal, OUTLIER * live.median()).mean()
    diagonal.copy_(torch.where(diagonal <= 0, floor, diagonal))
    diagonal.add_(damping * floor)


def activation_order(H: Tensor) -> Tensor:
    """Channels by falling second moment: int64 (in). Ties keep their order."""
    return torch.sort(H.diagonal(), descending=True, stable=True).indices


def factorize(H: Tensor, damping: float, *, act_order: bool, largest: float = 10.0) -> Factor:
    """The factor of `H` (in, in), which is left damped, in place, by as much as it took.

    The damping is raised tenfold at a time where Cholesky fails; float64 is tried before that. Beside `H` and the
    factor it needs a quarter of `H` more. Errors: `NotFactorizable`, with `H` as it was.
    """
    width = H.shape[0]
    order = activation_order(H) if act_order else torch.arange(width, device=H.device)
    reverse = order.flip(0)
    plain = H.diagonal().clone()
    while True:
        condition_(H, damping)
        for dtype in (torch.float32, torch.float64):
            R = _inverse_factor(H, reverse, dtype)
            if R is not None:
                return Factor(R, order, damping)
        H.diagonal().copy_(plain)
        if damping >= largest:
            raise NotFactorizable("the second moment has no Cholesky factor at any damping")
        damping = max(damping * 10, 1e-3)


def aim(W: Tensor, missed: Tensor, factor: Factor) -> Tensor:
    """The weights that come closest to a target which `W` misses because its inputs have changed: float32 (out, in).

    For inputs `x` where the target is `W x + e`, the least squares of `(W + C) x` against it, damped towards `C = 0`,
    is `C = E[e x^T] H^-1`. missed: `E[e x^T]`, (out, in); factor: of the second moment of `x`. With the inputs `x~` of
    a model that was not quantized, `e = W (x~ - x)`: the aim of GPTAQ (arXiv:2504.02692), here all columns at once.
    """
    correction = torch.empty_like(W)
    correction[:, factor.order] = missed[:, factor.order] @ factor.R.T @ factor.R
    return W + correction


def _inverse_factor(H: Tensor, reverse: Tensor, dtype: torch.dtype) -> Tensor | None:
    """`R` in float32, from a Cholesky in `dtype`; None where there is none. One new (in, in), worked on in place."""
    width = H.shape[0]
    A = torch.empty(width, width, dtype=dtype, device=H.device)
    strips = [(i, min(i + STRIP, width)) for i in range(0, width, STRIP)]
    for a, b in strips:
        A[a:b] = H[reverse[a:b]][:, reverse]
    info = torch.empty((), dtype=torch.int32, device=H.device)
    torch.linalg.cholesky_ex(A, out=(A, info))
    if int(info):
        return None
    kernels.lower_inverse_(A)
    if not bool(torch.isfinite(A.diagonal()).all()):
        return None
    R = A.to(torch.float32)
    del A
    # Both dimensions turned round, a strip and its mirror image at a time.
    for a, b in strips:
        if a >= width - b:
            middle = R[a : width - a].flip(0, 1)
            R[a : width - a] = middle
            break
        upper = R[a:b].flip(0, 1)
        R[a:b] = R[width - b : width - a].flip(0, 1)
        R[width - b : width - a] = upper
    return R


@kernels.tensor_cores()
def compensate(W: Tensor, grid: Grid, spec: GridSpec, factor: Factor) -> Tensor:
    """GPTQ's recursion over the static groups of `grid`: integers, uint8 (out, in), in the channels' own order.

    W: float32 (out, in).
    """
    out, width = W.shape
    order, R = factor.order, factor.R
    group = torch.div(order, spec.group_size, rounding_mode="floor")
    work = W.T[order].contiguous()  # (in, out): a column of W is a contiguous row
    scale, zero = grid.scale.T.contiguous(), grid.zero.T.contiguous()  # (groups, out)
    q = torch.empty(width, out, dtype=torch.uint8, device=W.device)
    errors = torch.empty(COLUMNS, out, device=W.device)
    for start in range(0, width, COLUMNS):
        stop = min(start + COLUMNS, width)
        part = slice(start, stop)
        found = errors[: stop - start]
        kernels.compensate_columns(
            work[part], scale, zero, group[part], R[part, part], spec.levels, q[part], found
        )
        if stop < width:
            work[stop:].addmm_(R[part, stop:].T, found, alpha=-1.0)
    result = torch.empty_like(q)
    result[order] = q
    return result.T.contiguous()


@kernels.tensor_cores()
def descend(
    W: Tensor, q: Tensor, grid: Grid, spec: GridSpec, H: Tensor, *, sweeps: int, refit: bool
) -> tuple[Tensor, Grid]:
    """Coordinate descent on the integers, and with `refit` on the scales too, from where `compensate` ended.

    Each step sets one group's scale, then one integer at a time, to what minimizes the whole quadratic form with
    everything else held; the error never grows. H: the damped second moment (in, in), in the channels' own order.
    """
    width = W.shape[1]
    size = spec.group_size
    gradient = H @ (W - dequantize(q, grid, size)).T  # (in, out)
    scale, zero = grid.scale.T.contiguous(), grid.zero.T.contiguous()
    integers = q.T.contiguous()
    # A piece never crosses a group's border: its columns share one scale.
    pieces = [
        slice(start, min(start + COLUMNS, first + size))
        for first in range(0, width, size)
        for start in range(first, first + size, COLUMNS)
    ]
    dtypes = spec.scale_dtypes if refit and size <= COLUMNS else None
    changes = torch.empty(COLUMNS, W.shape[0], device=W.device)
    for _ in range(sweeps):
        for part in pieces:
            index = part.start // size
            delta = changes[: part.stop - part.start]
            kernels.descend_columns(
                gradient[part], None, scale[index], zero[index], H[part, part], spec.levels, integers[part],
                delta, dtypes,
            )  # fmt: skip
            gradient.addmm_(H[:, part], delta, alpha=-1.0)
    return integers.T.contiguous(), Grid(scale.T.contiguous(), zero.T.contiguous())


def output_error(W: Tensor, V: Tensor, H: Tensor) -> float:
    """`tr((W - V) H (W - V)^T) / tr(W H W^T)`: the relative squared output error of a layer."""
    E = W - V
    lost = float(torch.sum((E @ H) * E, dtype=torch.float64))
    whole = float(torch.sum((W @ H) * W, dtype=torch.float64))
    return lost / whole if whole > 0 else 0.0
