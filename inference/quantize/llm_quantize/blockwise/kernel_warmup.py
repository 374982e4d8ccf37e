"""The solver run on a small problem, in the background, while the model is opened and the text is read.

The first use of a GPU costs seconds that have nothing to do with the model: its context, the libraries' handles, the
compilation of Triton kernels. A warm-up changes no result and no setting, draws no random number that others would
have drawn, and may fail without a word.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

import torch

from llm_quantize.device import Device
from llm_quantize.kernels import cholesky
from llm_quantize.kernels.launcher import compile_together
from llm_quantize.kernels.tiling import FEW
from llm_quantize.solver.base import Solver
from llm_quantize.solver.factorization import Factor
from llm_quantize.solver.problem import Problem

# Of the weights: others use the same kernels as these.
ROWS, COLUMNS = (FEW, FEW + 2048), cholesky.WHOLE + cholesky.PANEL


@torch.no_grad()
def warm_up_kernels(solver: Solver, device: torch.device) -> None:
    """Solve a linear that is not large, as `solver` does."""
    size = solver.scheme.group_width(COLUMNS)
    width = max(size, COLUMNS // size * size)
    generator = torch.Generator(device).manual_seed(0)
    tokens = torch.randn(2 * width, width, generator=generator, device=device)
    H = tokens.T @ tokens / len(tokens)
    del tokens

    def begin() -> None:
        solver.prepare(H.clone(), width, device)
        _solve(solver, Problem(H, _identity(width, device), 0.0, 0, None, 0.0), generator)

    if device.type == "cuda":
        compile_together(begin, device)
    _solve(solver, solver.prepare(H, width, device).finish(), generator)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def _solve(solver: Solver, problem: Problem, generator: torch.Generator) -> None:
    """All that follows a factorization."""
    H, width = problem.H, len(problem.H)
    for rows in ROWS:
        W = torch.randn(rows, width, generator=generator, device=H.device)
        if solver.uses_mappings and rows == ROWS[0]:
            channels = torch.arange(width, device=H.device)
            solver.choose_scales(W, problem, channels, width)
            problem.scale_inputs_(torch.ones(width, device=H.device))
        solver.quantize(W, problem)


def _identity(width: int, device: torch.device) -> Factor:
    """A factor laid out as the factorization does it."""
    panel = cholesky.PANEL
    blocks = [torch.eye(min(panel, width - a), device=device) for a in range(0, width, panel)]
    order = torch.arange(width, device=device)
    return Factor(torch.eye(width, device=device), blocks, order, torch.ones(width, device=device), 0.0)


class KernelWarmup:
    """A warm-up in a thread, from `start` to `join`. A context manager, which ends when the thread has ended.

    On the CPU there is nothing to warm up, and no thread.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def start(self, solver: Solver, device: Device) -> None:
        """Begin as `warm_up_kernels`; returns at once."""
        if device.is_gpu:
            self._thread = threading.Thread(
                target=self._run, args=(solver, device.torch), name="kernel-warmup", daemon=True
            )
            self._thread.start()

    def _run(self, solver: Solver, device: torch.device) -> None:
        with suppress(Exception), torch.cuda.device(device):  # what fails here fails again where it matters
            warm_up_kernels(solver, device)

    def join(self) -> None:
        """Wait for it: a process that ends in the middle of a compilation may crash."""
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.join()
