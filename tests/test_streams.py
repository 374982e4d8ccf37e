"""Test what the streams wait for, and that the solver's results do not depend on them."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from torch import Tensor, nn

from llm_quantize.blockwise.block_solution import BlockProblem, solve_block
from llm_quantize.blockwise.channel_scaling import BlockScaling
from llm_quantize.kernels.streams import SideStream, StreamPool, Timestamp
from llm_quantize.model.awq_mappings import AWQMapping
from llm_quantize.solver.awq import AWQSolver
from llm_quantize.solver.quality import quality_preset
from llm_quantize.types import QuantScheme

CPU = torch.device("cpu")
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = pytest.param(torch.device("cuda"), marks=gpu)
LONG = 50_000_000  # cycles of a GPU: some hundredths of a second


def pause(device: torch.device) -> None:
    """Keep the current stream busy, so that work which does not wait for it overtakes it; nothing on the CPU."""
    if device.type == "cuda":
        torch.cuda._sleep(LONG)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_streams_of_a_pool_wait_for_what_they_need(device: torch.device) -> None:
    """A stream waits for the caller and for the streams `after`; the caller waits where it joins, and at the end."""
    x, y, z = (torch.zeros(1000, device=device) for _ in range(3))
    with StreamPool.create(device, 3) as streams:
        pause(device)
        x.fill_(1)
        with streams.use(0):
            x.add_(1)  # after the caller
            pause(device)
            y.copy_(x)
        with streams.use(1, after=[0]):
            y.mul_(10)
        streams.join(1)
        assert y.tolist() == [20] * 1000
        with streams.use(2):
            pause(device)
            z.copy_(y)
    assert z.tolist() == [20] * 1000


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_side_stream_waits_for_the_caller_and_the_caller_where_it_joins(device: torch.device) -> None:
    x, y = (torch.zeros(1000, device=device) for _ in range(2))
    with SideStream(device) as side:
        pause(device)
        x.fill_(1)
        with side.use():
            x.add_(1)
            pause(device)
            y.copy_(x)
        side.join()
        assert y.tolist() == [2] * 1000
        pause(device)
        y.add_(1)
        with side.use(behind=False):  # on a GPU, before the last work of the caller
            x.copy_(y)
        side.join()
        assert x.tolist() == [3 if device.type == "cpu" else 2] * 1000
        assert y.tolist() == [3] * 1000
        with side.use():
            pause(device)
            x.copy_(y)
    assert x.tolist() == [3] * 1000


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_streams_are_joined_after_an_error(device: torch.device) -> None:
    x = torch.zeros(1000, device=device)

    def fail() -> None:
        with StreamPool.create(device, 1) as streams, streams.use(0):
            pause(device)
            x.fill_(3)
            raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"):
        fail()
    assert x.tolist() == [3] * 1000


class Recorded:
    """A stream in the place of a GPU's, with the names of the streams that it has waited for."""

    device = torch.device("cuda", 0)

    def __init__(self, name: str) -> None:
        self.name = name
        self.awaited: list[str] = []

    def wait_stream(self, other: Recorded) -> None:
        self.awaited.append(other.name)


def test_waits_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each `use` and `join` asks for exactly the waits that it documents, and makes its stream the current one."""
    caller, side, *pool = (Recorded(name) for name in ("caller", "side", "0", "1", "2"))
    entered: list[str] = []

    def enter(stream: Recorded) -> AbstractContextManager[None]:
        entered.append(stream.name)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: caller)
    monkeypatch.setattr(torch.cuda, "stream", enter)
    with StreamPool(tuple(pool)) as streams:
        with streams.use(0):
            pass
        with streams.use(2, after=[0, 1]):
            pass
        assert [each.awaited for each in pool] == [["caller"], [], ["caller", "0", "1"]]
        streams.join(1)
        assert caller.awaited == ["1"]
    assert caller.awaited == ["1", "0", "1", "2"]
    caller.awaited.clear()
    with SideStream(CPU) as beside:
        beside._stream = side
        with beside.use():
            pass
        with beside.use(behind=False):
            pass
        assert side.awaited == ["caller"]
        assert caller.awaited == []
    assert caller.awaited == ["side"]
    assert entered == ["0", "2", "side", "side"]


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_timestamps_measure_the_work_between_them(device: torch.device) -> None:
    begun = Timestamp(device)
    pause(device)
    if device.type == "cpu":
        time.sleep(0.02)
    assert 0.01 < Timestamp(device).since(begun) < 5


class Gated(nn.Module):
    """A block with the linears of an MLP, and one linear without a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(512)
        self.gate, self.up = nn.Linear(512, 1024, bias=False), nn.Linear(512, 1024, bias=False)
        self.down, self.other = nn.Linear(1024, 512), nn.Linear(512, 256)


GROUPS = [["gate", "up"], ["down"], ["other"]]
MAPPINGS = [
    AWQMapping("norm", ("gate", "up"), torch.arange(512)),
    AWQMapping("up", ("down",), torch.arange(1024)),
]


def hessians(device: torch.device) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for width in (512, 1024, 512):
        x = torch.randn(4 * width, width, generator=generator) * torch.rand(width, generator=generator).exp()
        yield (x.T @ x / len(x)).to(device)


@pytest.mark.parametrize("mappings", [[], MAPPINGS], ids=["gptq", "awq"])
@pytest.mark.parametrize("device", [CUDA])
def test_bits_do_not_depend_on_streams(device: torch.device, mappings: list[AWQMapping]) -> None:
    """Three runs each, since a race may end well by chance; other work keeps the caller's stream busy meanwhile."""
    torch.manual_seed(0)
    source = Gated()
    solver = AWQSolver(QuantScheme(4, 128, symmetric=False), quality_preset("default", 4))
    expected: dict[str, Tensor] = {}
    for streams in (None, *[StreamPool.create(device, 3)] * 3):
        block = copy.deepcopy(source).to(device)
        given = dict(enumerate(hessians(device)))
        with torch.no_grad():
            scaling = BlockScaling(block, GROUPS, mappings, solver, torch.bfloat16)
            solved = solve_block(BlockProblem(block, "m", GROUPS, given.pop, solver, scaling), None, streams)
            found = {}
            for each in solved:
                torch.randn(2048, 2048, device=device) @ torch.randn(2048, 2048, device=device)
                found[f"{each.path}.q"] = each.q.clone()
        found |= {name: p.detach().clone() for name, p in block.named_parameters()}
        expected = expected or found
        assert found.keys() == expected.keys()
        for name in found:
            assert torch.equal(found[name], expected[name]), name
