"""GPTQ's recursion against a plain float64 one, its factor, coordinate descent, AWQ's scales, whole blocks."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from llm_quantize.blockwise.block_solution import QUALITY_PRESETS, BlockChanges, SolveOptions, solve_block
from llm_quantize.kernels import cholesky
from llm_quantize.kernels.launcher import on_triton
from llm_quantize.kernels.streams import StreamPool
from llm_quantize.model.awq_mappings import AWQMapping
from llm_quantize.solver.awq_scales import candidates, choose_scales, scale_
from llm_quantize.solver.gptq import (
    Factor,
    NotFactorizable,
    activation_order,
    compensate,
    condition_,
    descend,
    factorize,
    output_error,
)
from llm_quantize.solver.qparams import (
    QParams,
    QuantScheme,
    ScaleSearch,
    dequantize,
    hessian_blocks,
    minmax_qparams,
    round_to_nearest,
    search_qparams,
)
from models import random_hessian, weights


def condition(H: Tensor, damping: float) -> Tensor:
    """A damped copy."""
    damped = H.clone()
    condition_(damped, damping)
    return damped


def plain_gptq(W: Tensor, grid: QParams, spec: QuantScheme, H: Tensor, order: list[int]) -> Tensor:
    """One column after another, from the inverse itself, in float64: eq. 2 and 3 of the paper."""
    W, H = W.double().clone(), H.double()
    inverse = torch.linalg.inv(H[order][:, order])
    q = torch.zeros(W.shape, dtype=torch.uint8)
    for step, column in enumerate(order):
        s = grid.scale[:, column // spec.group_size].double()
        z = grid.zero[:, column // spec.group_size].double()
        integer = (torch.round(W[:, column] / s) + z).clamp(0, spec.qmax)
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
    spec = QuantScheme(bits, group, symmetric)
    grid = minmax_qparams(W, spec)
    factor = factorize(H.clone(), 0.05, act_order=act_order)
    damped = condition(H, 0.05)
    found = compensate(W, grid, spec, factor)
    expected = plain_gptq(W, grid, spec, damped, factor.order.tolist())
    assert found.dtype == torch.uint8
    # float32 may fall on the other side of a tie, after which that row goes its own way.
    same = (found == expected).all(1)
    assert float(same.float().mean()) >= 0.8
    ours, theirs = (output_error(W, dequantize(q, grid, group), damped) for q in (found, expected))
    assert ours == pytest.approx(theirs, rel=0.02)
    assert ours < output_error(W, dequantize(round_to_nearest(W, grid, spec), grid, group), damped)


@pytest.mark.parametrize("act_order", [True, False])
def test_identity_gives_rounding_to_nearest(act_order: bool) -> None:
    W = weights(40, 160)
    spec = QuantScheme(3, 32, False)
    grid = minmax_qparams(W, spec)
    q = compensate(W, grid, spec, factorize(torch.eye(160), 0.1, act_order=act_order))
    assert torch.equal(q, round_to_nearest(W, grid, spec))
    descended, after = descend(W, q, grid, spec, torch.eye(160), sweeps=2, refit=False)
    assert torch.equal(descended, q)
    assert torch.equal(after.scale, grid.scale)


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
    """The inverses are those of the blocks on the diagonal, which they cover."""
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


def test_dead_channels() -> None:
    H = random_hessian(64, 256)
    dead = [3, 17, 63]
    H[dead] = 0
    H[:, dead] = 0
    W = weights(16, 64)
    spec = QuantScheme(4, 32, True)
    grid = minmax_qparams(W, spec)
    q = compensate(W, grid, spec, factorize(H.clone(), 0.1, act_order=True))
    assert torch.equal(q[:, dead], round_to_nearest(W, grid, spec)[:, dead])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("width", [1, 2, 5, 1023, 1024, 2050])
def test_strips_leave_nothing_out(width: int, dtype: torch.dtype) -> None:
    """The permutation, Cholesky in place and the turn by strips, at their borders."""
    from llm_quantize.solver import gptq

    x = torch.randn(8, width, generator=torch.Generator().manual_seed(0))
    H = x.T @ x + torch.eye(width)
    reverse = activation_order(H).flip(0)
    scales = gptq.norms(H)
    U, inverses, failed = gptq._factor(H, reverse, scales, dtype)
    assert not failed
    expected = torch.linalg.cholesky(H[reverse][:, reverse].double()).flip(0, 1)
    torch.testing.assert_close(U.double(), expected, rtol=1e-3, atol=1e-4)
    blocks_are_inverted(Factor(U, inverses, reverse.flip(0), scales, 0.0))


def test_factorize_leaves_the_damped_one() -> None:
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


def test_singular_needs_damping() -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    H = x.T @ x / 8
    raised = factorize(H.clone(), 0.0, act_order=False)
    assert raised.damping >= 1e-3
    kept = factorize(H.clone(), 0.1, act_order=False)
    assert kept.damping == 0.1
    U = kept.U.double()
    damped = condition(H, 0.1).double()[kept.order][:, kept.order]
    torch.testing.assert_close(U @ U.T, damped, rtol=0, atol=1e-5)


def test_indefinite_raises_damping_step_by_step() -> None:
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
    """However many columns wait before the others are told: as with one span, which is the whole row."""
    from llm_quantize.solver import gptq

    W, H = weights(24, 800), condition(random_hessian(800, 2400), 0.05)
    spec = QuantScheme(4, group, True)
    grid = search_qparams(W, hessian_blocks(H, group), spec)
    results = []
    for size in (4096, span):
        monkeypatch.setattr(gptq, "SPAN", size)
        monkeypatch.setattr(cholesky, "PANEL", size)  # whose blocks are what the recursion's spans are
        factor = factorize(H.clone(), 0.0, act_order=True)
        assert len(factor.inverses) == -(-800 // size)
        q = compensate(W, grid, spec, factor)
        results.append((q, *descend(W, q, grid, spec, H, sweeps=3, refit=True)))
    (q, fine, one), (q_span, fine_span, spanned) = results
    assert float((q == q_span).all(1).float().mean()) > 0.7  # a row may part ways at a near tie
    assert float((fine == fine_span).all(1).float().mean()) > 0.5
    errors = [
        output_error(W, dequantize(integers, chosen, group), H)
        for integers, chosen in ((fine, one), (fine_span, spanned))
    ]
    assert errors[1] == pytest.approx(errors[0], rel=2e-3)
    if span == 256:
        pieces = [piece for part in gptq._spans(800, group) for piece in part]
        assert [c for piece in pieces for c in range(800)[piece]] == list(range(800))
        assert all(part[-1].stop - part[0].start <= span for part in gptq._spans(800, group))


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(2, 32, False), (4, 128, True), (8, 320, False)])
@pytest.mark.parametrize("size", [1.0, 1e-8, 1e8])
def test_products_of_half_precision_cost_nothing(
    bits: int, group: int, symmetric: bool, size: float, halves: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the sizes of rows and channels: a few of each are a thousand times as large or as small as the rest."""
    from llm_quantize.solver import gptq

    width = 640
    monkeypatch.setattr(gptq, "SPAN", 256)
    monkeypatch.setattr(cholesky, "PANEL", 256)
    W, channels = weights(200, width) * size**0.25, torch.ones(width)
    W[::5] *= 1e-3
    channels[7::50], channels[9::50] = 1e3, 1e-3
    H = condition(random_hessian(width, 3 * width), 0.02) * channels * channels[:, None] * size
    W /= channels
    spec = QuantScheme(bits, group, symmetric)
    grid = search_qparams(W, hessian_blocks(H, group), spec)
    errors = []
    for takes in (True, False):
        monkeypatch.setattr(cholesky, "has_half_products", lambda _, takes=takes: takes)
        factor = factorize(H.clone(), 1e-4, act_order=True)
        q = compensate(W, grid, spec, factor)
        found = descend(W, q, grid, spec, H, sweeps=2, refit=True)
        errors.append([quadratic(W, dequantize(*each, group), H) for each in ((q, grid), found)])
        assert (len(halves) > 0) == takes
        halves.clear()
    for half, full in zip(*errors, strict=True):
        assert float((half / full - 1).abs().mean()) < 4e-3
        assert float(half.log().mean() - full.log().mean()) == pytest.approx(0, abs=2e-3)


def quadratic(W: Tensor, V: Tensor, H: Tensor) -> Tensor:
    """The quadratic form of each row, float64."""
    E = (W - V).double()
    return ((E @ H.double()) * E).sum(1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize(
    ("width", "group"), [(64, 32), (256, 128), (320, 160), (384, 192), (200, 200), (512, 256)]
)
def test_descend_never_grows(width: int, group: int, refit: bool, symmetric: bool) -> None:
    W, H = weights(20, width), condition(random_hessian(width, 3 * width), 0.05)
    spec = QuantScheme(3, group, symmetric, scale_dtypes=(torch.bfloat16, torch.float16))
    grid = search_qparams(W, hessian_blocks(H, group), spec)
    q = compensate(W, grid, spec, factorize(H.clone(), 0.0, act_order=True))
    before = quadratic(W, dequantize(q, grid, group), H)
    scale = grid.scale.clone()
    for _ in range(3):
        q, grid = descend(W, q, grid, spec, H, sweeps=1, refit=refit)
        after = quadratic(W, dequantize(q, grid, group), H)
        assert bool((after <= before * (1 + 1e-5)).all())
        before = after
    assert int(q.max()) <= 7
    for dtype in spec.scale_dtypes:
        assert torch.equal(grid.scale.to(dtype).float(), grid.scale)
    if not refit:
        assert torch.equal(grid.scale, scale)


def test_sweeps_follow_each_other() -> None:
    """What a sweep changed is known to the next one: several in one call are as good as one call after another."""
    W, H = weights(40, 512), condition(random_hessian(512, 1500), 0.02)
    spec = QuantScheme(3, 64, False)
    grid = minmax_qparams(W, spec)
    q = round_to_nearest(W, grid, spec)
    once = descend(W, q, grid, spec, H, sweeps=4, refit=True)
    singly = (q, grid)
    for _ in range(4):
        singly = descend(W, *singly, spec, H, sweeps=1, refit=True)
    ours, theirs = (quadratic(W, dequantize(a, g, 64), H).sum() for a, g in (once, singly))
    assert float(ours) == pytest.approx(float(theirs), rel=1e-3)


def test_descend_improves_and_ends_where_no_single_step_helps() -> None:
    W, H = weights(30, 6), condition(random_hessian(6, 40), 0.01)
    spec = QuantScheme(2, 6, False)
    grid = minmax_qparams(W, spec)
    q = round_to_nearest(W, grid, spec)
    start = quadratic(W, dequantize(q, grid, 6), H)
    found, _ = descend(W, q, grid, spec, H, sweeps=20, refit=False)
    end = quadratic(W, dequantize(found, grid, 6), H)
    every = torch.tensor(list(itertools.product(range(4), repeat=6)), dtype=torch.uint8)
    best = torch.stack(
        [
            quadratic(
                W[row].expand(len(every), -1),
                (every.float() - grid.zero[row]) * grid.scale[row],
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
                assert quadratic(W[row : row + 1], dequantize(other, one(grid, row), 6), H) >= end[row] * (
                    1 - 1e-5
                )


def one(grid: QParams, row: int) -> QParams:
    return QParams(grid.scale[row : row + 1], grid.zero[row : row + 1])


@pytest.mark.parametrize("act_order", [True, False])
def test_scaled_factor_is_a_fresh_one(act_order: bool) -> None:
    H = condition(random_hessian(96, 300), 0.05)
    factor = factorize(H.clone(), 0.0, act_order=act_order)
    scale = torch.exp(torch.randn(96, generator=torch.Generator().manual_seed(2)) * 0.5)
    scaled, order = H / (scale[:, None] * scale), factor.order
    scale_(H, factor, scale)
    assert torch.equal(H, scaled)
    fresh = factorize(scaled[order][:, order], 0.0, act_order=False)
    torch.testing.assert_close(factor.U, fresh.U, rtol=2e-3, atol=2e-4)
    blocks_are_inverted(factor)
    assert torch.equal(factor.order, order)


def test_output_error_is_that_of_outputs() -> None:
    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(0))
    W, V = weights(5, 12, 1), weights(5, 12, 2)
    expected = ((x @ (W - V).T) ** 2).sum() / ((x @ W.T) ** 2).sum()
    assert output_error(W, V, x.T @ x / 50) == pytest.approx(float(expected), rel=1e-5)
    assert output_error(torch.zeros(5, 12), torch.zeros(5, 12), torch.eye(12)) == 0.0


# -- AWQ


def test_candidates() -> None:
    H = torch.diag(torch.tensor([1.0, 4.0, 9.0, 16.0]))
    rows = torch.tensor([0, 0, 2, 3])
    plain, found = candidates(H, rows, 5, (0.0, 1.0))
    assert plain.tolist() == [1.0] * 5
    rms = torch.tensor([2.5**0.5, 1.0, 3.0, 4.0, 1.0])
    middle = (4.0 * 2.5**0.5) ** 0.5
    used = torch.tensor([True, False, True, True, False])
    torch.testing.assert_close(found[used], rms[used] / middle)
    assert found[~used].tolist() == [1.0, 1.0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_candidates_are_always_the_same() -> None:
    """To the last bit, where seven query heads share a value head: a GPU may add in any order."""
    H = torch.diag(torch.rand(3584, generator=torch.Generator().manual_seed(0)).exp())
    channel = torch.arange(3584)
    rows = channel // 128 // 7 * 128 + channel % 128
    expected = candidates(H, rows, 512, (0.5,))
    H, rows = H.cuda(), rows.cuda()
    found = [candidates(H, rows, 512, (0.5,)) for _ in range(50)]
    torch.testing.assert_close(found[0].cpu(), expected)
    assert all(torch.equal(each, found[0]) for each in found)


@pytest.mark.parametrize("size", [32, 1024])
def test_channel_scales_of_every_group_size(size: int) -> None:
    """One search for all candidates finds what one for each does, also where groups are judged by the diagonal."""
    W, H = weights(20, 1024), condition(random_hessian(1024, 2048), 0.05)
    factor = factorize(H.clone(), 0.0, act_order=True)
    spec, effort = QuantScheme(4, size, True), ScaleSearch(8, 1)
    chosen = choose_scales(W, H, factor, torch.arange(1024), 1024, spec, effort)
    index = int(chosen.losses.argmin())
    s = candidates(H, torch.arange(1024), 1024, (chosen.alpha,))[0]
    torch.testing.assert_close(chosen.scale, s)
    scaled, other = H.clone(), copy.deepcopy(factor)
    scale_(scaled, other, s)
    grid = search_qparams(W * s, hessian_blocks(scaled, size), spec, effort)
    q = compensate(W * s, grid, spec, other)
    again = float(quadratic(W * s, dequantize(q, grid, size), scaled).sum())
    assert float(chosen.losses[index]) == pytest.approx(again, rel=0.01)


def test_channel_scales_are_judged_by_the_rounding_that_follows() -> None:
    """The losses are those of really scaling, searching, compensating; no scaling is among them."""
    W, H = weights(60, 64), condition(random_hessian(64, 256), 0.05)
    factor = factorize(H.clone(), 0.0, act_order=True)
    spec, effort = QuantScheme(3, 32, False), ScaleSearch(8, 1)
    chosen = choose_scales(W, H, factor, torch.arange(64), 64, spec, effort)
    assert chosen.losses[0] >= chosen.losses.min()
    for alpha, loss in zip((0.0, 0.3, 0.6), (float(chosen.losses[i]) for i in (0, 3, 6)), strict=True):
        (s,) = candidates(H, torch.arange(64), 64, (alpha,))
        scaled, other = H.clone(), copy.deepcopy(factor)
        scale_(scaled, other, s)
        grid = search_qparams(W * s, hessian_blocks(scaled, 32), spec, effort)
        q = compensate(W * s, grid, spec, other)
        again = float(quadratic(W * s, dequantize(q, grid, 32), scaled).sum())
        assert loss == pytest.approx(again, rel=0.01)


# -- a block


class Block(nn.Module):
    """Two linears behind one norm, and one that the second feeds."""

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


FOLDS = [AWQMapping("norm", ("a", "b"), torch.arange(64)), AWQMapping("b", ("c",), torch.arange(64))]


def options(**more: object) -> SolveOptions:
    values: dict[str, object] = {
        "bits": 4,
        "group_size": 32,
        "symmetric": False,
        "act_order": True,
        "dynamic_groups": False,
        "damping": 0.05,
        "effort": QUALITY_PRESETS["default"],
        "zero_min": 0,
        "scale_dtypes": (torch.float16,),
        "store": torch.float16,
    }
    return SolveOptions(**(values | more))


def calibrated() -> tuple[Block, Tensor, list[Tensor | None]]:
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


@pytest.mark.parametrize("mappings", [[], FOLDS], ids=["gptq", "awq"])
@pytest.mark.parametrize("quality", ["fast", "default", "best"])
def test_solve_block(quality: str, mappings: list[AWQMapping]) -> None:
    block, x, hessians = calibrated()
    before = block(x).detach()
    plain = Block()
    plain.load_state_dict(block.state_dict())
    spec = QuantScheme(4, 32, False)
    with torch.no_grad():
        for linear in (plain.a, plain.b, plain.c):
            grid = minmax_qparams(linear.weight, spec)
            linear.weight.copy_(dequantize(round_to_nearest(linear.weight, grid, spec), grid, 32))
        changes = BlockChanges()
        given, asked = dict(enumerate(hessians)), []

        def take(index: int) -> Tensor | None:
            asked.append(index)
            return given.pop(index)

        groups = [["a", "b"], ["c"]]
        solved = list(
            solve_block(
                block, "m.0", groups, take, mappings, options(effort=QUALITY_PRESETS[quality]), changes
            )
        )
        after, rtn = block(x), plain(x)
    for s in solved:
        assert torch.equal(block.get_parameter(f"{s.path}.weight"), dequantize(s.q, s.grid, 32))
        assert s.report.name == f"m.0.{s.path}"
        assert s.report.fallback is None
        assert 0 < s.report.error < 0.02
    assert (after - before).pow(2).mean() < 0.8 * (rtn - before).pow(2).mean()
    assert asked == ([1, 0] if mappings else [0, 1])
    assert [s.path for s in solved] == (["c", "a", "b"] if mappings else ["a", "b", "c"])
    alphas = {s.path: s.report.alpha for s in solved}
    if mappings:
        assert alphas["c"]
        assert alphas["a"] == alphas["b"] != 0
        assert changes.names == {"norm.weight", "norm.bias", "b.bias"}
    else:
        assert set(alphas.values()) == {None}
        assert not changes.names


@pytest.mark.parametrize("mappings", [[], FOLDS], ids=["gptq", "awq"])
def test_side_by_side_changes_nothing(mappings: list[AWQMapping]) -> None:
    """All factors, then all scales, then the rounding, or one group after another: the same bits."""
    found = []
    for streams in (None, StreamPool()):
        block, _, hessians = calibrated()
        changes = BlockChanges()
        with torch.no_grad():
            solved = list(
                solve_block(
                    block,
                    "m",
                    [["a", "b"], ["c"]],
                    hessians.__getitem__,
                    mappings,
                    options(),
                    changes,
                    None,
                    streams,
                )
            )
        reports = [(s.path, s.report.name, s.report.error, s.report.alpha) for s in solved]
        found.append((reports, [s.q for s in solved], list(block.parameters()), changes.names))
    (reports, integers, parameters, names), other = found
    assert (reports, names) == (other[0], other[3])
    for one, same in zip([*integers, *parameters], [*other[1], *other[2]], strict=True):
        assert torch.equal(one, same)


@pytest.mark.parametrize("streams", [None, StreamPool()], ids=["one by one", "side by side"])
def test_no_scaling_changes_nothing(streams: StreamPool | None) -> None:
    """Where all channels carry as much, the scales are one, and no parameter but the rounded weights is touched."""
    block, _, _ = calibrated()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(1e-5)  # more digits than float16 has
    before = {name: p.detach().clone() for name, p in block.named_parameters()}
    changes = BlockChanges()
    with torch.no_grad():
        solved = list(
            solve_block(
                block,
                "m",
                [["a", "b"], ["c"]],
                lambda _: torch.eye(64),
                FOLDS,
                options(),
                changes,
                None,
                streams,
            )
        )
    assert [s.report.alpha for s in solved] == [0.0] * 3
    assert not changes.names
    for name, parameter in block.named_parameters():
        assert torch.equal(parameter, before[name]) != (name in ("a.weight", "b.weight", "c.weight")), name


def test_dynamic_groups_follow_the_order() -> None:
    block, _, hessians = calibrated()
    H = hessians[1]
    assert H is not None
    order = activation_order(H)
    W = block.c.weight.detach().clone()
    with torch.no_grad():
        solved = {
            s.path: s
            for s in solve_block(
                block,
                "m",
                [["a", "b"], ["c"]],
                hessians.__getitem__,
                [],
                options(dynamic_groups=True),
                BlockChanges(),
            )
        }
    c = solved["c"]
    assert c.g_idx is not None
    assert c.g_idx.dtype == torch.int32
    assert torch.equal(c.g_idx[order], torch.arange(64, dtype=torch.int32) // 32)
    V = (c.q.float() - c.grid.zero[:, c.g_idx.long()]) * c.grid.scale[:, c.g_idx.long()]
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
    spec = QuantScheme(4, 32, False)
    with torch.no_grad():
        solved = list(
            solve_block(
                block, "m", [["a", "b"], ["c"]], hessians.__getitem__, FOLDS, options(), BlockChanges()
            )
        )
    c = next(s for s in solved if s.path == "c")
    assert c.report.fallback is not None
    assert "rounded to nearest" in c.report.fallback
    assert c.report.alpha is None
    V = dequantize(c.q, c.grid, 32)
    assert torch.equal(block.c.weight, V)
    plain = minmax_qparams(W, spec)
    assert (W - V).pow(2).sum() <= 1.05 * (W - dequantize(round_to_nearest(W, plain, spec), plain, 32)).pow(
        2
    ).sum()
    assert c.report.error < 0.02  # a number, and a small one
    assert all(s.report.fallback is None for s in solved if s.path != "c")


def test_columns_twin_is_what_runs_here() -> None:
    assert not on_triton(torch.zeros(1))
    factor = Factor(torch.eye(2), [torch.eye(2)], torch.arange(2), torch.ones(2), 0.0)
    W = torch.tensor([[0.4, -0.6]])
    grid = QParams(torch.tensor([[0.5]]), torch.tensor([[2.0]]))
    assert compensate(W, grid, QuantScheme(2, 2, True), factor).tolist() == [[3, 1]]
