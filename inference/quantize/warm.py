"""The solvers rehearsed on small problems, in the background, while the calibration text is read.

The first use of a GPU costs seconds that have nothing to do with the model: its context, the libraries' handles, the
compilation of Triton kernels. A rehearsal changes no result and no setting, draws no random number that others would
have drawn, and may fail without a word. It must have ended before the device is used for anything else: the solvers
set the precision of products for the whole process while they run.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import Self

import torch

from awq_search import choose_scales
from gptq_solver import compensate, descend, factorize
from grid import metric_blocks, search_grid
from solve import AWQ_EFFORT, SolveOptions

LARGE = 8192  # rows of a linear from which on more rows behave as these do
WIDE = 4096  # the same of columns


def representatives(shapes: Iterable[tuple[int, int]]) -> list[int]:
    """Rows (out) of small linears that stand for linears (out, in): the same kernels are compiled for them.

    Triton compiles anew for rows that are no multiple of 16.
    """
    return sorted({out if out < LARGE else LARGE + out % 16 for out, _ in shapes})


@torch.no_grad()
def rehearse(
    options: SolveOptions, shapes: Iterable[tuple[int, int]], device: torch.device, *, scales: bool
) -> None:
    """Solves a linear, not large, for each kind among `shapes`, (out, in). scales: channel scales are searched too."""
    shapes = list(shapes)
    size, widest = options.group_size, min(WIDE, max(width for _, width in shapes))
    width = widest if size == -1 else max(size, widest // size * size)
    spec = options.spec(width)
    generator = torch.Generator(device).manual_seed(0)
    tokens = torch.randn(2 * width, width, generator=generator, device=device)
    H = tokens.T @ tokens / len(tokens)
    del tokens
    factor = factorize(H, options.damping, act_order=options.act_order)
    rows = torch.arange(width, device=device)
    for out in representatives(shapes):
        W = torch.randn(out, width, generator=generator, device=device)
        if scales:
            choose_scales(W, H, factor, rows, width, spec, AWQ_EFFORT)
        grid = search_grid(W, metric_blocks(H, spec.group_size), spec, options.effort.search)
        q = compensate(W, grid, spec, factor)
        descend(W, q, grid, spec, H, sweeps=1, refit=options.effort.refit)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


class Rehearsal:
    """A rehearsal in a thread; context manager, which is left when it is over.

    On the CPU there is nothing to rehearse, and no thread.
    """

    def __init__(
        self, options: SolveOptions, shapes: Iterable[tuple[int, int]], device: torch.device, *, scales: bool
    ) -> None:
        self._shapes = list(shapes)
        self._thread: threading.Thread | None = None
        if device.type == "cuda":
            self._thread = threading.Thread(
                target=self._run, args=(options, device, scales), name="rehearsal", daemon=True
            )

    def _run(self, options: SolveOptions, device: torch.device, scales: bool) -> None:
        with suppress(Exception), torch.cuda.device(device):  # what fails here fails again where it matters
            rehearse(options, self._shapes, device, scales=scales)

    def __enter__(self) -> Self:
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._thread.join()  # a process that ends in the middle of a compilation may crash
