"""The solvers rehearsed on a small problem, in the background, while the model is opened and the text is read.

The first use of a GPU costs seconds that have nothing to do with the model: its context, the libraries' handles, the
compilation of Triton kernels. A rehearsal changes no result and no setting, draws no random number that others would
have drawn, and may fail without a word. It must have ended before the device is used for anything else: the solvers
set the precision of products for the whole process while they run.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from llm_quantize.blockwise.block_solution import AWQ_EFFORT, SolveOptions
from llm_quantize.kernels import cholesky
from llm_quantize.kernels.launcher import compile_together
from llm_quantize.kernels.tiling import FEW
from llm_quantize.solver.awq_scales import choose_scales, scale_
from llm_quantize.solver.gptq import Factor, Factorization, compensate, descend, factorize
from llm_quantize.solver.qparams import QuantScheme, hessian_blocks, search_qparams

# Of the weights: others use the same kernels as these.
ROWS, COLUMNS = (FEW, FEW + 2048), cholesky.WHOLE + cholesky.PANEL


@torch.no_grad()
def warm_up_kernels(options: SolveOptions, device: torch.device, *, scales: bool) -> None:
    """Solves a linear that is not large. scales: channel scales are searched too."""
    size = options.group_size
    width = COLUMNS if size == -1 else max(size, COLUMNS // size * size)
    spec = options.spec(width)
    generator = torch.Generator(device).manual_seed(0)
    tokens = torch.randn(2 * width, width, generator=generator, device=device)
    H = tokens.T @ tokens / len(tokens)
    del tokens
    solve = partial(_solve, H, spec, options, generator, scales)

    def begin() -> None:
        Factorization(H.clone(), options.damping, act_order=options.act_order)
        solve(_identity(width, device))

    if device.type == "cuda":
        compile_together(begin, device)
    solve(factorize(H, options.damping, act_order=options.act_order))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def _solve(
    H: Tensor,
    spec: QuantScheme,
    options: SolveOptions,
    generator: torch.Generator,
    scales: bool,
    factor: Factor,
) -> None:
    """All that follows a factorization."""
    width = len(H)
    ones = torch.ones(width, device=H.device)
    for rows in ROWS:
        W = torch.randn(rows, width, generator=generator, device=H.device)
        if scales and rows == ROWS[0]:
            choose_scales(W, H, factor, torch.arange(width, device=H.device), width, spec, AWQ_EFFORT)
            scale_(H, factor, ones)
        grid = search_qparams(W, hessian_blocks(H, spec.group_size), spec, options.effort.search)
        q = compensate(W, grid, spec, factor)
        descend(W, q, grid, spec, H, sweeps=1, refit=options.effort.refit)


def _identity(width: int, device: torch.device) -> Factor:
    """A factor laid out as `factorize` does it."""
    blocks = [
        torch.eye(min(cholesky.PANEL, width - a), device=device) for a in range(0, width, cholesky.PANEL)
    ]
    order = torch.arange(width, device=device)
    return Factor(torch.eye(width, device=device), blocks, order, torch.ones(width, device=device), 0.0)


class KernelWarmup:
    """A rehearsal in a thread, from `begin` to `end`; context manager, which is left when it is over.

    On the CPU there is nothing to rehearse, and no thread.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def begin(self, options: SolveOptions, device: torch.device, *, scales: bool) -> None:
        """As `rehearse`; returns at once."""
        if device.type == "cuda":
            self._thread = threading.Thread(
                target=self._run, args=(options, device, scales), name="rehearsal", daemon=True
            )
            self._thread.start()

    def _run(self, options: SolveOptions, device: torch.device, scales: bool) -> None:
        with suppress(Exception), torch.cuda.device(device):  # what fails here fails again where it matters
            warm_up_kernels(options, device, scales=scales)

    def end(self) -> None:
        """Waits for it: a process that ends in the middle of a compilation may crash."""
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()
