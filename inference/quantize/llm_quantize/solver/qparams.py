"""Scales and zero points of groups, rounding onto them, and the error-weighted search for the best ones.

Every format stores `w ~ (q - z) * s` with `q` in `[0, 2^bits)`; a *group* is `group_size` consecutive input
channels of one row, and shares `s` and `z`. A grid is fixed before any rounding ("static groups").

A symmetric grid has `z = 2^(bits-1)` and is one level longer on one side; the scale's sign chooses which side
that is (the reader multiplies by it, so it costs nothing), which is worth a great deal at two and three bits.

Knows tensors only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_quantize.kernels.precision import dequantized, representable
from llm_quantize.kernels.scale_search import NEIGHBOURS, can_search, search_groups


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """The shape of a grid: bits, columns per group (> 0), symmetry, and what scales may be stored as.

    `zero_min` is the smallest zero point that the file can hold for every reader (1 in the `gptq` layout,
    which stores `z - 1`). `scale_dtypes`: a stored scale survives a cast to each of these unchanged, so that
    a reader computing in either sees the grid that the rounding saw.
    """

    bits: int
    group_size: int
    symmetric: bool
    zero_min: int = 0
    scale_dtypes: tuple[torch.dtype, ...] = (torch.float16,)

    @property
    def qmax(self) -> int:
        """The largest integer, `2^bits - 1`."""
        return int(2**self.bits - 1)


@dataclass(frozen=True, slots=True)
class QParams:
    """`scale`, `zero`: float32 (out, groups); zeros are whole numbers."""

    scale: Tensor
    zero: Tensor


def expand(grid: QParams, group_size: int) -> tuple[Tensor, Tensor]:
    """Scale and zero of each weight: two float32 (out, in)."""
    return (
        grid.scale.repeat_interleave(group_size, dim=1),
        grid.zero.repeat_interleave(group_size, dim=1),
    )


def round_to_nearest(W: Tensor, grid: QParams, spec: QuantScheme) -> Tensor:
    """Integers of the nearest grid points: uint8 (out, in)."""
    scale, zero = expand(grid, spec.group_size)
    return (torch.round(W / scale) + zero).clamp_(0, spec.qmax).to(torch.uint8)


def dequantize(q: Tensor, grid: QParams, group_size: int) -> Tensor:
    """`(q - z) * s` in float32 (out, in)."""
    return dequantized(q, grid.scale, grid.zero, group_size)


def minmax_qparams(W: Tensor, spec: QuantScheme) -> QParams:
    """The plain grid that spans each group's smallest to largest weight (and zero)."""
    groups = W.reshape(W.shape[0], -1, spec.group_size)
    if spec.symmetric:
        scale = 2.0 * groups.abs().amax(dim=2) / spec.qmax
        scale = representable(scale, spec.scale_dtypes)
        return QParams(scale, torch.full_like(scale, 2.0 ** (spec.bits - 1)))
    low = groups.amin(dim=2).clamp(max=0.0)
    high = groups.amax(dim=2).clamp(min=0.0)
    scale = representable((high - low) / spec.qmax, spec.scale_dtypes)
    zero = torch.round(-low / scale).clamp(spec.zero_min, spec.qmax)
    return QParams(scale, zero)


# ----------------------------------------------------------------------------------------------------------
# The search. One group of one row is a point in (scale, zero); its error is (w - v)^T M (w - v) with M the
# second moment's diagonal block. The layout inside is (groups, rows, columns): one matrix product per group.


def _error(E: Tensor, M: Tensor) -> Tensor:
    """Quadratic form of each row of `E` (G, rows, g) under `M` (G, g, g), or its diagonal (G, 1, g)."""
    if M.shape[1] == 1:
        return (E * E * M).sum(dim=2)
    return (torch.bmm(E, M) * E).sum(dim=2)


def _product(U: Tensor, M: Tensor) -> Tensor:
    """`U M` for each group; `M` (G, g, g) or its diagonal (G, 1, g)."""
    return U * M if M.shape[1] == 1 else torch.bmm(U, M)


def hessian_blocks(H: Tensor, group_size: int, *, widest: int = 512) -> Tensor:
    """The diagonal blocks of `H` (in, in): (G, g, g); only their diagonals, (G, 1, g), for very wide groups.

    A block of `g` columns costs `g` multiplications a weight and candidate; past `widest` that is more than
    the search is worth (measured), and the diagonal stands in.
    """
    groups = H.shape[0] // group_size
    if group_size > widest:
        return H.diagonal().reshape(groups, 1, group_size)
    index = torch.arange(groups, device=H.device)
    return H.reshape(groups, group_size, groups, group_size)[index, :, index, :]


@dataclass(frozen=True, slots=True)
class ScaleSearch:
    """How finely scales are searched: points of the shrink sweep, and least-squares refinements after it."""

    sweep: int = 24
    refits: int = 2


def _shrinks(bits: int, count: int) -> list[float]:
    """Factors (`count`, 4 or more) on the spanning scale, from a little above it to where clipping no longer pays.

    The first two are those of `minmax_grid`, symmetric and not, so that the search is never worse.
    """
    low = {2: 0.30, 3: 0.45, 4: 0.55}.get(bits, 0.80)
    high = 1.06
    swept = [high - (high - low) * i / (count - 3) for i in range(count - 2)]
    return [2.0**bits / (2.0**bits - 1), 1.0, *swept]


class _Best:
    """The best (scale, zero) of each group and row so far: tensors (G, rows)."""

    def __init__(self, W: Tensor, M: Tensor, spec: QuantScheme) -> None:
        self.W, self.M, self.spec = W, M, spec
        shape = W.shape[:2]
        self.loss = torch.full(shape, float("inf"), device=W.device)
        self.scale = torch.ones(shape, device=W.device)
        self.zero = torch.zeros(shape, device=W.device)

    def steps_at(self, scale: Tensor, zero: Tensor) -> Tensor:
        """Signed steps `q - z` of rounding to nearest on the given grid: (G, rows, g)."""
        z = zero.unsqueeze(2)
        return (torch.round(self.W / scale.unsqueeze(2)) + z).clamp_(0, self.spec.qmax).sub_(z)

    def offer(self, scale: Tensor, zero: Tensor) -> None:
        scale = representable(scale, self.spec.scale_dtypes)
        loss = _error(self.W - self.steps_at(scale, zero) * scale.unsqueeze(2), self.M)
        better = loss < self.loss
        self.loss = torch.where(better, loss, self.loss)
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)

    def offer_refit(self) -> None:
        """The least-squares scale for the integers at hand: `u^T M w / u^T M u`."""
        U = self.steps_at(self.scale, self.zero)
        UM = _product(U, self.M)
        scale = (UM * self.W).sum(dim=2) / (UM * U).sum(dim=2).clamp(min=1e-30)
        self.offer(torch.where(scale == 0, self.scale, scale), self.zero)


def _search(W: Tensor, M: Tensor, spec: QuantScheme, effort: ScaleSearch) -> _Best:
    best = _Best(W, M, spec)
    factors = _shrinks(spec.bits, effort.sweep)
    if spec.symmetric:
        high, low = W.amax(dim=2), W.amin(dim=2)
        # The long side of the grid, q = 0, goes to the larger extreme; near ties the other way is tried too.
        sign = torch.where(high > -low, -1.0, 1.0)
        span = torch.maximum(high, -low) / (2.0 ** (spec.bits - 1))
        zero = torch.full_like(span, 2.0 ** (spec.bits - 1))
        for factor in factors:
            best.offer(span * sign * factor, zero)
        for factor in factors:
            best.offer(-span * sign * factor, zero)
        for _ in range(effort.refits):
            best.offer_refit()
        return best
    low, high = W.amin(dim=2).clamp(max=0.0), W.amax(dim=2).clamp(min=0.0)
    span = (high - low) / spec.qmax
    for factor in factors:
        scale = span * factor
        zero = torch.round(-(low + high) / (2 * scale.clamp(min=1e-30)) + spec.qmax / 2)
        best.offer(scale, zero.clamp(spec.zero_min, spec.qmax))
    for shift in (-1.0, 1.0):
        scale, zero = best.scale, (best.zero + shift).clamp(spec.zero_min, spec.qmax)
        for factor in NEIGHBOURS:
            best.offer(scale * factor, zero)
    for _ in range(effort.refits):
        best.offer_refit()
    return best


def search_qparams(
    W: Tensor, M: Tensor, spec: QuantScheme, effort: ScaleSearch = ScaleSearch(), *, budget: int = 1 << 27
) -> QParams:
    """The grid with the smallest error of rounding to nearest under the metric blocks `M`.

    W: float32 (out, in); M: from `metric_blocks`. Rows are worked on in slices of about `budget` elements.
    Never worse than `minmax_grid` by that measure (but for a last bit), since the sweep holds its scale.
    """
    out, width = W.shape
    grouped = W.reshape(out, -1, spec.group_size)
    if can_search(grouped, M, spec.scale_dtypes):
        scale, zero, _ = search_groups(
            grouped,
            M,
            _shrinks(spec.bits, effort.sweep),
            qmax=spec.qmax,
            symmetric=spec.symmetric,
            zero_min=spec.zero_min,
            dtypes=spec.scale_dtypes,
            refits=effort.refits,
        )
        return QParams(scale.T.contiguous(), zero.T.contiguous())
    rows = max(1, budget // width)
    scales, zeros = [], []
    for start in range(0, out, rows):
        part = W[start : start + rows]
        part = part.reshape(part.shape[0], -1, spec.group_size).transpose(0, 1).contiguous()
        found = _search(part, M, spec, effort)
        scales.append(found.scale.T)
        zeros.append(found.zero.T)
    return QParams(torch.cat(scales).contiguous(), torch.cat(zeros).contiguous())
