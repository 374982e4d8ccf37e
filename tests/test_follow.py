"""Following the source: the correction against least squares, the drift against its definition, and what is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm_quantize.blockwise.block_solution import (
    QUALITY_PRESETS,
    BlockChanges,
    SolveOptions,
    effort,
    solve_block,
)
from llm_quantize.blockwise.reference import ReferenceBlock
from llm_quantize.model import block_forward
from llm_quantize.model.awq_mappings import find_mappings
from llm_quantize.solver.gptq import aim, factorize
from models import CPU


@pytest.mark.parametrize("act_order", [False, True])
def test_aim_is_damped_least_squares(act_order: bool) -> None:
    g = torch.Generator().manual_seed(0)
    x, far = torch.randn(200, 32, generator=g), torch.randn(200, 32, generator=g)
    x = x * torch.linspace(0.2, 3, 32)
    W, stream = torch.randn(8, 32, generator=g), torch.randn(200, 8, generator=g)
    missed = far @ W.T + stream - x @ W.T
    H = x.T @ x / 200
    ridge = 0.1 * H.diagonal().mean()
    found = aim(W, missed.T @ x / 200, factorize(H.clone(), 0.1, act_order=act_order))
    # The same as one least squares of stacked rows, in float64.
    rows = torch.cat([x, (200 * ridge).sqrt() * torch.eye(32)]).double()
    goal = torch.cat([missed, torch.zeros(32, 8)]).double()
    expected = W.double() + torch.linalg.lstsq(rows, goal).solution.T
    assert torch.allclose(found.double(), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "writers"),
    [
        ("llama", {"self_attn.o_proj": None, "mlp.down_proj": "post_attention_layernorm"}),
        ("qwen2", {"self_attn.o_proj": None, "mlp.down_proj": "post_attention_layernorm"}),
        ("gemma2", {}),  # a norm lies between
        ("gpt_neox", {}),  # attention and MLP are added to each other first
    ],
)
def test_residual_writers(family: str, writers: dict[str, str | None], opened: Any) -> None:
    source, states, kwargs = opened(family)
    found = block_forward.residual_writers(source.modules[0], states, kwargs)
    assert found == writers


def inputs(block: nn.Module, states: block_forward.States, kwargs: dict[str, Any], path: str) -> Tensor:
    """What a whole forward pass feeds a module."""
    seen: list[Tensor] = []
    handle = block.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        block_forward.forward(block, states.data, kwargs)
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1]).double()


@pytest.mark.parametrize("windows", [3, 7])  # of seven, two at a time
@pytest.mark.parametrize("suspension_budget", [0.0, 1e9])
def test_drift(suspension_budget: float, windows: int, opened: Any) -> None:
    source, states, kwargs = opened("llama")
    block = source.modules[0]
    reference = block_forward.copied(states, windows)
    states.data.add_(0.1 * torch.randn(states.data.shape, generator=torch.Generator().manual_seed(2)))
    paths = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    batch = block_forward.MicroBatch(CPU, 16, 64, tokens=32)
    reference_block = ReferenceBlock(
        block, reference, states, kwargs, [[path] for path in paths], batch, suspension_budget
    )
    with torch.no_grad():
        block.self_attn.v_proj.weight.mul_(1.2)  # as rounding would change it
    assert torch.equal(reference_block.weight("self_attn.v_proj") * 1.2, block.self_attn.v_proj.weight)
    channels = torch.linspace(1, 2, block.mlp.down_proj.in_features)
    for path, before, scale in (
        ("self_attn.o_proj", None, None),
        ("mlp.up_proj", "", None),
        ("mlp.down_proj", "post_attention_layernorm", channels),
    ):
        mismatch = reference_block.mismatch(paths.index(path), scale)
        assert mismatch is not None
        x, far = inputs(block, states, kwargs, path), inputs(reference_block.twin, reference, kwargs, path)
        if scale is not None:
            far = far / scale
        assert torch.allclose(mismatch.H.double(), x.T @ x / x.shape[0], atol=1e-5)
        tokens = far.shape[0]
        x = x[:tokens]
        assert torch.allclose(mismatch.inputs.double(), (far - x).T @ x / tokens, atol=1e-5)
        if before == "":
            assert mismatch.stream is None
            continue
        if before is None:
            r, r_far = (s.data[:windows].reshape(tokens, -1).double() for s in (states, reference))
        else:
            r, r_far = (
                inputs(block, states, kwargs, before),
                inputs(reference_block.twin, reference, kwargs, before),
            )
            r = r[:tokens]
        assert mismatch.stream is not None
        assert float((r_far - r).abs().max()) > 0.01
        assert torch.allclose(mismatch.stream.double(), (r_far - r).T @ x / tokens, atol=1e-5)


def test_a_linear_makes_up_for_what_came_before(opened: Any) -> None:
    """With weights that are barely rounded, a disturbed stream comes back closer to the source's."""
    errors = []
    for aims in (False, True):
        source, states, kwargs = opened("llama")
        block = source.modules[0]
        reference = block_forward.copied(states, len(states))
        states.data.mul_(1.3)  # what a linear can undo
        with torch.no_grad():
            expected = block_forward.forward(block, reference.data, kwargs)
        options = SolveOptions(
            8, 32, False, True, False, 0.01, QUALITY_PRESETS["fast"], 0, (torch.float16,), torch.float16
        )
        batch = block_forward.MicroBatch(CPU, 16, 64, tokens=32)
        groups = block_forward.distinct_inputs(block, states, kwargs)
        reference_block = ReferenceBlock(
            block, reference if aims else states, states, kwargs, groups, batch, 1e9
        )
        mappings = find_mappings(block, source.config)
        solved = list(
            solve_block(
                block, "m", groups, lambda _: None, mappings, options, BlockChanges(), reference_block
            )
        )
        assert {s.path for s in solved} == {path for paths in groups for path in paths}
        assert all(s.report.fallback is None for s in solved)
        with torch.no_grad():
            errors.append(float((block_forward.forward(block, states.data, kwargs) - expected).norm()))
    assert errors[1] < 0.8 * errors[0]


def test_what_is_not_finite_is_rounded_to_nearest(opened: Any) -> None:
    source, states, kwargs = opened("llama")
    block = source.modules[0]
    reference = block_forward.copied(states, len(states))
    batch = block_forward.MicroBatch(CPU, 16, 64)
    reference_block = ReferenceBlock(block, reference, states, kwargs, [["self_attn.q_proj"]], batch, 1e9)
    reference.data[0, 0, 0] = torch.inf
    assert reference_block.mismatch(0, None) is None


def test_how_much_is_followed() -> None:
    assert (
        effort("fast", 2).reference_windows(1024, 2048)
        == effort("default", 4).reference_windows(1024, 2048)
        == 0
    )
    assert effort("default", 3).reference_windows(1024, 2048) == 256
    assert effort("default", 2).reference_windows(256, 2048) == 128  # a quarter would be too few
    assert effort("default", 2).reference_windows(64, 2048) == 64
    assert effort("best", 8).reference_windows(1024, 2048) == 1024
