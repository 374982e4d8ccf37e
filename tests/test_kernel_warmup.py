"""The kernel warm-up: it compiles what a run needs, changes no result and no setting, and may fail."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gptq_quantize
from llm_quantize.blockwise import kernel_warmup, loop
from llm_quantize.device import Device
from llm_quantize.kernels import cholesky, tiling
from llm_quantize.model.source import SourceModel
from llm_quantize.solver import awq, problem
from llm_quantize.solver.awq import AWQSolver
from llm_quantize.solver.base import Solver
from llm_quantize.solver.factorization import Factor, Factorization
from llm_quantize.solver.gptq import GPTQSolver
from llm_quantize.solver.problem import Problem
from llm_quantize.solver.quality import PRESETS
from llm_quantize.types import QuantScheme
from models import CPU
from seams import everywhere

GPU = torch.device("cuda", 0)


def make_solver(*, mappings: bool, group_size: int = 32, **scheme: Any) -> Solver:
    asked = QuantScheme(4, group_size, False, **scheme)
    if mappings:
        return AWQSolver(asked, PRESETS["default"])
    return GPTQSolver(asked, PRESETS["default"], damping=0.05)


def precision() -> Any:
    settings = torch.backends.cuda.matmul
    return getattr(settings, "fp32_precision" if hasattr(settings, "fp32_precision") else "allow_tf32")


@pytest.mark.parametrize("mappings", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
def test_it_takes_every_step_of_a_solver_and_changes_nothing(
    mappings: bool, group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []

    def spy_on(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def spied(*args: Any, **more: Any) -> Any:
            called.append(name)
            return function(*args, **more)

        monkeypatch.setattr(owner, name, spied)

    spy_on(awq, "choose_scales")
    spy_on(Problem, "scale_inputs_")
    for name in ("Factorization", "search_qparams", "compensate", "descend"):
        spy_on(problem, name)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    settings = precision(), torch.is_grad_enabled()
    monkeypatch.setattr(kernel_warmup, "ROWS", (64, 96))
    monkeypatch.setattr(kernel_warmup, "COLUMNS", 80)
    kernel_warmup.warm_up_kernels(make_solver(mappings=mappings, group_size=group_size), CPU)
    assert torch.equal(torch.rand(3), expected)
    assert (precision(), torch.is_grad_enabled()) == settings
    each = ["search_qparams", "compensate", "descend"]
    scaling = ["choose_scales", "scale_inputs_"] if mappings else []
    assert called == ["Factorization", *scaling, *each, *each]


def specialized(kernel: Any, args: tuple[Any, ...]) -> list[Any]:
    """What Triton compiles a kernel anew for: dtypes, alignments and divisibility of its arguments."""
    names = kernel.arg_names if hasattr(kernel, "arg_names") else list(signature(kernel.fn).parameters)
    loose = {names[i] for i, p in enumerate(getattr(kernel, "params", [])) if p.do_not_specialize}
    return [
        (arg.dtype, arg.data_ptr() % 16)
        if isinstance(arg, Tensor)
        else (name not in loose and (arg == 1, arg % 16), arg >> 31)
        if isinstance(arg, int)
        else float
        for name, arg in zip(names, args, strict=False)
    ]


@pytest.mark.skipif(find_spec("triton") is None, reason="no build for this platform")
@pytest.mark.parametrize("mappings", [True, False])
@pytest.mark.parametrize("size", [32, 128, -1])
def test_it_compiles_what_models_need(
    size: int, mappings: bool, halves: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linears of other widths, with groups that are no multiple of 16, need no kernel that it has not compiled."""
    started: set[Any] = set()

    def launch(kernel: Any, grid: Any, *args: Any, warps: int, **constants: Any) -> None:
        name = getattr(kernel, "__name__", None) or kernel.fn.__name__
        started.add((name, *specialized(kernel, args), warps, *constants.items()))

    def identity(self: Factorization) -> Factor:
        return kernel_warmup._identity(len(self._H), CPU)  # no kernel has computed a factor

    everywhere(monkeypatch, "launch", launch)
    everywhere(monkeypatch, "on_triton", lambda _: True)
    monkeypatch.setattr(cholesky, "_threefold", lambda a, b: a.numel() * b.shape[1] >= 1 << 21)
    monkeypatch.setattr(cholesky, "PANEL", 128)
    monkeypatch.setattr(tiling, "FEW", 256)
    monkeypatch.setattr(kernel_warmup, "ROWS", (256, 320))
    monkeypatch.setattr(kernel_warmup, "COLUMNS", 640)
    monkeypatch.setattr(Factorization, "finish", identity)
    dtypes = (torch.float16, torch.bfloat16)
    solver = make_solver(mappings=mappings, group_size=size, zero_min=1, scale_dtypes=dtypes)
    kernel_warmup.warm_up_kernels(solver, CPU)
    compiled = started.copy()
    assert len(compiled) >= 10 + mappings
    started.clear()
    for rows, width in ((384, 384), (128, 1152), (1152, 384)):
        W = torch.randn(rows, width)
        ready = solver.prepare(torch.eye(width), width, CPU).finish()
        if mappings:
            solver.choose_scales(W, ready, torch.arange(width), width)
            ready.scale_inputs_(torch.ones(width))
        solver.quantize(W, ready)
    assert started
    assert started - compiled == set()
    assert halves


def test_on_the_cpu_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_warmup, "warm_up_kernels", lambda *args: pytest.fail("it was run"))
    before = threading.active_count()
    with kernel_warmup.KernelWarmup() as warmup:
        warmup.start(make_solver(mappings=True), Device(CPU))
        assert threading.active_count() == before


@pytest.mark.parametrize("error", [None, RuntimeError("no kernel"), MemoryError()])
def test_the_context_ends_after_the_thread(error: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go, ended = threading.Event(), threading.Event(), threading.Event()

    def slow(solver: Solver, device: torch.device) -> None:
        assert (solver, device) == (make_solver(mappings=True), GPU)
        begun.set()
        go.wait()
        ended.set()
        if error is not None:
            raise error

    monkeypatch.setattr(kernel_warmup, "warm_up_kernels", slow)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    with kernel_warmup.KernelWarmup() as warmup:
        warmup.start(make_solver(mappings=True), Device(GPU))
        assert begun.wait(60)
        assert not ended.is_set()
        go.set()
    assert ended.is_set()


def test_it_starts_before_the_model_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is given the run's own solver, for one sweep: with another one it would compile other kernels."""
    order: list[Any] = []
    real_open = SourceModel.open.__func__  # type: ignore[attr-defined]

    def opened(cls: Any, *args: Any, **more: Any) -> SourceModel:
        model: SourceModel = real_open(cls, *args, **more)
        order.append("built")
        return model

    monkeypatch.setattr(SourceModel, "open", classmethod(opened))
    monkeypatch.setattr(
        kernel_warmup.KernelWarmup, "start", lambda _, solver, device: order.append((solver, device.torch))
    )
    monkeypatch.setattr(kernel_warmup.KernelWarmup, "join", lambda _: order.append("joined"))
    taken: list[Solver] = []
    real_blocks = loop.quantize_blocks

    def quantized(context: Any, *rest: Any) -> None:
        order.append("blocks")
        taken.append(context.solver)
        real_blocks(context, *rest)

    monkeypatch.setattr("llm_quantize.pipeline.quantize_blocks", quantized)
    words = ["--calib_samples", "4", "--calib_seq_len", "64", "--eval_data", "off", "--device", "cpu"]
    assert gptq_quantize.main([*words, "--bits", "3", "--output_path", str(tmp_path / "out")]) == 0
    assert isinstance(taken[0], GPTQSolver)
    assert taken[0].preset.sweeps == 2
    one_sweep = replace(taken[0], preset=replace(taken[0].preset, sweeps=1))
    assert order[:4] == [(one_sweep, CPU), "built", "joined", "blocks"]
    assert not taken[0].uses_mappings
