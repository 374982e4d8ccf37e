"""Quantizes the linears of one block from the second moments of their inputs.

The inputs are taken in the order in which the block computes, so that each linear can be rounded for what its
predecessors, quantized, make of its inputs. With channel scales they are taken from the last one back to the first: a
scale which folds into an earlier linear's rows must be known before that linear is rounded. Where the source is
followed, that goes for the scales alone, and the rounding goes forward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from llm_quantize.blockwise.reference import InputMismatch, ReferenceBlock
from llm_quantize.kernels.streams import StreamPool, Timestamp
from llm_quantize.model.awq_mappings import AWQMapping, apply_mapping, sources
from llm_quantize.model.block_forward import linear_at
from llm_quantize.solver.awq_scales import ChannelScales, choose_scales, scale_
from llm_quantize.solver.gptq import (
    Factor,
    Factorization,
    NotFactorizable,
    aim,
    compensate,
    descend,
    output_forms,
    relative,
)
from llm_quantize.solver.qparams import (
    QParams,
    QuantScheme,
    ScaleSearch,
    dequantize,
    hessian_blocks,
    round_to_nearest,
    search_qparams,
)

STACK = 1 << 28  # weights that are rounded together at most
REPORT_ROWS = 256  # rows of a layer on which its output error is told


@dataclass(frozen=True, slots=True)
class QualityPreset:
    """What `--quality` buys: the scale search, sweeps of coordinate descent after the rounding, and `follow`: the share
    of the windows on which each linear learns what its predecessors' quantization made of its inputs, and aims at what
    the source's would give. `tune`: steps by gradient of a whole block after that."""

    search: ScaleSearch
    sweeps: int
    refit: bool
    follow: float = 0.0
    tune: int = 0

    def reference_windows(self, windows: int, length: int) -> int:
        """How many of `windows` of `length` tokens: the share, and never too few to tell drift from noise."""
        return min(windows, max(math.ceil(self.follow * windows), -(-ENOUGH // length))) if self.follow else 0


ENOUGH = 1 << 18  # tokens
QUALITY_PRESETS = {
    "fast": QualityPreset(ScaleSearch(sweep=16, refits=1), sweeps=0, refit=False),
    "default": QualityPreset(ScaleSearch(sweep=24, refits=2), sweeps=2, refit=True),
    "best": QualityPreset(ScaleSearch(sweep=48, refits=3), sweeps=8, refit=True, follow=1.0, tune=384),
}
FEW_BITS = 3  # up to so many "default" follows too, and "best" tunes
SOME = 0.25  # of the windows, which "default" then follows on


def effort(quality: str, bits: int) -> QualityPreset:
    """What `--quality` means at so many bits: where each costs much accuracy, following pays by default, and tuning
    pays at all."""
    found = QUALITY_PRESETS[quality]
    if bits > FEW_BITS:
        return replace(found, tune=0)
    return replace(found, follow=SOME) if quality == "default" else found


AIM = 0.75  # of the way to the source's outputs: the rest would follow the noise of the calibration tokens
AWQ_EFFORT = ScaleSearch(sweep=8, refits=1)  # enough to tell candidates apart


@dataclass(frozen=True, slots=True)
class SolveOptions:
    """How linears are rounded. `group_size` -1: the whole row. `store`: the dtype that norms are saved in."""

    bits: int
    group_size: int
    symmetric: bool
    act_order: bool
    dynamic_groups: bool
    damping: float
    effort: QualityPreset
    zero_min: int
    scale_dtypes: tuple[torch.dtype, ...]
    store: torch.dtype

    def spec(self, width: int) -> QuantScheme:
        size = width if self.group_size == -1 else self.group_size
        return QuantScheme(self.bits, size, self.symmetric, self.zero_min, self.scale_dtypes)


@dataclass(slots=True)
class LayerReport:
    """What happened to one linear. `error`: relative squared output error of its rounding on calibration inputs, before
    its block was tuned."""

    name: str
    error: float
    damping: float
    dead: int
    alpha: float | None
    fallback: str | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Solved:
    """One linear: integers uint8 (out, in), their grid, and `g_idx` (in) where groups follow activation order."""

    path: str
    q: Tensor
    grid: QParams
    g_idx: Tensor | None
    report: LayerReport


Hessians = Callable[[int], Tensor | None]


@dataclass(slots=True)
class BlockChanges:
    """Parameters other than quantized weights that folds changed, by path in the block."""

    names: set[str] = field(default_factory=set)


def solve_block(
    block: nn.Module,
    name: str,
    groups: list[list[str]],
    hessians: Hessians,
    mappings: list[AWQMapping],
    options: SolveOptions,
    changes: BlockChanges,
    reference_block: ReferenceBlock | None = None,
    streams: StreamPool | None = None,
) -> Generator[Solved, None, None]:
    """Yields every linear quantized, its de-quantized weight already in the block.

    groups: paths that share an input, in the order in which the block computes; moments: gives `H` (in, in) of one
    group, which is used up, or None where it is unusable; asked for once each. With `lanes`, one for each group, all
    are asked for before a linear is rounded; else each when the groups before it are done, from the last group to the
    first with `folds`, in order without. With a `follower` the linears aim at what the source would give,
    and moments serve only the folds.
    """
    device = linear_at(block, groups[0][0]).weight.device
    scaling = _Scalings(
        block, groups, [replace(mapping, rows=mapping.rows.to(device)) for mapping in mappings], options
    )
    order = list(range(len(groups)))
    if mappings:
        order.reverse()
    if reference_block is not None:
        yield from _solve_following(block, name, groups, hessians, scaling, options, reference_block)
    elif streams is not None:
        with streams:
            yield from _side_by_side(block, name, groups, order, hessians, scaling, options, streams)
    else:
        yield from _one_by_one(block, name, groups, order, hessians, scaling, options)
    changes.names.update(scaling.changed())


def _one_by_one(
    block: nn.Module,
    name: str,
    groups: list[list[str]],
    order: list[int],
    hessians: Hessians,
    scaling: _Scalings,
    options: SolveOptions,
) -> Iterator[Solved]:
    """Each group is done with, and its memory free, before the next one's moment is asked for."""
    for index in order:
        paths = groups[index]
        problem = _Preparation.of(hessians(index), block, paths, options).finish()
        weights = [_weight(block, path) for path in paths]
        scaling.choose(index, weights, problem, keep=True)
        weights = [scaling.apply(path, W) for path, W in zip(paths, weights, strict=True)]
        for rounded in _round(block, name, paths, weights, problem, options):
            yield from rounded.finish(scaling.alpha(index))
            del rounded
        del problem, weights


def _side_by_side(
    block: nn.Module,
    name: str,
    groups: list[list[str]],
    order: list[int],
    hessians: Hessians,
    scaling: _Scalings,
    options: SolveOptions,
    streams: StreamPool,
) -> Iterator[Solved]:
    """Each group in a lane of its own. Nothing waits for the device before all of it is begun, but to know whether the
    factors exist; and what keeps the device busy for long with few kernels is begun before what does with many."""
    begun, problems, rounded = {}, {}, {}
    widths = {index: linear_at(block, groups[index][0]).in_features for index in order}
    narrow_first = sorted(order, key=widths.__getitem__)
    for index in narrow_first:
        H = hessians(index)
        with streams.stream(index):
            begun[index] = _Preparation.of(H, block, groups[index], options)
        del H

    def solve(index: int) -> None:
        with streams.stream(index, after=scaling.behind(index)):
            problems[index] = begun.pop(index).finish()
            scaling.choose(index, [_weight(block, p) for p in groups[index]], problems[index], keep=True)
            weights = [scaling.apply(path, _weight(block, path)) for path in groups[index]]
            rounded[index] = list(_round(block, name, groups[index], weights, problems.pop(index), options))
        for other in order:
            if index in scaling.behind(other) and not scaling.behind(other) & begun.keys():
                solve(other)

    for index in narrow_first:
        if not scaling.behind(index):
            solve(index)
    for index in order:
        streams.join(index)
        for each in rounded.pop(index):
            yield from each.finish(scaling.alpha(index))


def _weight(block: nn.Module, path: str) -> Tensor:
    """Float32, (out, in)."""
    return linear_at(block, path).weight.detach().float()


def _solve_following(
    block: nn.Module,
    name: str,
    groups: list[list[str]],
    hessians: Hessians,
    scaling: _Scalings,
    options: SolveOptions,
    reference_block: ReferenceBlock,
) -> Iterator[Solved]:
    """First all channel scales, from the last input back to the first, then the rounding in order."""
    for index in reversed(range(len(groups))):
        if not scaling.folded(index):
            continue
        problem = _Preparation.of(hessians(index), block, groups[index], options).finish()
        scaling.choose(index, [reference_block.weight(path) for path in groups[index]], problem, keep=False)
        del problem
    for path in (path for paths in groups for path in paths):
        weight = linear_at(block, path).weight
        weight.copy_(scaling.apply(path, reference_block.weight(path)).to(weight.dtype))
    for index, paths in enumerate(groups):
        mismatch = reference_block.mismatch(index, scaling.channels.get(paths[0]))
        problem = _Preparation.of(None if mismatch is None else mismatch.H, block, paths, options).finish()
        weights = [scaling.apply(path, reference_block.weight(path)) for path in paths]
        if mismatch is not None and problem.factor is not None:
            weights = [aim(W, _missed(W, mismatch), problem.factor) for W in weights]
        del mismatch
        for rounded in _round(block, name, paths, weights, problem, options):
            yield from rounded.finish(scaling.alpha(index))
            del rounded
        del problem, weights


class _Scalings:
    """The channel scales of a block, each chosen from the last group of linears back to the first.

    What folds do to a linear's weight: its input `channels` are multiplied, its `rows` divided. No scaling is a scale
    of one, which changes nothing: so nobody has to wait to know which was chosen.
    """

    def __init__(
        self, block: nn.Module, groups: list[list[str]], mappings: list[AWQMapping], options: SolveOptions
    ) -> None:
        self._block, self._groups, self._options = block, groups, options
        self._folds = {
            i: f for i, paths in enumerate(groups) for f in mappings if set(f.targets) == set(paths)
        }
        self._chosen: dict[int, tuple[ChannelScales, tuple[str, ...]]] = {}
        self.channels: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}

    def folded(self, index: int) -> bool:
        return index in self._folds

    def behind(self, index: int) -> set[int]:
        """The groups whose scales must have been chosen before those of group `index`: they divide its rows."""
        paths = self._groups[index]
        return {i for i, mapping in self._folds.items() if mapping.source in paths}

    def choose(self, index: int, weights: list[Tensor], problem: _Problem, *, keep: bool) -> None:
        """Scales the inputs of group `index`, where a fold and a factor are there; weights: of its linears, unscaled,
        float32. keep: the problem becomes that of the scaled inputs."""
        mapping = self._folds.get(index)
        if mapping is None or problem.factor is None:
            return
        paths, spec = self._groups[index], self._options.spec(weights[0].shape[1])
        stacked = torch.cat([self.apply(path, W) for path, W in zip(paths, weights, strict=True)])
        rows, count = mapping.rows, sources(self._block, mapping)
        chosen = choose_scales(stacked, problem.H, problem.factor, rows, count, spec, AWQ_EFFORT)
        folded = apply_mapping(self._block, mapping, chosen.scale, self._options.store)
        self._chosen[index] = chosen, folded.changed
        if folded.rows is not None:
            self.rows[mapping.source] = folded.rows
        for path in paths:
            self.channels[path] = folded.channels
        if keep:
            scale_(problem.H, problem.factor, folded.channels)

    def apply(self, path: str, W: Tensor) -> Tensor:
        """A linear's weight as its scales make it."""
        W = W / self.rows[path][:, None] if path in self.rows else W
        return W * self.channels[path] if path in self.channels else W

    def alpha(self, index: int) -> float | None:
        """Of the scales of group `index`, None where it has none. Waits for the device."""
        return self._chosen[index][0].alpha if index in self._chosen else None

    def changed(self) -> set[str]:
        """Parameters that folds changed, by path in the block, other than weights of linears."""
        return {name for chosen, names in self._chosen.values() if chosen.alpha > 0 for name in names}


def _missed(W: Tensor, mismatch: InputMismatch) -> Tensor:
    """How what `W` makes of the inputs, and the stream it is added to, lag behind the source: e x^T, (out, in)."""
    missed = W @ mismatch.inputs
    return AIM * (missed if mismatch.stream is None else missed + mismatch.stream)


@dataclass(slots=True)
class _Rounded:
    """Linears of one input, rounded together: on their way, where they come from a GPU."""

    name: str
    paths: list[str]
    q: list[Tensor]
    grids: list[QParams]
    g_idx: Tensor | None
    forms: Tensor  # of the output error, (linears, 2)
    problem: _Problem
    share: float  # of the problem's time
    begun: Timestamp
    ended: Timestamp

    def finish(self, alpha: float | None) -> Iterator[Solved]:
        """Waits for them."""
        problem, count = self.problem, len(self.paths)
        seconds = self.share * problem.seconds + self.ended.since(self.begun) / count
        for path, q, grid, forms in zip(self.paths, self.q, self.grids, self.forms.cpu(), strict=True):
            report = LayerReport(
                f"{self.name}.{path}",
                relative(forms),
                problem.damping,
                problem.dead,
                alpha,
                problem.fallback,
                seconds,
            )
            yield Solved(path, q, grid, self.g_idx, report)


def _round(
    block: nn.Module,
    name: str,
    paths: list[str],
    weights: list[Tensor],
    problem: _Problem,
    options: SolveOptions,
) -> Iterator[_Rounded]:
    """Rounds the linears of one input and puts what the file will hold into the block; `weights` are used up.

    They are rounded as rows of one matrix where that is not too large: a column takes as long for few rows as for many.
    A GPU is not waited for.
    """
    for part in _stacks(weights):
        begun = Timestamp(weights[part[0]].device)
        rows = [weights[i].shape[0] for i in part]
        W = torch.cat([weights[i] for i in part]) if len(part) > 1 else weights[part[0]]
        for i in part:
            weights[i] = W.new_empty(0)
        q, grid, g_idx, V = problem.solve(W, options.spec(W.shape[1]), options)
        forms = []
        for i, W_one, V_one in zip(part, torch.split(W, rows), torch.split(V, rows), strict=True):
            sample = slice(None, None, max(1, W_one.shape[0] // REPORT_ROWS))
            forms.append(output_forms(W_one[sample], V_one[sample], problem.H))
            weight = linear_at(block, paths[i]).weight
            weight.copy_(V_one.to(weight.dtype))
        del W, V
        yield _Rounded(
            name,
            [paths[i] for i in part],
            list(torch.split(q, rows)),
            _split(grid, rows),
            g_idx,
            torch.stack(forms),
            problem,
            1 / len(paths),
            begun,
            Timestamp(q.device),
        )


def _stacks(weights: list[Tensor]) -> list[list[int]]:
    """Numbers of the weights that are rounded together, in order."""
    parts: list[list[int]] = [[]]
    for i, W in enumerate(weights):
        if parts[-1] and sum(weights[j].numel() for j in parts[-1]) + W.numel() > STACK:
            parts.append([])
        parts[-1].append(i)
    return parts


def _split(grid: QParams, rows: list[int]) -> list[QParams]:
    return [
        QParams(s, z)
        for s, z in zip(torch.split(grid.scale, rows), torch.split(grid.zero, rows), strict=True)
    ]


class _Preparation:
    """A `_Problem` on its way: begun at once, asked for with `finish`."""

    def __init__(self, H: Tensor | None, options: SolveOptions, width: int, device: torch.device) -> None:
        self._H, self._width, self._device = H, width, device
        self._begun = Timestamp(device)
        if H is not None:
            diagonal = H.diagonal()
            self._seen = torch.stack((torch.isfinite(diagonal).logical_not().sum(), (diagonal <= 0).sum()))
            self._factorization = Factorization(H, options.damping, act_order=options.act_order)
        self._ended = Timestamp(device)

    @classmethod
    def of(cls, H: Tensor | None, block: nn.Module, paths: list[str], options: SolveOptions) -> _Preparation:
        """For the input of the linears `paths`."""
        weight = linear_at(block, paths[0]).weight
        return cls(H, options, weight.shape[1], weight.device)

    def finish(self) -> _Problem:
        """Waits for the device."""
        seconds = self._ended.since(self._begun)
        if self._H is None:
            return self._plain("no usable inputs", 0, seconds)
        infinite, dead = self._seen.tolist()
        if infinite:
            return self._plain("second moment is not finite", 0, seconds)
        try:
            factor = self._factorization.finish()
        except NotFactorizable:
            # Not even its diagonal blocks can be trusted: it may be indefinite, or hold NaN.
            return self._plain("second moment cannot be factorized", dead, seconds)
        return _Problem(self._H, factor, factor.damping, dead, None, seconds)

    def _plain(self, why: str, dead: int, seconds: float) -> _Problem:
        H = torch.eye(self._width, device=self._device)
        return _Problem(H, None, 0.0, dead, f"rounded to nearest: {why}", seconds)


@dataclass(slots=True)
class _Problem:
    """One input's second moment made ready: damped `H`, its factor, and why there is none. Owns both matrices."""

    H: Tensor
    factor: Factor | None
    damping: float
    dead: int
    fallback: str | None
    seconds: float  # that it took

    def solve(
        self, W: Tensor, spec: QuantScheme, options: SolveOptions
    ) -> tuple[Tensor, QParams, Tensor | None, Tensor]:
        """Integers, grid, `g_idx` or None, and the de-quantized weight, float32."""
        effort = options.effort
        if self.factor is None:
            grid = search_qparams(W, hessian_blocks(self.H, spec.group_size), spec, effort.search)
            q = round_to_nearest(W, grid, spec)
            return q, grid, None, dequantize(q, grid, spec.group_size)
        if options.dynamic_groups:
            order = self.factor.order
            inner = replace(options, dynamic_groups=False)
            straight = replace(self.factor, order=torch.arange(len(order), device=order.device))
            permuted = _Problem(self.H[order][:, order], straight, self.damping, self.dead, None, 0.0)
            q, grid, _, V = permuted.solve(W[:, order], spec, inner)
            back = torch.argsort(order)
            g_idx = torch.div(back, spec.group_size, rounding_mode="floor").to(torch.int32)
            return q[:, back].contiguous(), grid, g_idx, V[:, back]
        grid = search_qparams(W, hessian_blocks(self.H, spec.group_size), spec, effort.search)
        q = compensate(W, grid, spec, self.factor)
        if effort.sweeps:
            q, grid = descend(W, q, grid, spec, self.H, sweeps=effort.sweeps, refit=effort.refit)
        return q, grid, None, dequantize(q, grid, spec.group_size)
