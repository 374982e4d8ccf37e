"""Quantizes the linears of one block from the second moments of their inputs.

The inputs are taken in the order in which the block computes, so that each linear can be rounded for what its
predecessors, quantized, make of its inputs. With channel scales they are taken from the last one back to the first: a
scale which folds into an earlier linear's rows must be known before that linear is rounded. Where the source is
followed, that goes for the scales alone, and the rounding goes forward.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from awq_search import ChannelScales, choose_scales, scale_
from capture import linear_at
from folds import Fold, apply_fold, sources
from follow import Drift, Follower
from gptq_solver import Factor, NotFactorizable, aim, compensate, descend, factorize, output_error
from grid import Grid, GridSpec, SearchEffort, dequantize, metric_blocks, round_to_nearest, search_grid

STACK = 1 << 28  # weights that are rounded together at most
REPORT_ROWS = 256  # rows of a layer on which its output error is told


@dataclass(frozen=True, slots=True)
class Effort:
    """What `--quality` buys: the scale search, sweeps of coordinate descent after the rounding, and `follow`: the share
    of the windows on which each linear learns what its predecessors' quantization made of its inputs, and aims at what
    the source's would give."""

    search: SearchEffort
    sweeps: int
    refit: bool
    follow: float = 0.0

    def followed(self, windows: int, length: int) -> int:
        """How many of `windows` of `length` tokens: the share, and never too few to tell drift from noise."""
        return min(windows, max(math.ceil(self.follow * windows), -(-ENOUGH // length))) if self.follow else 0


ENOUGH = 1 << 18  # tokens
EFFORTS = {
    "fast": Effort(SearchEffort(sweep=16, refits=1), sweeps=0, refit=False),
    "default": Effort(SearchEffort(sweep=24, refits=2), sweeps=2, refit=True),
    "best": Effort(SearchEffort(sweep=48, refits=3), sweeps=8, refit=True, follow=1.0),
}
FEW_BITS, SOME = 3, 0.25  # up to so many bits "default" follows too, on so many of the windows


def effort(quality: str, bits: int) -> Effort:
    """What `--quality` means at so many bits: where each costs much accuracy, following pays by default."""
    found = EFFORTS[quality]
    return replace(found, follow=SOME) if quality == "default" and bits <= FEW_BITS else found


AIM = 0.75  # of the way to the source's outputs: the rest would follow the noise of the calibration tokens
AWQ_EFFORT = SearchEffort(sweep=8, refits=1)  # enough to tell candidates apart


@dataclass(frozen=True, slots=True)
class SolveOptions:
    """How linears are rounded. `group_size` -1: the whole row. `store`: the dtype that norms are saved in."""

    bits: int
    group_size: int
    symmetric: bool
    act_order: bool
    dynamic_groups: bool
    damping: float
    effort: Effort
    zero_min: int
    scale_dtypes: tuple[torch.dtype, ...]
    store: torch.dtype

    def spec(self, width: int) -> GridSpec:
        size = width if self.group_size == -1 else self.group_size
        return GridSpec(self.bits, size, self.symmetric, self.zero_min, self.scale_dtypes)


@dataclass(slots=True)
class LayerReport:
    """What happened to one linear. `error`: relative squared output error of its rounding on calibration inputs."""

    name: str
    error: float
    damping: float
    dead: int
    exponent: float | None
    fallback: str | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Solved:
    """One linear: integers uint8 (out, in), their grid, and `g_idx` (in) where groups follow activation order."""

    path: str
    q: Tensor
    grid: Grid
    g_idx: Tensor | None
    report: LayerReport


Moments = Callable[[int], Tensor | None]


@dataclass(slots=True)
class BlockChanges:
    """Parameters other than quantized weights that folds changed, by path in the block."""

    names: set[str] = field(default_factory=set)


def solve_block(
    block: nn.Module,
    name: str,
    groups: list[list[str]],
    moments: Moments,
    folds: list[Fold],
    options: SolveOptions,
    changes: BlockChanges,
    follower: Follower | None = None,
) -> Iterator[Solved]:
    """Yields every linear quantized, its de-quantized weight already in the block.

    groups: paths that share an input, in the order in which the block computes; moments: gives `H` (in, in) of one
    group, which is used up, or None where it is unusable; asked for once each, with `folds` from the last group to
    the first and in order without, when all groups before it are in the block. With a `follower` the linears aim at
    what the source would give, and moments serve only the folds.
    """
    if follower is not None:
        yield from _solve_following(block, name, groups, moments, folds, options, changes, follower)
        return
    divisors: dict[str, Tensor] = {}
    for index in reversed(range(len(groups))) if folds else range(len(groups)):
        paths, H = groups[index], moments(index)
        weights = [linear_at(block, path).weight.detach().float() for path in paths]
        weights = [
            W / divisors[p][:, None] if p in divisors else W for p, W in zip(paths, weights, strict=True)
        ]
        start = time.perf_counter()
        problem = _Problem.prepare(H, options, weights[0].shape[1], weights[0].device)
        del H
        fold = next((f for f in folds if set(f.targets) == set(paths)), None)
        exponent: float | None = None
        if fold is not None and problem.factor is not None:
            chosen = _choose(block, fold, weights, problem, options)
            exponent = chosen.exponent
            if exponent > 0:
                folded = apply_fold(block, fold, chosen.scale, options.store)
                changes.names.update(folded.changed)
                if folded.rows is not None:
                    divisors[fold.source] = folded.rows
                scale_(problem.H, problem.factor, folded.channels)
                weights = [W * folded.channels for W in weights]
        yield from _round(block, name, paths, weights, problem, options, exponent, start)
        del problem, weights  # before the next group's moment takes their place


def _solve_following(
    block: nn.Module,
    name: str,
    groups: list[list[str]],
    moments: Moments,
    folds: list[Fold],
    options: SolveOptions,
    changes: BlockChanges,
    follower: Follower,
) -> Iterator[Solved]:
    """First all channel scales, from the last input back to the first, then the rounding in order."""
    scales = {path: _Scaling() for paths in groups for path in paths}
    exponents: dict[str, float] = {}
    for index in reversed(range(len(groups))):
        paths = groups[index]
        fold = next((f for f in folds if set(f.targets) == set(paths)), None)
        H = None if fold is None else moments(index)
        if fold is None or H is None:
            continue
        weights = [scales[path].apply(follower.weight(path)) for path in paths]
        problem = _Problem.prepare(H, options, weights[0].shape[1], weights[0].device)
        del H
        if problem.factor is None:
            continue
        chosen = _choose(block, fold, weights, problem, options)
        exponents |= dict.fromkeys(paths, chosen.exponent)
        if chosen.exponent > 0:
            folded = apply_fold(block, fold, chosen.scale, options.store)
            changes.names.update(folded.changed)
            if folded.rows is not None:
                scales[fold.source].rows = folded.rows
            for path in paths:
                scales[path].channels = folded.channels
    for path, scaling in scales.items():
        weight = linear_at(block, path).weight
        weight.copy_(scaling.apply(follower.weight(path)).to(weight.dtype))
    for index, paths in enumerate(groups):
        drift = follower.drift(index, scales[paths[0]].channels)
        start = time.perf_counter()
        width = linear_at(block, paths[0]).in_features
        problem = _Problem.prepare(None if drift is None else drift.H, options, width, follower.device)
        weights = [scales[path].apply(follower.weight(path)) for path in paths]
        if drift is not None and problem.factor is not None:
            weights = [aim(W, _missed(W, drift), problem.factor) for W in weights]
        del drift
        yield from _round(block, name, paths, weights, problem, options, exponents.get(paths[0]), start)
        del problem, weights


@dataclass(slots=True)
class _Scaling:
    """What folds do to a linear's weight: its input channels are multiplied, its rows divided."""

    channels: Tensor | None = None
    rows: Tensor | None = None

    def apply(self, W: Tensor) -> Tensor:
        W = W if self.rows is None else W / self.rows[:, None]
        return W if self.channels is None else W * self.channels


def _missed(W: Tensor, drift: Drift) -> Tensor:
    """How what `W` makes of the inputs, and the stream it is added to, lag behind the source: e x^T, (out, in)."""
    missed = W @ drift.inputs
    return AIM * (missed if drift.stream is None else missed + drift.stream)


def _choose(
    block: nn.Module, fold: Fold, weights: list[Tensor], problem: _Problem, options: SolveOptions
) -> ChannelScales:
    assert problem.factor is not None
    rows, spec = fold.rows.to(weights[0].device), options.spec(weights[0].shape[1])
    return choose_scales(
        torch.cat(weights), problem.H, problem.factor, rows, sources(block, fold), spec, AWQ_EFFORT
    )


def _round(
    block: nn.Module,
    name: str,
    paths: list[str],
    weights: list[Tensor],
    problem: _Problem,
    options: SolveOptions,
    exponent: float | None,
    start: float,
) -> Iterator[Solved]:
    """Rounds the linears of one input and puts what the file will hold into the block; `weights` are used up.

    They are rounded as rows of one matrix where that is not too large: a column takes as long for few rows as for many.
    `start`: when the work on them began.
    """
    seconds = (time.perf_counter() - start) / len(paths)
    for part in _stacks(weights):
        start = time.perf_counter()
        rows = [weights[i].shape[0] for i in part]
        W = torch.cat([weights[i] for i in part]) if len(part) > 1 else weights[part[0]]
        for i in part:
            weights[i] = W.new_empty(0)
        q, grid, g_idx, V = problem.solve(W, options.spec(W.shape[1]), options)
        solved = []
        pieces = zip(
            torch.split(W, rows), torch.split(V, rows), torch.split(q, rows), _split(grid, rows), strict=True
        )
        for i, (W_one, V_one, q_one, grid_one) in zip(part, pieces, strict=True):
            sample = slice(None, None, max(1, W_one.shape[0] // REPORT_ROWS))
            error = output_error(W_one[sample], V_one[sample], problem.H)
            weight = linear_at(block, paths[i]).weight
            weight.copy_(V_one.to(weight.dtype))
            report = LayerReport(
                f"{name}.{paths[i]}",
                error,
                problem.damping,
                problem.dead,
                exponent,
                problem.fallback,
                seconds,
            )
            solved.append(Solved(paths[i], q_one, grid_one, g_idx, report))
        del W, V
        for one in solved:
            one.report.seconds += (time.perf_counter() - start) / len(part)
        yield from solved


def _stacks(weights: list[Tensor]) -> list[list[int]]:
    """Numbers of the weights that are rounded together, in order."""
    parts: list[list[int]] = [[]]
    for i, W in enumerate(weights):
        if parts[-1] and sum(weights[j].numel() for j in parts[-1]) + W.numel() > STACK:
            parts.append([])
        parts[-1].append(i)
    return parts


def _split(grid: Grid, rows: list[int]) -> list[Grid]:
    return [
        Grid(s, z) for s, z in zip(torch.split(grid.scale, rows), torch.split(grid.zero, rows), strict=True)
    ]


@dataclass(slots=True)
class _Problem:
    """One input's second moment made ready: damped `H`, its factor, and why there is none. Owns both matrices."""

    H: Tensor
    factor: Factor | None
    damping: float
    dead: int
    fallback: str | None

    @classmethod
    def prepare(cls, H: Tensor | None, options: SolveOptions, width: int, device: torch.device) -> _Problem:
        if H is None:
            return cls(torch.eye(width, device=device), None, 0.0, 0, "rounded to nearest: no usable inputs")
        if not bool(torch.isfinite(H.diagonal()).all()):
            plain = torch.eye(width, device=device)
            return cls(plain, None, 0.0, 0, "rounded to nearest: second moment is not finite")
        dead = int((H.diagonal() <= 0).sum())
        try:
            factor = factorize(H, options.damping, act_order=options.act_order)
        except NotFactorizable:
            # Not even its diagonal blocks can be trusted: it may be indefinite, or hold NaN.
            plain = torch.eye(width, device=device)
            return cls(plain, None, 0.0, dead, "rounded to nearest: second moment cannot be factorized")
        return cls(H, factor, factor.damping, dead, None)

    def solve(
        self, W: Tensor, spec: GridSpec, options: SolveOptions
    ) -> tuple[Tensor, Grid, Tensor | None, Tensor]:
        """Integers, grid, `g_idx` or None, and the de-quantized weight, float32."""
        effort = options.effort
        if self.factor is None:
            grid = search_grid(W, metric_blocks(self.H, spec.group_size), spec, effort.search)
            q = round_to_nearest(W, grid, spec)
            return q, grid, None, dequantize(q, grid, spec.group_size)
        if options.dynamic_groups:
            order = self.factor.order
            inner = replace(options, dynamic_groups=False)
            straight = Factor(
                self.factor.R, torch.arange(len(order), device=order.device), self.factor.damping
            )
            permuted = _Problem(self.H[order][:, order], straight, self.damping, self.dead, None)
            q, grid, _, V = permuted.solve(W[:, order], spec, inner)
            back = torch.argsort(order)
            g_idx = torch.div(back, spec.group_size, rounding_mode="floor").to(torch.int32)
            return q[:, back].contiguous(), grid, g_idx, V[:, back]
        grid = search_grid(W, metric_blocks(self.H, spec.group_size), spec, effort.search)
        q = compensate(W, grid, spec, self.factor)
        if effort.sweeps:
            q, grid = descend(W, q, grid, spec, self.H, sweeps=effort.sweeps, refit=effort.refit)
        return q, grid, None, dequantize(q, grid, spec.group_size)
