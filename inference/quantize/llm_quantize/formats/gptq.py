"""The `gptq` format: AutoGPTQ 0.7.1's first version, 2, 3, 4 or 8 bits.

A little-endian bit stream along the inputs; zero points are stored less one, modulo `2^bits`; `g_idx` gives each
input channel its group (`auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py`).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from llm_quantize.errors import InputError
from llm_quantize.formats.base import CheckpointFormat, ModuleNames, StoredSettings, TensorSpec, Unpacked
from llm_quantize.io.escaping import python_literal
from llm_quantize.types import WHOLE_ROW, Method, QuantScheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llm_quantize.solver.qparams import QParams

VLLM_BITS = (4, 8)
# Where optimum looks for blocks without being told (`optimum/gptq/constants.py`).
_KNOWN_BLOCKS = ("transformer.h", "model.decoder.layers", "gpt_neox.layers", "model.layers")
VLLM_GROUPS = (WHOLE_ROW, 32, 64, 128)


class GPTQFormat(CheckpointFormat):
    """AutoGPTQ's layout; the second version is read, too."""

    name = "gptq"
    title = "AutoGPTQ's layout (`gptq`)"
    bits = (2, 3, 4, 8)
    parts = ("qweight", "qzeros", "scales", "g_idx")
    marker = "qweight"
    has_g_idx = True
    zero_min = 1
    settings_file = "quantize_config.json"
    repeats_tied_head = True  # AutoGPTQ takes what the file lacks for zero, tied or not
    serve_flag = " --quantization gptq"
    transformers_needs = "gptqmodel and optimum"

    def is_default(self, method: Method, scheme: QuantScheme) -> bool:
        return method == "gptq" and scheme.bits in VLLM_BITS and scheme.symmetric

    def packed_widths(self, out_features: int, in_features: int) -> dict[str, int]:
        return {"output": out_features, "input": in_features}

    def vllm_refusal(self, scheme: QuantScheme, dynamic_groups: bool) -> str | None:
        if dynamic_groups and scheme.group_size != WHOLE_ROW:
            return "vLLM 0.30 and later refuse --act_order_groups dynamic in groups: take static to serve it there"
        if scheme.bits not in VLLM_BITS or not scheme.symmetric:
            kind = f"{scheme.bits} bits" if scheme.bits not in VLLM_BITS else "asymmetric weights"
            return f"vLLM refuses {kind} in --format gptq: take --format compressed-tensors to serve it there"
        if scheme.group_size not in VLLM_GROUPS:
            groups = ", ".join(map(str, VLLM_GROUPS))
            return (
                f"vLLM refuses --group_size {scheme.group_size} in --format gptq: take one of {groups} to serve it "
                "there"
            )
        return None

    def plan(
        self, out_features: int, in_features: int, scheme: QuantScheme, dtype: torch.dtype
    ) -> dict[str, TensorSpec]:
        import torch

        groups = scheme.groups(in_features)
        return {
            "qweight": (torch.int32, (in_features * scheme.bits // 32, out_features)),
            "qzeros": (torch.int32, (groups, out_features * scheme.bits // 32)),
            "scales": (torch.float16, (groups, out_features)),
            "g_idx": (torch.int32, (in_features,)),
        }

    def _pack(
        self, q: Tensor, qparams: QParams, scheme: QuantScheme, dtype: torch.dtype, g_idx: Tensor | None
    ) -> dict[str, Tensor]:
        import torch

        from llm_quantize.formats.bit_streams import pack_stream

        width = q.shape[1]
        less_one = ((qparams.zero.T.to(torch.int32) - 1) & scheme.qmax).to(torch.uint8)
        if g_idx is None:
            g_idx = torch.arange(width, dtype=torch.int32, device=q.device) // scheme.group_width(width)
        return {
            "qweight": pack_stream(q, scheme.bits).T.contiguous(),
            "qzeros": pack_stream(less_one, scheme.bits),
            "scales": qparams.scale.T.to(torch.float16).contiguous(),
            "g_idx": g_idx.to(device=q.device, dtype=torch.int32).contiguous(),
        }

    def unpack(self, tensors: dict[str, Tensor], settings: StoredSettings) -> Unpacked:
        import torch

        from llm_quantize.formats.bit_streams import in_slices, unpack_stream

        bits = settings.bits
        words, scales = tensors["qweight"], tensors["scales"].float()
        width, out = words.shape[0] * 32 // bits, words.shape[1]
        stored = unpack_stream(tensors["qzeros"], bits)[:, :out]
        zeros = ((stored + settings.zero_offset) % 2**bits).float()
        if scales.shape != zeros.shape or scales.shape[1] != out:
            raise ValueError(
                f"scales {tuple(scales.shape)}, zero points {tuple(zeros.shape)} for {out} outputs"
            )
        groups = scales.shape[0]
        group = None
        if "g_idx" in tensors:
            group = tensors["g_idx"].long()
            if group.shape != (width,) or bool(((group < 0) | (group >= groups)).any()):
                raise ValueError(f"g_idx does not give one of {groups} groups to each of {width} channels")
        if group is None or not settings.act_order:
            if groups == 0 or width % groups:
                raise ValueError(f"{groups} groups do not divide {width} channels")
            if group is not None and not torch.equal(
                group, torch.arange(width, device=words.device) // (width // groups)
            ):
                raise ValueError(
                    "g_idx is not trivial where the config says desc_act false: readers ignore it"
                )
            group = None
        turned = words.T.contiguous()
        q = in_slices(out, width, lambda a, b: unpack_stream(turned[a:b], bits)[:, :width])
        return Unpacked(q, scales.T.contiguous(), zeros.T.contiguous(), group)

    def quantization_config(
        self, scheme: QuantScheme, *, dynamic_groups: bool, damping: float, modules: ModuleNames
    ) -> dict[str, Any]:
        config: dict[str, Any] = {
            "quant_method": "gptq",
            "bits": scheme.bits,
            "group_size": scheme.group_size,
            "desc_act": dynamic_groups,  # for readers: whether `g_idx` matters
            "sym": scheme.symmetric,
            "damp_percent": damping,
            "lm_head": False,
            "checkpoint_format": "gptq",
        }
        # Readers take every linear for quantized but the output head, which "lm_head" tells of. vLLM and GPTQModel take
        # out what `dynamic` says; optimum looks for what is named, in the blocks that it knows or is told of.
        others = [name for name in modules.floats if name != modules.head]
        if others:
            config["dynamic"] = {rf"-:(.*\.)?{re.escape(name)}$": {} for name in others}
        if modules.blocks not in _KNOWN_BLOCKS:
            config["block_name_to_quantize"] = modules.blocks
        if any(name.startswith(f"{modules.blocks}.") for name in others):
            config["modules_in_block_to_quantize"] = [list(modules.paths)]
        return config

    def stored_settings(self, settings: dict[str, Any]) -> StoredSettings:
        bits = settings.get("bits")
        if type(bits) is not int or bits not in self.bits:
            raise InputError(f"GPTQ at {bits} bits cannot be read: 2, 3, 4 and 8 can")
        second = "gptq_v2" in (settings.get("checkpoint_format"), settings.get("format"))
        return StoredSettings(bits, zero_offset=0 if second else 1, act_order=bool(settings.get("desc_act")))

    def loading_code(self, path: str, *, symmetric: bool, whole: bool) -> list[str]:
        lines = super().loading_code(path, symmetric=symmetric, whole=whole)
        if whole:
            lines += [
                "# AutoGPTQ",
                "from auto_gptq import AutoGPTQForCausalLM",
                f'model = AutoGPTQForCausalLM.from_quantized({python_literal(path)}, device="cuda:0")',
            ]
        return lines
