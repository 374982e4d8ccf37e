"""Tuning: its gradients by hand, what it does to windows that it was not tuned on, and memory that runs out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gptq_quantize
from conftest import Opened, Runs
from llm_quantize.blockwise import tuning
from llm_quantize.blockwise.block_solution import SolvedLinear
from llm_quantize.blockwise.layer_report import LayerReport
from llm_quantize.device import Device
from llm_quantize.io.embedded_files import EMBEDDED_CALIBRATION
from llm_quantize.kernels.precision import representable
from llm_quantize.model.block_forward import MicroBatch, forward, linear_at, replay
from llm_quantize.model.model_forward import embed
from llm_quantize.model.source import SourceModel
from llm_quantize.model.states import States
from llm_quantize.solver.qparams import QParams, dequantize, minmax_qparams, round_to_nearest
from llm_quantize.solver.quality import PRESETS, quality_preset
from llm_quantize.types import QuantScheme
from models import CPU, tokens
from reference import dequantize_directory

NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]
STEPS = 24


def make_scheme(bits: int, *, symmetric: bool = True) -> QuantScheme:
    return QuantScheme(bits, 32, symmetric, scale_dtypes=(torch.float16, torch.float32))


def nearest(block: Any, scheme: QuantScheme, *, dynamic: bool = False) -> list[SolvedLinear]:
    """Round all linears of a block to nearest, in the block too."""
    solved = []
    for path, linear in block.named_modules():
        if not isinstance(linear, torch.nn.Linear):
            continue
        W = linear.weight.detach().float()
        g_idx = None
        order = back = torch.arange(W.shape[1])
        if dynamic:
            order = torch.randperm(W.shape[1], generator=torch.Generator().manual_seed(len(path)))
            back = torch.argsort(order)
            g_idx = torch.div(back, scheme.group_size, rounding_mode="floor").to(torch.int32)
        qparams = minmax_qparams(W[:, order], scheme)
        q = round_to_nearest(W[:, order], qparams, scheme)
        with torch.no_grad():
            linear.weight.copy_(dequantize(q, qparams)[:, back])
        report = LayerReport(path, 0.0, 0.1, 0, None, None, 0.0)
        solved.append(SolvedLinear(path, q[:, back].contiguous(), qparams, g_idx, report))
    return solved


def by_hand(each: SolvedLinear, size: int) -> Tensor:
    """The weight of a linear, de-quantized a column at a time."""
    columns = []
    for i in range(each.q.shape[1]):
        group = i // size if each.g_idx is None else int(each.g_idx[i])
        columns.append((each.q[:, i].float() - each.qparams.zero[:, group]) * each.qparams.scale[:, group])
    return torch.stack(columns, 1)


def reference_states(found: Opened) -> States:
    """What the block makes of its states."""
    target = found.states.copy(len(found.states))
    replay(found.model.modules[0], "m", target, found.kwargs, MicroBatch(Device(CPU), 16, 64))
    return target


@pytest.mark.parametrize("bits", [2, 8])
def test_gradients(bits: int) -> None:
    """`round(u) s` has the gradient of `u s` for `u`, and for `s` the sum of `round(u)` over the group."""
    g = torch.Generator().manual_seed(0)
    qmax = 2**bits - 1
    zero = torch.randint(0, qmax + 1, (5, 3), generator=g).float()
    u = (torch.randn(5, 12, generator=g) * qmax).requires_grad_()
    scale = torch.rand(5, 3, generator=g).requires_grad_()
    made = tuning._RoundStraightThrough.apply(u, scale, zero, qmax, torch.float32)
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
    symmetric: bool, dynamic: bool, saved: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "STEP_TOKENS", 256)
    model = SourceModel.open(saved("llama", torch.float32))
    states, all_kwargs = embed(model, tokens(120, 32), CPU, CPU, torch.float32)
    block, kwargs = model.load_block(0, CPU, torch.float32), all_kwargs[0]
    scheme = make_scheme(3, symmetric=symmetric)
    target = reference_states(Opened(model, states, kwargs))
    others = {k: v.clone() for k, v in block.named_parameters() if "norm" in k}
    solved = nearest(block, scheme, dynamic=dynamic)
    with torch.no_grad():
        before = tuning._distance(forward(block, states.data, kwargs), target.data)
    tuned = tuning.tune_block(block, solved, scheme, 96, states, target.copy(96), kwargs)
    with torch.no_grad():
        made = forward(block, states.data, kwargs)
    # The last fifth of the windows was not among those that it was tuned on.
    assert tuning._distance(made[96:], target.data[96:]) < 0.95 * before
    assert [t.path for t in tuned] == [s.path for s in solved]
    changed = 0
    for old, new in zip(solved, tuned, strict=True):
        assert new.report == old.report
        assert new.g_idx is old.g_idx
        assert new.q.dtype == torch.uint8
        assert int(new.q.max()) <= 7
        assert torch.equal(new.qparams.zero, old.qparams.zero)
        assert torch.equal(new.qparams.scale, representable(new.qparams.scale, scheme.scale_dtypes))
        assert torch.equal(linear_at(block, new.path).weight, by_hand(new, 32))
        changed += int((new.q != old.q).sum())
    assert changed > 100
    assert all(torch.equal(block.get_parameter(k), v) for k, v in others.items())


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_twice(device: str, opened: Callable[[str], Opened]) -> None:
    results = []
    for _ in range(2):
        found = opened("qwen2")
        block, states, kwargs = found.model.modules[0], found.states, found.kwargs
        scheme = make_scheme(2)
        target = reference_states(found)
        solved = nearest(block, scheme)
        if device == "cuda":
            block.to(device)
            states, target = _moved(states), _moved(target)
            kwargs = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.cuda(), kwargs)
        results.append(tuning.tune_block(block, solved, scheme, STEPS, states, target, kwargs))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one.q, other.q)
        assert torch.equal(one.qparams.scale, other.qparams.scale)


def _moved(states: States) -> States:
    device = torch.device("cuda")
    moved = States(tuple(states.data.shape), states.data.dtype, device, device)
    moved.data.copy_(states.data)
    return moved


def test_a_block_at_its_target_stays(opened: Callable[[str], Opened]) -> None:
    """Where the block gives the target, there is no gradient."""
    model, states, kwargs = opened("llama")
    block, scheme = model.modules[0], make_scheme(4)
    solved = nearest(block, scheme)
    target = states.copy(len(states))
    with torch.no_grad():
        target.data.copy_(tuning._BlockRun(block, kwargs, CPU)(states.data, {}))
    tuned = tuning.tune_block(block, solved, scheme, STEPS, states, target, kwargs)
    for old, new in zip(solved, tuned, strict=True):
        assert torch.equal(old.q, new.q)
        assert torch.equal(old.qparams.scale, new.qparams.scale)


@pytest.mark.parametrize("rate", [1e6, float("nan")])
def test_tuning_that_does_not_help_is_given_up(
    rate: float, opened: Callable[[str], Opened], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "SCALE_RATE", rate)
    found = opened("llama")
    block, scheme = found.model.modules[0], make_scheme(3)
    target = reference_states(found)
    solved = nearest(block, scheme)
    kept = {k: v.clone() for k, v in block.state_dict().items()}
    assert tuning.tune_block(block, solved, scheme, STEPS, found.states, target, found.kwargs) is solved
    assert all(torch.equal(v, kept[k]) for k, v in block.state_dict().items())


def test_large_tokens_do_not_hide_the_others() -> None:
    wanted, made = torch.ones(1, 9, 4), torch.ones(1, 9, 4)
    made[0, 3] = 1.5
    small = tuning._distance(made, wanted)
    wanted[0, 0], made[0, 0] = 1000.0, 1000.0
    assert tuning._distance(made, wanted) == small
    made[0, 0] = 1500.0  # relative to its size as far off as the other
    assert tuning._distance(made, wanted) == pytest.approx(2 * float(small))


def test_which_presets_tune() -> None:
    assert [bits for bits in (2, 3, 4, 8) if quality_preset("best", bits).tuning_steps] == [2, 3]
    for bits in (2, 3, 4, 8):
        assert not quality_preset("fast", bits).tuning_steps
        assert not quality_preset("default", bits).tuning_steps
    assert tuning.windows_used(384, 2048) == 64
    assert tuning.windows_used(384, 256) == 512
    assert tuning.windows_used(384, 10_000) == 64


@pytest.fixture(scope="module")
def words(saved: Callable[..., Path]) -> list[str]:
    """The arguments of a run whose tuning takes 96 steps a block; in half of them no integer can change.

    No linear of GPT-NeoX adds to the residual stream by itself, so rounding leaves much for tuning to do: the KL
    divergence falls by 15 %.
    """
    return [
        "--model_path", str(saved("gpt_neox")), "--bits", "2", "--group_size", "32", "--quality", "best",
        "--calib_data", str(EMBEDDED_CALIBRATION), "--calib_samples", "512", "--calib_seq_len", "64",
        "--eval_data", "auto", "--eval_samples", "16", "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def untuned(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the same run publishes without tuning."""
    path = tmp_path_factory.mktemp("untuned") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "best", replace(PRESETS["best"], tuning_steps=0))
        assert gptq_quantize.main([*words, "--output_path", str(path)]) == 0
    return path


def kl(path: Path) -> float:
    report = json.loads((path / "quantization_report.json").read_text())
    return float(report["measured"]["kl"])


def test_the_program_tunes(words: list[str], untuned: Path, runs: Runs) -> None:
    tuned = runs("gptq", *words)
    published = dequantize_directory(tuned.path)
    assert tuned.weights.keys() <= published.keys()
    for name, weight in tuned.weights.items():
        assert torch.equal(torch.from_numpy(published[name]), weight), name
    assert kl(tuned.path) < 0.95 * kl(untuned)


@pytest.mark.parametrize("how", ["too little is free", "it runs out"])
def test_without_memory_nothing_is_tuned(
    how: str,
    words: list[str],
    untuned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[int] = []

    def out_of_memory(*_: object) -> None:
        asked.append(1)
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.")

    if how == "it runs out":
        monkeypatch.setattr(tuning, "_distance", out_of_memory)
    else:
        monkeypatch.setattr(Device, "has_room", lambda *_: False)
        monkeypatch.setattr(tuning, "tune_block", lambda *_: pytest.fail("tuned"))
    assert gptq_quantize.main([*words, "--output_path", str(tmp_path / "short")]) == 0
    assert len(asked) == (how == "it runs out")
    warned = " ".join(capsys.readouterr().err.split())
    assert warned.count("tuning takes about") == 1
    assert "gpt_neox.layers.0: tuning takes about 0." in warned
    assert kl(tmp_path / "short") == kl(untuned)


def test_the_solution_stays_as_it_was() -> None:
    """The tuned linear has tensors of its own."""
    block = torch.nn.Sequential(torch.nn.Linear(64, 8, bias=False))
    scheme = make_scheme(4)
    (solved,) = nearest(block, scheme)
    kept = QParams(solved.qparams.scale.clone(), solved.qparams.zero.clone()), solved.q.clone()
    linear = tuning._TunedLinear(solved, scheme, CPU)
    with torch.no_grad():
        linear.u.add_(1.0)
        linear.factor.mul_(1.1)
    new = linear.finish(block)
    assert not torch.equal(new.q, kept[1])
    assert torch.equal(solved.q, kept[1])
    assert torch.equal(solved.qparams.scale, kept[0].scale)
