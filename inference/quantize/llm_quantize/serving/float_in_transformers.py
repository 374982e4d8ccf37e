"""Which linears a checkpoint's quantization settings call float for transformers, whose rules are not vLLM's.

Names are full module names in the tree that transformers builds, settings are the `quantization_config` of
config.json. A published checkpoint has to say the same to both readers. Like `float_modules`, whose helpers it shares,
it looks at names and settings alone.

| format | float is | source |
|---|---|---|
| awq | the output head, and a module for which an entry of `modules_to_not_convert` is its end, or a regex for its beginning up to a dot | `should_convert_module` in `quantizers/quantizers_utils.py` |
| gptq | a module outside the blocks, or that ends with no entry of `modules_in_block_to_quantize`; `dynamic` is not read | `GPTQQuantizer.convert_model` in optimum's `gptq/quantizer.py` |
| compressed-tensors | a module that `ignore` names by name, regex or class, or that no config group targets so | `match_named_modules` in compressed-tensors' `utils/match.py` |
"""  # noqa: E501 the rows of a table

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llm_quantize.serving.float_modules import (
    LINEAR,
    NamePatterns,
    compiled,
    is_output_head,
    listed_texts,
    method_of,
    target_groups,
)

# Where optimum looks for the blocks of a gptq model whose settings do not name them (`gptq/constants.py`).
BLOCKS = ("transformer.h", "model.decoder.layers", "gpt_neox.layers", "model.layers")
BLOCK_KEY = "block_name_to_quantize"


PLAIN = re.compile(r"[\w.-]+")  # entries that may be joined to one regex
BOUNDARY = r"(?:(?<=\.)|(?=\.|$))"


def is_float_in_transformers(name: str, settings: Mapping[str, Any], class_name: str = LINEAR) -> bool:
    """Tell whether transformers builds the linear `name` of the class `class_name` with float weights.

    Raises `ValueError` for settings of another form and for a method other than awq, gptq and compressed-tensors;
    `UnreadableRegex`, which is one, for a regex that Python's `re` does not read.
    """
    return FloatInTransformers(settings).is_float(name, class_name)


class FloatInTransformers:
    """The rules of one checkpoint's settings, prepared for many names; errors as in `is_float_in_transformers`."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.method = method_of(settings)
        if self.method == "awq":
            entries = listed_texts(settings, "modules_to_not_convert")
            self._ends = tuple(entries)
            plain = [entry for entry in entries if PLAIN.fullmatch(entry)]
            odd = [entry for entry in entries if not PLAIN.fullmatch(entry)]
            joined = ["|".join(plain)] if plain else []
            self._starts = [compiled(f"(?:{entry}){BOUNDARY}") for entry in (*joined, *odd)]
        elif self.method == "gptq":
            block = settings.get(BLOCK_KEY)
            if block is not None and not isinstance(block, str):
                raise ValueError(f"{BLOCK_KEY} is no text")
            self._blocks = tuple(f"{one}." for one in ([block] if block else BLOCKS))
            named = listed_texts(settings, "modules_in_block_to_quantize", nested=True)
            self._quantized = None if settings.get("modules_in_block_to_quantize") is None else tuple(named)
        elif self.method == "compressed-tensors":
            self._ignored = NamePatterns(listed_texts(settings, "ignore"))
            self._targets = NamePatterns(target for target, _ in target_groups(settings))
        else:
            raise ValueError(f"no rule is known for the method {self.method!r}")

    def is_float(self, name: str, class_name: str = LINEAR) -> bool:
        """Tell whether the linear `name` of class `class_name` is float."""
        if self.method == "awq":
            return (
                is_output_head(name) or name.endswith(self._ends) or any(s.match(name) for s in self._starts)
            )
        if self.method == "gptq":
            is_named = self._quantized is None or name.endswith(self._quantized)
            return not (is_named and name.startswith(self._blocks))
        both = (name, class_name)
        return any(self._ignored.first(one) is not None for one in both) or all(
            self._targets.first(one) is None for one in both
        )
