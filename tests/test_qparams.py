"""Quantization parameters: the file's dtypes hold the scales, and the search is never worse than min-max."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm_quantize.kernels.precision import representable
from llm_quantize.solver.qparams import (
    QParams,
    ScaleSearch,
    dequantize,
    hessian_blocks,
    minmax_qparams,
    round_to_nearest,
    search_qparams,
)
from llm_quantize.types import WHOLE_ROW, QuantScheme
from models import random_hessian, weights

HALF, BRAIN = torch.float16, torch.bfloat16
BOTH = [(HALF,), (BRAIN, HALF), (HALF, BRAIN)]


def error(W: Tensor, qparams: QParams, scheme: QuantScheme, H: Tensor) -> Tensor:
    """The error of rounding to nearest under the diagonal blocks of `H`: float64 (out, groups)."""
    E = (W - dequantize(round_to_nearest(W, qparams, scheme), qparams)).double()
    size = scheme.group_width(W.shape[1])
    groups = []
    for start in range(0, W.shape[1], size):
        part = E[:, start : start + size]
        block = H[start : start + size, start : start + size].double()
        groups.append(((part @ block) * part).sum(1))
    return torch.stack(groups, 1)


def test_scheme_by_hand() -> None:
    scheme = QuantScheme(3, 4, True)
    assert (scheme.qmax, scheme.middle) == (7, 4)
    assert (scheme.group_width(12), scheme.groups(12)) == (4, 3)
    whole = QuantScheme(8, WHOLE_ROW, False)
    assert (whole.qmax, whole.middle) == (255, 128)
    assert (whole.group_width(12), whole.groups(12)) == (12, 1)
    assert (whole.zero_min, whole.scale_dtypes) == (0, (HALF,))


@pytest.mark.parametrize("search", [ScaleSearch(4, 0), ScaleSearch(8, 1), ScaleSearch(24, 2)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_search_is_never_worse_than_minmax(bits: int, symmetric: bool, search: ScaleSearch) -> None:
    W, H = weights(96, 128), random_hessian(128, 512)
    W[::7] += 0.3  # rows whose weights are nearly all above zero
    scheme = QuantScheme(bits, 32, symmetric)
    plain = error(W, minmax_qparams(W, scheme), scheme, H)
    found = error(W, search_qparams(W, hessian_blocks(H, 32), scheme, search), scheme, H)
    assert bool((found <= plain * 1.001).all())  # a scale may be rounded the other way
    if bits < 8 and search.refits:
        assert float(found.sum()) < 0.9 * float(plain.sum())


def test_search_does_not_depend_on_its_budget() -> None:
    """The budget sets how many rows are searched at a time."""
    W, H = weights(50, 64), random_hessian(64, 256)
    scheme = QuantScheme(4, 32, False)
    blocks = hessian_blocks(H, 32)
    whole, sliced = search_qparams(W, blocks, scheme), search_qparams(W, blocks, scheme, budget=64 * 7)
    torch.testing.assert_close(whole.scale, sliced.scale, rtol=0, atol=0)
    torch.testing.assert_close(whole.zero, sliced.zero, rtol=0, atol=0)


@pytest.mark.parametrize("width", [256, 1024])
def test_whole_rows(width: int) -> None:
    """One group a row; above 512 columns the diagonal of the Hessian takes the place of the block."""
    W, H = weights(24, width), random_hessian(width, 2 * width)
    scheme = QuantScheme(4, WHOLE_ROW, True)
    blocks = hessian_blocks(H, scheme.group_width(width))
    assert blocks.shape == ((1, width, width) if width <= 512 else (1, 1, width))
    qparams = search_qparams(W, blocks, scheme)
    assert qparams.scale.shape == (24, 1)
    assert torch.equal(qparams.scale, search_qparams(W, blocks, QuantScheme(4, width, True)).scale)
    measure = H if width <= 512 else torch.diag(H.diagonal())
    plain = error(W, minmax_qparams(W, scheme), scheme, measure)
    assert error(W, qparams, scheme, measure).sum() < 0.9 * plain.sum()


@pytest.mark.parametrize("dtypes", BOTH)
def test_representable_survives_casts(dtypes: tuple[torch.dtype, ...]) -> None:
    exponents = torch.linspace(-40, 20, 4001)
    scale = torch.cat([torch.exp2(exponents), -torch.exp2(exponents), torch.zeros(1)])
    found = representable(scale, dtypes)
    for dtype in dtypes:
        assert torch.equal(found.to(dtype).float(), found)
    assert bool(torch.isfinite(found).all())
    assert bool((found != 0).all())
    assert bool(((found < 0) == (scale < 0)).all())
    inside = (scale.abs() > 2.0**-14) & (scale.abs() < 60000)
    precision = 2.0**-8 if BRAIN in dtypes else 2.0**-11
    assert bool(((found - scale).abs() <= precision * 1.15 * scale.abs())[inside].all())


@pytest.mark.parametrize("dtypes", BOTH)
@pytest.mark.parametrize("symmetric", [True, False])
def test_stored_dtypes_hold_the_qparams(dtypes: tuple[torch.dtype, ...], symmetric: bool) -> None:
    W, H = weights(32, 64), random_hessian(64, 256)
    W[3], W[4] = 0, 1e-7
    scheme = QuantScheme(3, 32, symmetric, scale_dtypes=dtypes)
    for qparams in (minmax_qparams(W, scheme), search_qparams(W, hessian_blocks(H, 32), scheme)):
        for dtype in dtypes:
            assert torch.equal(qparams.scale.to(dtype).float(), qparams.scale)
        assert torch.equal(qparams.zero, qparams.zero.round().clamp(0, 7))
        assert not dequantize(round_to_nearest(W, qparams, scheme), qparams)[3].any()


def test_sign_of_a_symmetric_scale() -> None:
    """The side with one integer more goes to the weight of the largest magnitude."""
    scheme = QuantScheme(2, 32, True)
    W = torch.zeros(2, 32)
    W[:, ::2], W[:, 1::2] = 0.25, -0.25
    W[0, 0], W[1, 1] = 1.0, -1.0
    W[0, 2], W[1, 3] = 0.5, -0.5
    qparams = search_qparams(W, hessian_blocks(torch.eye(32), 32), scheme, ScaleSearch(48, 3))
    assert qparams.scale[0, 0] < 0 < qparams.scale[1, 0]
    assert torch.equal(qparams.zero, torch.full((2, 1), 2.0))
    V = dequantize(round_to_nearest(W, qparams, scheme), qparams)
    torch.testing.assert_close(V[0], -V[1].reshape(-1, 2).flip(1).reshape(-1))
    plain = error(W, minmax_qparams(W, scheme), scheme, torch.eye(32))
    assert float(((W - V) ** 2).sum()) < 0.7 * float(plain.sum())


@pytest.mark.parametrize("zero_min", [0, 1])
def test_zero_points_are_at_least_zero_min(zero_min: int) -> None:
    W = weights(16, 64).abs()  # no weight is below zero, so the best zero point is 0
    scheme = QuantScheme(4, 32, False, zero_min=zero_min)
    for qparams in (minmax_qparams(W, scheme), search_qparams(W, hessian_blocks(torch.eye(64), 32), scheme)):
        assert float(qparams.zero.min()) == zero_min
        assert float(qparams.zero.max()) <= 15
    assert float(minmax_qparams(-W, scheme).zero.min()) == 15


def test_round_to_nearest_by_hand() -> None:
    scheme = QuantScheme(2, 2, False)
    qparams = QParams(torch.tensor([[0.5, 1.0]]), torch.tensor([[1.0, 2.0]]))
    W = torch.tensor([[-0.6, 0.24, 0.4, -9.0]])
    q = round_to_nearest(W, qparams, scheme)
    assert q.dtype == torch.uint8
    assert q.tolist() == [[0, 1, 2, 0]]
    assert dequantize(q, qparams).tolist() == [[-0.5, 0.0, 0.0, -2.0]]
    first, second = QParams(qparams.scale.repeat(3, 1), qparams.zero.repeat(3, 1)).split([1, 2])
    assert first.scale.tolist() == [[0.5, 1.0]]
    assert first.zero.tolist() == [[1.0, 2.0]]
    assert second.scale.tolist() == [[0.5, 1.0]] * 2
    assert second.zero.tolist() == [[1.0, 2.0]] * 2


def test_the_hessian_decides() -> None:
    """A channel with nearly all of the activation keeps its weights, at the cost of the other channels."""
    W = weights(64, 32)
    W[:, 5] = 0.9  # far larger than the others
    H = torch.eye(32) * 1e-3
    scheme = QuantScheme(3, 32, True)
    light = search_qparams(W, hessian_blocks(H, 32), scheme)
    H[5, 5] = 1e3
    heavy = search_qparams(W, hessian_blocks(H, 32), scheme)
    lost = [
        (W - dequantize(round_to_nearest(W, each, scheme), each))[:, 5].abs().mean()
        for each in (light, heavy)
    ]
    assert lost[1] < 0.2 * lost[0]


def test_hessian_blocks_are_on_the_diagonal() -> None:
    H = torch.arange(64.0).reshape(8, 8)
    assert torch.equal(hessian_blocks(H, 4)[1], H[4:, 4:])
    assert torch.equal(hessian_blocks(H, 4, widest=2)[1, 0], H.diagonal()[4:])
