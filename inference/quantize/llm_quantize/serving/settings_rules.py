"""Which quantization settings vLLM accepts of awq, gptq and compressed-tensors checkpoints.

The rules are those of vLLM 0.30 to 0.33, read from its sources and tried on its CPU build. Knows nothing of tensors.
`device` is `cuda`, `cpu` or `other`, an accelerator whose own rules are left to vLLM.
"""

from __future__ import annotations

import re
from typing import Any

from llm_quantize.serving.float_modules import FloatModules, class_of
from llm_quantize.serving.refusal import Refusal

METHODS = ("awq", "gptq", "compressed-tensors")
# Other names under which vLLM on a GPU takes a checkpoint of the method; its CPU build knows the first name alone.
# Source: `override_quantization_method` in the files of `model_executor/layers/quantization/`.
METHOD_ALIASES = {
    "awq": ("awq_marlin", "auto_awq", "marlin", "humming", "moe_wna16"),
    "gptq": ("gptq_marlin", "auto_gptq", "marlin", "humming", "moe_wna16"),
    "compressed-tensors": (),
}
AWQ_BITS = 4
GPTQ_BITS = (4, 8)
COMPRESSED_TENSORS_BITS = tuple(range(2, 9))
CPU_BITS = 4
# MARLIN_SUPPORTED_GROUP_SIZES in vLLM's `model_executor/layers/quantization/utils/marlin_utils.py`.
MARLIN_GROUP_SIZES = (-1, 32, 64, 128)
# Groups that Marlin does not take run on vLLM's older awq kernels, which take multiples of this.
AWQ_KERNEL_GROUP_MULTIPLE = 32

REQUANTIZE_AWQ = "quantize it again with awq_quantize.py --format auto, which picks a format that vLLM serves"
REQUANTIZE_GPTQ = (
    "quantize it again with gptq_quantize.py --format auto, which picks a format that vLLM serves"
)


def required_setting(settings: dict[str, Any], method: str, *keys: str) -> Any:
    """Return the first of `keys` that `settings` has. Raises `Refusal` without any: vLLM would not start."""
    for key in keys:
        if settings.get(key) is not None:
            return settings[key]
    raise Refusal(f"the {method} settings name no '{keys[-1]}', which vLLM needs: add it to config.json")


def required_integer(settings: dict[str, Any], method: str, *keys: str) -> int:
    """Return the first of `keys` that `settings` has, a whole number. vLLM takes neither `4.0` nor `"4"` for 4."""
    value = required_setting(settings, method, *keys)
    if type(value) is not int:
        raise Refusal(
            f"the {method} settings have '{keys[-1]}' {shown(value)}, which is no whole number: correct it in "
            "config.json"
        )
    return value


def required_boolean(settings: dict[str, Any], method: str, key: str) -> bool:
    """Return `key` of `settings`, true or false; 1 and 0 count, as for vLLM."""
    value = required_setting(settings, method, key)
    if type(value) not in (bool, int) or value not in (0, 1):
        raise Refusal(
            f"the {method} settings have '{key}' {shown(value)}, which is neither true nor false: correct it in "
            "config.json"
        )
    return bool(value)


def shown(value: Any) -> str:
    """Return `value` as a text that fits into a message."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def check_settings(settings: dict[str, Any], method: str, device: str, notes: list[str]) -> None:
    """Refuse the quantization settings of `method` that vLLM refuses on `device`.

    Appends to `notes` what the user should know of settings that are served. Raises `Refusal`.
    """
    if method == "awq":
        check_awq(settings, device, notes)
    elif method == "gptq":
        check_gptq(settings, device, notes)
    else:
        check_compressed_tensors(settings, device)


def check_awq(settings: dict[str, Any], device: str, notes: list[str]) -> None:
    """Refuse awq settings that vLLM refuses; arguments as in `check_settings`.

    Source: `AutoAWQConfig` in vLLM's `model_executor/layers/quantization/auto_awq.py`.
    """
    bits = required_integer(settings, "awq", "w_bit", "bits")
    group_size = required_integer(settings, "awq", "q_group_size", "group_size")
    required_setting(settings, "awq", "zero_point")
    version = str(settings.get("version") or settings.get("checkpoint_format") or "gemm").lower()
    if bits != AWQ_BITS:
        raise Refusal(f"vLLM reads awq files of 4 bits alone and this one has {bits}: {REQUANTIZE_AWQ}")
    if version != "gemm":
        raise Refusal(
            f"this awq file is laid out as '{version}' and vLLM reads 'gemm' alone: {REQUANTIZE_AWQ}"
        )
    if group_size < 1 and group_size != -1:
        raise Refusal(f"vLLM's awq kernels take groups of 32, 64 or 128, not {group_size}: {REQUANTIZE_AWQ}")
    if device == "cuda" and group_size not in MARLIN_GROUP_SIZES:
        if group_size % AWQ_KERNEL_GROUP_MULTIPLE:
            raise Refusal(
                f"vLLM's awq kernels take groups of 32, 64 or 128, not {group_size}: {REQUANTIZE_AWQ}"
            )
        notes.append(
            f"groups of {group_size} run on vLLM's slow awq kernels, in float16: add --dtype float16"
        )


def check_gptq(settings: dict[str, Any], device: str, notes: list[str]) -> None:
    """Refuse gptq settings that vLLM refuses; arguments as in `check_settings`.

    Each rule of `dynamic` is checked too, which gives some linears settings of their own. Source: `AutoGPTQConfig`
    in vLLM's `model_executor/layers/quantization/auto_gptq.py`.
    """
    checkpoint_format = str(settings.get("checkpoint_format") or settings.get("format") or "gptq").lower()
    if "desc_act" not in settings:  # vLLM takes null for false
        required_setting(settings, "gptq", "desc_act")
    dynamic = settings.get("dynamic")
    schemes = [settings]
    for pattern, rule in (dynamic if isinstance(dynamic, dict) else {}).items():
        if isinstance(rule, dict) and not pattern.startswith("-:"):  # `-:` leaves linears unquantized
            schemes.append({**settings, **rule})
    for scheme in schemes:
        bits = required_integer(scheme, "gptq", "bits")
        group_size = required_integer(scheme, "gptq", "group_size")
        symmetric = required_boolean(scheme, "gptq", "sym")
        if scheme.get("desc_act") is not None:
            required_boolean(scheme, "gptq", "desc_act")
        if bits not in GPTQ_BITS:
            raise Refusal(f"vLLM reads gptq files of 4 and 8 bits and this one has {bits}: {REQUANTIZE_GPTQ}")
        if not symmetric:
            raise Refusal(
                f"vLLM reads symmetric gptq files alone and this one has sym false: {REQUANTIZE_GPTQ}"
            )
        if group_size not in MARLIN_GROUP_SIZES:
            raise Refusal(f"vLLM takes gptq groups of 32, 64, 128 or -1, not {group_size}: {REQUANTIZE_GPTQ}")
        check_cpu_bits(bits, device)
    if checkpoint_format == "gptq_v2":
        # The two formats store zero points differently, and vLLM ignores those of a symmetric file.
        notes.append("the file is gptq_v2; vLLM takes it as gptq, which gives the same for symmetric weights")
    elif checkpoint_format != "gptq":
        raise Refusal(f"vLLM does not read gptq files laid out as '{checkpoint_format}': {REQUANTIZE_GPTQ}")


def check_compressed_tensors(settings: dict[str, Any], device: str) -> None:
    """Refuse settings of packed integers that vLLM refuses; other contents are left to vLLM to judge.

    Source: `_get_scheme_from_parts` in vLLM's `model_executor/layers/quantization/compressed_tensors/`.
    """
    for group in packed_groups(settings):
        bits = packed_integer(group["weights"], "num_bits")
        if bits not in COMPRESSED_TENSORS_BITS:
            raise Refusal(
                f"vLLM reads packed weights of 2 to 8 bits and these have {bits}: quantize it again"
            )
        if str(group["weights"].get("actorder")).lower() in ("group", "dynamic", "true"):
            raise Refusal(
                "groups follow the activation order (actorder 'group'), which vLLM no longer serves: quantize it "
                "again with static groups"
            )
        check_cpu_bits(bits, device)


def packed_groups(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the config groups of compressed-tensors whose weights are packed integers and activations floats."""
    config_groups = settings.get("config_groups")
    return [
        group
        for group in (config_groups.values() if isinstance(config_groups, dict) else ())
        if isinstance(group, dict)
        and isinstance(group.get("weights"), dict)
        and (group.get("format") or settings.get("format")) == "pack-quantized"
        and not group.get("input_activations")
    ]


def packed_integer(weights: dict[str, Any], key: str) -> int:
    """Return `key` of a config group's `weights`, a whole number; vLLM takes `4.0` and `"4"` for 4 here."""
    value = required_setting(weights, "compressed-tensors", key)
    if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,9}\s*", value):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return required_integer(weights, "compressed-tensors", key)


def packed_group_size(group: dict[str, Any]) -> int:
    """Return the group size of a config group of packed integers, -1 for one group per row."""
    weights = group["weights"]
    if weights.get("strategy") == "channel" or weights.get("group_size") is None:
        return -1
    return packed_integer(weights, "group_size")


def check_cpu_bits(bits: int, device: str) -> None:
    """Refuse bits that vLLM's CPU build does not serve.

    Source: `CPUWNA16LinearKernel` in vLLM's `model_executor/kernels/linear/mixed_precision/cpu.py`.
    """
    if device == "cpu" and bits != CPU_BITS:
        raise Refusal(
            f"vLLM on a CPU serves 4-bit weights alone and these have {bits}: serve them on an NVIDIA GPU"
        )


def has_one_group_per_row(settings: dict[str, Any], method: str) -> bool:
    """Tell whether the settings of `method` themselves make each row of weights one group (group size -1).

    A group size that happens to equal a linear's width does not count: vLLM treats it as groups.
    """
    if method == "compressed-tensors":
        groups = packed_groups(settings)
        return bool(groups) and all(packed_group_size(group) == -1 for group in groups)
    return required_integer(settings, method, "group_size") == -1


class LinearSettings:
    """Bits and group sizes of single linears, which rules and config groups may give them."""

    def __init__(self, settings: dict[str, Any], method: str, rules: FloatModules) -> None:
        """Arguments: the quantization settings that `check_settings` accepts, their method, and its rules."""
        self._settings, self._method, self._rules = settings, method, rules
        self._packed = packed_groups(settings)

    def bits(self, name: str) -> int | None:
        """Return the bits of a weight of the linear `name`; None where it is no packed integer."""
        if self._method == "awq":
            return AWQ_BITS
        if self._method == "gptq":
            return required_integer(self._rules.settings_of(name), "gptq", "bits")
        group = self._rules.scheme(name, class_of(name))
        return packed_integer(group["weights"], "num_bits") if group in self._packed and group else None

    def group_size(self, name: str) -> int:
        """Return the group size of the linear `name`, whose `bits` are known; -1 for one group per row."""
        if self._method == "awq":
            return required_integer(self._settings, "awq", "q_group_size", "group_size")
        if self._method == "gptq":
            return required_integer(self._rules.settings_of(name), "gptq", "group_size")
        group = self._rules.scheme(name, class_of(name))
        return packed_group_size(group) if group else -1
