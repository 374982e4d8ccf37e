"""Quantized checkpoints as plain weights, from the files alone."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llm_quantize.errors import InputError, WorkError, one_line
from llm_quantize.formats import FORMATS
from llm_quantize.formats.base import CheckpointFormat, Unpacked
from llm_quantize.formats.bit_streams import UNPACKED_TOGETHER
from llm_quantize.io.pinned_copies import Prefetcher
from llm_quantize.io.untrusted import read_json
from llm_quantize.model.source import Model
from llm_quantize.model.weight_files import tensor_files

_RANKS = {"g_idx": 1, "weight_g_idx": 1, "weight_shape": 1}  # of those that are no matrices


class QuantizedStore:
    """A `TensorStore` over a quantized directory: `X.weight` is the de-quantized weight, float32 (out, in).

    Other tensors come as they are stored. files: the names that can be read, with their shards. linears: the quantized
    `X`. format, settings: as config.json says. Raises InputError for what is no quantized directory, or in a format
    that is not known here.
    """

    what = "quantized checkpoint"

    def __init__(self, directory: Path) -> None:
        if not (directory / "config.json").is_file():
            raise InputError(f"{directory} has no config.json: give the directory of a quantized model")
        config = read_json(directory / "config.json")
        stored = config.get("quantization_config")
        if not isinstance(stored, dict):
            raise InputError(f"{directory} is not quantized: give a directory that the quantizer wrote")
        self.directory = directory
        self.format = _known_format(str(stored.get("quant_method")))
        self.settings = self.format.stored_settings(stored)
        self._stored = tensor_files(directory)
        end = "." + self.format.marker
        self.linears = {name.removesuffix(end) for name in self._stored if name.endswith(end)}
        if not self.linears:
            raise InputError(
                f"{directory} says {self.format.name} and holds no tensor *{end}: write it again"
            )
        packed = {f"{linear}.{part}" for linear in self.linears for part in self.format.parts}
        self.files = {name: file for name, file in self._stored.items() if name not in packed}
        self.files |= {f"{linear}.weight": self._stored[linear + end] for linear in self.linears}
        self._handles: dict[Path, Any] = {}
        self._prefetcher = Prefetcher(self._mapped)

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        linear = name.removesuffix(".weight")
        if linear == name or linear not in self.linears:
            return self._tensor(name, device)
        parts = {n.removeprefix(f"{linear}."): self._tensor(n, device) for n in self._parts(name)}
        try:
            for part, tensor in parts.items():
                if tensor.ndim != _RANKS.get(part, 2):
                    raise ValueError(f"{part} has {tensor.ndim} dimensions")
            return dequantize_unpacked(self.format.unpack(parts, self.settings))
        except KeyError as error:
            raise WorkError(
                f"{linear} has no tensor {error.args[0]} in {self.directory}: write it again"
            ) from None
        except torch.cuda.OutOfMemoryError:
            raise
        except (ValueError, IndexError, TypeError, RuntimeError, OverflowError) as error:
            # Tensors of other types or ranks than the format has.
            raise WorkError(f"{linear} cannot be unpacked: {one_line(error)}") from None

    def dtype(self, name: str) -> torch.dtype:
        linear = name.removesuffix(".weight")
        return torch.float32 if linear in self.linears else self._mapped(name).dtype

    def prefetch(self, names: Iterable[str], device: torch.device) -> None:
        if self._prefetcher.serves(device):
            self._prefetcher.start(stored for name in names for stored in self._parts(name))

    def _parts(self, name: str) -> list[str]:
        """The stored tensors of which `read` makes the tensor called `name`."""
        linear = name.removesuffix(".weight")
        if linear == name or linear not in self.linears:
            return [name]
        names = (f"{linear}.{part}" for part in self.format.parts)
        return [stored for stored in names if stored in self._stored]

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


def _known_format(name: str) -> CheckpointFormat:
    if name not in FORMATS:
        raise InputError(f"checkpoints of {name} cannot be read: awq, gptq and compressed-tensors can")
    return FORMATS[name]


def open_quantized(source: Model, directory: Path) -> Model:
    """A quantized directory as a model of de-quantized weights, on a skeleton of its own like that of `source`.

    Everything comes from its files: norms and biases too, which AWQ changes. Raises InputError.
    """
    store = QuantizedStore(directory)
    return Model(directory, source.config, copy.deepcopy(source.skeleton), source.tokenizer, store)


def dequantize_unpacked(read: Unpacked) -> Tensor:
    """`(q - zero) * scale`, float32 (out, in), some rows at a time."""
    out, width = read.q.shape
    weight = torch.empty((out, width), device=read.q.device)
    step = max(1, UNPACKED_TOGETHER // max(width, 1))
    for start in range(0, out, step):
        rows = slice(start, start + step)
        q, scale, zero = read.q[rows], read.scale[rows], read.zero[rows]
        if read.group is not None:
            weight[rows] = q.float().sub_(zero[:, read.group]).mul_(scale[:, read.group])
            continue
        if scale.shape[1] == 0 or width % scale.shape[1]:
            raise ValueError(f"{scale.shape[1]} groups do not divide {width} channels")
        parts = q.float().view(len(q), scale.shape[1], -1)
        weight[rows] = parts.sub_(zero[:, :, None]).mul_(scale[:, :, None]).flatten(1)
    return weight
