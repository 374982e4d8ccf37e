"""GPTQ's rounding against a plain one in float64, its factor, coordinate descent, AWQ's scales, whole blocks."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from llm_quantize.blockwise.block_solution import BlockProblem, SolvedLinear, solve_block
from llm_quantize.blockwise.channel_scaling import BlockScaling
from llm_quantize.kernels import cholesky
from llm_quantize.kernels.launcher import on_triton
from llm_quantize.kernels.streams import StreamPool
from llm_quantize.model.awq_mappings import AWQMapping
from llm_quantize.solver import compensation
from llm_quantize.solver.awq import SEARCH, AWQSolver, candidate_scales, choose_scales
from llm_quantize.solver.base import Solver
from llm_quantize.solver.compensation import compensate, descend, output_forms, relative_error
from llm_quantize.solver.factorization import (
    Factor,
    NotFactorizable,
    _factor,
    activation_order,
    condition_,
    diagonal_norms,
    factorize,
)
from llm_quantize.solver.gptq import GPTQSolver
from llm_quantize.solver.problem import Problem
from llm_quantize.solver.qparams import (
    QParams,
    dequantize,
    hessian_blocks,
    minmax_qparams,
    round_to_nearest,
    search_qparams,
)
from llm_quantize.solver.quality import PRESETS
from llm_quantize.types import QuantScheme
from models import random_hessian, weights


def output_error(W: Tensor, V: Tensor, H: Tensor) -> float:
    """The relative squared output error of `V` in place of `W`."""
    return relative_error(output_forms(W, V, H))


def scaled_problem(H: Tensor, factor: Factor, scale: Tensor) -> Problem:
    """The problem of inputs divided by `scale`; `H` and `factor` stay as they are."""
    problem = Problem(H.clone(), copy.deepcopy(factor), factor.damping, 0, None, 0.0)
    problem.scale_inputs_(scale)
    return problem


def condition(H: Tensor, damping: float) -> Tensor:
    """A damped copy of `H`."""
    damped = H.clone()
    condition_(damped, damping)
    return damped


def plain_gptq(W: Tensor, qparams: QParams, scheme: QuantScheme, H: Tensor, order: list[int]) -> Tensor:
    """Round one column after another, with the inverse itself, in float64: equations 2 and 3 of the paper."""
    W, H = W.double().clone(), H.double()
    inverse = torch.linalg.inv(H[order][:, order])
    q = torch.zeros(W.shape, dtype=torch.uint8)
    for step, column in enumerate(order):
        s = qparams.scale[:, column // scheme.group_size].double()
        z = qparams.zero[:, column // scheme.group_size].double()
        integer = (torch.round(W[:, column] / s) + z).clamp(0, scheme.qmax)
        q[:, column] = integer.to(torch.uint8)
        error = (W[:, column] - (integer - z) * s) / inverse[0, 0]
        for place, other in enumerate(order[step + 1 :], 1):
            W[:, other] -= error * inverse[0, place]
        inverse = (inverse - torch.outer(inverse[:, 0], inverse[0]) / inverse[0, 0])[1:, 1:]
    return q


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize(
    ("width", "group", "bits", "symmetric"),
    [(32, 32, 4, True), (96, 32, 2, False), (160, 160, 3, True), (200, 40, 4, False), (384, 128, 8, True)],
)
def test_compensate_is_gptq(width: int, group: int, bits: int, symmetric: bool, act_order: bool) -> None:
    W, H = weights(24, width), random_hessian(width, 4 * width)
    scheme = QuantScheme(bits, group, symmetric)
    qparams = minmax_qparams(W, scheme)
    factor = factorize(H.clone(), 0.05, act_order=act_order)
    damped = condition(H, 0.05)
    found = compensate(W, qparams, scheme, factor)
    expected = plain_gptq(W, qparams, scheme, damped, factor.order.tolist())
    assert found.dtype == torch.uint8
    # At a near tie float32 may round the other way, and then the rest of that row differs too.
    same = (found == expected).all(1)
    assert float(same.float().mean()) >= 0.8
    ours, theirs = (output_error(W, dequantize(q, qparams), damped) for q in (found, expected))
    assert ours == pytest.approx(theirs, rel=0.02)
    assert ours < output_error(W, dequantize(round_to_nearest(W, qparams, scheme), qparams), damped)


@pytest.mark.parametrize("act_order", [True, False])
def test_identity_gives_rounding_to_nearest(act_order: bool) -> None:
    W = weights(40, 160)
    scheme = QuantScheme(3, 32, False)
    qparams = minmax_qparams(W, scheme)
    q = compensate(W, qparams, scheme, factorize(torch.eye(160), 0.1, act_order=act_order))
    assert torch.equal(q, round_to_nearest(W, qparams, scheme))
    descended, after = descend(W, q, qparams, scheme, torch.eye(160), sweeps=2, refit=False)
    assert torch.equal(descended, q)
    assert torch.equal(after.scale, qparams.scale)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("width", [48, 700])
def test_factor(width: int, act_order: bool) -> None:
    H = random_hessian(width, 3 * width)
    factor = factorize(H.clone(), 0.01, act_order=act_order)
    assert factor.damping == 0.01
    assert torch.equal(factor.U, factor.U.triu())
    assert bool((factor.U.diagonal() > 0).all())
    if act_order:
        diagonal = H.diagonal()[factor.order]
        assert bool((diagonal[:-1] >= diagonal[1:]).all())
    assert sorted(factor.order.tolist()) == list(range(width))
    rows = factor.U.norm(dim=1)
    assert bool((factor.norms <= rows * 1.0001).all() and (rows < 2.0001 * factor.norms).all())
    damped = condition(H, 0.01).double()[factor.order][:, factor.order]
    U = factor.U.double()
    torch.testing.assert_close(U @ U.T, damped, rtol=0, atol=1e-5 * float(damped.diagonal().max()))
    blocks_are_inverted(factor)


def blocks_are_inverted(factor: Factor) -> None:
    """Assert that the inverses are those of blocks that cover the diagonal."""
    stops = [0]
    for span, R in factor.spans():
        assert span.start == stops[-1]
        stops.append(span.stop)
        assert torch.equal(R, R.triu())
        identity = factor.U[span, span].double() @ R.double()
        torch.testing.assert_close(identity, torch.eye(len(R), dtype=torch.float64), rtol=0, atol=2e-4)
    assert stops[-1] == len(factor.U)


def test_condition() -> None:
    H = torch.diag(torch.tensor([1.0, 0.0, 3.0, 4.0]))
    assert condition(H, 0.5).diagonal().tolist() == [2.0, 3.0, 4.0, 5.0]  # mean 2: floored to 2, plus 1
    assert H[1, 1] == 0
    assert condition(torch.zeros(3, 3), 0.1).diagonal().tolist() == pytest.approx([1.1] * 3)
    outlier = torch.diag(torch.tensor([1.0, 2.0, 3.0, 1e6]))  # counts for ten times the median, which is 2
    assert condition(outlier, 0.5).diagonal().tolist() == pytest.approx([4.25, 5.25, 6.25, 1e6 + 3.25])
    nan = torch.diag(torch.tensor([1.0, float("nan"), 3.0]))
    assert bool(condition(nan, 0.5).diagonal().isnan().any())  # not taken for a dead channel
    assert activation_order(torch.diag(torch.tensor([1.0, 5.0, 1.0, 5.0]))).tolist() == [1, 3, 0, 2]


def test_dead_channels_are_rounded_to_nearest() -> None:
    H = random_hessian(64, 256)
    dead = [3, 17, 63]
    H[dead] = 0
    H[:, dead] = 0
    W = weights(16, 64)
    scheme = QuantScheme(4, 32, True)
    qparams = minmax_qparams(W, scheme)
    q = compensate(W, qparams, scheme, factorize(H.clone(), 0.1, act_order=True))
    assert torch.equal(q[:, dead], round_to_nearest(W, qparams, scheme)[:, dead])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 2, 5, 1023, 1024, 2050])
def test_factor_of_every_width(width: int, dtype: torch.dtype) -> None:
    """The permutation, Cholesky and the turn work in strips, and no row is lost at a strip's border."""
    x = torch.randn(8, width, generator=torch.Generator().manual_seed(0))
    H = x.T @ x + torch.eye(width)
    reverse = activation_order(H).flip(0)
    norms = diagonal_norms(H)
    U, inverses, failed = _factor(H, reverse, norms, dtype)
    assert not failed
    expected = torch.linalg.cholesky(H[reverse][:, reverse].double()).flip(0, 1)
    torch.testing.assert_close(U.double(), expected, rtol=1e-3, atol=1e-4)
    blocks_are_inverted(Factor(U, inverses, reverse.flip(0), norms, 0.0))


def test_factorize_damps_in_place() -> None:
    H = random_hessian(48, 200)
    H[5] = H[:, 5] = 0
    expected = condition(H, 0.1)
    factorize(H, 0.1, act_order=True)
    assert torch.equal(H, expected)
    bad = torch.eye(32)
    bad[0, 1] = bad[1, 0] = 100.0
    before = bad.clone()
    with pytest.raises(NotFactorizable):
        factorize(bad, 0.01, act_order=True)
    assert torch.equal(bad, before)


def test_singular_hessian_needs_damping() -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    H = x.T @ x / 8
    raised = factorize(H.clone(), 0.0, act_order=False)
    assert raised.damping >= 1e-3
    kept = factorize(H.clone(), 0.1, act_order=False)
    assert kept.damping == 0.1
    U = kept.U.double()
    damped = condition(H, 0.1).double()[kept.order][:, kept.order]
    torch.testing.assert_close(U @ U.T, damped, rtol=0, atol=1e-5)


def test_damping_is_raised_until_the_hessian_is_definite() -> None:
    H = torch.eye(32)
    H[0, 1] = H[1, 0] = 1.5  # eigenvalues 2.5 and -0.5
    factor = factorize(H.clone(), 0.01, act_order=True)
    assert factor.damping == pytest.approx(1.0)
    H[0, 1] = H[1, 0] = 100.0
    with pytest.raises(NotFactorizable):
        factorize(H.clone(), 0.01, act_order=True)


@pytest.mark.parametrize("where", [(2, 2), (3, 9)])
def test_nan_has_no_factor(where: tuple[int, int]) -> None:
    H = random_hessian(32, 128)
    H[where] = H[where[::-1]] = float("nan")
    with pytest.raises(NotFactorizable):
        factorize(H.clone(), 0.1, act_order=False)


@pytest.mark.parametrize("span", [128, 256, 384])
@pytest.mark.parametrize("group", [32, 160, 400])
def test_spans_change_nothing_but_the_order_of_sums(
    span: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The update accumulates over spans of columns; with several spans the result is that of one."""
    W, H = weights(24, 800), condition(random_hessian(800, 2400), 0.05)
    scheme = QuantScheme(4, group, True)
    qparams = search_qparams(W, hessian_blocks(H, group), scheme)
    results = []
    for size in (4096, span):
        monkeypatch.setattr(compensation, "SPAN", size)
        monkeypatch.setattr(cholesky, "PANEL", size)  # the spans of `compensate` are the factor's blocks
        factor = factorize(H.clone(), 0.0, act_order=True)
        assert len(factor.inverses) == -(-800 // size)
        q = compensate(W, qparams, scheme, factor)
        results.append((q, *descend(W, q, qparams, scheme, H, sweeps=3, refit=True)))
    (q, descended, one), (q_spans, descended_spans, several) = results
    # After a near tie the rest of a row may be rounded otherwise.
    assert float((q == q_spans).all(1).float().mean()) > 0.7
    assert float((descended == descended_spans).all(1).float().mean()) > 0.5
    errors = [
        output_error(W, dequantize(integers, found), H)
        for integers, found in ((descended, one), (descended_spans, several))
    ]
    assert errors[1] == pytest.approx(errors[0], rel=2e-3)
    if span == 256:
        pieces = [piece for part in compensation._spans(800, group) for piece in part]
        assert [c for piece in pieces for c in range(800)[piece]] == list(range(800))
        assert all(part[-1].stop - part[0].start <= span for part in compensation._spans(800, group))


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(2, 32, False), (4, 128, True), (8, 320, False)])
@pytest.mark.parametrize("size", [1.0, 1e-8, 1e8])
def test_half_precision_products_cost_nothing(
    bits: int, group: int, symmetric: bool, size: float, halves: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few rows and channels are a thousand times as large or as small as the others; rounding is as good."""
    width = 640
    monkeypatch.setattr(compensation, "SPAN", 256)
    monkeypatch.setattr(cholesky, "PANEL", 256)
    W, channels = weights(200, width) * size**0.25, torch.ones(width)
    W[::5] *= 1e-3
    channels[7::50], channels[9::50] = 1e3, 1e-3
    H = condition(random_hessian(width, 3 * width), 0.02) * channels * channels[:, None] * size
    W /= channels
    scheme = QuantScheme(bits, group, symmetric)
    qparams = search_qparams(W, hessian_blocks(H, group), scheme)
    errors = []
    for half_products in (True, False):
        monkeypatch.setattr(cholesky, "has_half_products", lambda _, has=half_products: has)
        factor = factorize(H.clone(), 1e-4, act_order=True)
        q = compensate(W, qparams, scheme, factor)
        found = descend(W, q, qparams, scheme, H, sweeps=2, refit=True)
        errors.append([quadratic(W, dequantize(*each), H) for each in ((q, qparams), found)])
        assert (len(halves) > 0) == half_products
        halves.clear()
    for half, full in zip(*errors, strict=True):
        assert float((half / full - 1).abs().mean()) < 4e-3
        assert float(half.log().mean() - full.log().mean()) == pytest.approx(0, abs=2e-3)


def quadratic(W: Tensor, V: Tensor, H: Tensor) -> Tensor:
    """The squared output error of each row: float64 (out)."""
    E = (W - V).double()
    return ((E @ H.double()) * E).sum(1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize(
    ("width", "group"), [(64, 32), (256, 128), (320, 160), (384, 192), (200, 200), (512, 256)]
)
def test_descent_never_raises_the_error(width: int, group: int, refit: bool, symmetric: bool) -> None:
    W, H = weights(20, width), condition(random_hessian(width, 3 * width), 0.05)
    scheme = QuantScheme(3, group, symmetric, scale_dtypes=(torch.bfloat16, torch.float16))
    qparams = search_qparams(W, hessian_blocks(H, group), scheme)
    q = compensate(W, qparams, scheme, factorize(H.clone(), 0.0, act_order=True))
    before = quadratic(W, dequantize(q, qparams), H)
    scale = qparams.scale.clone()
    for _ in range(3):
        q, qparams = descend(W, q, qparams, scheme, H, sweeps=1, refit=refit)
        after = quadratic(W, dequantize(q, qparams), H)
        assert bool((after <= before * (1 + 1e-5)).all())
        before = after
    assert int(q.max()) <= 7
    for dtype in scheme.scale_dtypes:
        assert torch.equal(qparams.scale.to(dtype).float(), qparams.scale)
    if not refit:
        assert torch.equal(qparams.scale, scale)


def test_a_sweep_builds_on_the_one_before() -> None:
    """Four sweeps in one call are as good as four calls with one sweep."""
    W, H = weights(40, 512), condition(random_hessian(512, 1500), 0.02)
    scheme = QuantScheme(3, 64, False)
    qparams = minmax_qparams(W, scheme)
    q = round_to_nearest(W, qparams, scheme)
    once = descend(W, q, qparams, scheme, H, sweeps=4, refit=True)
    singly = (q, qparams)
    for _ in range(4):
        singly = descend(W, *singly, scheme, H, sweeps=1, refit=True)
    ours, theirs = (quadratic(W, dequantize(*each), H).sum() for each in (once, singly))
    assert float(ours) == pytest.approx(float(theirs), rel=1e-3)


def test_descent_ends_where_no_single_step_helps() -> None:
    W, H = weights(30, 6), condition(random_hessian(6, 40), 0.01)
    scheme = QuantScheme(2, 6, False)
    qparams = minmax_qparams(W, scheme)
    q = round_to_nearest(W, qparams, scheme)
    start = quadratic(W, dequantize(q, qparams), H)
    found, _ = descend(W, q, qparams, scheme, H, sweeps=20, refit=False)
    end = quadratic(W, dequantize(found, qparams), H)
    every = torch.tensor(list(itertools.product(range(4), repeat=6)), dtype=torch.uint8)
    best = torch.stack(
        [
            quadratic(
                W[row].expand(len(every), -1),
                (every.float() - qparams.zero[row]) * qparams.scale[row],
                H,
            ).min()
            for row in range(30)
        ]
    )
    assert bool((end >= best * (1 - 1e-6)).all())
    assert float((end - best).sum()) < 0.5 * float((start - best).sum())
    for row in range(30):
        for column in range(6):
            for value in range(4):
                other = found[row : row + 1].clone()
                other[0, column] = value
                assert quadratic(W[row : row + 1], dequantize(other, row_qparams(qparams, row)), H) >= end[
                    row
                ] * (1 - 1e-5)


def row_qparams(qparams: QParams, row: int) -> QParams:
    return QParams(qparams.scale[row : row + 1], qparams.zero[row : row + 1])


@pytest.mark.parametrize("act_order", [True, False])
def test_scaled_inputs_need_no_new_factorization(act_order: bool) -> None:
    H = condition(random_hessian(96, 300), 0.05)
    factor = factorize(H.clone(), 0.0, act_order=act_order)
    order = factor.order.clone()
    scale = torch.exp(torch.randn(96, generator=torch.Generator().manual_seed(2)) * 0.5)
    expected = H / (scale[:, None] * scale)
    problem = scaled_problem(H, factor, scale)
    assert problem.factor is not None
    assert torch.equal(problem.H, expected)
    fresh = factorize(expected[order][:, order], 0.0, act_order=False)
    torch.testing.assert_close(problem.factor.U, fresh.U, rtol=2e-3, atol=2e-4)
    blocks_are_inverted(problem.factor)
    assert torch.equal(problem.factor.order, order)


def test_output_error_is_that_of_outputs() -> None:
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    W, V = weights(5, 12, 1), weights(5, 12, 2)
    expected = ((x @ (W - V).T) ** 2).sum() / ((x @ W.T) ** 2).sum()
    assert output_error(W, V, x.T @ x / 50) == pytest.approx(float(expected), rel=1e-5)
    assert output_error(torch.zeros(5, 12), torch.zeros(5, 12), torch.eye(12)) == 0.0


# -- AWQ


def test_candidate_scales() -> None:
    H = torch.diag(torch.tensor([1.0, 4.0, 9.0, 16.0]))
    rows = torch.tensor([0, 0, 2, 3])
    plain, found = candidate_scales(H, rows, 5, (0.0, 1.0))
    assert plain.tolist() == [1.0] * 5
    rms = torch.tensor([2.5**0.5, 1.0, 3.0, 4.0, 1.0])
    middle = (4.0 * 2.5**0.5) ** 0.5
    used = torch.tensor([True, False, True, True, False])
    torch.testing.assert_close(found[used], rms[used] / middle)
    assert found[~used].tolist() == [1.0, 1.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_candidate_scales_are_always_the_same() -> None:
    """Seven query heads share a value head, whose powers a GPU could add in any order: the bits are the same."""
    H = torch.diag(torch.rand(3584, generator=torch.Generator().manual_seed(0)).exp())
    channel = torch.arange(3584)
    rows = channel // 128 // 7 * 128 + channel % 128
    expected = candidate_scales(H, rows, 512, (0.5,))
    H, rows = H.cuda(), rows.cuda()
    found = [candidate_scales(H, rows, 512, (0.5,)) for _ in range(50)]
    torch.testing.assert_close(found[0].cpu(), expected)
    assert all(torch.equal(each, found[0]) for each in found)


def scaled_loss(W: Tensor, H: Tensor, factor: Factor, scale: Tensor, scheme: QuantScheme) -> float:
    """The output error after scaling by `scale`, searching scales and rounding, each as a step of its own."""
    problem = scaled_problem(H, factor, scale)
    assert problem.factor is not None
    scaled = W * scale
    blocks = hessian_blocks(problem.H, scheme.group_width(W.shape[1]))
    qparams = search_qparams(scaled, blocks, scheme, SEARCH)
    q = compensate(scaled, qparams, scheme, problem.factor)
    return float(quadratic(scaled, dequantize(q, qparams), problem.H).sum())


@pytest.mark.parametrize("size", [32, 1024])
def test_channel_scales_of_every_group_size(size: int) -> None:
    """One search for all candidates finds what one for each finds, also where only the diagonal is used."""
    W, H = weights(20, 1024), condition(random_hessian(1024, 2048), 0.05)
    factor = factorize(H.clone(), 0.0, act_order=True)
    scheme = QuantScheme(4, size, True)
    chosen = choose_scales(W, H, factor, torch.arange(1024), 1024, scheme)
    index = int(chosen.losses.argmin())
    s = candidate_scales(H, torch.arange(1024), 1024, (chosen.alpha,))[0]
    torch.testing.assert_close(chosen.scale, s)
    again = scaled_loss(W, H, factor, s, scheme)
    assert float(chosen.losses[index]) == pytest.approx(again, rel=0.01)


def test_channel_scales_are_judged_by_the_rounding_that_follows() -> None:
    """The losses are those of scaling, searching and rounding in turn; no scaling is among the candidates."""
    W, H = weights(60, 64), condition(random_hessian(64, 256), 0.05)
    factor = factorize(H.clone(), 0.0, act_order=True)
    scheme = QuantScheme(3, 32, False)
    chosen = choose_scales(W, H, factor, torch.arange(64), 64, scheme)
    assert chosen.losses[0] >= chosen.losses.min()
    for alpha, loss in zip((0.0, 0.3, 0.6), (float(chosen.losses[i]) for i in (0, 3, 6)), strict=True):
        (s,) = candidate_scales(H, torch.arange(64), 64, (alpha,))
        again = scaled_loss(W, H, factor, s, scheme)
        assert loss == pytest.approx(again, rel=0.01)


# -- a block


class Block(nn.Module):
    """Two linears behind one norm, which together feed a third."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.a = nn.Linear(64, 64)
        self.b = nn.Linear(64, 64)
        self.c = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        result: Tensor = self.c(torch.sigmoid(self.a(x)) * self.b(x))
        return result


GROUPS = [["a", "b"], ["c"]]
MAPPINGS = [AWQMapping("norm", ("a", "b"), torch.arange(64)), AWQMapping("b", ("c",), torch.arange(64))]
SCHEME = QuantScheme(4, 32, False)
Hessians = list[Tensor | None]


def calibrated() -> tuple[Block, Tensor, Hessians]:
    """A block, tokens that enter it, and the Hessians of the inputs of both groups."""
    torch.manual_seed(0)
    block = Block()
    with torch.no_grad():
        block.norm.weight.copy_(torch.exp(torch.randn(64)))
        block.norm.bias.normal_(std=0.3)
        block.b.weight.mul_(torch.exp(torch.randn(64, 1)))
        x = torch.randn(600, 64)
        n = block.norm(x)
        m = torch.sigmoid(block.a(n)) * block.b(n)
    return block, x, [n.T @ n / 600, m.T @ m / 600]


def make_problem(
    block: Block,
    hessians: Callable[[int], Tensor | None],
    mappings: list[AWQMapping],
    *,
    quality: str = "default",
    dynamic_groups: bool = False,
    name: str = "m",
) -> BlockProblem:
    """The block as AWQ solves it where there are mappings, and as GPTQ does where there are none."""
    solver: Solver = AWQSolver(SCHEME, PRESETS[quality])
    if not mappings:
        solver = GPTQSolver(SCHEME, PRESETS[quality], damping=0.05, dynamic_groups=dynamic_groups)
    assert solver.damping == 0.05
    scaling = BlockScaling(block, GROUPS, mappings, solver, torch.float16)
    return BlockProblem(block, name, GROUPS, hessians, solver, scaling)


@torch.no_grad()
def solve(problem: BlockProblem, streams: StreamPool | None = None) -> list[SolvedLinear]:
    return list(solve_block(problem, streams=streams))


@pytest.mark.parametrize("mappings", [[], MAPPINGS], ids=["gptq", "awq"])
@pytest.mark.parametrize("quality", ["fast", "default", "best"])
def test_solve_block(quality: str, mappings: list[AWQMapping]) -> None:
    block, x, hessians = calibrated()
    before = block(x).detach()
    plain = Block()
    plain.load_state_dict(block.state_dict())
    given, asked = dict(enumerate(hessians)), []

    def take(index: int) -> Tensor | None:
        asked.append(index)
        return given.pop(index)

    problem = make_problem(block, take, mappings, quality=quality, name="m.0")
    with torch.no_grad():
        for linear in (plain.a, plain.b, plain.c):
            qparams = minmax_qparams(linear.weight, SCHEME)
            linear.weight.copy_(dequantize(round_to_nearest(linear.weight, qparams, SCHEME), qparams))
        solved = solve(problem)
        after, rtn = block(x), plain(x)
    for s in solved:
        assert torch.equal(block.get_parameter(f"{s.path}.weight"), dequantize(s.q, s.qparams))
        assert s.report.name == f"m.0.{s.path}"
        assert s.report.fallback is None
        assert 0 < s.report.error < 0.02
    assert (after - before).pow(2).mean() < 0.8 * (rtn - before).pow(2).mean()
    assert asked == ([1, 0] if mappings else [0, 1])
    assert [s.path for s in solved] == (["c", "a", "b"] if mappings else ["a", "b", "c"])
    alphas = {s.path: s.report.alpha for s in solved}
    changed = problem.scaling.changed_parameters()
    if mappings:
        assert alphas["c"]
        assert alphas["a"] == alphas["b"] != 0
        assert changed == {"norm.weight", "norm.bias", "b.bias"}
    else:
        assert set(alphas.values()) == {None}
        assert not changed


@pytest.mark.parametrize("mappings", [[], MAPPINGS], ids=["gptq", "awq"])
def test_solving_in_parallel_changes_nothing(mappings: list[AWQMapping]) -> None:
    """With streams, all factors and all scales come before the rounding. The bits are those of groups in turn."""
    found = []
    for streams in (None, StreamPool()):
        block, _, hessians = calibrated()
        problem = make_problem(block, hessians.__getitem__, mappings)
        solved = solve(problem, streams)
        reports = [(s.path, s.report.name, s.report.error, s.report.alpha) for s in solved]
        changed = problem.scaling.changed_parameters()
        found.append((reports, [s.q for s in solved], list(block.parameters()), changed))
    (reports, integers, parameters, changed), other = found
    assert (reports, changed) == (other[0], other[3])
    for one, same in zip([*integers, *parameters], [*other[1], *other[2]], strict=True):
        assert torch.equal(one, same)


@pytest.mark.parametrize("streams", [None, StreamPool()], ids=["in turn", "in parallel"])
def test_no_scaling_changes_nothing(streams: StreamPool | None) -> None:
    """Where all channels are alike, the scales are one: only the rounded weights change."""
    block, _, _ = calibrated()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(1e-5)  # more digits than float16 has
    before = {name: p.detach().clone() for name, p in block.named_parameters()}
    problem = make_problem(block, lambda _: torch.eye(64), MAPPINGS)
    solved = solve(problem, streams)
    assert [s.report.alpha for s in solved] == [0.0] * 3
    assert not problem.scaling.changed_parameters()
    for name, parameter in block.named_parameters():
        assert torch.equal(parameter, before[name]) != (name in ("a.weight", "b.weight", "c.weight")), name


def test_dynamic_groups_follow_the_activation_order() -> None:
    block, _, hessians = calibrated()
    H = hessians[1]
    assert H is not None
    order = activation_order(H)
    W = block.c.weight.detach().clone()
    solved = solve(make_problem(block, hessians.__getitem__, [], dynamic_groups=True))
    (c,) = (s for s in solved if s.path == "c")
    assert c.g_idx is not None
    assert c.g_idx.dtype == torch.int32
    assert torch.equal(c.g_idx[order], torch.arange(64, dtype=torch.int32) // 32)
    V = (c.q.float() - c.qparams.zero[:, c.g_idx.long()]) * c.qparams.scale[:, c.g_idx.long()]
    assert torch.equal(block.c.weight, V)
    assert output_error(W, V, H) < 0.01


@pytest.mark.parametrize("kind", ["missing", "nan", "indefinite"])
def test_what_cannot_be_solved_is_rounded_to_nearest(kind: str) -> None:
    block, _, hessians = calibrated()
    H = hessians[1]
    assert H is not None
    if kind == "missing":
        hessians[1] = None
    elif kind == "nan":
        H[3, 4] = H[4, 3] = float("nan")
    else:
        H[0, 1] = H[1, 0] = 1e6
    W = block.c.weight.detach().clone()
    solved = solve(make_problem(block, hessians.__getitem__, MAPPINGS))
    c = next(s for s in solved if s.path == "c")
    assert c.report.fallback is not None
    assert "rounded to nearest" in c.report.fallback
    assert c.report.alpha is None
    V = dequantize(c.q, c.qparams)
    assert torch.equal(block.c.weight, V)
    qparams = minmax_qparams(W, SCHEME)
    plain = dequantize(round_to_nearest(W, qparams, SCHEME), qparams)
    assert (W - V).pow(2).sum() <= 1.05 * (W - plain).pow(2).sum()
    assert c.report.error < 0.02  # small, and not NaN
    assert all(s.report.fallback is None for s in solved if s.path != "c")


def test_the_cpu_takes_no_kernel() -> None:
    assert not on_triton(torch.zeros(1))
    factor = Factor(torch.eye(2), [torch.eye(2)], torch.arange(2), torch.ones(2), 0.0)
    W = torch.tensor([[0.4, -0.6]])
    qparams = QParams(torch.tensor([[0.5]]), torch.tensor([[2.0]]))
    assert compensate(W, qparams, QuantScheme(2, 2, True), factor).tolist() == [[3, 1]]
