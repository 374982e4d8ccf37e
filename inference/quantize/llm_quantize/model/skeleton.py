"""The model on the meta device, and where its decoder blocks are: found from its modules, not from its name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llm_quantize.errors import InputError, one_line
from llm_quantize.model.allocation_limit import AllocationLimit, TooLarge
from llm_quantize.model.weight_files import tensor_shapes

LEAST_ELEMENTS = 1 << 26  # that a config may always ask for: 256 MB in float32
_OWN_CONFIG = "take the config.json that came with the weights"


@dataclass(frozen=True, slots=True)
class LinearLayer:
    """A linear layer of a block: its path in the block, its name in the model, and its widths."""

    path: str
    name: str
    out_features: int
    in_features: int

    @property
    def weights(self) -> int:
        """How many weights it has."""
        return self.out_features * self.in_features


def read_config(directory: Path, raw: dict[str, Any], *, trust_remote_code: bool) -> Any:
    """The transformers config of `directory`, whose config.json holds `raw`.

    Raises InputError where transformers cannot use it, and for code that comes with the model and is not trusted.
    """
    from transformers import AutoConfig
    from transformers.models.auto import configuration_auto

    known: Any = configuration_auto
    if (
        "auto_map" in raw
        and not trust_remote_code
        and raw.get("model_type") not in known.CONFIG_MAPPING_NAMES
    ):
        raise InputError(
            "the model brings its own code (auto_map): read it, then pass --trust_remote_code to run it"
        )
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
        for part in (config, config.get_text_config()):
            part.output_hidden_states = part.output_attentions = False  # nobody reads them here
    except Exception as error:
        raise InputError(f"config.json is not usable ({one_line(error)}): {_OWN_CONFIG}") from None
    return config


def build_skeleton(config: Any, files: set[Path], *, trust_remote_code: bool) -> Any:
    """The model of `config` on the meta device, but for its buffers.

    It may take no more than its weights, which lie in `files`. Raises InputError.
    """
    from accelerate import init_empty_weights
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    remote = trust_remote_code and "AutoModelForCausalLM" in getattr(config, "auto_map", {})
    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in known and not remote:
        raise _other_kind(config)
    shapes = [shape for path in files for shape in tensor_shapes(path).values()]
    limit = AllocationLimit(max(sum(map(math.prod, shapes)), LEAST_ELEMENTS), 100 * len(shapes) + 10_000)
    try:
        with init_empty_weights(include_buffers=False), limit:
            skeleton = _with_fastest_attention(config, trust_remote_code)
    except TooLarge as error:
        raise InputError(f"{error}: {_OWN_CONFIG}") from None
    except ImportError as error:
        raise InputError(
            f"{type(config).__name__} needs a package that is not installed ({one_line(error)}): install it"
        ) from None
    except Exception as error:
        raise InputError(f"cannot build the model ({one_line(error)}): {_OWN_CONFIG}") from None
    skeleton.eval()
    return skeleton


def _other_kind(config: Any) -> InputError:
    """The refusal of a model that transformers has no causal language model for."""
    from transformers.models.auto import modeling_auto

    known: Any = modeling_auto
    name = type(config).__name__
    if getattr(config, "is_encoder_decoder", False):
        return InputError(f"{name} is an encoder-decoder: not supported, only decoders are")
    if type(config) in known.MODEL_FOR_MULTIMODAL_LM_MAPPING:
        return InputError(f"{name} is a model of more than text: not supported yet")
    return InputError(f"{name} is not a causal LM: nothing to quantize here")


def _with_fastest_attention(config: Any, trust_remote_code: bool) -> Any:
    """With PyTorch's fused attention wherever it computes the same."""
    from transformers import AutoModelForCausalLM

    def build(attention: str) -> Any:
        make: Any = AutoModelForCausalLM.from_config
        return make(
            config, dtype=torch.float32, trust_remote_code=trust_remote_code, attn_implementation=attention
        )

    # It has no soft cap on the scores (Gemma 2): the plain implementation does.
    if not getattr(config.get_text_config(), "attn_logit_softcapping", None):
        try:
            return build("sdpa")
        except ValueError:
            pass  # transformers has it for most models, not for all; what else is wrong, the plain one says too
    return build("eager")


def find_blocks(skeleton: nn.Module, config: Any) -> tuple[str, nn.ModuleList]:
    """The name and the list of the decoder blocks. Raises InputError where there is none that can be quantized."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    count = getattr(text, "num_hidden_layers", None)
    lists = [
        (name, module)
        for name, module in skeleton.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    lists = [(n, m) for n, m in lists if any(isinstance(x, nn.Linear) for x in m.modules())]
    if not lists:
        raise InputError(f"{type(skeleton).__name__} has no decoder blocks with linear layers: not supported")
    find_decoder: Any = getattr(skeleton, "get_decoder", None)
    decoder = find_decoder() if callable(find_decoder) else None
    inside = {id(module) for module in decoder.modules()} if isinstance(decoder, nn.Module) else set()
    # Towers of images and sounds have as many blocks, by chance.
    lists = [pair for pair in lists if id(pair[1]) in inside] or lists
    name, found = min(lists, key=lambda pair: pair[0].count("."))
    if any(_holds_experts(block) for block in found):
        raise InputError(f"{type(skeleton).__name__} is a mixture of experts: not supported yet")
    return name, found


def blocks_alike(blocks: nn.ModuleList) -> list[list[int]]:
    """The indices of the blocks, those together that are made of the same modules."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for index, block in enumerate(blocks):
        kind = tuple((path, type(module), module.extra_repr()) for path, module in block.named_modules())
        found.setdefault(kind, []).append(index)
    return list(found.values())


def _holds_experts(block: nn.Module) -> bool:
    """Whether a block has experts: a list of modules of that name, or weights that are stacked.

    Names of classes and counts in a config do not tell: dense models have them too.
    """
    for path, module in block.named_modules():
        named = path.rpartition(".")[2] == "experts"
        if named and next(module.parameters(), None) is not None:
            return True
        convolution = isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
        if not convolution and any(
            p.ndim == 3 and min(p.shape) > 1 for p in module.parameters(recurse=False)
        ):
            return True
    return False
