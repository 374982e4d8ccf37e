"""Grids: what is stored survives, and the search is never worse than the plain grid."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from llm_quantize.kernels.precision import representable
from llm_quantize.solver.qparams import (
    QParams,
    QuantScheme,
    ScaleSearch,
    dequantize,
    expand,
    hessian_blocks,
    minmax_qparams,
    round_to_nearest,
    search_qparams,
)
from models import random_hessian, weights

HALF, BRAIN = torch.float16, torch.bfloat16
BOTH = [(HALF,), (BRAIN, HALF), (HALF, BRAIN)]


def error(W: Tensor, grid: QParams, spec: QuantScheme, H: Tensor) -> Tensor:
    """Error of rounding to nearest of each row and group under the diagonal blocks of `H`: float64."""
    E = (W - dequantize(round_to_nearest(W, grid, spec), grid, spec.group_size)).double()
    groups = []
    for start in range(0, W.shape[1], spec.group_size):
        part = E[:, start : start + spec.group_size]
        block = H[start : start + spec.group_size, start : start + spec.group_size].double()
        groups.append(((part @ block) * part).sum(1))
    return torch.stack(groups, 1)


@pytest.mark.parametrize("effort", [ScaleSearch(4, 0), ScaleSearch(8, 1), ScaleSearch(24, 2)])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_search_is_never_worse_than_minmax(bits: int, symmetric: bool, effort: ScaleSearch) -> None:
    W, H = weights(96, 128), random_hessian(128, 512)
    W[::7] += 0.3  # rows that lie on one side
    spec = QuantScheme(bits, 32, symmetric)
    plain = error(W, minmax_qparams(W, spec), spec, H)
    found = error(W, search_qparams(W, hessian_blocks(H, 32), spec, effort), spec, H)
    assert bool((found <= plain * 1.001).all())  # a scale may be rounded the other way
    if bits < 8 and effort.refits:
        assert float(found.sum()) < 0.9 * float(plain.sum())


def test_search_does_not_depend_on_the_slices() -> None:
    W, H = weights(50, 64), random_hessian(64, 256)
    spec = QuantScheme(4, 32, False)
    blocks = hessian_blocks(H, 32)
    whole, sliced = search_qparams(W, blocks, spec), search_qparams(W, blocks, spec, budget=64 * 7)
    torch.testing.assert_close(whole.scale, sliced.scale, rtol=0, atol=0)
    torch.testing.assert_close(whole.zero, sliced.zero, rtol=0, atol=0)


@pytest.mark.parametrize("width", [256, 1024])
def test_whole_rows(width: int) -> None:
    """One group a row; past 512 columns the diagonal stands in for the block."""
    W, H = weights(24, width), random_hessian(width, 2 * width)
    spec = QuantScheme(4, width, True)
    blocks = hessian_blocks(H, width)
    assert blocks.shape == ((1, width, width) if width <= 512 else (1, 1, width))
    grid = search_qparams(W, blocks, spec)
    assert grid.scale.shape == (24, 1)
    measure = H if width <= 512 else torch.diag(H.diagonal())
    assert error(W, grid, spec, measure).sum() < 0.9 * error(W, minmax_qparams(W, spec), spec, measure).sum()


@pytest.mark.parametrize("dtypes", BOTH)
def test_representable_survives_casts(dtypes: tuple[torch.dtype, ...]) -> None:
    alphas = torch.linspace(-40, 20, 4001)
    scale = torch.cat([torch.exp2(alphas), -torch.exp2(alphas), torch.zeros(1)])
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
def test_grids_are_stored_as_they_are(dtypes: tuple[torch.dtype, ...], symmetric: bool) -> None:
    W, H = weights(32, 64), random_hessian(64, 256)
    W[3], W[4] = 0, 1e-7
    spec = QuantScheme(3, 32, symmetric, scale_dtypes=dtypes)
    for grid in (minmax_qparams(W, spec), search_qparams(W, hessian_blocks(H, 32), spec)):
        for dtype in dtypes:
            assert torch.equal(grid.scale.to(dtype).float(), grid.scale)
        assert torch.equal(grid.zero, grid.zero.round().clamp(0, 7))
        assert not dequantize(round_to_nearest(W, grid, spec), grid, 32)[3].any()


def test_symmetric_sign_puts_the_longer_side_where_the_larger_weight_is() -> None:
    spec = QuantScheme(2, 32, True)
    W = torch.zeros(2, 32)
    W[:, ::2], W[:, 1::2] = 0.25, -0.25
    W[0, 0], W[1, 1] = 1.0, -1.0
    W[0, 2], W[1, 3] = 0.5, -0.5
    grid = search_qparams(W, hessian_blocks(torch.eye(32), 32), spec, ScaleSearch(48, 3))
    assert grid.scale[0, 0] < 0 < grid.scale[1, 0]
    assert torch.equal(grid.zero, torch.full((2, 1), 2.0))
    V = dequantize(round_to_nearest(W, grid, spec), grid, 32)
    torch.testing.assert_close(V[0], -V[1].reshape(-1, 2).flip(1).reshape(-1))
    assert float(((W - V) ** 2).sum()) < 0.7 * float(
        error(W, minmax_qparams(W, spec), spec, torch.eye(32)).sum()
    )


@pytest.mark.parametrize("zero_min", [0, 1])
def test_zero_points_stay_in_what_the_file_holds(zero_min: int) -> None:
    W = weights(16, 64).abs()  # all above zero: the zero point wants to be 0
    spec = QuantScheme(4, 32, False, zero_min=zero_min)
    for grid in (minmax_qparams(W, spec), search_qparams(W, hessian_blocks(torch.eye(64), 32), spec)):
        assert float(grid.zero.min()) == zero_min
        assert float(grid.zero.max()) <= 15
    assert float(minmax_qparams(-W, spec).zero.min()) == 15


def test_round_to_nearest_by_hand() -> None:
    spec = QuantScheme(2, 2, False)
    grid = QParams(torch.tensor([[0.5, 1.0]]), torch.tensor([[1.0, 2.0]]))
    W = torch.tensor([[-0.6, 0.24, 0.4, -9.0]])
    q = round_to_nearest(W, grid, spec)
    assert q.dtype == torch.uint8
    assert q.tolist() == [[0, 1, 2, 0]]
    assert dequantize(q, grid, 2).tolist() == [[-0.5, 0.0, 0.0, -2.0]]
    scale, zero = expand(grid, 2)
    assert scale.tolist() == [[0.5, 0.5, 1.0, 1.0]]
    assert zero.tolist() == [[1.0, 1.0, 2.0, 2.0]]


def test_the_metric_decides() -> None:
    """A channel that carries nearly everything is kept, at the others' cost."""
    W = weights(64, 32)
    W[:, 5] = 0.9  # far out
    H = torch.eye(32) * 1e-3
    spec = QuantScheme(3, 32, True)
    light = search_qparams(W, hessian_blocks(H, 32), spec)
    H[5, 5] = 1e3
    heavy = search_qparams(W, hessian_blocks(H, 32), spec)
    lost = [(W - dequantize(round_to_nearest(W, g, spec), g, 32))[:, 5].abs().mean() for g in (light, heavy)]
    assert lost[1] < 0.2 * lost[0]


def test_metric_blocks_are_the_diagonal() -> None:
    H = torch.arange(64.0).reshape(8, 8)
    assert torch.equal(hessian_blocks(H, 4)[1], H[4:, 4:])
    assert torch.equal(hessian_blocks(H, 4, widest=2)[1, 0], H.diagonal()[4:])
    assert replace(QuantScheme(3, 4, True)).qmax == 7
