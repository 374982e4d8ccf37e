"""Passes that halt: what they hand over against whole forward passes, whatever the memory, and what they give up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm_quantize.model import block_forward, suspended_forward
from llm_quantize.model.block_forward import MicroBatch
from llm_quantize.model.source import Source
from llm_quantize.model.suspended_forward import SuspendedForwards, resume_together
from models import CPU, FAMILIES

Opened = tuple[Source, block_forward.States, dict[str, Any]]


def groups_of(found: Opened) -> list[list[str]]:
    source, states, kwargs = found
    return block_forward.distinct_inputs(source.modules[0], states, kwargs)


def begun(found: Opened, suspension_budget: float, windows: int = 2, **more: Any) -> SuspendedForwards:
    source, states, kwargs = found
    stops = [paths[0] for paths in groups_of(found)]
    batch = MicroBatch(CPU, states.length, 1, tokens=windows * states.length)
    return SuspendedForwards(source.modules[0], states, kwargs, stops, batch, suspension_budget, **more)


def whole(found: Opened, path: str | None) -> Tensor:
    """What a forward pass over each micro-batch of two windows feeds a module; None: what it returns."""
    source, states, kwargs = found
    block: nn.Module = source.modules[0]
    seen: list[Tensor] = []
    handle = None
    if path is not None:
        handle = block.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        out = [block_forward.forward(block, states.data[a : a + 2], kwargs) for a in range(0, len(states), 2)]
    if handle is not None:
        handle.remove()
    return torch.cat(seen if path is not None else out).flatten(0, 1)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each time that states are taken to begin a pass."""
    real, begins = block_forward.States.get, []

    def get(self: block_forward.States, start: int, stop: int) -> Tensor:
        begins.append(start)
        return real(self, start, stop)

    monkeypatch.setattr(block_forward.States, "get", get)
    return begins


def reached(running: SuspendedForwards, index: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    for (found,) in resume_together((running,), index):
        assert found is not None
        yield found


def disturb(block: nn.Module, paths: list[str]) -> None:
    for path in paths:
        block.get_parameter(f"{path}.weight").data.mul_(0.9)


@pytest.mark.parametrize(
    "suspension_budget", [0.0, 20_000.0, 1e9], ids=["none held", "some held", "all held"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_linear_sees_its_predecessors_as_they_are_now(
    family: str, suspension_budget: float, opened: Callable[[str], Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = opened(family)
    source, states, _ = found
    block, groups = source.modules[0], groups_of(found)
    running = begun(found, suspension_budget)
    begun_passes = counted(monkeypatch)
    with running:
        for index, paths in enumerate(groups):
            x = torch.cat([x.clone() for x, _ in reached(running, index)])
            assert torch.equal(x, whole(found, paths[0]))
            disturb(block, paths)
        expected = whole(found, None)
        running.advance("block")
    assert torch.equal(states.data.flatten(0, 1), expected)
    made, without = len(begun_passes), 4 * (len(groups) + 1)
    assert made == {0.0: without, 1e9: 4}.get(suspension_budget, made)
    assert 4 <= made <= without
    assert all(not module._forward_pre_hooks for module in block.modules())


@pytest.mark.parametrize("suspension_budget", [0.0, 1e9])
def test_what_entered_a_module_before(suspension_budget: float, opened: Callable[[str], Opened]) -> None:
    found = opened("llama")
    groups = groups_of(found)
    wanted = {groups.index(["self_attn.o_proj"]): None, groups.index(["mlp.down_proj"]): "mlp"}
    with begun(found, suspension_budget, before=wanted) as running:
        for index in range(len(groups)):
            seen = [stream for _, stream in reached(running, index)]
            if index not in wanted:
                assert seen == [None] * 4
                continue
            before = wanted[index]
            entered = found[1].data.flatten(0, 1) if before is None else whole(found, before)
            assert torch.equal(torch.cat([part for part in seen if part is not None]), entered)


def test_memory_that_runs_out(opened: Callable[[str], Opened], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is halted is given up first, then micro-batches get smaller; no window is handed over twice."""
    found = opened("llama")
    states, groups = found[1], groups_of(found)
    expected = [whole(found, paths[0]) for paths in groups]
    out = whole(found, None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    running = begun(found, 1e9, windows=4)
    real, largest = torch.nn.functional.silu, 4
    tight = [False]

    def scarce(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.shape[0] > largest or (tight[0] and running._halted):
            raise torch.cuda.OutOfMemoryError("no memory")
        return real(x, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "silu", scarce)
    with running:
        for index in range(len(groups)):
            tight[0] = index == len(groups) - 1
            if tight[0]:
                largest = 2
            x = torch.cat([x.clone() for x, _ in reached(running, index)])
            torch.testing.assert_close(x, expected[index], rtol=1e-4, atol=1e-5)
        assert running.batch.windows == 2
        running.advance("block")
    torch.testing.assert_close(states.data.flatten(0, 1), out, rtol=1e-4, atol=1e-5)
    again = begun(opened("llama"), 1e9)
    largest = 0
    with again, pytest.raises(torch.cuda.OutOfMemoryError):
        list(resume_together((again,), len(groups) - 1))


def test_what_is_given_up_ends(opened: Callable[[str], Opened]) -> None:
    """No frame of a pass survives, and the block works as before."""
    found = opened("llama")
    expected = whole(found, None)
    with begun(found, 1e9) as running:
        list(resume_together((running,), 1))
        halted = list(running._halted.values())
        assert len(halted) == 4
        assert not any(each.dead for each in halted)
        assert running.drop()
        assert all(each.dead for each in halted)
        assert not running.drop()
    assert torch.equal(whole(found, None), expected)


def test_room(monkeypatch: pytest.MonkeyPatch) -> None:
    assert suspended_forward.suspension_budget(CPU, None, 64, 2048) > 0
    monkeypatch.setattr(block_forward, "free_memory", lambda device, limit: limit or 1e9)
    cuda = torch.device("cuda", 0)
    solving = 4 * (2.5 * 64**2 + 6 * 2048)
    assert suspended_forward.suspension_budget(cuda, None, 64, 2048) == pytest.approx(0.6 * (1e9 - solving))
    assert suspended_forward.suspension_budget(cuda, 10.0, 64, 2048) == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("suspension_budget", [0.0, 2e5, 1e9])
def test_states_in_host_memory(suspension_budget: float, saved: Callable[..., Path]) -> None:
    """They travel beside the work, and arrive as they would have been on the device."""
    cuda, ends = torch.device("cuda", 0), []
    for storage in (cuda, CPU):
        source = Source.open(saved("llama", torch.float32))
        tokens = torch.randint(3, 2048, (37, 64), generator=torch.Generator().manual_seed(1))
        states, calls = block_forward.embed(source, tokens, storage, cuda, torch.float32)
        assert states.data.is_pinned() == (storage == CPU)
        batch = MicroBatch(cuda, states.length, 1, tokens=5 * states.length)
        for index, name in enumerate(source.blocks):
            block = source.modules[index]
            source.load(block, name, cuda, torch.float32)
            groups = block_forward.distinct_inputs(block, states, calls.kwargs[index])
            with SuspendedForwards(
                block, states, calls.kwargs[index], [g[0] for g in groups], batch, suspension_budget
            ) as running:
                for group, paths in enumerate(groups):
                    assert sum(x.shape[0] for x, _ in reached(running, group)) == 37 * 64
                    disturb(block, paths)
                running.advance(name)
        torch.cuda.synchronize()
        ends.append(states.data.cpu())
    assert torch.equal(*ends)
