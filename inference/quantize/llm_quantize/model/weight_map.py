"""Which stored tensors give each parameter of a module tree: by transformers' own renaming and conversion.

transformers names some tensors otherwise than the checkpoints that it loads, and makes some parameters of several
tensors (the experts of a layer, stacked). Its tables say how (`transformers.conversion_mapping`); what is decided here
is what `from_pretrained` decides.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

ReadTensor = Callable[[str], Tensor]


@dataclass(slots=True)
class Conversion:
    """Stored tensors of which transformers makes one or more parameters.

    converter: transformers' `WeightConverter`. target: the first parameter. parameters: all of them. sources: the
    stored names, by the source pattern that they match, in the order in which they are stacked.
    """

    converter: Any
    target: str
    parameters: tuple[str, ...]
    sources: dict[str, list[str]] = field(default_factory=dict)

    @property
    def stored(self) -> list[str]:
        """All stored names."""
        return [name for names in self.sources.values() for name in names]

    def convert(self, skeleton: Any, read: ReadTensor) -> dict[str, Tensor]:
        """The parameters, made of what `read` gives for the stored names. Raises whatever transformers raises."""
        converter = deepcopy(self.converter)
        for pattern, names in self.sources.items():
            for name in names:
                converter.add_tensor(self.target, name, pattern, read(name))
        made = converter.convert(self.target, model=skeleton, config=skeleton.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


class WeightMap:
    """From the parameters and buffers of a skeleton to the stored tensors that give them.

    skeleton: a transformers model. stored: the names in the checkpoint.

    unused: stored names that give nothing, sorted. missing: parameters that nothing gives, in the tree's order.
    """

    def __init__(self, skeleton: Any, stored: Collection[str]) -> None:
        self._skeleton = skeleton
        self._plain: dict[str, str] = {}
        self._made: tuple[Conversion | None, dict[str, Tensor]] = (None, {})
        self._converted: dict[str, Conversion] = {}
        self.unused: list[str] = []
        self._resolve(stored)
        self._tie()
        ignored = _patterns(skeleton, "_keys_to_ignore_on_load_missing")
        self.missing = [
            name
            for name, _ in skeleton.named_parameters(remove_duplicate=False)
            if name not in self and not any(pattern.search(name) for pattern in ignored)
        ]

    def __contains__(self, parameter: str) -> bool:
        return parameter in self._plain or parameter in self._converted

    def stored_name(self, parameter: str) -> str | None:
        """The one stored tensor that is the parameter; None where it is made of several, or of none."""
        return self._plain.get(parameter)

    def conversion(self, parameter: str) -> Conversion | None:
        """What the parameter is made by; None where it is stored as it is, or not at all."""
        return self._converted.get(parameter)

    def sources(self, parameter: str) -> list[str]:
        """The stored tensors that give the parameter."""
        if parameter in self._plain:
            return [self._plain[parameter]]
        return self._converted[parameter].stored if parameter in self._converted else []

    def read(self, parameter: str, read: ReadTensor) -> Tensor:
        """The parameter, made of what `read` gives for stored names. Raises KeyError where nothing gives it.

        What was made beside it is kept until it is asked for, or another conversion begins.
        """
        if parameter in self._plain:
            return read(self._plain[parameter])
        conversion = self._converted[parameter]
        if self._made[0] is not conversion or parameter not in self._made[1]:
            self._made = (conversion, conversion.convert(self._skeleton, read))
        made = self._made[1].pop(parameter)
        if not self._made[1]:
            self._made = (None, {})
        return made

    def keeps_float32(self, parameter: str, dtype: torch.dtype) -> bool:
        """Whether transformers computes with the parameter in float32 in a model of `dtype`."""
        strict = getattr(self._skeleton, "_keep_in_fp32_modules_strict", None) or ()
        half = getattr(self._skeleton, "_keep_in_fp32_modules", None) or ()
        kept = [*strict, *(half if dtype == torch.float16 else ())]
        return any(re.search(pattern.replace("*", ".*"), parameter) for pattern in kept)

    def unexpected(self) -> list[str]:
        """The unused stored tensors of which transformers would warn."""
        ignored = _patterns(self._skeleton, "_keys_to_ignore_on_load_unexpected")
        buffers = [name for name, _ in self._skeleton.named_buffers()]
        # Once saved in every layer, or with other models.
        for leaf in ("rotary_emb.inv_freq", "position_ids"):
            if any(name.endswith(leaf) for name in buffers):
                ignored.append(re.compile(rf"(^|\.){re.escape(leaf)}$"))
        return [name for name in self.unused if not any(pattern.search(name) for pattern in ignored)]

    def _resolve(self, stored: Collection[str]) -> None:
        """As `convert_and_load_state_dict_in_model` of transformers goes through the names."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        skeleton = self._skeleton
        rules = get_model_conversion_mapping(skeleton)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
        expected = skeleton.state_dict()
        prefix = skeleton.base_model_prefix
        for name in sorted(stored, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
            if target not in expected and name in expected:
                target, pattern = rename_source_key(name, [], [], prefix, expected)
            if target not in expected:
                self.unused.append(name)
            elif pattern is not None:
                self._collect(target, pattern, name, by_pattern[pattern])
            elif target in self._plain:
                self.unused.append(name)
            else:
                self._plain[target] = name
        self.unused.sort()

    def _collect(self, target: str, pattern: str, name: str, converter: Any) -> None:
        found = self._converted.get(target)
        if found is None:
            first = converter.target_patterns[0]
            parameters = tuple(target.replace(first, each) for each in converter.target_patterns)
            found = Conversion(converter, target, parameters)
            self._converted |= dict.fromkeys(parameters, found)
        found.sources.setdefault(pattern, []).append(name)

    def _tie(self) -> None:
        """Give tied parameters without a tensor of their own the tensor of one that has it."""
        pairs = list((getattr(self._skeleton, "all_tied_weights_keys", None) or {}).items())
        for _ in range(2):  # of three that are tied, the first may wait for what the last one has
            for one, other in pairs:
                for absent, present in ((one, other), (other, one)):
                    if absent not in self and present in self._plain:
                        self._plain[absent] = self._plain[present]


def _patterns(skeleton: Any, attribute: str) -> list[re.Pattern[str]]:
    return [re.compile(pattern) for pattern in getattr(skeleton, attribute, None) or ()]
