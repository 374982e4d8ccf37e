"""Suspended forward passes: what they hand over, with little and much memory, and what they give up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import Opened
from llm_quantize.device import Device
from llm_quantize.errors import WorkError
from llm_quantize.model.block_forward import MicroBatch, distinct_inputs, forward, linear_at
from llm_quantize.model.model_forward import embed
from llm_quantize.model.source import SourceModel
from llm_quantize.model.states import States
from llm_quantize.model.suspended_forward import SuspendedForwards, resume_together, suspension_budget
from models import CPU, FAMILIES


def groups_of(found: Opened) -> list[list[str]]:
    return distinct_inputs(found.model.modules[0], found.states, found.kwargs)


def batch_of(states: States, windows: int, device: torch.device = CPU) -> MicroBatch:
    """Micro-batches of so many windows."""
    return MicroBatch(Device(device), states.length, 1, tokens=windows * states.length)


def suspended_forwards(found: Opened, budget: float, windows: int = 2, **more: Any) -> SuspendedForwards:
    stops = [paths[0] for paths in groups_of(found)]
    batch = batch_of(found.states, windows)
    return SuspendedForwards(found.model.modules[0], found.states, found.kwargs, stops, batch, budget, **more)


def whole(found: Opened, path: str | None) -> Tensor:
    """What a forward pass over each micro-batch of two windows feeds a module; None: what it returns."""
    block: nn.Module = found.model.modules[0]
    seen: list[Tensor] = []
    handle = None
    if path is not None:
        handle = block.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    states = found.states
    with torch.no_grad():
        out = [forward(block, states.data[a : a + 2], found.kwargs) for a in range(0, len(states), 2)]
    if handle is not None:
        handle.remove()
    return torch.cat(seen if path is not None else out).flatten(0, 1)


def begun_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list with one entry for each pass that begins, since each begins by taking its states."""
    real, begun = States.get, []

    def get(self: States, start: int, stop: int) -> Tensor:
        begun.append(start)
        return real(self, start, stop)

    monkeypatch.setattr(States, "get", get)
    return begun


def reached(forwards: SuspendedForwards, index: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    for (found,) in resume_together((forwards,), index):
        assert found is not None
        yield found


def disturb(block: nn.Module, paths: list[str]) -> None:
    for path in paths:
        block.get_parameter(f"{path}.weight").data.mul_(0.9)


@pytest.mark.parametrize("budget", [0.0, 20_000.0, 1e9], ids=["none held", "some held", "all held"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_linear_sees_its_predecessors_as_they_are_now(
    family: str, budget: float, opened: Callable[[str], Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = opened(family)
    block, groups = found.model.modules[0], groups_of(found)
    forwards = suspended_forwards(found, budget)
    begun = begun_passes(monkeypatch)
    with forwards:
        for index, paths in enumerate(groups):
            x = torch.cat([x.clone() for x, _ in reached(forwards, index)])
            assert torch.equal(x, whole(found, paths[0]))
            disturb(block, paths)
        expected = whole(found, None)
        forwards.finish("block")
    assert torch.equal(found.states.data.flatten(0, 1), expected)
    made, without = len(begun), 4 * (len(groups) + 1)
    assert made == {0.0: without, 1e9: 4}.get(budget, made)
    assert 4 <= made <= without
    assert all(not module._forward_pre_hooks for module in block.modules())


@pytest.mark.parametrize("budget", [0.0, 1e9])
def test_residuals_are_what_entered_a_module(budget: float, opened: Callable[[str], Opened]) -> None:
    found = opened("llama")
    groups = groups_of(found)
    wanted = {groups.index(["self_attn.o_proj"]): None, groups.index(["mlp.down_proj"]): "mlp"}
    with suspended_forwards(found, budget, residuals=wanted) as forwards:
        for index in range(len(groups)):
            seen = [residual for _, residual in reached(forwards, index)]
            if index not in wanted:
                assert seen == [None] * 4
                continue
            path = wanted[index]
            entered = found.states.data.flatten(0, 1) if path is None else whole(found, path)
            assert torch.equal(torch.cat([part for part in seen if part is not None]), entered)


def test_memory_that_runs_out(opened: Callable[[str], Opened], monkeypatch: pytest.MonkeyPatch) -> None:
    """Suspended passes are given up first, then micro-batches get smaller; no window is handed over twice."""
    found = opened("llama")
    groups = groups_of(found)
    expected = [whole(found, paths[0]) for paths in groups]
    out = whole(found, None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    forwards = suspended_forwards(found, 1e9, windows=4)
    real, largest = torch.nn.functional.silu, 4
    tight = [False]

    def scarce(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.shape[0] > largest or (tight[0] and forwards._suspended):
            raise torch.cuda.OutOfMemoryError("no memory")
        return real(x, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "silu", scarce)
    with forwards:
        for index in range(len(groups)):
            tight[0] = index == len(groups) - 1
            if tight[0]:
                largest = 2
            x = torch.cat([x.clone() for x, _ in reached(forwards, index)])
            torch.testing.assert_close(x, expected[index], rtol=1e-4, atol=1e-5)
        assert forwards.batch.windows == 2
        forwards.finish("block")
    torch.testing.assert_close(found.states.data.flatten(0, 1), out, rtol=1e-4, atol=1e-5)
    again = suspended_forwards(opened("llama"), 1e9)
    largest = 0
    with again, pytest.raises(torch.cuda.OutOfMemoryError):
        list(resume_together((again,), len(groups) - 1))


def test_passes_that_are_given_up_end(opened: Callable[[str], Opened]) -> None:
    """No frame of a pass survives, and the block works as before."""
    found = opened("llama")
    expected = whole(found, None)
    with suspended_forwards(found, 1e9) as forwards:
        list(resume_together((forwards,), 1))
        suspended = list(forwards._suspended.values())
        assert len(suspended) == 4
        assert not any(each.dead for each in suspended)
        assert forwards.drop()
        assert all(each.dead for each in suspended)
        assert not forwards.drop()
    assert torch.equal(whole(found, None), expected)


class Branching(nn.Module):
    """A block that decides by its input which linears run, and in which order."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        branch = int(x[0, 0, 0])
        order = [self.first, self.second]
        if branch == 1:
            order = [self.first]
        elif branch == 2:
            order = [self.second, self.first]
        for linear in order:
            x = linear(x)
        return x


def branching_forwards(branches: list[int], budget: float) -> SuspendedForwards:
    """Forward passes over one window for each branch, one window at a time."""
    torch.manual_seed(0)
    states = States((len(branches), 3, 8), torch.float32, CPU, CPU)
    states.data.normal_()
    states.data[:, 0, 0] = torch.tensor(branches).float()
    return SuspendedForwards(Branching(), states, {}, ["first", "second"], batch_of(states, 1), budget)


@pytest.mark.parametrize("budget", [0.0, 1e9])
def test_a_linear_that_some_windows_skip(budget: float) -> None:
    with branching_forwards([0, 0, 1], budget) as forwards:
        assert len(list(reached(forwards, 0))) == 3
        seen: list[Tensor] = []
        with pytest.raises(WorkError, match=r"^second is not reached for windows 2 to 3: .*not supported$"):
            seen.extend(x for x, _ in reached(forwards, 1))
        assert len(seen) == 2
        assert torch.equal(seen[0], linear_at(forwards.block, "first")(forwards.states.data[0]))
    assert all(not module._forward_pre_hooks for module in forwards.block.modules())
    assert not forwards._suspended


@pytest.mark.parametrize("budget", [0.0, 1e9])
def test_a_linear_that_comes_before_an_earlier_one(budget: float) -> None:
    """Refused whether passes are held or run again, before anything of the window is handed over."""
    with branching_forwards([0, 2], budget) as forwards:
        seen: list[Tensor] = []
        words = r"^second comes before first for windows 1 to 2: .* not supported$"
        with pytest.raises(WorkError, match=words):
            seen.extend(x for x, _ in reached(forwards, 0))
        assert len(seen) == 1
    assert not forwards._suspended


def test_suspension_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    assert suspension_budget(Device(CPU), 64, 2048) > 0
    gpu = Device(torch.device("cuda", 0))
    solving = 4 * (2.5 * 64**2 + 6 * 2048)
    monkeypatch.setattr(Device, "free_memory", lambda _: 1e9)
    assert suspension_budget(gpu, 64, 2048) == pytest.approx(0.6 * (1e9 - solving))
    monkeypatch.setattr(Device, "free_memory", lambda _: 10.0)
    assert suspension_budget(gpu, 64, 2048) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("budget", [0.0, 2e5, 1e9])
def test_states_in_host_memory(budget: float, saved: Callable[..., Path]) -> None:
    """They are copied to and fro beside the work, and the results are those of states on the device."""
    gpu, ends = torch.device("cuda", 0), []
    for storage in (gpu, CPU):
        model = SourceModel.open(saved("llama", torch.float32))
        tokens = torch.randint(3, 2048, (37, 64), generator=torch.Generator().manual_seed(1))
        states, kwargs = embed(model, tokens, storage, gpu, torch.float32)
        assert states.data.is_pinned() == (storage == CPU)
        batch = batch_of(states, 5, gpu)
        for index, name in enumerate(model.blocks):
            block = model.load_block(index, gpu, torch.float32)
            groups = distinct_inputs(block, states, kwargs[index])
            stops = [paths[0] for paths in groups]
            with SuspendedForwards(block, states, kwargs[index], stops, batch, budget) as forwards:
                for group, paths in enumerate(groups):
                    assert sum(x.shape[0] for x, _ in reached(forwards, group)) == 37 * 64
                    disturb(block, paths)
                forwards.finish(name)
        torch.cuda.synchronize()
        ends.append(states.data.cpu())
    assert torch.equal(*ends)
