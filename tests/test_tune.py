"""Tuning: its gradients against their definition, that a block comes closer to the source's on windows that it has not
seen, and what becomes of it where memory is short."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gptq_quantize
from conftest import Runs
from llm_quantize.blockwise import loop, tuning
from llm_quantize.blockwise.block_solution import QUALITY_PRESETS, LayerReport, Solved, SolveOptions, effort
from llm_quantize.config import EMBEDDED_CALIBRATION
from llm_quantize.kernels.precision import representable
from llm_quantize.model import block_forward
from llm_quantize.model.source import Source
from llm_quantize.solver.qparams import QParams, dequantize, minmax_qparams, round_to_nearest
from models import CPU, tokens
from reference import dequantize_directory

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]


def options(bits: int, *, symmetric: bool = True, steps: int = 24) -> SolveOptions:
    best = replace(QUALITY_PRESETS["best"], tune=steps)
    return SolveOptions(
        bits, 32, symmetric, True, False, 0.1, best, 0, (torch.float16, torch.float32), torch.float16
    )


def nearest(block: Any, asked: SolveOptions, *, dynamic: bool = False) -> list[Solved]:
    """All linears of a block rounded to nearest, in the block too."""
    solved = []
    for path, linear in block.named_modules():
        if not isinstance(linear, torch.nn.Linear):
            continue
        W = linear.weight.detach().float()
        spec = asked.spec(W.shape[1])
        g_idx = None
        order = back = torch.arange(W.shape[1])
        if dynamic:
            order = torch.randperm(W.shape[1], generator=torch.Generator().manual_seed(len(path)))
            back = torch.argsort(order)
            g_idx = torch.div(back, spec.group_size, rounding_mode="floor").to(torch.int32)
        grid = minmax_qparams(W[:, order], spec)
        q = round_to_nearest(W[:, order], grid, spec)
        with torch.no_grad():
            linear.weight.copy_(dequantize(q, grid, spec.group_size)[:, back])
        report = LayerReport(path, 0.0, 0.1, 0, None, None, 0.0)
        solved.append(Solved(path, q[:, back].contiguous(), grid, g_idx, report))
    return solved


def by_hand(each: Solved, size: int) -> Tensor:
    """A linear's weight, de-quantized a column at a time."""
    columns = []
    for i in range(each.q.shape[1]):
        group = i // size if each.g_idx is None else int(each.g_idx[i])
        columns.append((each.q[:, i].float() - each.grid.zero[:, group]) * each.grid.scale[:, group])
    return torch.stack(columns, 1)


@pytest.mark.parametrize("bits", [2, 8])
def test_gradients(bits: int) -> None:
    """Of `round(u) s`: as of `u s` for `u`, and `round(u)` summed over its group for `s`."""
    g = torch.Generator().manual_seed(0)
    qmax = 2**bits - 1
    zero = torch.randint(0, qmax + 1, (5, 3), generator=g).float()
    u = (torch.randn(5, 12, generator=g) * qmax).requires_grad_()
    scale = torch.rand(5, 3, generator=g).requires_grad_()
    made = tuning._Rounded.apply(u, scale, zero, qmax, torch.float32)
    wanted = torch.randn(5, 12, generator=g)
    torch.autograd.backward((made * wanted).sum())
    z, s = zero.repeat_interleave(4, 1), scale.detach().repeat_interleave(4, 1)
    steps = (u.detach().round() + z).clamp(0, qmax) - z
    torch.testing.assert_close(made.detach(), steps * s)
    assert u.grad is not None
    torch.testing.assert_close(u.grad, wanted * s)
    torch.testing.assert_close(scale.grad, (wanted * steps).reshape(5, 3, 4).sum(2))


@pytest.mark.parametrize(("symmetric", "dynamic"), [(True, False), (False, False), (True, True)])
def test_a_block_comes_closer(
    symmetric: bool, dynamic: bool, saved: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "TOKENS", 256)
    source = Source.open(saved("llama", torch.float32))
    states, calls = block_forward.embed(source, tokens(120, 32), CPU, CPU, torch.float32)
    source.load(source.modules[0], source.blocks[0], CPU, torch.float32)
    block, kwargs, asked = source.modules[0], calls.kwargs[0], options(3, symmetric=symmetric, steps=96)
    goal = block_forward.copied(states, len(states))
    block_forward.replay(block, "m", goal, kwargs, block_forward.MicroBatch(CPU, 16, 64))
    others = {k: v.clone() for k, v in block.named_parameters() if "norm" in k}
    solved = nearest(block, asked, dynamic=dynamic)
    with torch.no_grad():
        before = tuning._distance(block_forward.forward(block, states.data, kwargs), goal.data)
    few = block_forward.copied(goal, 96)
    tuned = tuning.tune_block(block, solved, asked, states, few, kwargs)
    with torch.no_grad():
        made = block_forward.forward(block, states.data, kwargs)
    # A fifth of the windows was not among those that it was tuned with.
    assert tuning._distance(made[96:], goal.data[96:]) < 0.95 * before
    assert [t.path for t in tuned] == [s.path for s in solved]
    changed = 0
    for old, new in zip(solved, tuned, strict=True):
        assert new.report == old.report
        assert new.g_idx is old.g_idx
        assert new.q.dtype == torch.uint8
        assert int(new.q.max()) <= 7
        assert torch.equal(new.grid.zero, old.grid.zero)
        assert torch.equal(new.grid.scale, representable(new.grid.scale, asked.scale_dtypes))
        weight = block_forward.linear_at(block, new.path).weight
        assert torch.equal(weight, by_hand(new, 32))
        changed += int((new.q != old.q).sum())
    assert changed > 100
    assert all(torch.equal(block.get_parameter(k), v) for k, v in others.items())


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_twice(device: str, opened: Any) -> None:
    found = []
    for _ in range(2):
        source, states, kwargs = opened("qwen2")
        block, asked = source.modules[0], options(2)
        goal = block_forward.copied(states, len(states))
        block_forward.replay(block, "m", goal, kwargs, block_forward.MicroBatch(CPU, 16, 64))
        solved = nearest(block, asked)
        if device == "cuda":
            block.to(device)
            states, goal = _moved(states), _moved(goal)
            kwargs = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.cuda(), kwargs)
        found.append(tuning.tune_block(block, solved, asked, states, goal, kwargs))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.q, other.q)
        assert torch.equal(one.grid.scale, other.grid.scale)


def _moved(states: block_forward.States) -> block_forward.States:
    device = torch.device("cuda")
    moved = block_forward.States(tuple(states.data.shape), states.data.dtype, device, device)
    moved.data.copy_(states.data)
    return moved


def test_nothing_to_do_changes_nothing(opened: Any) -> None:
    """A block that gives what is wanted has no gradient."""
    source, states, kwargs = opened("llama")
    block, asked = source.modules[0], options(4)
    solved = nearest(block, asked)
    goal = block_forward.copied(states, len(states))
    with torch.no_grad():
        goal.data.copy_(tuning._Run(block, kwargs, CPU)(states.data, {}))
    for old, new in zip(solved, tuning.tune_block(block, solved, asked, states, goal, kwargs), strict=True):
        assert torch.equal(old.q, new.q)
        assert torch.equal(old.grid.scale, new.grid.scale)


@pytest.mark.parametrize("rate", [1e6, float("nan")])
def test_what_does_not_help_is_given_up(rate: float, opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "SCALE_RATE", rate)
    source, states, kwargs = opened("llama")
    block, asked = source.modules[0], options(3)
    goal = block_forward.copied(states, len(states))
    block_forward.replay(block, "m", goal, kwargs, block_forward.MicroBatch(CPU, 16, 64))
    solved = nearest(block, asked)
    kept = {k: v.clone() for k, v in block.state_dict().items()}
    assert tuning.tune_block(block, solved, asked, states, goal, kwargs) is solved
    assert all(torch.equal(v, kept[k]) for k, v in block.state_dict().items())


def test_far_tokens_do_not_drown_the_others() -> None:
    wanted, made = torch.ones(1, 9, 4), torch.ones(1, 9, 4)
    made[0, 3] = 1.5
    near = tuning._distance(made, wanted)
    wanted[0, 0], made[0, 0] = 1000.0, 1000.0
    assert tuning._distance(made, wanted) == near
    made[0, 0] = 1500.0  # as far off, in its own measure, as the other
    assert tuning._distance(made, wanted) == pytest.approx(2 * float(near))


def test_which_efforts_tune() -> None:
    assert [bits for bits in (2, 3, 4, 8) if effort("best", bits).tune] == [2, 3]
    assert not any(effort(quality, bits).tune for quality in ("fast", "default") for bits in (2, 3, 4, 8))
    assert tuning.windows_used(384, 2048) == 64
    assert tuning.windows_used(384, 256) == 512
    assert tuning.windows_used(384, 10_000) == 64


WORDS = [
    "--calib_data", str(EMBEDDED_CALIBRATION), "--calib_samples", "32", "--calib_seq_len", "128", "--bits", "2",
    "--quality", "best", "--eval_data", "auto", "--eval_samples", "8", "--device", "cpu",
]  # fmt: skip


def kl(path: Path) -> float:
    report = json.loads((path / "quantization_report.json").read_text())
    return float(report["measured"]["kl"])


def test_the_program_tunes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: Runs) -> None:
    tuned = runs("gptq", *WORDS)
    for name, weight in dequantize_directory(tuned.path).items():
        if name in tuned.weights:
            assert torch.equal(torch.from_numpy(weight), tuned.weights[name]), name
    monkeypatch.setitem(QUALITY_PRESETS, "best", replace(QUALITY_PRESETS["best"], tune=0))
    assert gptq_quantize.main([*WORDS, "--output_path", str(tmp_path / "plain")]) == 0
    assert kl(tuned.path) < 0.99 * kl(tmp_path / "plain")


@pytest.mark.parametrize("how", ["too little is free", "it runs out"])
def test_without_memory_nothing_is_tuned(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []

    def out_of_memory(*_: object) -> None:
        asked.append(1)
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    if how == "it runs out":
        monkeypatch.setattr(tuning, "_distance", out_of_memory)
    else:
        monkeypatch.setattr(loop, "_fits", lambda *_: False)
        monkeypatch.setattr(tuning, "tune_block", lambda *_: pytest.fail("tuned"))
    assert gptq_quantize.main([*WORDS, "--output_path", str(tmp_path / "short")]) == 0
    assert len(asked) == (how == "it runs out")
    warned = " ".join(capsys.readouterr().err.split())
    assert warned.count("tuning takes about") == 1
    assert "model.layers.0: tuning takes about 0." in warned
    monkeypatch.undo()
    monkeypatch.setitem(QUALITY_PRESETS, "best", replace(QUALITY_PRESETS["best"], tune=0))
    assert gptq_quantize.main([*WORDS, "--output_path", str(tmp_path / "plain")]) == 0
    assert kl(tmp_path / "short") == kl(tmp_path / "plain")


def test_grid_is_not_shared() -> None:
    """Settling makes new tensors: what was solved stays as it was."""
    block = torch.nn.Sequential(torch.nn.Linear(64, 8, bias=False))
    asked = options(4)
    (solved,) = nearest(block, asked)
    kept = QParams(solved.grid.scale.clone(), solved.grid.zero.clone()), solved.q.clone()
    linear = tuning._Linear(solved, asked, CPU)
    with torch.no_grad():
        linear.u.add_(1.0)
        linear.factor.mul_(1.1)
    new = linear.make_durable(block)
    assert not torch.equal(new.q, kept[1])
    assert torch.equal(solved.q, kept[1])
    assert torch.equal(solved.grid.scale, kept[0].scale)
