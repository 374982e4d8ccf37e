"""AWQ's channel scales, chosen by the output error after the rounding that will be used.

Lin et al., "AWQ" (arXiv:2306.00978), section 3.2: input channels that carry much are scaled up before rounding and
their inputs down, which costs nothing where the scale folds into the operation before. The paper searches the exponent
of the activation magnitude on layer outputs; here the error is `tr((W - V) H (W - V)^T)`, which needs no forward pass,
and `V` comes from the rounding with error compensation. No scaling is among the candidates.

In unscaled coordinates a channel scale only changes the step of that channel's grid, so all candidates of all sampled
rows go through one recursion as rows of one matrix.

Knows tensors only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from llm_quantize.kernels.permutation import divide_
from llm_quantize.kernels.precision import power_of_two, tensor_cores
from llm_quantize.solver.gptq import Factor, compensate
from llm_quantize.solver.qparams import (
    QParams,
    QuantScheme,
    ScaleSearch,
    dequantize,
    hessian_blocks,
    search_qparams,
)

ALPHAS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
ROWS = 128  # rows of the weights that candidates are judged on


@dataclass(frozen=True, slots=True)
class ChannelScales:
    """`scale`: float32 (sources), one per row of what the scale folds into; `losses` of all candidates, float32.

    Both on the device, which nobody has waited for.
    """

    scale: Tensor
    losses: Tensor

    @property
    def alpha(self) -> float:
        """Of the best candidate; zero for no scaling, whose scales are exactly one. Waits for the device."""
        return ALPHAS[int(_best(self.losses))]


def _best(losses: Tensor) -> Tensor:
    """The number of the smallest, of the first of equals; int64 (1). A NaN is never it, but where all are."""
    return losses.nan_to_num(nan=torch.inf).argmin(0, keepdim=True)


def candidates(H: Tensor, rows: Tensor, sources: int, alphas: tuple[float, ...]) -> Tensor:
    """Scales `rms^exponent`, geometric middle at one, float32 (exponents, sources).

    Tied channels take their mean power. The device is not waited for.
    """
    # Not `index_add_`: on a GPU it adds in whatever order, and the same input would not always give the same scales.
    power = torch.zeros(sources, device=H.device).index_put_(
        (rows,), H.diagonal().clamp(min=0), accumulate=True
    )
    count = torch.zeros(sources, device=H.device).index_add_(0, rows, torch.ones_like(H.diagonal()))
    used = count > 0
    rms = (power / count.clamp(min=1)).sqrt()
    floor = rms.sum() / used.sum() * 1e-4 + 1e-20  # no power, no part in the sum
    rms = rms.clamp(min=floor)
    scale = torch.stack([rms.pow(alpha) for alpha in alphas])
    largest = torch.where(used, scale, 0.0).amax(1, keepdim=True)
    smallest = torch.where(used, scale, torch.inf).amin(1, keepdim=True)
    return torch.where(used, scale / (largest * smallest).sqrt(), 1.0)


def choose_scales(
    W: Tensor, H: Tensor, factor: Factor, rows: Tensor, sources: int, spec: QuantScheme, effort: ScaleSearch
) -> ChannelScales:
    """The best exponent for weights `W` (out, in), all targets of one fold stacked, float32.

    H: damped second moment of their input, `factor` its factor; rows: int64 (in), the source row of each channel.
    """
    stride = max(1, W.shape[0] // ROWS)
    sample = W[::stride].contiguous()
    out, width = sample.shape
    size, count = spec.group_size, len(ALPHAS)
    scales = candidates(H, rows, sources, ALPHAS)
    channels = scales[:, rows]  # (candidates, in)
    # Each candidate's groups stand beside the others', as if of one wide matrix: one search for all.
    wide = (sample.unsqueeze(1) * channels).reshape(out, count * width)
    part = channels.reshape(count, -1, 1, size)
    plain = hessian_blocks(H, size)
    blocks = plain / (part * part if plain.shape[1] == 1 else part.mT * part)
    grid = search_qparams(wide, blocks.flatten(0, 1), spec, effort)
    steps, zeros = (
        each.reshape(out, count, -1, 1).transpose(0, 1).contiguous() for each in (grid.scale, grid.zero)
    )
    every = QParams(
        (steps / channels.reshape(count, 1, -1, size)).reshape(count * out, width),
        zeros.expand(-1, -1, -1, size).reshape(count * out, width),
    )
    del wide, blocks, steps, zeros
    stacked = sample.repeat(count, 1)
    q = compensate(stacked, every, replace(spec, group_size=1), factor)
    E = stacked.sub_(dequantize(q, every, 1))
    with tensor_cores():
        losses = (E @ H).mul_(E).reshape(count, -1).sum(1)
    return ChannelScales(scales.index_select(0, _best(losses))[0], losses)


def scale_(H: Tensor, factor: Factor, scale: Tensor) -> None:
    """Turns `H` (in, in) and its factor into those of inputs divided by `scale` (in), in place.

    No new Cholesky: the factor of `S^-1 H S^-1` is that of `H` with its rows over the scale.
    """
    divide_(H, scale)
    ordered = scale[factor.order]
    factor.U.div_(ordered[:, None])
    factor.norms.copy_(power_of_two(factor.norms / ordered))
    for span, R in factor.spans():
        R.mul_(ordered[span])
