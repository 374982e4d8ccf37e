"""Slow, obvious packers and unpackers of the three checkpoint formats, and a reader of whole directories.

Independent of the product on purpose: written from the formats' descriptions with numpy alone, one bit at a
time, sharing no line with `llm_quantize.formats`.

A layer is `W: (out, in)` with integers `q: (out, in)`, scales and zero points `(out, groups)`, and for each
input channel the group it belongs to; `W ≈ (q − z)·s`. Every integer is unsigned, whatever the file stores.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Tensors = dict[str, npt.NDArray[Any]]

# Column of the eight that the k-th nibble of an AWQ word holds, lowest nibble first.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One quantized linear: `q` (out, in), `zeros` and `scales` (out, groups), `group` (in,)."""

    q: Ints
    zeros: Ints
    scales: Floats
    group: Ints

    def dequantized(self) -> Floats:
        """`W`: (out, in), float32; exact, since the product of 8 bits and a half-precision scale fits."""
        offset = (self.q - self.zeros[:, self.group]).astype(np.float32)
        return offset * self.scales[:, self.group]


def stream(values: Ints, bits: int) -> npt.NDArray[np.int32]:
    """Pack the last axis of `values` (…, n) as a little-endian bit stream into words (…, n·bits/32)."""
    ones = ((values[..., None] >> np.arange(bits)) & 1).astype(np.uint8)
    ones = ones.reshape(*values.shape[:-1], values.shape[-1] * bits)
    missing = -ones.shape[-1] % 32
    ones = np.concatenate([ones, np.zeros((*ones.shape[:-1], missing), np.uint8)], axis=-1)
    return np.packbits(ones, axis=-1, bitorder="little").view("<i4")


def unstream(words: npt.NDArray[Any], bits: int, count: int) -> Ints:
    """Undo `stream`: read the first `count` values along the last axis."""
    words = np.ascontiguousarray(words.astype("<i4"))
    ones = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")[..., : count * bits]
    ones = ones.reshape(*words.shape[:-1], count, bits).astype(np.int64)
    values: Ints = (ones << np.arange(bits)).sum(axis=-1)
    return values


def groups_in_order(width: int, group_size: int) -> Ints:
    """Return the group of each channel, (width,): 0 … 0 1 … 1 …; all 0 for −1."""
    return np.arange(width) // (width if group_size == -1 else group_size)


# --- awq ------------------------------------------------------------------------------------------


def awq_words(values: Ints) -> npt.NDArray[np.int32]:
    """Pack 4-bit `values` (rows, columns), eight columns a word: int32 (rows, columns / 8)."""
    rows, columns = values.shape
    words = np.zeros((rows, columns // 8), np.uint32)
    for column in range(columns // 8):
        for nibble, place in enumerate(AWQ_ORDER):
            words[:, column] |= values[:, 8 * column + place].astype(np.uint32) << np.uint32(4 * nibble)
    return words.view(np.int32)


def awq_values(words: npt.NDArray[Any]) -> Ints:
    """Undo `awq_words`: (rows, columns)."""
    unsigned = np.ascontiguousarray(words.astype(np.int32)).view(np.uint32)
    values = np.zeros((words.shape[0], words.shape[1] * 8), np.int64)
    for column in range(words.shape[1]):
        for nibble, place in enumerate(AWQ_ORDER):
            values[:, 8 * column + place] = (unsigned[:, column] >> np.uint32(4 * nibble)) & 15
    return values


def pack_awq(layer: Layer) -> Tensors:
    """AutoAWQ's `gemm`, 4 bits: `qweight` (in, out/8), `qzeros` (groups, out/8), `scales` (groups, out)."""
    return {
        "qweight": awq_words(layer.q.T),
        "qzeros": awq_words(layer.zeros.T),
        "scales": layer.scales.T.astype(np.float16),
    }


def unpack_awq(tensors: Tensors, group_size: int) -> Layer:
    """Undo `pack_awq`."""
    q = awq_values(tensors["qweight"]).T
    return Layer(
        q=q,
        zeros=awq_values(tensors["qzeros"]).T,
        scales=tensors["scales"].astype(np.float32).T,
        group=groups_in_order(q.shape[1], group_size),
    )


# --- gptq -----------------------------------------------------------------------------------------


def pack_gptq(layer: Layer, bits: int) -> Tensors:
    """AutoGPTQ's v1: `qweight` (in·bits/32, out), `qzeros` (groups, out·bits/32) of z − 1, `g_idx` (in,)."""
    return {
        "qweight": stream(layer.q, bits).T,
        "qzeros": stream((layer.zeros.T - 1) % 2**bits, bits),
        "scales": layer.scales.T.astype(np.float16),
        "g_idx": layer.group.astype(np.int32),
    }


def unpack_gptq(tensors: Tensors, bits: int) -> Layer:
    """Undo `pack_gptq`. A stored 2^bits − 1 is read as zero point 0."""
    rows, out = tensors["qweight"].shape
    return Layer(
        q=unstream(tensors["qweight"].T, bits, rows * 32 // bits),
        zeros=((unstream(tensors["qzeros"], bits, out) + 1) % 2**bits).T,
        scales=tensors["scales"].astype(np.float32).T,
        group=tensors["g_idx"].astype(np.int64),
    )


# --- compressed-tensors ---------------------------------------------------------------------------


def pack_compressed_tensors(layer: Layer, bits: int, sym: bool) -> Tensors:
    """`pack-quantized`: `weight_packed` (out, in·bits/32), packed along `in`; zero points packed along `out`.

    What the library calls −2^(bits−1) … 2^(bits−1) − 1 is stored as 0 … 2^bits − 1. Values cross word borders
    (since compressed-tensors 0.18; before, a 3-bit word held ten values and two idle bits).
    """
    tensors: Tensors = {
        "weight_packed": stream(layer.q, bits),
        "weight_scale": layer.scales,
        "weight_shape": np.array(layer.q.shape, np.int64),
    }
    if not sym:
        tensors["weight_zero_point"] = stream(layer.zeros.T, bits).T
    return tensors


def unpack_compressed_tensors(tensors: Tensors, bits: int, group_size: int) -> Layer:
    """Undo `pack_compressed_tensors`; without stored zero points they are 2^(bits−1)."""
    out, width = (int(n) for n in tensors["weight_shape"])
    packed, scales = tensors["weight_packed"], tensors["weight_scale"].astype(np.float32)
    if packed.shape != (out, -(-width * bits // 32)):
        raise ValueError(f"weight_packed {packed.shape} does not hold {bits} bits of {(out, width)}")
    zeros: Ints = np.full(scales.shape, 2 ** (bits - 1), np.int64)
    if "weight_zero_point" in tensors:
        zeros = unstream(tensors["weight_zero_point"].T, bits, out).T
    return Layer(
        q=unstream(packed, bits, width), zeros=zeros, scales=scales, group=groups_in_order(width, group_size)
    )


# --- directories ----------------------------------------------------------------------------------


def read_tensors(path: Path) -> tuple[Tensors, dict[str, torch.dtype]]:
    """Read every tensor of a checkpoint directory, floats as float32, and the dtypes they are stored in."""
    index = path / "model.safetensors.index.json"
    files = {"model.safetensors"}
    if index.exists():
        files = set(json.loads(index.read_text())["weight_map"].values())
    tensors: Tensors = {}
    dtypes: dict[str, torch.dtype] = {}
    for file in sorted(files):
        with safe_open(path / file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 (not a mapping)
                tensor = stored.get_tensor(name)
                dtypes[name] = tensor.dtype
                tensors[name] = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return tensors, dtypes


def read_layers(path: Path) -> tuple[dict[str, Layer], Tensors]:
    """Read the quantized linears of a directory by name (without `.weight`), and all other tensors."""
    config = json.loads((path / "config.json").read_text())["quantization_config"]
    method = config["quant_method"]
    tensors, dtypes = read_tensors(path)
    marker = "weight_packed" if method == "compressed-tensors" else "qweight"
    layers: dict[str, Layer] = {}
    for name in [key.removesuffix("." + marker) for key in tensors if key.endswith("." + marker)]:
        parts = {
            key.removeprefix(name + "."): tensors.pop(key)
            for key in list(tensors)
            if key.startswith(name + ".") and key != name + ".bias"
        }
        if method != "compressed-tensors":
            scales = name + ".scales"
            if dtypes[scales] != torch.float16:
                raise ValueError(f"{scales} is {dtypes[scales]}, not float16")
        if method == "awq":
            if config["bits"] != 4 or config["version"].lower() != "gemm":
                raise ValueError(f"not AWQ's 4-bit gemm version: {config}")
            layers[name] = unpack_awq(parts, config["group_size"])
        elif method == "gptq":
            layers[name] = unpack_gptq(parts, config["bits"])
        elif method == "compressed-tensors" and config["format"] == "pack-quantized":
            (scheme,) = config["config_groups"].values()
            weights = scheme["weights"]
            if weights["symmetric"] == ("weight_zero_point" in parts):
                raise ValueError(f"{name}: symmetric is {weights['symmetric']}, tensors are {sorted(parts)}")
            layers[name] = unpack_compressed_tensors(
                parts, weights["num_bits"], weights["group_size"] if weights["strategy"] == "group" else -1
            )
        else:
            raise ValueError(f"no such format: {config}")
    return layers, tensors


def dequantize_directory(path: str | Path) -> dict[str, Floats]:
    """Return the float32 state dict of a quantized checkpoint, named as in its source (`X.weight`).

    Reads `awq`, `gptq` and `compressed-tensors` (`pack-quantized`), one file or shards with an index.
    """
    layers, tensors = read_layers(Path(path))
    return {name: tensor.astype(np.float32) for name, tensor in tensors.items()} | {
        f"{name}.weight": layer.dequantized() for name, layer in layers.items()
    }


def plain_model(path: str | Path) -> PreTrainedModel:
    """Load the de-quantized checkpoint as a float32 model of plain linears on the CPU."""
    config = AutoConfig.from_pretrained(path)
    del config.quantization_config
    build: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config
    model = build(config, dtype=torch.float32, attn_implementation="eager")
    state = {name: torch.from_numpy(tensor) for name, tensor in dequantize_directory(path).items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if unexpected or set(missing) - tied:
        raise ValueError(f"{path}: missing {sorted(missing)}, unexpected {sorted(unexpected)}")
    model.tie_weights()
    model.train(False)
    return model


# --- round to nearest -----------------------------------------------------------------------------


def round_to_nearest(
    weight: Floats, bits: int, sym: bool, group: Ints, scale_dtype: torch.dtype = torch.float16
) -> Layer:
    """Round to the minimum and maximum of each group of a row, with scales in their stored dtype."""
    top = 2**bits - 1
    count = int(group.max()) + 1
    scales = np.zeros((weight.shape[0], count), np.float32)
    zeros = np.zeros((weight.shape[0], count), np.int64)
    for number in range(count):
        part = weight[:, group == number]
        low, high = np.minimum(part.min(axis=1), 0), np.maximum(part.max(axis=1), 0)
        if sym:
            high = np.maximum(-low, high)
            low = -high
        scale = torch.from_numpy(np.maximum((high - low) / top, 1e-5)).to(scale_dtype).float().numpy()
        scales[:, number] = scale
        zeros[:, number] = 2 ** (bits - 1) if sym else np.clip(np.rint(-low / scale), 0, top)
    q = np.clip(np.rint(weight / scales[:, group]) + zeros[:, group], 0, top).astype(np.int64)
    return Layer(q=q, zeros=zeros, scales=scales, group=group)


def shuffled_groups(width: int, group_size: int, seed: int) -> Ints:
    """Make groups of equal size over a random order of the channels, as activation order does."""
    group = np.empty(width, np.int64)
    group[np.random.default_rng(seed).permutation(width)] = groups_in_order(width, group_size)
    return group


def quantization_config(
    format_name: str, bits: int, group_size: int, sym: bool, act_order: bool
) -> dict[str, Any]:
    """What `config.json` says of a checkpoint in this format."""
    if format_name == "awq":
        return {
            "quant_method": "awq",
            "bits": bits,
            "group_size": group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": ["lm_head"],
        }
    if format_name == "gptq":
        return {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group_size,
            "desc_act": act_order,
            "sym": sym,
            "damp_percent": 0.1,
            "lm_head": False,
            "checkpoint_format": "gptq",
        }
    weights = {
        "num_bits": bits,
        "type": "int",
        "symmetric": sym,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


def write_rtn_checkpoint(
    model_dir: str | Path,
    out_dir: str | Path,
    format_name: str,
    bits: int,
    group_size: int,
    sym: bool,
    *,
    act_order: bool = False,
    shards: int = 1,
) -> None:
    """Write a round-to-nearest checkpoint of a local model: 2-D weights inside the blocks are rounded, others copied.

    `act_order` (`gptq` alone) spreads each group over random channels, so that `g_idx` is not trivial.
    """
    model_dir, out_dir = Path(model_dir), Path(out_dir)
    if act_order and format_name != "gptq":
        raise ValueError(f"{format_name} has no g_idx")
    shutil.copytree(model_dir, out_dir, ignore=shutil.ignore_patterns("*.safetensors*"), dirs_exist_ok=True)
    tensors, dtypes = read_tensors(model_dir)
    saved: dict[str, torch.Tensor] = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        if ".layers." not in name or tensor.ndim != 2:
            saved[name] = torch.from_numpy(tensor).to(dtypes[name])
            continue
        width = tensor.shape[1]
        group = (
            shuffled_groups(width, group_size, number) if act_order else groups_in_order(width, group_size)
        )
        scale_dtype = dtypes[name] if format_name == "compressed-tensors" else torch.float16
        layer = round_to_nearest(tensor, bits, sym, group, scale_dtype)
        if format_name == "awq":
            parts = pack_awq(layer)
        elif format_name == "gptq":
            parts = pack_gptq(layer, bits)
        else:
            parts = pack_compressed_tensors(layer, bits, sym)
        for part, array in parts.items():
            packed = torch.from_numpy(np.ascontiguousarray(array))
            if part == "weight_scale":
                packed = packed.to(dtypes[name])
            saved[f"{name.removesuffix('.weight')}.{part}"] = packed
    write_shards(out_dir, saved, shards)

    quantization = quantization_config(format_name, bits, group_size, sym, act_order)
    config = json.loads((out_dir / "config.json").read_text())
    (out_dir / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}, indent=2))
    if format_name == "gptq":
        (out_dir / "quantize_config.json").write_text(json.dumps(quantization, indent=2))


def write_shards(out_dir: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    """Write `model.safetensors`, or that many shards with their index."""
    if shards == 1:
        save_file(tensors, out_dir / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        names = list(tensors)[shard::shards]
        save_file({name: tensors[name] for name in names}, out_dir / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    index = {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": weight_map,
    }
    (out_dir / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
