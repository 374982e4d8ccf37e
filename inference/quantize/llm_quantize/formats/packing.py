"""Integers, scales and zero points <-> the words of a checkpoint, for each layout that readers know.

`w ~ (q - z) * s` with unsigned `q` in every layout; `g = group_size` (-1: the whole row), `G = in / g`.

- `awq` (AutoAWQ's `gemm`, 4 bits): words along `out`, the eight columns of a word interleaved.
- `gptq` (AutoGPTQ v1; 2, 3, 4, 8 bits): a little-endian bit stream along `in`; zero points less one.
- `compressed-tensors` (`pack-quantized`, 2 to 8 bits): packed and described by that library itself.

Knows tensors and the shape of `quantization_config`; no files, no models. `compressed_tensors` takes long to import:
that is done where it is used.
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch
from torch import Tensor

from llm_quantize.errors import InputError
from llm_quantize.solver.qparams import QParams

# The tensors of a linear, by what follows its name; an asymmetric `compressed-tensors` one has all four.
SUFFIXES: dict[str, tuple[str, ...]] = {
    "awq": ("qweight", "qzeros", "scales"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point"),
}

# The library's packer makes several int32 copies of what it is given: rows go in slices of this many weights.
_SLICE = 1 << 25


# ------------------------------------------------------------------------------------------------------------
# Widths


def check_shape(
    layout: str, bits: int, group_size: int, name: str, out_features: int, in_features: int
) -> None:
    """Raises `InputError`, naming the layer, for a linear whose widths do not fill groups and words."""
    if group_size != -1 and in_features % group_size:
        raise InputError(
            f"{name} has {in_features} input channels, which {group_size} does not divide: "
            "choose another --group_size (-1 always fits)"
        )
    # 8 values of `bits` bits fill whole bytes; a stream must fill whole 32-bit words.
    step = 32 // math.gcd(32, bits)
    packed = {"awq": {"output": out_features}, "gptq": {"output": out_features, "input": in_features}}
    for side, width in packed.get(layout, {}).items():
        if width % step:
            raise InputError(
                f"{name} has {width} {side} channels, not a multiple of {step} as the {layout} format needs "
                f"at {bits} bits: use --format compressed-tensors"
            )


# ------------------------------------------------------------------------------------------------------------
# Bit streams


def _chunk(bits: int) -> tuple[int, int]:
    """The fewest values that fill whole bytes, and those bytes."""
    common = math.gcd(8, bits)
    return 8 // common, bits // common


def _split(x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """(rows, n) with its columns as `sizes`."""
    return x.reshape(x.shape[0], *sizes)


def _stream(values: Tensor, bits: int) -> Tensor:
    """uint8 (rows, n) -> int32 (rows, n * bits / 32): a little-endian bit stream along each row."""
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


def _unstream(words: Tensor, bits: int) -> Tensor:
    """Undoes `_stream`: uint8 (rows, n)."""
    count, width = _chunk(bits)
    chunk = words.reshape(-1).view(torch.uint8).reshape(words.shape[0], -1)
    if width > 1:
        parts = _split(chunk, (-1, width)).to(torch.int32)
        chunk = parts[:, :, 0]
        for k in range(1, width):
            chunk = chunk | (parts[:, :, k] << (8 * k))
    mask = 2**bits - 1
    values = [((chunk >> (bits * k)) & mask).to(torch.uint8) for k in range(count)]
    return torch.stack(values, dim=2).flatten(1)


def _awq_words(values: Tensor) -> Tensor:
    """uint8 (rows, n) -> int32 (rows, n / 8); nibble `k` is column `[0, 2, 4, 6, 1, 3, 5, 7][k]` of eight."""
    return _stream(_split(values, (-1, 4, 2)).transpose(2, 3).flatten(1), 4)


def _awq_values(words: Tensor) -> Tensor:
    """Undoes `_awq_words`."""
    return _split(_unstream(words, 4), (-1, 2, 4)).transpose(2, 3).flatten(1)


# ------------------------------------------------------------------------------------------------------------
# Layers


def trivial_g_idx(in_features: int, group_size: int, device: torch.device | str = "cpu") -> Tensor:
    """int32 (in,): 0 ... 0 1 ... 1 ...; all 0 for -1."""
    width = in_features if group_size == -1 else group_size
    return torch.arange(in_features, dtype=torch.int32, device=device) // width


def pack(
    layout: str,
    q: Tensor,
    grid: QParams,
    group_size: int,
    bits: int,
    *,
    g_idx: Tensor | None = None,
    scale_dtype: torch.dtype = torch.float16,
    symmetric: bool,
) -> dict[str, Tensor]:
    """The tensors of one linear, by suffix, on the device of `q`.

    q: uint8 (out, in); grid: (out, G). `g_idx`, int32 (in,), only in the `gptq` layout, for groups in
    activation order. `scale_dtype` is that of `weight_scale`; the other layouts hold float16. `symmetric`
    drops the zero points of `compressed-tensors`, which must then be `2^(bits-1)`.
    """
    out, width = q.shape
    check_shape(layout, bits, group_size, "the layer", out, width)
    groups = 1 if group_size == -1 else width // group_size
    if grid.scale.shape != (out, groups) or grid.zero.shape != (out, groups):
        raise ValueError(f"grid {tuple(grid.scale.shape)} for {out} rows of {groups} groups")
    if g_idx is not None and layout != "gptq":
        raise ValueError(f"{layout} has no g_idx")
    zero = grid.zero.to(torch.int32)
    if layout == "compressed-tensors":
        return _pack_compressed(q, grid.scale.to(scale_dtype), zero, bits, symmetric)
    scales = grid.scale.T.to(torch.float16).contiguous()
    if layout == "awq":
        return {
            "qweight": _awq_words(q.T.contiguous()),
            "qzeros": _awq_words(zero.T.to(torch.uint8).contiguous()),
            "scales": scales,
        }
    less_one = ((zero.T - 1) & (2**bits - 1)).to(torch.uint8)
    if g_idx is None:
        g_idx = trivial_g_idx(width, group_size, q.device)
    return {
        "qweight": _stream(q, bits).T.contiguous(),
        "qzeros": _stream(less_one, bits),
        "scales": scales,
        "g_idx": g_idx.to(device=q.device, dtype=torch.int32).contiguous(),
    }


def planned(
    layout: str,
    out: int,
    width: int,
    group_size: int,
    bits: int,
    *,
    scale_dtype: torch.dtype = torch.float16,
    symmetric: bool,
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """dtype and shape of every tensor that `pack` makes of a linear (out, width), by suffix."""
    groups = 1 if group_size == -1 else width // group_size
    if layout == "compressed-tensors":
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "weight_packed": (torch.int32, (out, -(-width * bits // 32))),
            "weight_scale": (scale_dtype, (out, groups)),
            "weight_shape": (torch.int64, (2,)),
        }
        if not symmetric:
            tensors["weight_zero_point"] = (torch.int32, (-(-out * bits // 32), groups))
        return tensors
    zeros = (torch.int32, (groups, out * bits // 32))
    scales = (torch.float16, (groups, out))
    if layout == "awq":
        return {"qweight": (torch.int32, (width, out * bits // 32)), "qzeros": zeros, "scales": scales}
    words = (torch.int32, (width * bits // 32, out))
    return {"qweight": words, "qzeros": zeros, "scales": scales, "g_idx": (torch.int32, (width,))}


def _pack_compressed(q: Tensor, scale: Tensor, zero: Tensor, bits: int, symmetric: bool) -> dict[str, Tensor]:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    middle = 2 ** (bits - 1)
    rows = max(1, _SLICE // q.shape[1])
    # The library's integers are signed; uint8 subtraction wraps to their two's complement.
    words = [pack_to_int32((part - middle).view(torch.int8), bits) for part in torch.split(q, rows)]
    tensors = {
        "weight_packed": torch.cat(words),
        "weight_scale": scale.contiguous(),
        "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
    }
    if not symmetric:
        signed = (zero - middle).to(torch.int8)
        tensors["weight_zero_point"] = pack_to_int32(signed, bits, packed_dim=0).contiguous()
    elif bool((zero != middle).any()):
        raise ValueError(f"a symmetric grid's zero points are {middle}")
    return tensors


def unpack(
    layout: str, tensors: dict[str, Tensor], bits: int, group_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Undoes `pack`: `q` uint8 (out, in), scale and zero point float32 (out, G).

    Errors: `KeyError` for a tensor that is missing, `ValueError` for shapes that do not belong together.
    """
    if layout == "compressed-tensors":
        q, scale, zero = _unpack_compressed(tensors, bits)
    elif layout == "awq":
        q = _awq_values(tensors["qweight"]).T.contiguous()
        zero, scale = _awq_values(tensors["qzeros"]).T, tensors["scales"].T
    else:
        q = _unstream(tensors["qweight"].T, bits)
        zero = (_unstream(tensors["qzeros"], bits).to(torch.int32) + 1).remainder(2**bits).T
        scale = tensors["scales"].T
    expected = (q.shape[0], 1 if group_size == -1 else q.shape[1] // group_size)
    if scale.shape != expected or zero.shape != expected:
        raise ValueError(f"scales {tuple(scale.shape)} and zeros {tuple(zero.shape)}, not {expected}")
    return q, scale.to(torch.float32).contiguous(), zero.to(torch.float32).contiguous()


def _unpack_compressed(tensors: dict[str, Tensor], bits: int) -> tuple[Tensor, Tensor, Tensor]:
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    middle = 2 ** (bits - 1)
    out, width = (int(n) for n in tensors["weight_shape"])
    scale, packed = tensors["weight_scale"], tensors["weight_packed"]
    if packed.shape != (out, -(-width * bits // 32)):
        raise ValueError(f"weight_packed {tuple(packed.shape)} does not hold {(out, width)} at {bits} bits")
    parts = [
        # int8 read as uint8 is modulo 256, and so is the addition.
        unpack_from_int32(part, bits, torch.Size((part.shape[0], width))).contiguous().view(torch.uint8)
        + middle
        for part in torch.split(packed, max(1, _SLICE // width))
    ]
    zero = torch.full(scale.shape, middle, dtype=torch.int32, device=scale.device)
    stored = tensors.get("weight_zero_point")
    if stored is not None:
        zero = unpack_from_int32(stored, bits, scale.shape, packed_dim=0).to(torch.int32) + middle
    return torch.cat(parts), scale, zero


# ------------------------------------------------------------------------------------------------------------
# config.json


def quantization_config(
    layout: str,
    *,
    method: str,
    bits: int,
    group_size: int,
    symmetric: bool,
    desc_act: bool,
    damp_percent: float,
    not_converted: list[str],
) -> dict[str, Any]:
    """`quantization_config` of config.json in plain JSON values; for `gptq` also all of quantize_config.json.

    `desc_act` is what the file says: true only with a `g_idx` that is not trivial. `not_converted` names the
    linears left alone (`["lm_head"]`). An `awq` file always says `zero_point: true`, a symmetric one with
    constant zeros: vLLM is slow with the other. `method` matters to no reader.
    """
    if desc_act and layout != "gptq":
        raise ValueError(f"{layout} has no desc_act")
    if layout == "awq":
        return {
            "quant_method": "awq",
            "bits": bits,
            "group_size": group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(not_converted),
        }
    if layout == "gptq":
        return {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group_size,
            "desc_act": desc_act,
            "sym": symmetric,
            "damp_percent": damp_percent,
            "lm_head": False,
            "checkpoint_format": "gptq",
        }
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
    )

    weights = QuantizationArgs(
        num_bits=bits,
        type="int",
        symmetric=symmetric,
        strategy="channel" if group_size == -1 else "group",
        group_size=None if group_size == -1 else group_size,
    )
    config = QuantizationConfig(
        config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        format="pack-quantized",
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=list(not_converted),
    )
    plain: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
    return plain
