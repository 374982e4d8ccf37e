"""Streams side by side: what waits for what, and that the solver's results do not depend on them."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from llm_quantize.blockwise.block_solution import QUALITY_PRESETS, BlockChanges, SolveOptions, solve_block
from llm_quantize.kernels.streams import SideStream, StreamPool, Timestamp
from llm_quantize.model.awq_mappings import AWQMapping

CPU = torch.device("cpu")
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
CUDA = pytest.param(torch.device("cuda"), marks=gpu)
LONG = 50_000_000  # cycles of a GPU: some hundredths of a second


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_lanes_wait_for_what_they_need(device: torch.device) -> None:
    """A lane waits for the caller and for the lanes that it names, the caller for those that it joins, and at the end
    for all."""

    def pause() -> None:
        if device.type == "cuda":
            torch.cuda._sleep(LONG)  # type: ignore[no-untyped-call]

    x, y, z = (torch.zeros(1000, device=device) for _ in range(3))
    with StreamPool.on(device, 3) as streams:
        pause()
        x.fill_(1)
        with streams.stream(0):
            x.add_(1)  # after the caller
            pause()
            y.copy_(x)
        with streams.stream(1, after=[0]):
            y.mul_(10)
        streams.join(1)
        assert y.tolist() == [20] * 1000
        with streams.stream(2):
            pause()
            z.copy_(y)
    assert z.tolist() == [20] * 1000


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_beside_waits_for_the_caller_who_waits_where_he_joins(device: torch.device) -> None:
    def pause() -> None:
        if device.type == "cuda":
            torch.cuda._sleep(LONG)  # type: ignore[no-untyped-call]

    x, y = (torch.zeros(1000, device=device) for _ in range(2))
    with SideStream(device) as beside:
        pause()
        x.fill_(1)
        with beside.stream():
            x.add_(1)
            pause()
            y.copy_(x)
        beside.join()
        assert y.tolist() == [2] * 1000
        pause()
        y.add_(1)
        with beside.stream(behind=False):  # on a GPU, before what the caller has just begun
            x.copy_(y)
        beside.join()
        assert x.tolist() == [3 if device.type == "cpu" else 2] * 1000
        assert y.tolist() == [3] * 1000
        with beside.stream():
            pause()
            x.copy_(y)
    assert x.tolist() == [3] * 1000


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_lanes_are_joined_after_an_error(device: torch.device) -> None:
    x = torch.zeros(1000, device=device)

    def fail() -> None:
        with StreamPool.on(device, 1) as streams, streams.stream(0):
            if device.type == "cuda":
                torch.cuda._sleep(LONG)  # type: ignore[no-untyped-call]
            x.fill_(3)
            raise ValueError("told")

    with pytest.raises(ValueError, match="told"):
        fail()
    assert x.tolist() == [3] * 1000


@pytest.mark.parametrize("device", [CPU, CUDA])
def test_marks_tell_how_long_the_work_took(device: torch.device) -> None:
    begun = Timestamp(device)
    if device.type == "cuda":
        torch.cuda._sleep(LONG)  # type: ignore[no-untyped-call]
    else:
        time.sleep(0.02)
    assert 0.01 < Timestamp(device).since(begun) < 5


class Gated(nn.Module):
    """What a block's MLP has, and a linear that nothing folds into."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(512)
        self.gate, self.up = nn.Linear(512, 1024, bias=False), nn.Linear(512, 1024, bias=False)
        self.down, self.other = nn.Linear(1024, 512), nn.Linear(512, 256)


GROUPS = [["gate", "up"], ["down"], ["other"]]
FOLDS = [
    AWQMapping("norm", ("gate", "up"), torch.arange(512)),
    AWQMapping("up", ("down",), torch.arange(1024)),
]


def hessians(device: torch.device) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for width in (512, 1024, 512):
        x = torch.randn(4 * width, width, generator=generator) * torch.rand(width, generator=generator).exp()
        yield (x.T @ x / len(x)).to(device)


@pytest.mark.parametrize("mappings", [[], FOLDS], ids=["gptq", "awq"])
@pytest.mark.parametrize("device", [CUDA])
def test_bits_do_not_depend_on_lanes(device: torch.device, mappings: list[AWQMapping]) -> None:
    """Three times each, since a race may be won once; and other work goes on where the results are taken."""
    torch.manual_seed(0)
    source = Gated()
    effort = QUALITY_PRESETS["default"]
    options = SolveOptions(
        4, 128, False, True, False, 0.05, effort, 0, (torch.bfloat16, torch.float16), torch.bfloat16
    )
    expected: dict[str, Tensor] = {}
    for streams in (None, *[StreamPool.on(device, 3)] * 3):
        block = copy.deepcopy(source).to(device)
        given = dict(enumerate(hessians(device)))
        with torch.no_grad():
            solved = solve_block(
                block, "m", GROUPS, given.pop, mappings, options, BlockChanges(), None, streams
            )
            found = {}
            for each in solved:
                torch.randn(2048, 2048, device=device) @ torch.randn(2048, 2048, device=device)
                found[f"{each.path}.q"] = each.q.clone()
        found |= {name: p.detach().clone() for name, p in block.named_parameters()}
        expected = expected or found
        assert found.keys() == expected.keys()
        for name in found:
            assert torch.equal(found[name], expected[name]), name
