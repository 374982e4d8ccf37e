"""Quantized checkpoints as plain weights, from the files alone.

Reads `awq` (AutoAWQ's gemm), `gptq` (AutoGPTQ v1 and v2) and `compressed-tensors` (`pack-quantized`).
Shares no code with `packing.py` on purpose: an error there must show in what is measured of the files.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm_quantize.errors import InputError, WorkError, one_line
from llm_quantize.io.pinned_copies import Prefetcher
from llm_quantize.model.source import read_json, tensor_files

# What a linear's packed integers are called after its name.
_MARKERS = {"awq": "qweight", "gptq": "qweight", "compressed-tensors": "weight_packed"}
_PARTS = {
    "awq": ("qweight", "qzeros", "scales"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "compressed-tensors": (
        "weight_packed",
        "weight_scale",
        "weight_zero_point",
        "weight_shape",
        "weight_g_idx",
    ),
}
_RANKS = {"g_idx": 1, "weight_g_idx": 1, "weight_shape": 1}  # of those that are no matrices
_AT_ONCE = 1 << 23  # values unpacked together; each takes some 40 bytes on the way
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # column k of eight lies in this nibble, lowest first


def dequantized(directory: Path) -> QuantizedCheckpoint:
    """Opens a quantized directory. Errors: `InputError` where it is none, or in a layout not known here."""
    return QuantizedCheckpoint(directory)


class QuantizedCheckpoint:
    """A reader: `read("X.weight")` is the de-quantized weight, float32 (out, in); other tensors as stored.

    `files` maps the names that can be read to the shard that holds them; `linears` are the quantized `X`.
    """

    def __init__(self, directory: Path) -> None:
        if not (directory / "config.json").is_file():
            raise InputError(f"{directory} has no config.json: give the directory of a quantized model")
        config = read_json(directory / "config.json")
        settings = config.get("quantization_config")
        if not isinstance(settings, dict):
            raise InputError(f"{directory} is not quantized: give a directory that the quantizer wrote")
        self.directory = directory
        self.layout = str(settings.get("quant_method"))
        self.bits = _bits(self.layout, settings)
        # AutoGPTQ's v1 stores zero points less one; v2 as they are.
        self._less = 0 if "gptq_v2" in (settings.get("checkpoint_format"), settings.get("format")) else 1
        self._act_order = bool(settings.get("desc_act"))
        self._stored = tensor_files(directory)
        end = "." + _MARKERS[self.layout]
        self.linears = {name.removesuffix(end) for name in self._stored if name.endswith(end)}
        if not self.linears:
            raise InputError(f"{directory} says {self.layout} and holds no tensor *{end}: write it again")
        packed = {f"{linear}.{part}" for linear in self.linears for part in _PARTS[self.layout]}
        self.files = {name: file for name, file in self._stored.items() if name not in packed}
        self.files |= {f"{linear}.weight": self._stored[linear + end] for linear in self.linears}
        self._handles: dict[Path, Any] = {}
        self._prefetcher = Prefetcher(self._mapped)

    def prefetch(self, prefix: str, device: torch.device) -> None:
        """Begins to read all tensors whose names begin with `prefix`, packed as they are, for `read` on `device`.

        As `source.Source.ahead`.
        """
        if self._prefetcher.serves(device):
            self._prefetcher.begin(name for name in self._stored if name.startswith(prefix))

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """One tensor on `device`. Errors: `WorkError`, naming tensor and shard."""
        linear = name.removesuffix(".weight")
        if linear == name or linear not in self.linears:
            return self._tensor(name, device)
        names = [f"{linear}.{part}" for part in _PARTS[self.layout]]
        parts = {n.removeprefix(f"{linear}."): self._tensor(n, device) for n in names if n in self._stored}
        try:
            for part, tensor in parts.items():
                if tensor.ndim != _RANKS.get(part, 2):
                    raise ValueError(f"{part} has {tensor.ndim} dimensions")
            if self.layout == "awq":
                return _awq(parts)
            if self.layout == "gptq":
                return _gptq(parts, self.bits, self._less, self._act_order)
            return _compressed(parts, self.bits)
        except KeyError as error:
            raise WorkError(
                f"{linear} has no tensor {error.args[0]} in {self.directory}: write it again"
            ) from None
        except torch.cuda.OutOfMemoryError:
            raise
        except (ValueError, IndexError, TypeError, RuntimeError, OverflowError) as error:
            # Tensors of other types or ranks than the layout has.
            raise WorkError(f"{linear} cannot be unpacked: {one_line(error)}") from None

    def _tensor(self, name: str, device: torch.device | str) -> Tensor:
        place = torch.device(device)
        tensor = self._prefetcher.take(name, place)
        return self._mapped(name).to(place) if tensor is None else tensor

    def _mapped(self, name: str) -> Tensor:
        file = self._stored.get(name)
        if file is None:
            raise WorkError(f"{self.directory} has no tensor {name}: write it again")
        try:
            if file not in self._handles:
                self._handles[file] = safe_open(file, framework="pt")
            tensor: Tensor = self._handles[file].get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise WorkError(
                f"cannot read {name} from {file.name} ({one_line(error)}): write it again"
            ) from None
        return tensor


def _bits(layout: str, settings: dict[str, Any]) -> int:
    if layout == "awq":
        if settings.get("bits") != 4 or str(settings.get("version", "gemm")).lower() != "gemm":
            raise InputError("only AWQ's gemm version at 4 bits can be read")
        return 4
    if layout == "gptq":
        bits = settings.get("bits")
        if type(bits) is not int or bits not in (2, 3, 4, 8):
            raise InputError(f"GPTQ at {bits} bits cannot be read: 2, 3, 4 and 8 can")
        return int(bits)
    if layout == "compressed-tensors":
        groups = settings.get("config_groups")
        schemes = list(groups.values()) if isinstance(groups, dict) else []
        found = [s.get("weights") for s in schemes if isinstance(s, dict)]
        weights = [w if isinstance(w, dict) else {} for w in found]
        widths = [w.get("num_bits") for w in weights]
        plain = all(n == widths[0] for n in widths) and all(w.get("type", "int") == "int" for w in weights)
        bits = widths[0] if plain and widths else None
        if settings.get("format") != "pack-quantized" or type(bits) is not int or not 2 <= bits <= 8:
            raise InputError("of compressed-tensors only pack-quantized integers of one width can be read")
        if any(w.get("actorder") in ("group", "dynamic") for w in weights):
            raise InputError("compressed-tensors with groups in activation order cannot be read")
        return bits
    raise InputError(f"checkpoints of {layout} cannot be read: awq, gptq and compressed-tensors can")


def _stream(words: Tensor, bits: int) -> Tensor:
    """int32 (rows, n) -> integers (rows, values): a little-endian bit stream along each row, to its end."""
    if 32 % bits == 0:  # no value crosses a word's border
        return _padded(words, bits)
    rows, columns = words.shape
    whole = -(-columns // bits) * bits  # 32 values fill `bits` words
    words = torch.nn.functional.pad(words, (0, whole - columns)).to(torch.int64) & 0xFFFFFFFF
    chunks = torch.nn.functional.pad(words.view(rows, -1, bits), (0, 1))
    first = torch.arange(32, device=words.device) * bits
    # A value that crosses a word's border has its upper bits at the bottom of the next one.
    pairs = chunks[:, :, first // 32] | (chunks[:, :, first // 32 + 1] << 32)
    return torch.bitwise_and(pairs >> (first % 32), 2**bits - 1).view(rows, -1)


def _padded(words: Tensor, bits: int) -> Tensor:
    """The same where each word holds `32 // bits` values and idle bits: compressed-tensors before 0.18."""
    return _in_words(words, _shifts(tuple(range(0, 32 - bits + 1, bits)), words.device), bits)


def _awq_columns(words: Tensor) -> Tensor:
    """int32 (rows, n / 8) -> int32 (rows, n)."""
    return _in_words(words, _shifts(tuple(4 * place for place in _AWQ_PLACES), words.device), 4)


@cache
def _shifts(bits: tuple[int, ...], device: torch.device) -> Tensor:
    """int32, on the device: made once, since the way there waits for what is going on."""
    return torch.tensor(bits, dtype=torch.int32, device=device)


def _in_words(words: Tensor, shifts: Tensor, bits: int) -> Tensor:
    """The values that begin at `shifts` in each word, one after another. The sign spreads beyond what is kept."""
    values = words[:, :, None] >> shifts
    return values.bitwise_and_(2**bits - 1).flatten(1)


def _slices(rows: int, width: int) -> list[tuple[int, int]]:
    step = max(1, _AT_ONCE // max(width, 1))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _groups(width: int, count: int, device: torch.device) -> Tensor:
    """int64 (width,): the group of each channel where groups lie one after another."""
    return torch.arange(width, device=device) // _size(width, count)


def _size(width: int, count: int) -> int:
    """Channels of a group. Errors: `ValueError` where they do not fill the width."""
    if count == 0 or width % count:
        raise ValueError(f"{count} groups do not divide {width} channels")
    return width // count


def _scaled(q: Tensor, zeros: Tensor, scales: Tensor, group: Tensor | None) -> Tensor:
    """`(q - z) * s`, float32 (rows, width), from integers (rows, width); zeros, scales: (rows, groups).

    group: that of each channel; None where they lie one after another, which spares looking them up.
    """
    if group is not None:
        return q.float().sub_(zeros[:, group]).mul_(scales[:, group])
    size = _size(q.shape[1], scales.shape[1])
    parts = q.float().view(q.shape[0], -1, size)
    return parts.sub_(zeros[:, :, None]).mul_(scales[:, :, None]).flatten(1)


def _awq(parts: dict[str, Tensor]) -> Tensor:
    words, scales = parts["qweight"], parts["scales"].float()
    width, out = words.shape[0], words.shape[1] * 8
    zeros = _awq_columns(parts["qzeros"]).float()
    if scales.shape != zeros.shape or scales.shape[1] != out:
        raise ValueError(f"scales {tuple(scales.shape)}, zero points {tuple(zeros.shape)} for {out} outputs")
    group = _groups(width, scales.shape[0], words.device)
    weight = torch.empty((out, width), device=words.device)
    for a, b in _slices(width, out):
        part = group[a:b]
        weight[:, a:b] = _awq_columns(words[a:b]).float().sub_(zeros[part]).mul_(scales[part]).T
    return weight


def _gptq(parts: dict[str, Tensor], bits: int, less: int, act_order: bool) -> Tensor:
    words, scales = parts["qweight"], parts["scales"].float()
    width, out = words.shape[0] * 32 // bits, words.shape[1]
    zeros = ((_stream(parts["qzeros"], bits)[:, :out] + less) % 2**bits).float()
    if scales.shape != zeros.shape or scales.shape[1] != out:
        raise ValueError(f"scales {tuple(scales.shape)}, zero points {tuple(zeros.shape)} for {out} outputs")
    plain = _groups(width, scales.shape[0], words.device) if not act_order or "g_idx" not in parts else None
    group = parts["g_idx"].long() if "g_idx" in parts else plain
    assert group is not None
    if group.shape != (width,) or bool(((group < 0) | (group >= scales.shape[0])).any()):
        raise ValueError(f"g_idx does not give one of {scales.shape[0]} groups to each of {width} channels")
    if plain is not None and not torch.equal(group, plain):
        raise ValueError("g_idx is not trivial where the config says desc_act false: readers ignore it")
    weight = torch.empty((out, width), device=words.device)
    turned, scales, zeros = words.T.contiguous(), scales.T.contiguous(), zeros.T.contiguous()
    for a, b in _slices(out, width):
        q = _stream(turned[a:b], bits)[:, :width]
        weight[a:b] = _scaled(q, zeros[a:b], scales[a:b], None if plain is not None else group)
    return weight


def _compressed(parts: dict[str, Tensor], bits: int) -> Tensor:
    words, scales = parts["weight_packed"], parts["weight_scale"].float()
    out, width = (int(n) for n in parts["weight_shape"].tolist())
    if "weight_g_idx" in parts:
        raise ValueError("groups in activation order (weight_g_idx)")
    if words.shape == (out, -(-width * bits // 32)):
        values = _stream
    elif words.shape == (out, -(-width // (32 // bits))):
        values = _padded
    else:
        raise ValueError(f"weight_packed {tuple(words.shape)} does not hold {(out, width)} at {bits} bits")
    if scales.ndim != 2 or scales.shape[0] != out:
        raise ValueError(f"weight_scale {tuple(scales.shape)} for {out} outputs")
    _size(width, scales.shape[1])
    zeros = torch.full_like(scales, 2 ** (bits - 1))
    if "weight_zero_point" in parts:
        zeros = values(parts["weight_zero_point"].T.contiguous(), bits)[:, :out].T.float()
        if zeros.shape != scales.shape:
            raise ValueError(f"weight_zero_point is for {tuple(zeros.shape)}, not {tuple(scales.shape)}")
    weight = torch.empty((out, width), device=words.device)
    for a, b in _slices(out, width):
        weight[a:b] = _scaled(values(words[a:b], bits)[:, :width], zeros[a:b], scales[a:b], None)
    return weight
