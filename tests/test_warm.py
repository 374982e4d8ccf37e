"""The rehearsal: it touches every solver, changes nothing, and may fail."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

import blocks
import gptq_quantize
import warm
from solve import EFFORTS, SolveOptions
from source import Source

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def options(**values: Any) -> SolveOptions:
    given: dict[str, Any] = {
        "bits": 4, "group_size": 32, "symmetric": False, "act_order": True, "dynamic_groups": False,
        "damping": 0.05, "effort": EFFORTS["default"], "zero_min": 0, "scale_dtypes": (torch.float16,),
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

    for name in ("choose_scales", "factorize", "search_grid", "compensate", "descend"):
        monkeypatch.setattr(warm, name, spied(name, getattr(warm, name)))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    settings = precision(), torch.is_grad_enabled()
    monkeypatch.setattr(warm, "ROWS", (64, 96))
    monkeypatch.setattr(warm, "COLUMNS", 80)
    warm.rehearse(options(group_size=group_size), CPU, scales=scales)
    assert torch.equal(torch.rand(3), expected)
    assert (precision(), torch.is_grad_enabled()) == settings
    each = [*(["choose_scales"] if scales else []), "search_grid", "compensate", "descend"]
    assert called == ["factorize", *each, *each]


def test_on_the_cpu_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "rehearse", lambda *args, **more: pytest.fail("rehearsed"))
    before = threading.active_count()
    with warm.Rehearsal() as rehearsal:
        rehearsal.begin(options(), CPU, scales=True)
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

    monkeypatch.setattr(warm, "rehearse", slow)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    with warm.Rehearsal() as rehearsal:
        rehearsal.begin(options(), GPU, scales=True)
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
        warm.Rehearsal, "begin", lambda _, given, device, scales: order.append((given, scales))
    )
    monkeypatch.setattr(warm.Rehearsal, "end", lambda _: order.append("waited for"))
    taken: list[Any] = []
    real_blocks = blocks.quantize_blocks

    def quantized(run: Any, *rest: Any) -> None:
        order.append("blocks")
        taken.append(run.options)
        real_blocks(run, *rest)

    monkeypatch.setattr("pipeline.quantize_blocks", quantized)
    words = ["--calib_samples", "4", "--calib_seq_len", "64", "--eval_data", "off", "--device", "cpu"]
    assert gptq_quantize.main([*words, "--bits", "3", "--output_path", str(tmp_path / "out")]) == 0
    assert order[:4] == [(taken[0], False), "built", "waited for", "blocks"]
