"""Hessians against float64, from tokens in pieces and in any order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from llm_quantize.solver.hessian import HessianAccumulator

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def tokens(count: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Correlated channels of very different size, whose mean is not zero, as in a real model."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / width**0.5
    size = torch.exp(torch.randn(width, generator=generator))
    x: Tensor = (torch.randn(count, width, generator=generator) @ mix + 0.3) * size
    return x.to(dtype)


def exact(x: Tensor) -> Tensor:
    x = x.double().cpu().reshape(-1, x.shape[-1])
    H: Tensor = x.T @ x / x.shape[0]
    return H


def assert_close(H: Tensor, truth: Tensor, tolerance: float) -> None:
    """Each entry is off by less than `tolerance` times `sqrt(H_ii H_jj)`, the bound of its absolute products' sum."""
    scale = truth.diagonal().sqrt()
    assert float(((H.double().cpu() - truth).abs() / (scale[:, None] * scale)).max()) < tolerance


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [48, 200, 2176])
def test_matches_float64(device: str, dtype: torch.dtype, width: int) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    x = tokens(1024, width, dtype).reshape(2, 512, width)
    hessian = HessianAccumulator(width, device)
    for part in x:
        hessian.add(part.unsqueeze(0).to(device))
    assert hessian.tokens == 1024
    assert hessian.finite()
    H = hessian.finish()
    assert H.dtype == torch.float32
    assert torch.equal(H, H.T)
    # Products of half-precision numbers are exact. n = 1024 float32 additions lose at most n * 2^-24 = 6e-5, and
    # typically sqrt(n) * 2^-24 = 2e-6.
    assert_close(H, exact(x), 1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_many_tokens_in_any_order(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    count = 2_000_000  # about as many as in a default run
    x = tokens(count, 32, torch.float16)
    truth = exact(x)
    for order in (x, x.flip(0), x[torch.randperm(x.shape[0], generator=torch.Generator().manual_seed(1))]):
        hessian = HessianAccumulator(32, device)
        for part in torch.split(order, 7777):
            hessian.add(part.to(device))
        assert hessian.tokens == count
        # A CPU loses 3e-6, a GPU more, since tensor cores truncate their sums.
        assert_close(hessian.finish(), truth, 3e-5)


def test_half_inputs_are_not_squared_in_half() -> None:
    hessian = HessianAccumulator(4, "cpu")
    hessian.add(torch.full((10, 4), 60000.0, dtype=torch.float16))  # the square does not fit float16
    assert hessian.finite()
    torch.testing.assert_close(hessian.finish(), torch.full((4, 4), float(torch.tensor(60000.0).half()) ** 2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_finite_sees_one_bad_number(bad: float) -> None:
    hessian = HessianAccumulator(64, "cpu")
    x = tokens(10, 64)
    hessian.add(x)
    assert hessian.finite()
    x[3, 17] = bad
    hessian.add(x)
    assert not hessian.finite()


def test_finish_is_final() -> None:
    x = tokens(600, 40)
    hessian = HessianAccumulator(40, "cpu")
    for piece in torch.split(x, [100, 300, 200]):
        hessian.add(piece)
    assert hessian.tokens == 600
    H = hessian.finish()
    assert_close(H, exact(x), 1e-6)
    assert hessian.finish() is H
    with pytest.raises(RuntimeError, match="finish"):
        hessian.add(x)


def test_no_tokens_give_zeros() -> None:
    hessian = HessianAccumulator(8, "cpu")
    hessian.add(torch.empty(2, 0, 8))
    assert hessian.tokens == 0
    assert torch.equal(hessian.finish(), torch.zeros(8, 8))
