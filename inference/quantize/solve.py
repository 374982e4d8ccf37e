"""Quantizes the linears of one block from the second moments of their inputs.

The inputs are taken from the last one back to the first, so that a scale which folds into an earlier linear's rows is
known before that linear is rounded.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from awq_search import choose_scales, scale_
from folds import Fold, apply_fold
from gptq_solver import Factor, NotFactorizable, compensate, descend, factorize, output_error
from grid import Grid, GridSpec, SearchEffort, dequantize, metric_blocks, round_to_nearest, search_grid

REPORT_ROWS = 256  # rows of a layer on which its output error is told


@dataclass(frozen=True, slots=True)
class Effort:
    """What `--quality` buys: the scale search, and sweeps of coordinate descent after the rounding."""

    search: SearchEffort
    sweeps: int
    refit: bool


EFFORTS = {
    "fast": Effort(SearchEffort(sweep=16, refits=1), sweeps=0, refit=False),
    "default": Effort(SearchEffort(sweep=24, refits=2), sweeps=2, refit=True),
    "best": Effort(SearchEffort(sweep=48, refits=3), sweeps=8, refit=True),
}
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
    """What happened to one linear. `error`: relative squared output error on the calibration inputs."""

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


@dataclass(slots=True)
class BlockChanges:
    """Parameters other than quantized weights that folds changed, by path in the block."""

    names: set[str] = field(default_factory=set)


def solve_block(
    block: nn.Module,
    name: str,
    groups: list[list[str]],
    moments: list[Tensor | None],
    folds: list[Fold],
    options: SolveOptions,
    changes: BlockChanges,
) -> Iterator[Solved]:
    """Yields every linear quantized, its de-quantized weight already in the block.

    groups: paths that share an input; moments: their `H` (in, in), None where it is unusable; consumed.
    """
    divisors: dict[str, Tensor] = {}
    for index in range(len(groups) - 1, -1, -1):
        paths, H = groups[index], moments[index]
        moments[index] = None
        modules = [_linear(block, path) for path in paths]
        weights = [module.weight.detach().float() for module in modules]
        weights = [
            W / divisors[p][:, None] if p in divisors else W for p, W in zip(paths, weights, strict=True)
        ]
        start = time.perf_counter()
        spec = options.spec(weights[0].shape[1])
        problem = _Problem.prepare(H, options, weights[0].shape[1], weights[0].device)
        del H
        fold = next((f for f in folds if set(f.targets) == set(paths)), None)
        exponent: float | None = None
        if fold is not None and problem.factor is not None:
            source = block.get_submodule(fold.source)
            size = source.out_features if isinstance(source, nn.Linear) else weights[0].shape[1]
            rows = fold.rows.to(weights[0].device)
            chosen = choose_scales(
                torch.cat(weights), problem.H, problem.factor, rows, size, spec, AWQ_EFFORT
            )
            exponent = chosen.exponent
            if exponent > 0:
                folded = apply_fold(block, fold, chosen.scale, options.store)
                changes.names.update(folded.changed)
                if folded.rows is not None:
                    divisors[fold.source] = folded.rows
                scale_(problem.H, problem.factor, folded.channels)
                weights = [W * folded.channels for W in weights]
        shared = (time.perf_counter() - start) / len(paths)
        for path, module, W in zip(paths, modules, weights, strict=True):
            start = time.perf_counter()
            q, grid, g_idx, V = problem.solve(W, spec, options)
            sample = slice(None, None, max(1, W.shape[0] // REPORT_ROWS))
            error = output_error(W[sample], V[sample], problem.H)
            module.weight.copy_(V.to(module.weight.dtype))
            report = LayerReport(
                f"{name}.{path}",
                error,
                problem.damping,
                problem.dead,
                exponent,
                problem.fallback,
                shared + time.perf_counter() - start,
            )
            yield Solved(path, q, grid, g_idx, report)


def _linear(block: nn.Module, path: str) -> nn.Linear:
    module = block.get_submodule(path)
    assert isinstance(module, nn.Linear)
    return module


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
