"""One input of a block made ready to be solved: its Hessian, damped and factorized, or why that failed."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llm_quantize.kernels.permutation import divide_
from llm_quantize.kernels.precision import power_of_two
from llm_quantize.kernels.streams import Timestamp
from llm_quantize.solver.compensation import compensate, descend
from llm_quantize.solver.factorization import Factor, Factorization, NotFactorizable
from llm_quantize.solver.qparams import QParams, dequantize, hessian_blocks, round_to_nearest, search_qparams
from llm_quantize.solver.quality import QualityPreset
from llm_quantize.types import QuantScheme


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight in integers.

    q: uint8 (out, in). qparams: (out, groups). g_idx: int32 (in), the group of each input channel where groups follow
    the activation order, else None. dequantized: float32 (out, in), what the integers stand for.
    """

    q: Tensor
    qparams: QParams
    g_idx: Tensor | None
    dequantized: Tensor


@dataclass(slots=True)
class Problem:
    """The damped Hessian of one input and its factor. Owns both.

    H: float32 (in, in). factor: None where there is none; `fallback` then says why. damping: the fraction of the mean
    diagonal that was added. dead: channels that carried nothing. seconds: that it took.
    """

    H: Tensor
    factor: Factor | None
    damping: float
    dead: int
    fallback: str | None
    seconds: float

    def scale_inputs_(self, scale: Tensor) -> None:
        """Make this the problem of inputs divided by `scale`, float32 (in), in place.

        No new Cholesky: the factor of `S^-1 H S^-1` is that of `H` with its rows over the scale.
        """
        divide_(self.H, scale)
        if self.factor is None:
            return
        ordered = scale[self.factor.order]
        self.factor.U.div_(ordered[:, None])
        self.factor.norms.copy_(power_of_two(self.factor.norms / ordered))
        for span, R in self.factor.spans():
            R.mul_(ordered[span])


class PendingProblem:
    """A `Problem` under way: it begins at once, and only `finish` waits for a GPU.

    H: the Hessian, float32 (in, in), which is used up; None where it cannot be used.
    """

    def __init__(
        self, H: Tensor | None, in_features: int, device: torch.device, *, damping: float, act_order: bool
    ) -> None:
        self._H, self._width, self._device = H, in_features, device
        self._begun = Timestamp(device)
        if H is not None:
            diagonal = H.diagonal()
            self._seen = torch.stack((torch.isfinite(diagonal).logical_not().sum(), (diagonal <= 0).sum()))
            self._factorization = Factorization(H, damping, act_order=act_order)
        self._ended = Timestamp(device)

    def finish(self) -> Problem:
        """Wait for the factor. Without one the problem has `H = I`, and weights are rounded to nearest."""
        seconds = self._ended.since(self._begun)
        if self._H is None:
            return self._without("no usable inputs", 0, seconds)
        infinite, dead = self._seen.tolist()
        if infinite:
            return self._without("the Hessian is not finite", 0, seconds)
        try:
            factor = self._factorization.finish()
        except NotFactorizable:
            # Not even its diagonal blocks can be trusted: it may be indefinite, or hold NaN.
            return self._without("the Hessian cannot be factorized", dead, seconds)
        return Problem(self._H, factor, factor.damping, dead, None, seconds)

    def _without(self, why: str, dead: int, seconds: float) -> Problem:
        H = torch.eye(self._width, device=self._device)
        return Problem(H, None, 0.0, dead, f"rounded to nearest: {why}", seconds)


def quantize_weight(
    W: Tensor, problem: Problem, scheme: QuantScheme, preset: QualityPreset, *, dynamic_groups: bool = False
) -> QuantizedWeight:
    """Search quantization parameters, round with compensation, and descend. W: float32 (out, in).

    dynamic_groups: groups are of channels that follow each other in the processing order, and `g_idx` is not None.
    """
    width = W.shape[1]
    if problem.factor is None:
        qparams = search_qparams(
            W, hessian_blocks(problem.H, scheme.group_width(width)), scheme, preset.search
        )
        q = round_to_nearest(W, qparams, scheme)
        return QuantizedWeight(q, qparams, None, dequantize(q, qparams))
    if dynamic_groups:
        return _quantize_permuted(W, problem, problem.factor, scheme, preset)
    qparams = search_qparams(W, hessian_blocks(problem.H, scheme.group_width(width)), scheme, preset.search)
    q = compensate(W, qparams, scheme, problem.factor)
    if preset.sweeps:
        q, qparams = descend(W, q, qparams, scheme, problem.H, sweeps=preset.sweeps, refit=preset.refit)
    return QuantizedWeight(q, qparams, None, dequantize(q, qparams))


def _quantize_permuted(
    W: Tensor, problem: Problem, factor: Factor, scheme: QuantScheme, preset: QualityPreset
) -> QuantizedWeight:
    """Quantize with the channels in the processing order, so that groups are static there."""
    order = factor.order
    straight = replace(factor, order=torch.arange(len(order), device=order.device))
    permuted = replace(problem, H=problem.H[order][:, order], factor=straight)
    found = quantize_weight(W[:, order], permuted, scheme, preset)
    back = torch.argsort(order)
    group = torch.div(back, scheme.group_width(W.shape[1]), rounding_mode="floor").to(torch.int32)
    return QuantizedWeight(found.q[:, back].contiguous(), found.qparams, group, found.dequantized[:, back])
