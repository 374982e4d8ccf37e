"""The factor of a Hessian that rounding with compensation needs.

GPTQ (Frantar et al., arXiv:2210.17323) spreads a column's error by the upper `R` with `H^-1 = R^T R`. QuIP (Chee et
al., arXiv:2307.13304, section 3) shows that the same follows from the error of all columns before, `W - V`, and the
factor of `H` itself: the upper `U = R^-1` with `H = U U^T`. One Cholesky of the order-reversed `H` gives `U`. So `R` is
needed for blocks on the diagonal alone, and `U` between them.

Knows tensors only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_quantize.kernels import cholesky
from llm_quantize.kernels.permutation import permute, turn_
from llm_quantize.kernels.precision import power_of_two

OUTLIER = 10.0  # times the median of the diagonal
LARGEST_DAMPING = 10.0


class NotFactorizable(ArithmeticError):
    """No damping up to the largest makes the Hessian positive definite."""


@dataclass(frozen=True, slots=True)
class Factor:
    """The damped Hessian, factorized in the processing order.

    U: float32 (in, in), upper, `H = U U^T`.
    inverses: of the blocks on the diagonal of `U`, which cover it in order; upper, of any size.
    order: int64 (in); `order[k]` is the input channel that is processed at step k.
    norms: float32 (in), of the rows of `U`, as powers of two within a factor of two.
    damping: the fraction of the mean diagonal that was added.
    """

    U: Tensor
    inverses: list[Tensor]
    order: Tensor
    norms: Tensor
    damping: float

    def spans(self) -> Iterator[tuple[slice, Tensor]]:
        """The columns of each block on the diagonal, and the block's inverse."""
        start = 0
        for R in self.inverses:
            yield slice(start, start + len(R)), R
            start += len(R)


def condition_(H: Tensor, damping: float) -> None:
    """Raise dead channels of `H` (in, in) and add `damping` times the mean diagonal, in place. Asynchronous.

    A dead channel (zero on the diagonal) carried no signal: any weight would do, and a positive diagonal makes it round
    to nearest. A channel far over the median counts for `OUTLIER` medians in the mean: otherwise a few of them would
    damp away all that is known of the others.
    """
    diagonal = H.diagonal()
    live = diagonal > 0
    middle = (live.sum(0, keepdim=True) - 1).clamp(min=0) // 2
    median = torch.where(live, diagonal, torch.inf).sort().values.index_select(0, middle)
    floor = torch.where(live.any(), torch.minimum(diagonal, OUTLIER * median).mean(), 1.0)
    diagonal.copy_(torch.where(diagonal <= 0, floor, diagonal))
    diagonal.add_(damping * floor)


def activation_order(H: Tensor) -> Tensor:
    """Channels by falling diagonal of `H` (in, in): int64 (in). Ties keep their order."""
    return torch.sort(H.diagonal(), descending=True, stable=True).indices


def diagonal_norms(H: Tensor) -> Tensor:
    """The roots of the diagonal of `H` (in, in), each the power of two at or below it: float32 (in)."""
    return power_of_two(H.diagonal().to(torch.float32).sqrt())


class Factorization:
    """A factorization under way: it begins at once, and only `finish` waits for a GPU.

    H: float32 (in, in). It is left damped, in place. Where Cholesky fails in float32, float64 is tried, then the
    damping is raised tenfold at a time up to `LARGEST_DAMPING`. Beside `H` and the factor it needs two fifths of a
    large `H` more, and two and a half times a small one.
    """

    def __init__(self, H: Tensor, damping: float, *, act_order: bool) -> None:
        self._H, self._damping = H, damping
        self._order = activation_order(H) if act_order else torch.arange(H.shape[0], device=H.device)
        self._plain = H.diagonal().clone()
        self._attempt(torch.float32)

    def _attempt(self, dtype: torch.dtype) -> None:
        if dtype == torch.float32:
            condition_(self._H, self._damping)
        self._dtype = dtype
        self._norms = diagonal_norms(self._H)
        self._U, self._inverses, self._failed = _factor(self._H, self._order.flip(0), self._norms, dtype)

    def finish(self) -> Factor:
        """Wait for the factor. Raises NotFactorizable, with `H` as it was."""
        while bool(self._failed):
            del self._U, self._inverses
            if self._dtype == torch.float32:
                self._attempt(torch.float64)
                continue
            self._H.diagonal().copy_(self._plain)
            if self._damping >= LARGEST_DAMPING:
                raise NotFactorizable("the Hessian has no Cholesky factor at any damping")
            self._damping = max(self._damping * 10, 1e-3)
            self._attempt(torch.float32)
        return Factor(self._U, self._inverses, self._order, self._norms[self._order], self._damping)


def factorize(H: Tensor, damping: float, *, act_order: bool) -> Factor:
    """The factor of `H` (in, in), as `Factorization` gives it, at once."""
    return Factorization(H, damping, act_order=act_order).finish()


def _factor(
    H: Tensor, reverse: Tensor, norms: Tensor, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor], Tensor]:
    """`U` and `inverses` of the `Factor` from a Cholesky in `dtype`, and whether that failed: a boolean scalar.

    reverse: the processing order from its end. norms: (in), in the channels' own order; rows and columns are divided by
    them, so that the diagonal is about one. Takes one new (in, in), worked on in place.
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
