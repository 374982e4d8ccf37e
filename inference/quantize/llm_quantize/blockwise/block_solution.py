"""Quantizes the linears of one block from the Hessians of their inputs.

The inputs are taken in the order in which the block computes, so that each linear can be rounded for what its
predecessors, quantized, make of its inputs. With channel scales they are taken from the last one back to the first: a
scale that divides an earlier linear's rows must be known before that linear is rounded. Beside the reference model that
goes for the scales alone, and the rounding goes forward.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llm_quantize.blockwise.channel_scaling import BlockScaling
from llm_quantize.blockwise.layer_report import LayerReport
from llm_quantize.blockwise.reference import InputMismatch, ReferenceBlock
from llm_quantize.kernels.streams import StreamPool, Timestamp
from llm_quantize.model.block_forward import linear_at
from llm_quantize.solver.base import Solver
from llm_quantize.solver.compensation import output_forms, relative_error, toward_target
from llm_quantize.solver.problem import PendingProblem, Problem
from llm_quantize.solver.qparams import QParams

STACKED_WEIGHTS = 1 << 28  # that are rounded together at most
REPORT_ROWS = 256  # rows of a layer on which its output error is measured
TARGET_SHARE = 0.75  # of the way to the target: the rest would follow the noise of the calibration tokens

Hessians = Callable[[int], Tensor | None]


@dataclass(frozen=True, slots=True)
class SolvedLinear:
    """One linear in integers, as it goes into the file; see `solver.problem.QuantizedWeight`."""

    path: str
    q: Tensor
    qparams: QParams
    g_idx: Tensor | None
    report: LayerReport


@dataclass(frozen=True, slots=True)
class BlockProblem:
    """What is to be solved.

    block: its weights are replaced by what the integers stand for. name: in the model. groups: paths of linears that
    share an input, in the order in which the block computes. hessians: gives `H`, float32 (in, in), of one group, which
    is used up, or None where it cannot be used; asked for once each.
    """

    block: nn.Module
    name: str
    groups: list[list[str]]
    hessians: Hessians
    solver: Solver
    scaling: BlockScaling

    def prepare(self, index: int, H: Tensor | None) -> PendingProblem:
        """Begin to make group `index` ready to be solved."""
        weight = linear_at(self.block, self.groups[index][0]).weight
        return self.solver.prepare(H, weight.shape[1], weight.device)

    def weight(self, path: str) -> Tensor:
        """The weight of a linear as it is in the block, float32 (out, in)."""
        return linear_at(self.block, path).weight.detach().float()


def solve_block(
    problem: BlockProblem, reference: ReferenceBlock | None = None, streams: StreamPool | None = None
) -> Generator[SolvedLinear, None, None]:
    """Yield every linear quantized, its de-quantized weight already in the block.

    streams: one for each group; all Hessians are then asked for before a linear is rounded. Else each is asked for when
    the groups before it are done: from the last to the first with channel scales, in order without. reference: gives
    the linears their targets; the Hessians then serve the channel scales alone.
    """
    order = list(range(len(problem.groups)))
    if problem.scaling.mapped:
        order.reverse()
    if reference is not None:
        yield from _solve_towards_reference(problem, reference)
    elif streams is not None:
        with streams:
            yield from _solve_in_parallel(problem, order, streams)
    else:
        yield from _solve_in_turn(problem, order)


def _solve_in_turn(problem: BlockProblem, order: list[int]) -> Iterator[SolvedLinear]:
    """Each group is done with, and its memory free, before the next one's Hessian is asked for."""
    scaling = problem.scaling
    for index in order:
        paths = problem.groups[index]
        ready = problem.prepare(index, problem.hessians(index)).finish()
        weights = [problem.weight(path) for path in paths]
        scaling.choose(index, weights, ready, keep=True)
        weights = [scaling.factors.apply(path, W) for path, W in zip(paths, weights, strict=True)]
        for rounded in _round(problem, paths, weights, ready):
            yield from rounded.finish(scaling.alpha(index))
            del rounded
        del ready, weights


def _solve_in_parallel(
    problem: BlockProblem, order: list[int], streams: StreamPool
) -> Iterator[SolvedLinear]:
    """Each group on a stream of its own.

    Until all is begun, the host waits for the device only to know whether the factors exist. What keeps the device busy
    for long with few kernels is begun before what does so with many.
    """
    scaling, groups = problem.scaling, problem.groups
    begun: dict[int, PendingProblem] = {}
    rounded: dict[int, list[_PendingLinears]] = {}
    widths = {index: linear_at(problem.block, groups[index][0]).in_features for index in order}
    narrow_first = sorted(order, key=widths.__getitem__)
    for index in narrow_first:
        H = problem.hessians(index)
        with streams.use(index):
            begun[index] = problem.prepare(index, H)
        del H

    def solve(index: int) -> None:
        with streams.use(index, after=scaling.mapped.prerequisites(index)):
            ready = begun.pop(index).finish()
            scaling.choose(index, [problem.weight(p) for p in groups[index]], ready, keep=True)
            weights = [scaling.factors.apply(path, problem.weight(path)) for path in groups[index]]
            rounded[index] = list(_round(problem, groups[index], weights, ready))
        for other in order:
            needed = scaling.mapped.prerequisites(other)
            if index in needed and not needed & begun.keys():
                solve(other)

    for index in narrow_first:
        if not scaling.mapped.prerequisites(index):
            solve(index)
    for index in order:
        streams.join(index)
        for each in rounded.pop(index):
            yield from each.finish(scaling.alpha(index))


def _solve_towards_reference(problem: BlockProblem, reference: ReferenceBlock) -> Iterator[SolvedLinear]:
    """First all channel scales, from the last input back to the first, then the rounding in order."""
    scaling, groups = problem.scaling, problem.groups
    for index in reversed(range(len(groups))):
        if scaling.mapped.get(index) is None:
            continue
        ready = problem.prepare(index, problem.hessians(index)).finish()
        scaling.choose(index, [reference.weight(path) for path in groups[index]], ready, keep=False)
        del ready
    for path in (path for paths in groups for path in paths):
        weight = linear_at(problem.block, path).weight
        weight.copy_(scaling.factors.apply(path, reference.weight(path)).to(weight.dtype))
    for index, paths in enumerate(groups):
        mismatch = reference.mismatch(index, scaling.factors.channels.get(paths[0]))
        ready = problem.prepare(index, None if mismatch is None else mismatch.H).finish()
        weights = [scaling.factors.apply(path, reference.weight(path)) for path in paths]
        if mismatch is not None and ready.factor is not None:
            weights = [toward_target(W, _output_residual(W, mismatch), ready.factor) for W in weights]
        del mismatch
        for rounded in _round(problem, paths, weights, ready):
            yield from rounded.finish(scaling.alpha(index))
            del rounded
        del ready, weights


def _output_residual(W: Tensor, mismatch: InputMismatch) -> Tensor:
    """How the output of `W` and the residual stream it is added to lag behind the target: `e x^T`, (out, in)."""
    behind = W @ mismatch.inputs
    return TARGET_SHARE * (behind if mismatch.residual is None else behind + mismatch.residual)


@dataclass(slots=True)
class _PendingLinears:
    """Linears of one input, rounded together; the device may not have finished them."""

    name: str
    paths: list[str]
    q: list[Tensor]
    qparams: list[QParams]
    g_idx: Tensor | None
    forms: Tensor  # of the output error, (linears, 2)
    problem: Problem
    share: float  # of the problem's time
    begun: Timestamp
    ended: Timestamp

    def finish(self, alpha: float | None) -> Iterator[SolvedLinear]:
        """Wait for them."""
        problem, count = self.problem, len(self.paths)
        seconds = self.share * problem.seconds + self.ended.since(self.begun) / count
        for path, q, qparams, forms in zip(self.paths, self.q, self.qparams, self.forms.cpu(), strict=True):
            report = LayerReport(
                f"{self.name}.{path}",
                relative_error(forms),
                problem.damping,
                problem.dead,
                alpha,
                problem.fallback,
                seconds,
            )
            yield SolvedLinear(path, q, qparams, self.g_idx, report)


def _round(
    problem: BlockProblem, paths: list[str], weights: list[Tensor], ready: Problem
) -> Iterator[_PendingLinears]:
    """Quantize the linears of one input and put what the file will hold into the block; `weights` are used up.

    They are rounded as rows of one matrix where that is not too large: a column takes as long for few rows as for many.
    Asynchronous.
    """
    for part in _stacks(weights):
        begun = Timestamp(weights[part[0]].device)
        rows = [weights[i].shape[0] for i in part]
        W = torch.cat([weights[i] for i in part]) if len(part) > 1 else weights[part[0]]
        for i in part:
            weights[i] = W.new_empty(0)
        found = problem.solver.quantize(W, ready)
        forms = _replace_weights(
            [linear_at(problem.block, paths[i]).weight for i in part], W, found.dequantized, ready.H
        )
        q, qparams, g_idx = torch.split(found.q, rows), found.qparams.split(rows), found.g_idx
        del W, found
        yield _PendingLinears(
            problem.name,
            [paths[i] for i in part],
            list(q),
            qparams,
            g_idx,
            forms,
            ready,
            1 / len(paths),
            begun,
            Timestamp(forms.device),
        )


def _replace_weights(parameters: list[Tensor], W: Tensor, V: Tensor, H: Tensor) -> Tensor:
    """Put `V` into the parameters, which stand one below another in it; the output error of each, (linears, 2)."""
    rows = [len(parameter) for parameter in parameters]
    forms = []
    for parameter, W_one, V_one in zip(parameters, torch.split(W, rows), torch.split(V, rows), strict=True):
        sample = slice(None, None, max(1, W_one.shape[0] // REPORT_ROWS))
        forms.append(output_forms(W_one[sample], V_one[sample], H))
        parameter.copy_(V_one.to(parameter.dtype))
    return torch.stack(forms)


def _stacks(weights: list[Tensor]) -> list[list[int]]:
    """Indices of the weights that are rounded together, in order."""
    parts: list[list[int]] = [[]]
    for i, W in enumerate(weights):
        if parts[-1] and sum(weights[j].numel() for j in parts[-1]) + W.numel() > STACKED_WEIGHTS:
            parts.append([])
        parts[-1].append(i)
    return parts
