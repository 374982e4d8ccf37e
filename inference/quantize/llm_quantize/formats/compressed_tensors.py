"""The `compressed-tensors` format `pack-quantized`, 2 to 8 bits, packed and described by that library itself.

The library is imported where it is used, since that takes long.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from llm_quantize.errors import InputError
from llm_quantize.formats.base import CheckpointFormat, ModuleNames, StoredSettings, TensorSpec, Unpacked
from llm_quantize.io.escaping import python_literal
from llm_quantize.types import WHOLE_ROW, Method, QuantScheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llm_quantize.solver.qparams import QParams

# The library's packer makes several int32 copies of what it is given: rows go in slices of this many weights.
PACKED_TOGETHER = 1 << 25


class CompressedTensorsFormat(CheckpointFormat):
    """What llm-compressor writes. Scales have the dtype of the model's weights."""

    name = "compressed-tensors"
    title = "compressed-tensors (`pack-quantized`)"
    bits = (2, 3, 4, 8)
    parts = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")
    marker = "weight_packed"
    transformers_needs = "compressed-tensors"
    written_by = ("compressed-tensors",)

    def is_default(self, method: Method, scheme: QuantScheme) -> bool:
        return True  # holds all that the others do not

    def plan(
        self, out_features: int, in_features: int, scheme: QuantScheme, dtype: torch.dtype
    ) -> dict[str, TensorSpec]:
        import torch

        groups = scheme.groups(in_features)
        tensors: dict[str, TensorSpec] = {
            "weight_packed": (torch.int32, (out_features, -(-in_features * scheme.bits // 32))),
            "weight_scale": (dtype, (out_features, groups)),
            "weight_shape": (torch.int64, (2,)),
        }
        if not scheme.symmetric:
            tensors["weight_zero_point"] = (torch.int32, (-(-out_features * scheme.bits // 32), groups))
        return tensors

    def _pack(
        self, q: Tensor, qparams: QParams, scheme: QuantScheme, dtype: torch.dtype, g_idx: Tensor | None
    ) -> dict[str, Tensor]:
        import torch
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        middle = scheme.middle
        rows = max(1, PACKED_TOGETHER // q.shape[1])
        # The library's integers are signed; uint8 subtraction wraps to their two's complement.
        words = [
            pack_to_int32((part - middle).view(torch.int8), scheme.bits) for part in torch.split(q, rows)
        ]
        tensors = {
            "weight_packed": torch.cat(words),
            "weight_scale": qparams.scale.to(dtype).contiguous(),
            "weight_shape": torch.tensor(q.shape, dtype=torch.int64),
        }
        zero = qparams.zero.to(torch.int32)
        if not scheme.symmetric:
            signed = (zero - middle).to(torch.int8)
            tensors["weight_zero_point"] = pack_to_int32(signed, scheme.bits, packed_dim=0).contiguous()
        elif bool((zero != middle).any()):
            raise ValueError(f"the zero points of symmetric groups are {middle}")
        return tensors

    def unpack(self, tensors: dict[str, Tensor], settings: StoredSettings) -> Unpacked:
        import torch

        from llm_quantize.formats.bit_streams import in_slices, unpack_padded, unpack_stream

        bits = settings.bits
        words, scales = tensors["weight_packed"], tensors["weight_scale"].float()
        out, width = (int(n) for n in tensors["weight_shape"].tolist())
        if "weight_g_idx" in tensors:
            raise ValueError("groups in activation order (weight_g_idx)")
        if words.shape == (out, -(-width * bits // 32)):
            values = unpack_stream
        elif words.shape == (out, -(-width // (32 // bits))):
            values = unpack_padded
        else:
            raise ValueError(
                f"weight_packed {tuple(words.shape)} does not hold {(out, width)} at {bits} bits"
            )
        if scales.ndim != 2 or scales.shape[0] != out:
            raise ValueError(f"weight_scale {tuple(scales.shape)} for {out} outputs")
        if scales.shape[1] == 0 or width % scales.shape[1]:
            raise ValueError(f"{scales.shape[1]} groups do not divide {width} channels")
        zeros = torch.full_like(scales, 2 ** (bits - 1))
        if "weight_zero_point" in tensors:
            zeros = values(tensors["weight_zero_point"].T.contiguous(), bits)[:, :out].T.float().contiguous()
            if zeros.shape != scales.shape:
                raise ValueError(f"weight_zero_point is for {tuple(zeros.shape)}, not {tuple(scales.shape)}")
        q = in_slices(out, width, lambda a, b: values(words[a:b], bits)[:, :width])
        return Unpacked(q, scales, zeros)

    def quantization_config(
        self, scheme: QuantScheme, *, dynamic_groups: bool, damping: float, modules: ModuleNames
    ) -> dict[str, Any]:
        from compressed_tensors.quantization import (
            QuantizationArgs,
            QuantizationConfig,
            QuantizationScheme,
            QuantizationStatus,
        )

        whole_row = scheme.group_size == WHOLE_ROW
        weights = QuantizationArgs(
            num_bits=scheme.bits,
            type="int",
            symmetric=scheme.symmetric,
            strategy="channel" if whole_row else "group",
            group_size=None if whole_row else scheme.group_size,
        )
        config = QuantizationConfig(
            config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
            format="pack-quantized",
            quantization_status=QuantizationStatus.COMPRESSED,
            ignore=list(modules.floats),
        )
        plain: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
        return plain

    def stored_settings(self, settings: dict[str, Any]) -> StoredSettings:
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
        return StoredSettings(bits)

    def loading_code(self, path: str, *, symmetric: bool, whole: bool) -> list[str]:
        if symmetric:
            return super().loading_code(path, symmetric=symmetric, whole=whole)
        # transformers refuses asymmetric integers unless it de-quantizes them.
        argument = "quantization_config=CompressedTensorsConfig(dequantize=True)"
        return [
            f"# transformers, with {self.transformers_needs}",
            "from transformers import AutoModelForCausalLM, CompressedTensorsConfig",
            f'model = AutoModelForCausalLM.from_pretrained({python_literal(path)}, device_map="auto", {argument})',
        ]
