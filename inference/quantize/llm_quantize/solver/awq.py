"""AWQ: channel scales, chosen by the output error after the rounding that will be used.

Lin et al., "AWQ" (arXiv:2306.00978), section 3.2: input channels that carry much are scaled up before rounding and
their inputs down. That costs nothing where the scale goes into the layer before. The paper searches the exponent
`alpha` of the activation magnitude on layer outputs. Here the error is `tr((W - V) H (W - V)^T)`, which needs no
forward pass, and `V` comes from rounding with compensation. No scaling is among the candidates.

In unscaled coordinates a channel scale only changes the step of that channel's integers. So all candidates of all
sampled rows go through one recursion as rows of one matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llm_quantize.kernels.precision import tf32_matmul
from llm_quantize.solver.base import ChannelScales, best_candidate
from llm_quantize.solver.compensation import compensate
from llm_quantize.solver.factorization import Factor
from llm_quantize.solver.problem import PendingProblem, Problem, QuantizedWeight, quantize_weight
from llm_quantize.solver.qparams import QParams, ScaleSearch, dequantize, hessian_blocks, search_qparams
from llm_quantize.solver.quality import QualityPreset
from llm_quantize.types import QuantScheme

ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
SAMPLED_ROWS = 128  # of the weights, on which candidates are judged
SEARCH = ScaleSearch(candidates=8, refits=1)  # enough to tell candidates apart
DAMPING = 0.05  # of the mean diagonal; measured on held-out text


@dataclass(frozen=True, slots=True)
class AWQSolver:
    """A `Solver` with channel scales; the rounding is GPTQ's, by falling activation."""

    scheme: QuantScheme
    preset: QualityPreset
    damping: float = DAMPING
    uses_mappings: bool = True

    def prepare(self, H: Tensor | None, in_features: int, device: torch.device) -> PendingProblem:
        return PendingProblem(H, in_features, device, damping=self.damping, act_order=True)

    def choose_scales(self, W: Tensor, problem: Problem, rows: Tensor, count: int) -> ChannelScales:
        assert problem.factor is not None
        return choose_scales(W, problem.H, problem.factor, rows, count, self.scheme)

    def quantize(self, W: Tensor, problem: Problem) -> QuantizedWeight:
        return quantize_weight(W, problem, self.scheme, self.preset)


def candidate_scales(H: Tensor, rows: Tensor, count: int, alphas: tuple[float, ...]) -> Tensor:
    """Scales `rms^alpha` whose geometric middle is one: float32 (alphas, count). Asynchronous.

    H: (in, in). rows: int64 (in), below `count`; channels that share one take their mean power.
    """
    # Not `index_add_`: on a GPU it adds in whatever order, and the same input would not always give the same scales.
    power = torch.zeros(count, device=H.device).index_put_(
        (rows,), H.diagonal().clamp(min=0), accumulate=True
    )
    channels = torch.zeros(count, device=H.device).index_add_(0, rows, torch.ones_like(H.diagonal()))
    used = channels > 0
    rms = (power / channels.clamp(min=1)).sqrt()
    floor = rms.sum() / used.sum() * 1e-4 + 1e-20  # no power, no part in the sum
    rms = rms.clamp(min=floor)
    scale = torch.stack([rms.pow(alpha) for alpha in alphas])
    largest = torch.where(used, scale, 0.0).amax(1, keepdim=True)
    smallest = torch.where(used, scale, torch.inf).amin(1, keepdim=True)
    return torch.where(used, scale / (largest * smallest).sqrt(), 1.0)


def choose_scales(
    W: Tensor, H: Tensor, factor: Factor, rows: Tensor, count: int, scheme: QuantScheme
) -> ChannelScales:
    """The best channel scales for the weights `W`, float32 (out, in), of all balance layers together.

    H: the damped Hessian of their input, (in, in). factor: of `H`. rows, count: as for `Solver.choose_scales`.
    """
    stride = max(1, W.shape[0] // SAMPLED_ROWS)
    sample = W[::stride].contiguous()
    out, width = sample.shape
    size, number = scheme.group_width(width), len(ALPHAS)
    grouped = replace(scheme, group_size=size)
    scales = candidate_scales(H, rows, count, ALPHAS)
    channels = scales[:, rows]  # (candidates, in)
    # Each candidate's groups stand beside the others', as if of one wide matrix: one search for all.
    wide = (sample.unsqueeze(1) * channels).reshape(out, number * width)
    part = channels.reshape(number, -1, 1, size)
    plain = hessian_blocks(H, size)
    blocks = plain / (part * part if plain.shape[1] == 1 else part.mT * part)
    qparams = search_qparams(wide, blocks.flatten(0, 1), grouped, SEARCH)
    steps, zeros = (
        each.reshape(out, number, -1, 1).transpose(0, 1).contiguous()
        for each in (qparams.scale, qparams.zero)
    )
    every = QParams(
        (steps / channels.reshape(number, 1, -1, size)).reshape(number * out, width),
        zeros.expand(-1, -1, -1, size).reshape(number * out, width),
    )
    del wide, blocks, steps, zeros
    stacked = sample.repeat(number, 1)
    q = compensate(stacked, every, replace(scheme, group_size=1), factor)
    E = stacked.sub_(dequantize(q, every))
    losses = tf32_matmul(E, H).mul_(E).reshape(number, -1).sum(1)
    return ChannelScales(scales.index_select(0, best_candidate(losses))[0], losses, ALPHAS)
