"""Integers of a few bits in 32-bit words, and back. The two ways share no code, so that one tests the other."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

UNPACKED_TOGETHER = 1 << 23  # values; each takes some 40 bytes on the way


# -- packing


def _chunk(bits: int) -> tuple[int, int]:
    """The fewest values that fill whole bytes, and the number of those bytes."""
    common = math.gcd(8, bits)
    return 8 // common, bits // common


def pack_stream(values: Tensor, bits: int) -> Tensor:
    """Pack each row as a little-endian bit stream: uint8 (rows, n) -> int32 (rows, n * bits / 32)."""
    count, width = _chunk(bits)
    wide = torch.uint8 if width == 1 else torch.int32
    chunk = values[:, 0::count].to(wide)
    for k in range(1, count):
        chunk = chunk | (values[:, k::count].to(wide) << (bits * k))
    if width > 1:
        parts = [((chunk >> (8 * k)) & 255).to(torch.uint8) for k in range(width)]
        chunk = torch.stack(parts, dim=2).flatten(1)
    # Through one dimension: a view as wider words asks for strides that a tensor of one row need not have.
    return chunk.reshape(-1).view(torch.int32).reshape(values.shape[0], -1)


# -- unpacking


def unpack_stream(words: Tensor, bits: int) -> Tensor:
    """Read each row as a little-endian bit stream, to its end: int32 (rows, n) -> integers (rows, values)."""
    if 32 % bits == 0:  # no value crosses a word's border
        return unpack_padded(words, bits)
    rows, columns = words.shape
    whole = -(-columns // bits) * bits  # 32 values fill `bits` words
    words = torch.nn.functional.pad(words, (0, whole - columns)).to(torch.int64) & 0xFFFFFFFF
    chunks = torch.nn.functional.pad(words.view(rows, -1, bits), (0, 1))
    first = torch.arange(32, device=words.device) * bits
    # A value that crosses a word's border has its upper bits at the bottom of the next one.
    pairs = chunks[:, :, first // 32] | (chunks[:, :, first // 32 + 1] << 32)
    return torch.bitwise_and(pairs >> (first % 32), 2**bits - 1).view(rows, -1)


def unpack_padded(words: Tensor, bits: int) -> Tensor:
    """Read rows whose words hold `32 // bits` values and idle bits, as compressed-tensors wrote before 0.18."""
    return unpack_words(words, tuple(range(0, 32 - bits + 1, bits)), bits)


def unpack_words(words: Tensor, shifts: tuple[int, ...], bits: int) -> Tensor:
    """Read the values that begin at the bits `shifts` of each word, one after another."""
    # The sign spreads beyond what is kept.
    values = words[:, :, None] >> _on_device(shifts, words.device)
    return values.bitwise_and_(2**bits - 1).flatten(1)


@cache
def _on_device(bits: tuple[int, ...], device: torch.device) -> Tensor:
    """int32, made once: a copy to the device waits for the work that it has."""
    return torch.tensor(bits, dtype=torch.int32, device=device)


def in_slices(rows: int, width: int, unpack: Callable[[int, int], Tensor]) -> Tensor:
    """uint8 (rows, width) from `unpack(start, stop)`, which gives some rows at a time and so bounds the memory."""
    step = max(1, UNPACKED_TOGETHER // max(width, 1))
    parts = [unpack(start, min(start + step, rows)).to(torch.uint8) for start in range(0, rows, step)]
    return (
        parts[0]
        if len(parts) == 1
        else torch.cat(parts)
        if parts
        else torch.empty(rows, width, dtype=torch.uint8)
    )
