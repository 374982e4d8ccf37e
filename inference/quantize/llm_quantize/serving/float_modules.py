"""Which linears a checkpoint's quantization settings call float: each format's rule, as vLLM applies it.

A reader builds a linear with quantized or with float weights by these rules before it reads any weight, so that they
must give exactly what the files hold. Names are full module names as in the files (`model.layers.0.mlp.down_proj`),
settings are the `quantization_config` of config.json. Imports nothing of the package: the quantizer checks its own
results with these functions, and the check before serving every checkpoint.

| format | float is |
|---|---|
| awq | a module whose name contains an entry of `modules_to_not_convert`; without entries, found by dtypes |
| gptq | a module that a `dynamic` rule `-:REGEX` is the first to match, or found by dtypes; experts by rule alone |
| compressed-tensors | a module that `ignore` names in full or matches (`re:REGEX`), or that no config group targets |

A layer that vLLM fuses has the rule of its members, and may also be named by its own name (`qkv_proj`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

FLOAT_DTYPES = ("F16", "BF16", "F32")
# The layers that vLLM fuses, by the last part of their names, each with the name of the fused one.
FUSED_NAMES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}
LINEAR = "Linear"
OUTPUT_HEAD = "ParallelLMHead"  # vLLM's class of the output head, which the target "Linear" does not match
REGEX = "re:"
EXPERT = re.compile(r"^(.*\.experts)\.\d+\.[^.]+$")


class UnreadableRegex(ValueError):
    """A regex of the settings that Python's `re` does not read."""


def is_float(
    name: str,
    settings: Mapping[str, Any],
    dtypes: Mapping[str, str] | None = None,
    class_name: str = LINEAR,
) -> bool:
    """Tell whether the linear `name` is float by the quantization `settings`.

    `dtypes` maps the name of every tensor in the files to its dtype as safetensors headers name it (`F16`): where
    settings leave it to them, awq and gptq find what is float by it. Without `dtypes` only the settings count.
    `class_name` is the module's class, which the targets of compressed-tensors may name: `LINEAR` for what
    transformers calls so, `OUTPUT_HEAD` for the output head in vLLM. Raises `ValueError` for settings of another form
    and for a method other than awq, gptq and compressed-tensors; `UnreadableRegex`, which is one, for a regex that
    Python's `re` does not read, while readers with another library may.
    """
    return FloatModules(settings, dtypes).is_float(name, class_name)


class FloatModules:
    """The rules of one checkpoint's settings, prepared for many names; arguments and errors as in `is_float`."""

    def __init__(self, settings: Mapping[str, Any], dtypes: Mapping[str, str] | None = None) -> None:
        self.settings = settings
        self.method = (
            str(settings.get("quant_method")).lower().replace("compressed_tensors", "compressed-tensors")
        )
        if self.method == "awq":
            self._skipped = SubstringSet(listed_texts(settings, "modules_to_not_convert"))
            if not self._skipped and dtypes is not None:
                owners, quantized = _modules_by_dtype(dtypes)
                self._skipped = SubstringSet(owners - quantized)
        elif self.method == "gptq":
            self._rules = _dynamic_rules(settings)
            named = listed_texts(settings, "modules_in_block_to_quantize", nested=True)
            if not named and dtypes is not None:
                named = sorted(_modules_by_dtype(dtypes)[1])
            self._quantized = SubstringSet(named)
        elif self.method == "compressed-tensors":
            self._ignored = NamePatterns(listed_texts(settings, "ignore"))
            self._groups = target_groups(settings)
            self._targets = NamePatterns(target for target, _ in self._groups)
        else:
            raise ValueError(f"no rule is known for the method {self.method!r}")

    def is_float(self, name: str, class_name: str = LINEAR) -> bool:
        """Tell whether the linear `name` of class `class_name` is float."""
        if self.method == "awq":
            return self._is_float_awq(name)
        if self.method == "gptq":
            return self._is_float_gptq(name)
        return self.scheme(name, class_name) is None

    def _is_float_awq(self, name: str) -> bool:
        """Source: `AutoAWQConfig` in vLLM's `auto_awq.py`, `is_layer_skipped` in its `utils/quant_utils.py`."""
        if is_output_head(name) and not self.settings.get("lm_head"):
            return True
        expert = EXPERT.match(name)
        if expert:  # vLLM has one module for all experts of a layer, which is what it looks for
            return self._skipped.is_any_in(expert[1])
        return any(self._skipped.is_any_in(one) for one in _own_and_fused(name))

    def _is_float_gptq(self, name: str) -> bool:
        """Source: `AutoGPTQConfig` in vLLM's `auto_gptq.py`, and its `utils/gptq_utils.py`."""
        if is_output_head(name) and not self.settings.get("lm_head"):
            return True
        expert = EXPERT.match(name)
        names = (expert[1],) if expert else _own_and_fused(name)
        for one in names:
            rule = next((r for r in self._rules if r[0].match(one)), None)
            if rule is not None and rule[1] is None:
                return True
        if expert or not self._quantized:
            return False
        return not self._quantized.is_any_in(name)

    def scheme(self, name: str, class_name: str = LINEAR) -> dict[str, Any] | None:
        """Return the config group of compressed-tensors that quantizes the linear `name`, None where it is float.

        Source: `get_scheme_dict` in vLLM's `compressed_tensors.py`, and its `utils.py`.
        """
        names = _own_and_fused(name)
        if any(self._ignored.first(one) is not None for one in names):
            return None
        for one in names:
            found = self._targets.first(one)
            if found is not None:
                return self._groups[found][1]
        found = self._targets.first(class_name)
        if found is not None:
            return self._groups[found][1]
        for target, group in self._groups:
            if not target.startswith(REGEX) and target.lower() in class_name.lower():
                return group
        return None

    def settings_of(self, name: str) -> dict[str, Any]:
        """Return the gptq settings of the linear `name`: the common ones with those of the first rule that matches."""
        for one in reversed(_own_and_fused(name)):
            for pattern, override in self._rules:
                if pattern.match(one):
                    return {**self.settings, **(override or {})}
        return dict(self.settings)

    @property
    def has_regexes(self) -> bool:
        """Whether the settings hold regexes, which may take any time to match."""
        if self.method == "compressed-tensors":
            return self._ignored.has_regexes or self._targets.has_regexes
        return self.method == "gptq" and bool(self._rules)

    @property
    def finds_by_dtype(self) -> bool:
        """Whether the settings leave it to the dtypes of the tensors what is float."""
        if self.method == "awq":
            return not listed_texts(self.settings, "modules_to_not_convert")
        return self.method == "gptq" and not listed_texts(
            self.settings, "modules_in_block_to_quantize", nested=True
        )


class NamePatterns:
    """Entries of compressed-tensors, each a full name or `re:REGEX`; tells fast which is the first that matches."""

    def __init__(self, entries: Iterable[str]) -> None:
        self._names: dict[str, int] = {}
        self._regexes: list[tuple[int, re.Pattern[str]]] = []
        for position, entry in enumerate(entries):
            if entry.startswith(REGEX):
                self._regexes.append((position, compiled(entry[len(REGEX) :])))
            else:
                self._names.setdefault(entry, position)

    @property
    def has_regexes(self) -> bool:
        """Whether one of the entries is a regex."""
        return bool(self._regexes)

    def first(self, name: str) -> int | None:
        """Return the position of the first entry that is `name`, or whose regex matches from its beginning."""
        found = [self._names[name]] if name in self._names else []
        found += [position for position, regex in self._regexes if regex.match(name)][:1]
        return min(found, default=None)


class SubstringSet:
    """A set of texts that tells fast whether any of them is part of a name, also where they are many."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._texts = set(texts)
        self._lengths = sorted({len(text) for text in self._texts})
        self._known: dict[str, bool] = {}  # what was found: all experts of a layer ask for one name

    def __bool__(self) -> bool:
        return bool(self._texts)

    def is_any_in(self, name: str) -> bool:
        """Tell whether one of the texts is a part of `name`."""
        if name not in self._known:
            self._known[name] = name in self._texts or any(
                name[start : start + length] in self._texts
                for length in self._lengths
                if length <= len(name)
                for start in range(len(name) - length + 1)
            )
        return self._known[name]


def method_of(settings: Mapping[str, Any]) -> str:
    """Return the method that the settings name: `awq`, `gptq`, `compressed-tensors`, or another."""
    return str(settings.get("quant_method")).lower().replace("compressed_tensors", "compressed-tensors")


def class_of(name: str) -> str:
    """Return the class of vLLM's that the linear `name` has, as far as settings may name it."""
    return OUTPUT_HEAD if is_output_head(name) else LINEAR


def _own_and_fused(name: str) -> tuple[str, ...]:
    """Return `name`, and the name of the layer into which vLLM fuses it, if any."""
    prefix, dot, leaf = name.rpartition(".")
    fused = FUSED_NAMES.get(leaf)
    return (name,) if fused is None else (name, f"{prefix}{dot}{fused}")


def is_output_head(name: str) -> bool:
    """Tell whether `name` is that of a language model's head."""
    return name.rpartition(".")[2] == "lm_head"


def _modules_by_dtype(dtypes: Mapping[str, str]) -> tuple[set[str], set[str]]:
    """Return all modules that own a tensor, and those that own one that is not of `FLOAT_DTYPES`."""
    owners = {name.rpartition(".")[0] or name for name in dtypes}
    return owners, {
        name.rpartition(".")[0] or name for name, dtype in dtypes.items() if dtype not in FLOAT_DTYPES
    }


def listed_texts(settings: Mapping[str, Any], key: str, nested: bool = False) -> list[str]:
    """Return the texts of the list `key`, which may be missing or null; `nested`: those of the lists in it too."""
    value = settings.get(key)
    if value is None:
        return []
    if not isinstance(value, list):
        raise ValueError(f"{key} is no list")
    flat: list[Any] = []
    for entry in value:
        flat += entry if nested and isinstance(entry, list) else [entry]
    if not all(isinstance(entry, str) for entry in flat):
        raise ValueError(f"{key} has an entry that is no text")
    return flat


def _dynamic_rules(settings: Mapping[str, Any]) -> list[tuple[re.Pattern[str], dict[str, Any] | None]]:
    """Return gptq's `dynamic` rules in their order: a pattern with its settings, None for `-:`, which says float."""
    dynamic = settings.get("dynamic") or {}
    if not isinstance(dynamic, dict):
        raise ValueError("dynamic is no object")
    rules: list[tuple[re.Pattern[str], dict[str, Any] | None]] = []
    for rule, override in dynamic.items():
        sign, pattern = (rule[:2], rule[2:]) if rule[:2] in ("+:", "-:") else ("+:", rule)
        if sign == "-:":
            rules.append((compiled(pattern), None))
        elif isinstance(override, dict):
            rules.append((compiled(pattern), override))
        else:
            raise ValueError(f"the rule {rule!r} of dynamic holds no settings")
    return rules


def target_groups(settings: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return each target of compressed-tensors' config groups with its group."""
    groups = settings.get("config_groups") or {}
    if not isinstance(groups, dict):
        raise ValueError("config_groups is no object")
    found = []
    for group_name, group in groups.items():
        targets = group.get("targets") if isinstance(group, dict) else None
        if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
            raise ValueError(f"{group_name} has no targets")
        if group.get("weights") is not None:
            found += [(target, group) for target in targets]
    return found


def compiled(pattern: str) -> re.Pattern[str]:
    """Return the regex `pattern`; raises `UnreadableRegex`."""
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UnreadableRegex(f"the regex {pattern[:80]!r} cannot be read ({error})") from error
