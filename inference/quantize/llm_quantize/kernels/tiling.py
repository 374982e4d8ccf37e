"""What the loops over columns share.

They go in steps of `SUB` columns: inside a step only its own columns hear of each other at once, in registers; a
product then tells the rest of the piece.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_quantize.kernels.launcher import jit, on_triton, tl, triton, triton_since
from llm_quantize.kernels.precision import to_tf32

COLUMNS = 128  # of a piece, at most: what a tile holds
FEW = 8192  # rows of weights at most that one kernel takes through several pieces
TOGETHER = 512  # columns at most that it rounds so, and tells each other of
SUB = 16  # columns of a step: the least depth that a product on the tensor cores takes
ROWS = 16  # rows of the weights in a tile, for one warp
# The same where few rows are to be had, or a tile has much in registers: twice as many tiles are at work.
HALF_ROWS = 8


@jit
def nearest(x, low, high):  # type: ignore[no-untyped-def]
    """To the nearest whole number within whole bounds, ties to even: 1.5 * 2^23 more leaves no bit for a fraction."""
    x = tl.minimum(tl.maximum(x, low), high)
    return (x + 12582912.0) - 12582912.0


@jit
def take_row(tile, at):  # type: ignore[no-untyped-def]
    """The one row of `tile` where `at` is true."""
    return tl.sum(tl.where(at[:, None], tile, 0.0), axis=0)


@jit
def take_part(tile, step, C: tl.constexpr, S: tl.constexpr, B: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows `[step * S, step * S + S)` of `tile` (C, B)."""
    if C == S:
        return tile
    at = tl.arange(0, C // S) == step
    return tl.sum(tl.where(at[:, None, None], tl.reshape(tile, (C // S, S, B)), 0.0), axis=0)


@jit
def add_product(total, a, whole):  # type: ignore[no-untyped-def]
    """`total + a @ whole`, for whole numbers of at most ten bits, which TF32 holds; `a` as the sum of two it holds."""
    high = to_tf32(a)
    total = tl.dot(a - high, whole, total, input_precision="tf32")
    return tl.dot(high, whole, total, input_precision="tf32")


def rows_of_tile(small: bool) -> int:
    """Rows of the weights in a tile. `tl.dot` takes fewer than sixteen since Triton 3.5, on NVIDIA's GPUs."""
    return HALF_ROWS if small and torch.version.hip is None and triton_since(3, 5) else ROWS


def padded(columns: int) -> int:
    """Columns of the tile that holds these."""
    return max(SUB, int(triton.next_power_of_2(columns)))


def spans_several_blocks(tensor: Tensor, rows: int) -> bool:
    """Whether kernels do well with several pieces of so many rows of weights at once, where `tensor` is.

    With few rows a kernel has little to do in a piece: waiting takes longer, for its own start and for the library's
    product before it. With many, that product is better than the kernel's own.
    """
    return on_triton(tensor) and rows <= FEW
