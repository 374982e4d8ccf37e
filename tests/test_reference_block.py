"""The reference block: the target against least squares, the input mismatch against its definition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from conftest import Opened
from llm_quantize.blockwise.block_solution import BlockProblem, solve_block
from llm_quantize.blockwise.channel_scaling import BlockScaling
from llm_quantize.blockwise.reference import ReferenceBlock
from llm_quantize.device import Device
from llm_quantize.model.awq_mappings import find_mappings
from llm_quantize.model.block_forward import (
    BlockKwargs,
    MicroBatch,
    distinct_inputs,
    forward,
    residual_writers,
)
from llm_quantize.model.states import States
from llm_quantize.solver.awq import AWQSolver
from llm_quantize.solver.compensation import toward_target
from llm_quantize.solver.factorization import factorize
from llm_quantize.solver.quality import PRESETS, quality_preset
from llm_quantize.types import QuantScheme
from models import CPU


@pytest.mark.parametrize("act_order", [False, True])
def test_target_is_damped_least_squares(act_order: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x, reference = torch.randn(200, 32, generator=g), torch.randn(200, 32, generator=g)
    x = x * torch.linspace(0.2, 3, 32)
    W, stream = torch.randn(8, 32, generator=g), torch.randn(200, 8, generator=g)
    residual = reference @ W.T + stream - x @ W.T
    H = x.T @ x / 200
    ridge = 0.1 * H.diagonal().mean()
    found = toward_target(W, residual.T @ x / 200, factorize(H.clone(), 0.1, act_order=act_order))
    # The same as one least squares of stacked rows, in float64.
    rows = torch.cat([x, (200 * ridge).sqrt() * torch.eye(32)]).double()
    wanted = torch.cat([residual, torch.zeros(32, 8)]).double()
    expected = W.double() + torch.linalg.lstsq(rows, wanted).solution.T
    assert torch.allclose(found.double(), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "writers"),
    [
        ("llama", {"self_attn.o_proj": None, "mlp.down_proj": "post_attention_layernorm"}),
        ("qwen2", {"self_attn.o_proj": None, "mlp.down_proj": "post_attention_layernorm"}),
        ("gemma2", {}),  # a norm stands between
        ("gpt_neox", {}),  # attention and MLP are added to each other first
    ],
)
def test_residual_writers(
    family: str, writers: dict[str, str | None], opened: Callable[[str], Opened]
) -> None:
    model, states, kwargs = opened(family)
    assert residual_writers(model.modules[0], states, kwargs) == writers


def inputs(block: nn.Module, states: States, kwargs: BlockKwargs, path: str) -> Tensor:
    """What a whole forward pass feeds a module: float64 (tokens, width)."""
    seen: list[Tensor] = []
    handle = block.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        forward(block, states.data, kwargs)
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1]).double()


@pytest.mark.parametrize("windows", [3, 7])  # of the reference model; the micro-batches are of two
@pytest.mark.parametrize("budget", [0.0, 1e9])
def test_input_mismatch(budget: float, windows: int, opened: Callable[[str], Opened]) -> None:
    model, states, kwargs = opened("llama")
    block = model.modules[0]
    reference = states.copy(windows)
    states.data.add_(0.1 * torch.randn(states.data.shape, generator=torch.Generator().manual_seed(2)))
    paths = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    batch = MicroBatch(Device(CPU), 16, 64, tokens=32)
    reference_block = ReferenceBlock(
        block, reference, states, kwargs, [[path] for path in paths], batch, budget
    )
    value = block.get_parameter("self_attn.v_proj.weight")
    with torch.no_grad():
        value.mul_(1.2)  # as rounding would change it
    assert torch.equal(reference_block.weight("self_attn.v_proj") * 1.2, value)
    channels = torch.linspace(1, 2, block.get_parameter("mlp.down_proj.weight").shape[1])
    for path, stream, scale in (
        ("self_attn.o_proj", None, None),
        ("mlp.up_proj", "", None),
        ("mlp.down_proj", "post_attention_layernorm", channels),
    ):
        mismatch = reference_block.mismatch(paths.index(path), scale)
        assert mismatch is not None
        x = inputs(block, states, kwargs, path)
        wanted = inputs(reference_block.block, reference, kwargs, path)
        if scale is not None:
            wanted = wanted / scale
        assert torch.allclose(mismatch.H.double(), x.T @ x / x.shape[0], atol=1e-5)
        tokens = wanted.shape[0]
        x = x[:tokens]
        assert torch.allclose(mismatch.inputs.double(), (wanted - x).T @ x / tokens, atol=1e-5)
        if stream == "":
            assert mismatch.residual is None
            continue
        if stream is None:
            r, r_wanted = (s.data[:windows].reshape(tokens, -1).double() for s in (states, reference))
        else:
            r = inputs(block, states, kwargs, stream)[:tokens]
            r_wanted = inputs(reference_block.block, reference, kwargs, stream)
        assert mismatch.residual is not None
        assert float((r_wanted - r).abs().max()) > 0.01
        assert torch.allclose(mismatch.residual.double(), (r_wanted - r).T @ x / tokens, atol=1e-5)


def test_a_linear_makes_up_for_earlier_errors(opened: Callable[[str], Opened]) -> None:
    """With 8 bits, disturbed states come out closer to the reference model's."""
    errors = []
    for with_target in (False, True):
        model, states, kwargs = opened("llama")
        block = model.modules[0]
        reference = states.copy(len(states))
        states.data.mul_(1.3)  # what a linear can undo
        with torch.no_grad():
            expected = forward(block, reference.data, kwargs)
        solver = AWQSolver(QuantScheme(8, 32, False), PRESETS["fast"], damping=0.01)
        groups = distinct_inputs(block, states, kwargs)
        scaling = BlockScaling(block, groups, find_mappings(block, model.config), solver, torch.float16)
        problem = BlockProblem(block, "m", groups, lambda _: None, solver, scaling)
        batch = MicroBatch(Device(CPU), 16, 64, tokens=32)
        reference_block = ReferenceBlock(
            block, reference if with_target else states, states, kwargs, groups, batch, 1e9
        )
        solved = list(solve_block(problem, reference_block))
        assert {s.path for s in solved} == {path for paths in groups for path in paths}
        assert all(s.report.fallback is None for s in solved)
        with torch.no_grad():
            errors.append(float((forward(block, states.data, kwargs) - expected).norm()))
    assert errors[1] < 0.8 * errors[0]


def test_states_that_are_not_finite_give_no_mismatch(opened: Callable[[str], Opened]) -> None:
    model, states, kwargs = opened("llama")
    reference = states.copy(len(states))
    batch = MicroBatch(Device(CPU), 16, 64)
    reference_block = ReferenceBlock(
        model.modules[0], reference, states, kwargs, [["self_attn.q_proj"]], batch, 1e9
    )
    reference.data[0, 0, 0] = torch.inf
    assert reference_block.mismatch(0, None) is None


def test_target_and_finish(opened: Callable[[str], Opened]) -> None:
    """`target` gives the reference model's output and keeps its states; `finish` replaces both models' states."""
    model, states, kwargs = opened("llama")
    block = model.modules[0]
    reference = states.copy(3)
    batch = MicroBatch(Device(CPU), 16, 64, tokens=32)
    with ReferenceBlock(block, reference, states, kwargs, [["self_attn.q_proj"]], batch, 1e9) as both:
        before = reference.data.clone()
        with torch.no_grad():
            wanted = forward(block, reference.data, kwargs)
            block.get_parameter("mlp.up_proj.weight").mul_(0.9)
            made = forward(block, states.data, kwargs)
        target = both.target("block", 2)
        assert len(target) == 2
        torch.testing.assert_close(target.data, wanted[:2], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(both.target("block", 9).data, wanted, rtol=1e-4, atol=1e-5)
        assert torch.equal(reference.data, before)
        both.finish("block")
    torch.testing.assert_close(reference.data, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(states.data, made, rtol=1e-4, atol=1e-5)


def test_reference_windows() -> None:
    assert (
        quality_preset("fast", 2).reference_windows(1024, 2048)
        == quality_preset("default", 4).reference_windows(1024, 2048)
        == 0
    )
    assert quality_preset("default", 3).reference_windows(1024, 2048) == 256
    assert quality_preset("default", 2).reference_windows(256, 2048) == 128  # a quarter would be too few
    assert quality_preset("default", 2).reference_windows(64, 2048) == 64
    assert quality_preset("best", 8).reference_windows(1024, 2048) == 1024
