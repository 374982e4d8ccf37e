"""Quantization parameters: scale and zero point of each group, and the search for the best ones.

Every format stores `w ~ (q - zero) * scale`. A *group* is `group_size` consecutive input channels of one row, which
share scale and zero point. Parameters are fixed before any rounding (static groups).

A symmetric group has its zero point at `2^(bits-1)`, so that one side has one integer more than the other. The sign of
the scale chooses which side that is. The reader multiplies by the scale, so the sign costs nothing; at 2 and 3 bits
it is worth a great deal.

Knows tensors only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_quantize.kernels.precision import dequantize_groups, representable
from llm_quantize.kernels.scale_search import NEIGHBOURS, can_search, search_groups
from llm_quantize.types import QuantScheme


@dataclass(frozen=True, slots=True)
class QParams:
    """scale, zero: float32 (out, groups); zero points are whole numbers."""

    scale: Tensor
    zero: Tensor

    def split(self, rows: list[int]) -> list[QParams]:
        """The parameters of matrices whose rows stand one below another; `rows` of each."""
        parts = zip(torch.split(self.scale, rows), torch.split(self.zero, rows), strict=True)
        return [QParams(scale, zero) for scale, zero in parts]


@dataclass(frozen=True, slots=True)
class ScaleSearch:
    """How finely scales are searched.

    candidates: shrink factors tried on the scale that spans the group, 4 or more.
    refits: least-squares refinements after that.
    """

    candidates: int = 24
    refits: int = 2


def dequantize(q: Tensor, qparams: QParams) -> Tensor:
    """`(q - zero) * scale` of integers (out, in): float32 (out, in)."""
    return dequantize_groups(q, qparams.scale, qparams.zero)


def round_to_nearest(W: Tensor, qparams: QParams, scheme: QuantScheme) -> Tensor:
    """Round each weight (out, in) to the nearest value of its group: integers, uint8 (out, in)."""
    width = W.shape[1] // qparams.scale.shape[1]
    scale, zero = (each.repeat_interleave(width, dim=1) for each in (qparams.scale, qparams.zero))
    return (torch.round(W / scale) + zero).clamp_(0, scheme.qmax).to(torch.uint8)


def minmax_qparams(W: Tensor, scheme: QuantScheme) -> QParams:
    """The plain parameters, which span each group's smallest to largest weight, and zero. W: float32 (out, in)."""
    groups = W.reshape(W.shape[0], -1, scheme.group_width(W.shape[1]))
    if scheme.symmetric:
        scale = 2.0 * groups.abs().amax(dim=2) / scheme.qmax
        scale = representable(scale, scheme.scale_dtypes)
        return QParams(scale, torch.full_like(scale, float(scheme.middle)))
    low = groups.amin(dim=2).clamp(max=0.0)
    high = groups.amax(dim=2).clamp(min=0.0)
    scale = representable((high - low) / scheme.qmax, scheme.scale_dtypes)
    zero = torch.round(-low / scale).clamp(scheme.zero_min, scheme.qmax)
    return QParams(scale, zero)


# ----------------------------------------------------------------------------------------------------------
# The search. The error of a group of one row, for a scale and a zero point, is `(w - v)^T M (w - v)`, with `M` the
# diagonal block of the Hessian. Inside, tensors are (groups, rows, columns): one matrix product for each group.


def hessian_blocks(H: Tensor, group_width: int, *, widest: int = 512) -> Tensor:
    """The diagonal blocks of `H` (in, in) for groups of so many channels: (groups, g, g).

    Only their diagonals, (groups, 1, g), where `g` is above `widest`. A block costs `g` multiplications for each weight
    and candidate; above `widest` that is more than the search is worth (measured).
    """
    groups = H.shape[0] // group_width
    if group_width > widest:
        return H.diagonal().reshape(groups, 1, group_width)
    index = torch.arange(groups, device=H.device)
    return H.reshape(groups, group_width, groups, group_width)[index, :, index, :]


def search_qparams(
    W: Tensor, M: Tensor, scheme: QuantScheme, search: ScaleSearch = ScaleSearch(), *, budget: int = 1 << 27
) -> QParams:
    """Search the parameters with the smallest error of rounding to nearest.

    W: float32 (out, in). M: from `hessian_blocks`. budget: elements that are worked on at a time, about.
    By that measure the result is never worse than `minmax_qparams`, whose scale is among the candidates (but for a
    last bit).
    """
    out, width = W.shape
    grouped = W.reshape(out, -1, scheme.group_width(width))
    if can_search(grouped, M, scheme.scale_dtypes):
        scale, zero, _ = search_groups(
            grouped,
            M,
            _shrink_factors(scheme.bits, search.candidates),
            qmax=scheme.qmax,
            symmetric=scheme.symmetric,
            zero_min=scheme.zero_min,
            dtypes=scheme.scale_dtypes,
            refits=search.refits,
        )
        return QParams(scale.T.contiguous(), zero.T.contiguous())
    rows = max(1, budget // width)
    scales, zeros = [], []
    for start in range(0, out, rows):
        found = _search(grouped[start : start + rows].transpose(0, 1).contiguous(), M, scheme, search)
        scales.append(found.scale.T)
        zeros.append(found.zero.T)
    return QParams(torch.cat(scales).contiguous(), torch.cat(zeros).contiguous())


def _shrink_factors(bits: int, count: int) -> list[float]:
    """Factors on the spanning scale, from a little above it to where clipping no longer pays.

    The first two are those of `minmax_qparams`, symmetric and not, so that the search is never worse.
    """
    low = {2: 0.30, 3: 0.45, 4: 0.55}.get(bits, 0.80)
    high = 1.06
    swept = [high - (high - low) * i / (count - 3) for i in range(count - 2)]
    return [2.0**bits / (2.0**bits - 1), 1.0, *swept]


def _product(U: Tensor, M: Tensor) -> Tensor:
    """`U M` for each group; `M` (G, g, g) or its diagonal (G, 1, g)."""
    return U * M if M.shape[1] == 1 else torch.bmm(U, M)


def _error(E: Tensor, M: Tensor) -> Tensor:
    """The quadratic form of each row of `E` (G, rows, g) under `M` (G, g, g), or its diagonal (G, 1, g)."""
    if M.shape[1] == 1:
        return (E * E * M).sum(dim=2)
    return (torch.bmm(E, M) * E).sum(dim=2)


class _Best:
    """The best (scale, zero) of each group and row so far: tensors (G, rows)."""

    def __init__(self, W: Tensor, M: Tensor, scheme: QuantScheme) -> None:
        self.W, self.M, self.scheme = W, M, scheme
        shape = W.shape[:2]
        self.loss = torch.full(shape, float("inf"), device=W.device)
        self.scale = torch.ones(shape, device=W.device)
        self.zero = torch.zeros(shape, device=W.device)

    def steps(self, scale: Tensor, zero: Tensor) -> Tensor:
        """`q - zero` of rounding to nearest with these parameters: (G, rows, g)."""
        z = zero.unsqueeze(2)
        return (torch.round(self.W / scale.unsqueeze(2)) + z).clamp_(0, self.scheme.qmax).sub_(z)

    def offer(self, scale: Tensor, zero: Tensor) -> None:
        """Take these parameters where their error is smaller."""
        scale = representable(scale, self.scheme.scale_dtypes)
        loss = _error(self.W - self.steps(scale, zero) * scale.unsqueeze(2), self.M)
        better = loss < self.loss
        self.loss = torch.where(better, loss, self.loss)
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)

    def offer_refit(self) -> None:
        """Offer the least-squares scale for the integers at hand: `u^T M w / u^T M u`."""
        U = self.steps(self.scale, self.zero)
        UM = _product(U, self.M)
        scale = (UM * self.W).sum(dim=2) / (UM * U).sum(dim=2).clamp(min=1e-30)
        self.offer(torch.where(scale == 0, self.scale, scale), self.zero)


def _search(W: Tensor, M: Tensor, scheme: QuantScheme, search: ScaleSearch) -> _Best:
    """The search in PyTorch: the twin of `kernels.scale_search`. W: (G, rows, g)."""
    best = _Best(W, M, scheme)
    factors = _shrink_factors(scheme.bits, search.candidates)
    if scheme.symmetric:
        high, low = W.amax(dim=2), W.amin(dim=2)
        # The side with one integer more, q = 0, goes to the larger extreme; near ties the other way is tried too.
        sign = torch.where(high > -low, -1.0, 1.0)
        span = torch.maximum(high, -low) / scheme.middle
        zero = torch.full_like(span, float(scheme.middle))
        for factor in factors:
            best.offer(span * sign * factor, zero)
        for factor in factors:
            best.offer(-span * sign * factor, zero)
    else:
        low, high = W.amin(dim=2).clamp(max=0.0), W.amax(dim=2).clamp(min=0.0)
        span = (high - low) / scheme.qmax
        for factor in factors:
            scale = span * factor
            zero = torch.round(-(low + high) / (2 * scale.clamp(min=1e-30)) + scheme.qmax / 2)
            best.offer(scale, zero.clamp(scheme.zero_min, scheme.qmax))
        for shift in (-1.0, 1.0):
            scale, zero = best.scale, (best.zero + shift).clamp(scheme.zero_min, scheme.qmax)
            for factor in NEIGHBOURS:
                best.offer(scale * factor, zero)
    for _ in range(search.refits):
        best.offer_refit()
    return best
