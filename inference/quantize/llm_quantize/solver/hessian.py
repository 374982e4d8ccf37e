"""The Hessian of a linear's inputs: `H = mean x x^T` (GPTQ's, without its factor 2), from tokens that arrive in pieces.

Products of two float16 or bfloat16 numbers are exact in float32. Such inputs go through the tensor cores with float32
sums, and lose nothing but the rounding of those sums. `H` is symmetric: only the blocks on and below its diagonal are
computed, each summed in place.

Knows tensors only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_quantize.kernels.cholesky import half_product_, has_half_products

BLOCKS = 8  # block rows of a wide H at least: 36 of 64 blocks are computed
BLOCK = 1024  # rows of a block at most: the wider H is, the smaller is the part computed in vain
WIDE = 2048  # below this one product is faster than several
CHUNK = 8192  # tokens that are widened to float32 at a time, where the device has no mixed product


class HessianAccumulator:
    """The sum of `x x^T` over tokens, and their number.

    width: input channels. Takes one float32 (width, width).
    """

    def __init__(self, width: int, device: torch.device | str) -> None:
        self.width = width
        self.tokens = 0
        self._sum = torch.zeros(width, width, dtype=torch.float32, device=device)
        self._finished = False
        step = min(-(-width // BLOCKS), BLOCK) if width >= WIDE else width
        step = -(-step // 128) * 128  # whole tiles
        self._edges = [(a, min(a + step, width)) for a in range(0, width, step)]

    def add(self, x: Tensor) -> None:
        """Add the tokens of `x` (..., width), float16, bfloat16 or float32, on the same device."""
        if self._finished:
            raise RuntimeError("finish() was called: this accumulator takes no more tokens")
        x = x.detach().reshape(-1, self.width)
        self.tokens += x.shape[0]
        if x.dtype != torch.float32 and has_half_products(x):
            self._accumulate(x)
            return
        for start in range(0, x.shape[0], CHUNK):
            self._accumulate(x[start : start + CHUNK].to(torch.float32))

    def _accumulate(self, x: Tensor) -> None:
        if x.shape[0] == 0:
            return
        for a, b in self._edges:
            block, left, right = self._sum[a:b, :b], x[:, a:b].T, x[:, :b]
            if x.dtype == torch.float32:
                block.addmm_(left, right)
            else:
                half_product_(block, left, right)

    def finite(self) -> bool:
        """Whether no NaN and no infinity came in, and no sum overflowed. Waits for the device.

        The diagonal tells: it holds every channel's squares, and `|H_ij|` is at most the larger of `H_ii`, `H_jj`.
        """
        return bool(torch.isfinite(self._sum.diagonal()).all())

    def finish(self) -> Tensor:
        """The mean `H`: float32 (width, width), exactly symmetric; zeros where no token came.

        Works in place and returns the buffer itself: nothing can be added afterwards.
        """
        if not self._finished:
            for a, b in self._edges:
                corner = self._sum[a:b, a:b]
                corner.copy_(corner.tril() + corner.tril(-1).T)
                self._sum[:a, a:b] = self._sum[a:b, :a].T
            self._sum /= max(self.tokens, 1)
            self._finished = True
        return self._sum


class CrossAccumulator:
    """The sum of `y x^T` over tokens: float32 (outputs, width), for two tensors of the same tokens."""

    def __init__(self, outputs: int, width: int, device: torch.device | str) -> None:
        self.tokens = 0
        self._sum = torch.zeros(outputs, width, dtype=torch.float32, device=device)

    def add(self, y: Tensor, x: Tensor) -> None:
        """Add the tokens of `y` (tokens, outputs) and `x` (tokens, width), of one dtype and device."""
        self.tokens += x.shape[0]
        if x.dtype != torch.float32 and has_half_products(x):
            half_product_(self._sum, y.T, x)
            return
        for start in range(0, x.shape[0], CHUNK):
            self._sum.addmm_(y[start : start + CHUNK].float().T, x[start : start + CHUNK].float())

    def finish(self) -> Tensor:
        """The mean; zeros where no token came. Nothing can be added afterwards."""
        return self._sum.div_(max(self.tokens, 1))
