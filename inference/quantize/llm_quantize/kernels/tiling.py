"""Tiles and steps that the loops over columns share.

A loop takes a *piece* of at most `COLUMNS` columns: one program holds a tile of the piece, all columns by a few rows of
the weights, in registers. Inside a piece the loop goes in *steps* of `SUB` columns. A column updates the later columns
of its own step at once; a matrix product updates the rest of the piece after the step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llm_quantize.kernels.launcher import jit, on_triton, tl, triton, triton_since
from llm_quantize.kernels.precision import to_tf32

COLUMNS = 128  # columns of a piece at most: what a tile holds
FEW = 8192  # rows of the weights at most for which one kernel takes several pieces
TOGETHER = 512  # columns at most that such a kernel takes
SUB = 16  # columns of a step: the least depth of a product on the tensor cores
ROWS = 16  # rows of the weights in a tile, for one warp
# Rows where the weights have few of them, or a tile needs many registers: twice as many tiles share the work.
HALF_ROWS = 8


@jit
def nearest(x, low, high):  # type: ignore[no-untyped-def]
    """Round `x` to the nearest integer between the integers `low` and `high`, ties to even.

    float32 numbers near 1.5 * 2^23 are integers: to add and subtract this one rounds to an integer.
    """
    x = tl.minimum(tl.maximum(x, low), high)
    return (x + 12582912.0) - 12582912.0


@jit
def take_row(tile, at):  # type: ignore[no-untyped-def]
    """Return the row (B) of `tile` (S, B) where the mask `at` (S) is true."""
    return tl.sum(tl.where(at[:, None], tile, 0.0), axis=0)


@jit
def take_part(tile, step, C: tl.constexpr, S: tl.constexpr, B: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return rows `[step * S, step * S + S)` of `tile` (C, B)."""
    if C == S:
        return tile
    at = tl.arange(0, C // S) == step
    return tl.sum(tl.where(at[:, None, None], tl.reshape(tile, (C // S, S, B)), 0.0), axis=0)


@jit
def add_product(total, a, integers):  # type: ignore[no-untyped-def]
    """Return `total + a @ integers` to about float32's accuracy, by two products of TF32.

    integers: of at most ten bits, which TF32 holds exactly. a: float32, split here into two that TF32 holds.
    """
    high = to_tf32(a)
    total = tl.dot(a - high, integers, total, input_precision="tf32")
    return tl.dot(high, integers, total, input_precision="tf32")


def rows_of_tile(small: bool) -> int:
    """Return how many rows of the weights a tile takes: `HALF_ROWS` if `small` and supported, else `ROWS`.

    `tl.dot` takes fewer than sixteen rows since Triton 3.5, on NVIDIA's GPUs.
    """
    return HALF_ROWS if small and torch.version.hip is None and triton_since(3, 5) else ROWS


def padded(columns: int) -> int:
    """Return the columns of the smallest tile that holds `columns`."""
    return max(SUB, int(triton.next_power_of_2(columns)))


def spans_several_blocks(tensor: Tensor, rows: int) -> bool:
    """Return whether one kernel should take several pieces, for weights of `rows` rows on the device of `tensor`.

    With few rows, a kernel of one piece takes less time than its launch and the library's product before it. With many
    rows, the library's product is faster than a product inside the kernel.
    """
    return on_triton(tensor) and rows <= FEW
