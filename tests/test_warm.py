"""The rehearsal: it touches every solver, changes nothing, and may fail."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import warm
from solve import EFFORTS, SolveOptions

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
SHAPES = [(96, 64), (40, 64), (9001, 64), (18944, 64)]


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


def test_small_ones_stand_for_large_ones() -> None:
    stand = warm.representatives(SHAPES)
    assert stand == [40, 96, 8192, 8192 + 9001 % 16]
    assert {out % 16 == 0 for out in stand} == {out % 16 == 0 for out, _ in SHAPES}


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
    warm.rehearse(options(group_size=group_size), [(64, 80), (96, 72)], CPU, scales=scales)
    assert torch.equal(torch.rand(3), expected)
    assert (precision(), torch.is_grad_enabled()) == settings
    each = [*(["choose_scales"] if scales else []), "search_grid", "compensate", "descend"]
    assert called == ["factorize", *each, *each]


def test_on_the_cpu_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "rehearse", lambda *args, **more: pytest.fail("rehearsed"))
    before = threading.active_count()
    with warm.Rehearsal(options(), SHAPES, CPU, scales=True):
        assert threading.active_count() == before


@pytest.mark.parametrize("error", [None, RuntimeError("no kernel"), MemoryError()])
def test_it_ends_before_it_is_left(error: Exception | None, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go, ended = threading.Event(), threading.Event(), threading.Event()

    def slow(
        given: SolveOptions, shapes: list[tuple[int, int]], device: torch.device, *, scales: bool
    ) -> None:
        assert (given, shapes, device, scales) == (options(), SHAPES, GPU, True)
        begun.set()
        go.wait()
        ended.set()
        if error is not None:
            raise error

    monkeypatch.setattr(warm, "rehearse", slow)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    with warm.Rehearsal(options(), SHAPES, GPU, scales=True):
        assert begun.wait(60)
        assert not ended.is_set()
        go.set()
    assert ended.is_set()
