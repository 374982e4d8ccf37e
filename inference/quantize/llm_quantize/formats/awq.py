"""The `awq` format: AutoAWQ 0.2.9's version `gemm`, 4 bits.

Words lie along the outputs, and the eight columns of a word are interleaved (`awq/utils/packing_utils.py`). Scales
are float16, zero points are stored as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llm_quantize.errors import InputError
from llm_quantize.formats.base import CheckpointFormat, ModuleNames, StoredSettings, TensorSpec, Unpacked
from llm_quantize.io.escaping import python_literal
from llm_quantize.types import Method, QuantScheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llm_quantize.solver.qparams import QParams

_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)  # column k of eight lies in this nibble, lowest first


class AWQFormat(CheckpointFormat):
    """AutoAWQ's `gemm`."""

    name = "awq"
    title = "AutoAWQ's layout (`gemm`)"
    bits = (4,)
    parts = ("qweight", "qzeros", "scales")
    marker = "qweight"
    serve_flag = " --quantization awq"
    transformers_needs = "gptqmodel"

    def is_default(self, method: Method, scheme: QuantScheme) -> bool:
        return method == "awq" and scheme.bits == 4

    def packed_widths(self, out_features: int, in_features: int) -> dict[str, int]:
        return {"output": out_features}

    def plan(
        self, out_features: int, in_features: int, scheme: QuantScheme, dtype: torch.dtype
    ) -> dict[str, TensorSpec]:
        import torch

        groups, words = scheme.groups(in_features), out_features * scheme.bits // 32
        return {
            "qweight": (torch.int32, (in_features, words)),
            "qzeros": (torch.int32, (groups, words)),
            "scales": (torch.float16, (groups, out_features)),
        }

    def _pack(
        self, q: Tensor, qparams: QParams, scheme: QuantScheme, dtype: torch.dtype, g_idx: Tensor | None
    ) -> dict[str, Tensor]:
        import torch

        return {
            "qweight": _pack_columns(q.T.contiguous()),
            "qzeros": _pack_columns(qparams.zero.T.to(torch.uint8).contiguous()),
            "scales": qparams.scale.T.to(torch.float16).contiguous(),
        }

    def unpack(self, tensors: dict[str, Tensor], settings: StoredSettings) -> Unpacked:
        from llm_quantize.formats.bit_streams import in_slices

        words, scales = tensors["qweight"], tensors["scales"].float()
        width, out = words.shape[0], words.shape[1] * 8
        zeros = _unpack_columns(tensors["qzeros"]).float()
        if scales.shape != zeros.shape or scales.shape[1] != out:
            raise ValueError(
                f"scales {tuple(scales.shape)}, zero points {tuple(zeros.shape)} for {out} outputs"
            )
        q = in_slices(width, out, lambda a, b: _unpack_columns(words[a:b]))
        return Unpacked(q.T.contiguous(), scales.T.contiguous(), zeros.T.contiguous())

    def quantization_config(
        self, scheme: QuantScheme, *, dynamic_groups: bool, damping: float, modules: ModuleNames
    ) -> dict[str, Any]:
        return {
            "quant_method": "awq",
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            # A symmetric file says so too, with constant zero points: without it vLLM takes slow kernels.
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": list(modules.floats),
        }

    def stored_settings(self, settings: dict[str, Any]) -> StoredSettings:
        if settings.get("bits") != 4 or str(settings.get("version", "gemm")).lower() != "gemm":
            raise InputError("only AWQ's gemm version at 4 bits can be read")
        return StoredSettings(bits=4)

    def loading_code(self, path: str, *, symmetric: bool, whole: bool) -> list[str]:
        return [
            *super().loading_code(path, symmetric=symmetric, whole=whole),
            "# AutoAWQ",
            "from awq import AutoAWQForCausalLM",
            f"model = AutoAWQForCausalLM.from_quantized({python_literal(path)}, fuse_layers=False)",
        ]


def _pack_columns(values: Tensor) -> Tensor:
    """uint8 (rows, n) -> int32 (rows, n / 8); nibble `k` is column `[0, 2, 4, 6, 1, 3, 5, 7][k]` of eight."""
    from llm_quantize.formats.bit_streams import pack_stream

    return pack_stream(values.reshape(values.shape[0], -1, 4, 2).transpose(2, 3).flatten(1), 4)


def _unpack_columns(words: Tensor) -> Tensor:
    """int32 (rows, n / 8) -> int32 (rows, n)."""
    from llm_quantize.formats.bit_streams import unpack_words

    return unpack_words(words, tuple(4 * nibble for nibble in _NIBBLES), 4)
