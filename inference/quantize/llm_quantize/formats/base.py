"""What a checkpoint format has to know. A new format is one module beside this one and one line in `__init__`.

Formats know tensors and the shape of `quantization_config`; no files, no models. Nothing heavy is imported at the
top of these modules, since the command line asks them what they hold.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from llm_quantize.errors import InputError
from llm_quantize.io.escaping import python_literal
from llm_quantize.types import WHOLE_ROW, Method, QuantScheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llm_quantize.solver.qparams import QParams

TensorSpec = tuple["torch.dtype", tuple[int, ...]]  # dtype and shape


@dataclass(frozen=True, slots=True)
class StoredSettings:
    """What a reader takes from `quantization_config`.

    bits: of an integer. zero_offset: what has to be added to the stored zero points. act_order: whether groups
    may follow the activation order, by a `g_idx` that is not trivial.
    """

    bits: int
    zero_offset: int = 0
    act_order: bool = False


@dataclass(frozen=True, slots=True)
class Unpacked:
    """A linear layer read back: `w = (q - zero) * scale`.

    q: uint8 (out, in). scale, zero: float32 (out, groups). group: int64 (in), the group of each input channel; None
    where groups lie one after another.
    """

    q: Tensor
    scale: Tensor
    zero: Tensor
    group: Tensor | None = None


@dataclass(frozen=True, slots=True)
class ModuleNames:
    """What the settings of a checkpoint say of its modules, by their stored names.

    floats: the linears that stay as they are. head: the output head, among them. blocks: the list of the blocks. paths:
    of the quantized linears, in a block.
    """

    floats: tuple[str, ...]
    head: str = "lm_head"
    blocks: str = "model.layers"
    paths: tuple[str, ...] = ()


class CheckpointFormat(ABC):
    """One layout of quantized linears in safetensors files, with the `quantization_config` that names it."""

    name: ClassVar[str]  # `quant_method` in config.json, and the value of --format
    title: ClassVar[str]  # as the model card says it
    bits: ClassVar[tuple[int, ...]]  # that it holds
    parts: ClassVar[tuple[str, ...]]  # suffixes of the tensors that a linear may have
    marker: ClassVar[str]  # the suffix by which a quantized linear is known
    has_g_idx: ClassVar[bool] = False  # whether groups may follow the activation order
    zero_min: ClassVar[int] = 0  # the smallest zero point that every reader takes
    settings_file: ClassVar[str | None] = None  # another file with the same settings
    repeats_tied_head: ClassVar[bool] = False  # when asked for by name, for readers that cannot tie weights
    serve_flag: ClassVar[str] = ""  # of run_vllm.sh
    transformers_needs: ClassVar[str]  # packages with which transformers reads it
    written_by: ClassVar[tuple[str, ...]] = ()  # packages that do the packing

    # -- what it holds

    @abstractmethod
    def is_default(self, method: Method, scheme: QuantScheme) -> bool:
        """Whether vLLM serves such weights best in this format."""

    def check_scheme(self, scheme: QuantScheme, dynamic_groups: bool, otherwise: str) -> None:
        """Refuse what the format cannot hold. `otherwise`: how the error's remedy ends, for another width.

        Every format holds either method's integers, symmetric or not: what counts is the width of an integer,
        whole words in a group, and `g_idx`. Raises InputError.
        """
        if scheme.bits not in self.bits:
            held = ", ".join(map(str, self.bits))
            raise InputError(
                f"--format {self.name} cannot hold --bits {scheme.bits} (only {held}): leave --format out, "
                f"and {otherwise}"
            )
        if scheme.group_size != WHOLE_ROW and (scheme.group_size <= 0 or scheme.group_size % 32):
            raise InputError(
                f"--group_size {scheme.group_size} does not fill whole 32-bit words: take 32, 64, 128, 256 or -1"
            )
        if dynamic_groups and not self.has_g_idx:
            raise InputError(
                f"--act_order_groups dynamic needs --format gptq, since {self.name} has no g_idx: "
                "take --format gptq or --act_order_groups static"
            )

    def packed_widths(self, out_features: int, in_features: int) -> dict[str, int]:
        """The sides (`output`, `input`) along which values must fill whole 32-bit words, with their widths."""
        return {}

    def misfit(
        self, scheme: QuantScheme, name: str, out_features: int, in_features: int, *, fitting: int = WHOLE_ROW
    ) -> str | None:
        """Why the widths of a linear layer do not fill groups and words, naming it; None where they do.

        fitting: the group size to advise.
        """
        if scheme.group_size != WHOLE_ROW and in_features % scheme.group_size:
            return (
                f"{name} has {in_features} input channels, which {scheme.group_size} does not divide: "
                f"take --group_size {fitting}"
            )
        # 8 values of `bits` bits fill whole bytes; a stream must fill whole 32-bit words.
        step = 32 // math.gcd(32, scheme.bits)
        for side, width in self.packed_widths(out_features, in_features).items():
            if width % step:
                return (
                    f"{name} has {width} {side} channels, not a multiple of {step} as the {self.name} format needs "
                    f"at {scheme.bits} bits: use --format compressed-tensors"
                )
        return None

    def vllm_refusal(self, scheme: QuantScheme, dynamic_groups: bool) -> str | None:
        """Why vLLM refuses such a file, and what to take instead, in one line; None where vLLM serves it."""
        return None

    # -- tensors

    @abstractmethod
    def plan(
        self, out_features: int, in_features: int, scheme: QuantScheme, dtype: torch.dtype
    ) -> dict[str, TensorSpec]:
        """The dtype and shape of every tensor of a linear layer, by suffix. `dtype`: of the model's weights."""

    def pack(
        self,
        q: Tensor,
        qparams: QParams,
        scheme: QuantScheme,
        dtype: torch.dtype,
        g_idx: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The tensors of a linear layer, by suffix, on the device of `q`.

        q: uint8 (out, in). qparams: (out, groups). dtype: of the model's weights, in which some formats store
        scales; the others store float16. g_idx: int32 (in), the group of each channel, where groups follow the
        activation order. Raises ValueError for shapes that do not belong together.
        """
        out, width = q.shape
        reason = self.misfit(scheme, "the layer", out, width)
        if reason is not None:
            raise ValueError(reason)
        groups = scheme.groups(width)
        if qparams.scale.shape != (out, groups) or qparams.zero.shape != (out, groups):
            raise ValueError(f"scales {tuple(qparams.scale.shape)} for {out} rows of {groups} groups")
        if g_idx is not None and not self.has_g_idx:
            raise ValueError(f"{self.name} has no g_idx")
        return self._pack(q, qparams, scheme, dtype, g_idx)

    @abstractmethod
    def _pack(
        self, q: Tensor, qparams: QParams, scheme: QuantScheme, dtype: torch.dtype, g_idx: Tensor | None
    ) -> dict[str, Tensor]: ...

    @abstractmethod
    def unpack(self, tensors: dict[str, Tensor], settings: StoredSettings) -> Unpacked:
        """Read the tensors of a linear layer, by suffix. Written apart from `pack`, so that one tests the other.

        Raises KeyError for a tensor that is missing, ValueError for shapes and indices that make no sense.
        """

    # -- config.json

    @abstractmethod
    def quantization_config(
        self, scheme: QuantScheme, *, dynamic_groups: bool, damping: float, modules: ModuleNames
    ) -> dict[str, Any]:
        """`quantization_config` of config.json, in plain JSON values.

        modules: which linears are quantized, and which are not.
        """

    @abstractmethod
    def stored_settings(self, settings: dict[str, Any]) -> StoredSettings:
        """What a `quantization_config` of this format says. Raises InputError where it cannot be read here."""

    # -- the model card

    def loading_code(self, path: str, *, symmetric: bool, whole: bool) -> list[str]:
        """Lines of Python that load a checkpoint at `path` with transformers, and with the format's own library.

        whole: whether the file repeats a tied output head, or has none.
        """
        return [
            f"# transformers, with {self.transformers_needs}",
            "from transformers import AutoModelForCausalLM",
            f'model = AutoModelForCausalLM.from_pretrained({python_literal(path)}, device_map="auto")',
        ]
