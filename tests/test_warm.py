"""The rehearsal: it touches every solver, changes nothing, and may fail."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gptq_quantize
from llm_quantize.blockwise import kernel_warmup, loop
from llm_quantize.blockwise.block_solution import AWQ_EFFORT, QUALITY_PRESETS, SolveOptions
from llm_quantize.kernels import cholesky, tiling
from llm_quantize.model.source import Source
from llm_quantize.solver.awq_scales import choose_scales, scale_
from llm_quantize.solver.gptq import Factorization, compensate, descend
from llm_quantize.solver.qparams import hessian_blocks, search_qparams
from seams import everywhere

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def options(**values: Any) -> SolveOptions:
    given: dict[str, Any] = {
        "bits": 4, "group_size": 32, "symmetric": False, "act_order": True, "dynamic_groups": False,
        "damping": 0.05, "effort": QUALITY_PRESETS["default"], "zero_min": 0, "scale_dtypes": (torch.float16,),
        "store": torch.float16,
    }  # fmt: skip
    return SolveOptions(**given | values)


def precision() -> Any:
    settings = torch.backends.cuda.matmul
    return getattr(settings, "fp32_precision" if hasattr(settings, "fp32_precision") else "allow_tf32")


@pytest.mark.parametrize("scales", [True, False])
@pytest.mark.parametrize("group_size", [32, -1])
def test_every_solver_and_nothing_else(
    scales: bool, group_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []

    def spied(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def spy(*args: Any, **more: Any) -> Any:
            called.append(name)
            return function(*args, **more)

        return spy

    for name in ("choose_scales", "scale_", "factorize", "search_qparams", "compensate", "descend"):
        monkeypatch.setattr(kernel_warmup, name, spied(name, getattr(kernel_warmup, name)))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    settings = precision(), torch.is_grad_enabled()
    monkeypatch.setattr(kernel_warmup, "ROWS", (64, 96))
    monkeypatch.setattr(kernel_warmup, "COLUMNS", 80)
    kernel_warmup.warm_up_kernels(options(group_size=group_size), CPU, scales=scales)
    assert torch.equal(torch.rand(3), expected)
    assert (precision(), torch.is_grad_enabled()) == settings
    each = ["search_qparams", "compensate", "descend"]
    assert called == ["factorize", *(["choose_scales", "scale_"] if scales else []), *each, *each]


def specialized(kernel: Any, args: tuple[Any, ...]) -> list[Any]:
    """What Triton compiles a kernel for, of its arguments."""
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
@pytest.mark.parametrize("scales", [True, False])
@pytest.mark.parametrize("size", [32, 128, -1])
def test_it_compiles_what_models_need(
    size: int, scales: bool, halves: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels for linears of other widths, whose groups are not a multiple of 16, are those of the rehearsal."""
    started: set[Any] = set()

    def launch(kernel: Any, grid: Any, *args: Any, warps: int, **constants: Any) -> None:
        name = getattr(kernel, "__name__", None) or kernel.fn.__name__
        started.add((name, *specialized(kernel, args), warps, *constants.items()))

    everywhere(monkeypatch, "launch", launch)
    everywhere(monkeypatch, "on_triton", lambda _: True)
    monkeypatch.setattr(cholesky, "_threefold", lambda a, b: a.numel() * b.shape[1] >= 1 << 21)
    monkeypatch.setattr(cholesky, "PANEL", 128)
    monkeypatch.setattr(tiling, "FEW", 256)
    monkeypatch.setattr(kernel_warmup, "ROWS", (256, 320))
    monkeypatch.setattr(kernel_warmup, "COLUMNS", 640)
    monkeypatch.setattr(kernel_warmup, "factorize", lambda H, *_, **__: kernel_warmup._identity(len(H), CPU))
    given = options(group_size=size, zero_min=1, scale_dtypes=(torch.float16, torch.bfloat16))
    kernel_warmup.warm_up_kernels(given, CPU, scales=scales)
    Factorization(torch.eye(640), 0.1, act_order=True)  # as `factorize` would begin
    rehearsed = started.copy()
    assert len(rehearsed) >= 10 + scales
    started.clear()
    for rows, width in ((384, 384), (128, 1152), (1152, 384)):
        H, W = torch.eye(width), torch.randn(rows, width)
        spec = given.spec(width)
        Factorization(H.clone(), 0.1, act_order=True)
        factor = kernel_warmup._identity(width, CPU)
        if scales:
            choose_scales(W, H, factor, torch.arange(width), width, spec, AWQ_EFFORT)
            scale_(H, factor, torch.ones(width))
        grid = search_qparams(W, hessian_blocks(H, spec.group_size), spec, given.effort.search)
        q = compensate(W, grid, spec, factor)
        descend(W, q, grid, spec, H, sweeps=2, refit=given.effort.refit)
    assert started - rehearsed == set()
    assert halves


def test_on_the_cpu_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_warmup, "warm_up_kernels", lambda *args, **more: pytest.fail("rehearsed"))
    before = threading.active_count()
    with kernel_warmup.KernelWarmup() as warmup:
        warmup.begin(options(), CPU, scales=True)
        assert threading.active_count() == before


@pytest.mark.parametrize("error", [None, RuntimeError("no kernel"), MemoryError()])
def test_it_ends_before_it_is_left(error: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go, ended = threading.Event(), threading.Event(), threading.Event()

    def slow(given: SolveOptions, device: torch.device, *, scales: bool) -> None:
        assert (given, device, scales) == (options(), GPU, True)
        begun.set()
        go.wait()
        ended.set()
        if error is not None:
            raise error

    monkeypatch.setattr(kernel_warmup, "warm_up_kernels", slow)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    with kernel_warmup.KernelWarmup() as warmup:
        warmup.begin(options(), GPU, scales=True)
        assert begun.wait(60)
        assert not ended.is_set()
        go.set()
    assert ended.is_set()


def test_it_begins_before_the_model_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the options of the run itself: what else was compiled would be of no use."""
    order: list[Any] = []
    real = Source.open.__func__  # type: ignore[attr-defined]

    def opened(cls: Any, *args: Any, **more: Any) -> Source:
        source: Source = real(cls, *args, **more)
        order.append("built")
        return source

    monkeypatch.setattr(Source, "open", classmethod(opened))
    monkeypatch.setattr(
        kernel_warmup.KernelWarmup, "begin", lambda _, given, device, scales: order.append((given, scales))
    )
    monkeypatch.setattr(kernel_warmup.KernelWarmup, "end", lambda _: order.append("waited for"))
    taken: list[Any] = []
    real_blocks = loop.quantize_blocks

    def quantized(run: Any, *rest: Any) -> None:
        order.append("blocks")
        taken.append(run.options)
        real_blocks(run, *rest)

    monkeypatch.setattr("llm_quantize.pipeline.quantize_blocks", quantized)
    words = ["--calib_samples", "4", "--calib_seq_len", "64", "--eval_data", "off", "--device", "cpu"]
    assert gptq_quantize.main([*words, "--bits", "3", "--output_path", str(tmp_path / "out")]) == 0
    assert order[:4] == [(taken[0], False), "built", "waited for", "blocks"]
