"""A block's integers and scales, tuned together by gradient towards what the reference model's block gives.

Rounding makes the most of each linear alone, from Hessians. Here the whole block runs, with what lies between its
linears, and all of them move at once: the integers as numbers that are rounded on the way (straight-through gradients:
Bengio et al., arXiv:1308.3432), the scales as factors on those found. Block after block, as BRECQ does (Li et al.,
arXiv:2102.05426), towards the reference model's states from those that the quantized model makes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map_only

from llm_quantize.blockwise.block_solution import SolvedLinear
from llm_quantize.kernels.precision import representable
from llm_quantize.model import block_forward
from llm_quantize.model.block_forward import BlockKwargs, linear_at
from llm_quantize.model.states import States
from llm_quantize.solver.qparams import QParams, dequantize
from llm_quantize.types import QuantScheme

STEP_TOKENS = 2048
EPOCHS = 6  # over the same windows at most: more fits them and not the text
TRAVEL = 4.0  # all of Adam's rates for integers together, in integers
PEAK_RATE = 0.02  # of them at most
SCALE_RATE = 0.003  # relative
BETAS = (0.9, 0.99)
WARM_UP = 0.05  # of the steps
SAMPLED_STEPS = 16  # whose tokens tell whether the tuning has helped


def windows_used(steps: int, length: int) -> int:
    """How many windows of `length` tokens `steps` steps need, each in as many epochs as are allowed."""
    return math.ceil(steps / EPOCHS) * _windows_per_step(length)


def memory_needed(solved: list[SolvedLinear], length: int, heads: int) -> int:
    """Bytes that `tune_block` takes, about: numbers, gradients, Adam's averages, and what a step's tokens leave."""
    weights = sum(each.q.numel() for each in solved)
    widths = sum(sum(each.q.shape) for each in solved)
    size = _windows_per_step(length)
    return 27 * weights + size * length * (8 * widths + 16 * heads * length)


def _windows_per_step(length: int) -> int:
    return max(1, round(STEP_TOKENS / length))


def tune_block(
    block: nn.Module,
    solved: list[SolvedLinear],
    scheme: QuantScheme,
    steps: int,
    states: States,
    target: States,
    kwargs: BlockKwargs,
) -> list[SolvedLinear]:
    """Tune the linears of a block, which holds them: other integers and scales, which the block holds at the end.

    states: what enters the block. target: what the reference model's block gives, for the first of those windows or
    all. Where the block comes no closer, or memory runs out on the way, the block and the linears are as they were.
    """
    linears = [_TunedLinear(each, scheme, states.device) for each in solved]
    size = _windows_per_step(states.length)
    batches = [(a, min(a + size, len(target))) for a in range(0, len(target), size)]
    steps = min(steps, EPOCHS * len(batches))
    optimizer = torch.optim.Adam(
        [
            {"params": [linear.u for linear in linears], "lr": min(PEAK_RATE, TRAVEL / steps)},
            {"params": [linear.factor for linear in linears], "lr": SCALE_RATE},
        ],
        betas=BETAS,
    )
    rates = [group["lr"] for group in optimizer.param_groups]
    run = _BlockRun(block, kwargs, states.device)

    def distance(start: int, stop: int) -> Tensor:
        weights = {f"{linear.path}.weight": linear.weight(run.dtype) for linear in linears}
        return _distance(run(states.get(start, stop), weights), target.get(start, stop))

    def sampled_distance() -> float:
        with torch.no_grad():
            return float(torch.stack([distance(*batch) for batch in batches[:SAMPLED_STEPS]]).mean())

    before = sampled_distance()
    for step, (start, stop) in zip(range(steps), _shuffled(batches), strict=False):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * _rate_factor(step, steps)
        with torch.enable_grad():
            torch.autograd.backward(distance(start, stop))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    del optimizer
    if not sampled_distance() < before:  # nor where it is no number
        return solved
    return [linear.finish(block) for linear in linears]


def _shuffled(batches: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """The batches in one order after another, the same ones every time."""
    generator = torch.Generator().manual_seed(0)
    while True:
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[index]


def _rate_factor(step: int, steps: int) -> float:
    """Factor of the learning rates: a linear warm-up, and half a cosine down to zero."""
    return min(1.0, (step + 1) / (WARM_UP * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))


def _distance(made: Tensor, wanted: Tensor) -> Tensor:
    """The mean squared distance of states (n, length, width), relative to the size of tokens far larger than most."""
    wanted = wanted.float()
    power = wanted.square().mean(2)
    error = (made.float() - wanted).square().mean(2)
    return (error / power.clamp(min=power.median())).mean()


class _BlockRun:
    """The block with other weights, in a precision that gradients survive."""

    def __init__(self, block: nn.Module, kwargs: BlockKwargs, device: torch.device) -> None:
        self._block, self._kwargs = _Replaced(block), kwargs
        self._device = device
        self._half = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
        self.dtype = torch.bfloat16 if self._half else torch.float32
        self._others: dict[str, Tensor] = {}
        if not self._half:
            self._others = {name: p.detach().float() for name, p in block.named_parameters()}
            self._kwargs = tree_map_only(Tensor, lambda t: t.float() if t.is_floating_point() else t, kwargs)

    def __call__(self, hidden: Tensor, weights: dict[str, Tensor]) -> Tensor:
        within: AbstractContextManager[Any] = nullcontext()
        if self._half:
            within = torch.autocast(self._device.type, self.dtype)
        else:
            hidden = hidden.float()
        # The fused kernels' gradients differ in the last bits from one run to the next.
        with within, sdpa_kernel(SDPBackend.MATH):
            result: Tensor = torch.func.functional_call(
                self._block,
                {f"block.{k}": v for k, v in {**self._others, **weights}.items()},
                (hidden, self._kwargs),
            )
        return result


class _Replaced(nn.Module):
    """A block as `block_forward.forward` calls it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden: Tensor, kwargs: BlockKwargs) -> Tensor:
        return block_forward.forward(self.block, hidden, kwargs)


class _TunedLinear:
    """One linear while it is tuned. Groups that follow the activation order stand together in here.

    u: float32 (out, in), `q - zero` before it is rounded. factor: float32 (out, groups), on the scales.
    """

    def __init__(self, solved: SolvedLinear, scheme: QuantScheme, device: torch.device) -> None:
        self._solved, self.path, self._scheme = solved, solved.path, scheme
        order = None if solved.g_idx is None else torch.argsort(solved.g_idx, stable=True).to(device)
        self._place = None if order is None else torch.argsort(order)  # of each column among the groups
        self._zero, self._scale = solved.qparams.zero.to(device), solved.qparams.scale.to(device)
        q = solved.q.to(device)
        q = q if order is None else q[:, order]
        zero = self._zero.repeat_interleave(scheme.group_width(q.shape[1]), 1)
        self.u = (q.float() - zero).requires_grad_()
        self.factor = torch.ones_like(self._scale).requires_grad_()

    def _back(self, columns: Tensor) -> Tensor:
        return columns if self._place is None else columns[:, self._place]

    def weight(self, dtype: torch.dtype) -> Tensor:
        """De-quantized as it now is, (out, in)."""
        made: Tensor = _RoundStraightThrough.apply(
            self.u, self._scale * self.factor, self._zero, self._scheme.qmax, dtype
        )
        return self._back(made)

    @torch.no_grad()
    def finish(self, block: nn.Module) -> SolvedLinear:
        """What the file will hold, which the block gets too."""
        qparams = QParams(representable(self._scale * self.factor, self._scheme.scale_dtypes), self._zero)
        q = _rounded_steps(self.u, self._zero, self._scheme.qmax) + self._zero.unsqueeze(2)
        integers = q.flatten(1).to(torch.uint8)
        weight = linear_at(block, self.path).weight
        weight.copy_(self._back(dequantize(integers, qparams)).to(weight.dtype))
        return replace(self._solved, q=self._back(integers).contiguous(), qparams=qparams)


def _rounded_steps(u: Tensor, zero: Tensor, qmax: int) -> Tensor:
    """`q - zero` of each group in whole numbers: (out, groups, columns)."""
    low = -zero.unsqueeze(2)
    return torch.round(u.view(*zero.shape, -1)).clamp_(low, low + qmax)


class _RoundStraightThrough(torch.autograd.Function):
    """`round(u) * scale`, with the gradient of `u * scale` for `u` and of `round(u) * scale` for the scale."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, scale: Tensor, zero: Tensor, qmax: int, dtype: torch.dtype) -> Tensor:
        steps = _rounded_steps(u, zero, qmax)
        ctx.save_for_backward(steps.to(torch.int16), scale)
        return steps.mul_(scale.unsqueeze(2)).to(dtype).view_as(u)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        steps, scale = ctx.saved_tensors
        by_group = gradient.float().view(steps.shape)
        of_scale = (by_group * steps).sum(2)
        return (by_group * scale.unsqueeze(2)).view_as(gradient), of_scale, None, None, None
