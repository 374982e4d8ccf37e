"""Which quantization settings vLLM accepts of awq, gptq and compressed-tensors checkpoints.

The rules are those of vLLM 0.30 to 0.33, read from its sources and tried on its CPU build. Knows nothing of tensors.
`device` is `cuda`, `cpu` or `other`, an accelerator whose own rules are left to vLLM.
"""

from __future__ import annotations

from typing import Any

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


def check_settings(settings: dict[str, Any], method: str, device: str, notes: list[str]) -> int | None:
    """Refuse the quantization settings of `method` that vLLM refuses on `device`.

    Appends to `notes` what the user should know of settings that are served. Returns the bits of a weight, None
    where compressed-tensors holds none that are packed integers. Raises `Refusal`; for settings of the wrong type
    what Python raises.
    """
    if method == "awq":
        return check_awq(settings, device, notes)
    if method == "gptq":
        return check_gptq(settings, device, notes)
    return check_compressed_tensors(settings, device)


def check_awq(settings: dict[str, Any], device: str, notes: list[str]) -> int:
    """Refuse awq settings that vLLM refuses; arguments and returns as in `check_settings`.

    Source: `AutoAWQConfig` in vLLM's `model_executor/layers/quantization/auto_awq.py`.
    """
    bits = int(required_setting(settings, "awq", "w_bit", "bits"))
    group_size = int(required_setting(settings, "awq", "q_group_size", "group_size"))
    required_setting(settings, "awq", "zero_point")
    version = str(settings.get("version") or settings.get("checkpoint_format") or "gemm").lower()
    if bits != AWQ_BITS:
        raise Refusal(f"vLLM reads awq files of 4 bits alone and this one has {bits}: {REQUANTIZE_AWQ}")
    if version != "gemm":
        raise Refusal(
            f"this awq file is laid out as '{version}' and vLLM reads 'gemm' alone: {REQUANTIZE_AWQ}"
        )
    if device == "cuda" and group_size not in MARLIN_GROUP_SIZES:
        if group_size % AWQ_KERNEL_GROUP_MULTIPLE:
            raise Refusal(
                f"vLLM's awq kernels take groups of 32, 64 or 128, not {group_size}: {REQUANTIZE_AWQ}"
            )
        notes.append(
            f"groups of {group_size} run on vLLM's slow awq kernels, in float16: add --dtype float16"
        )
    return bits


def check_gptq(settings: dict[str, Any], device: str, notes: list[str]) -> int:
    """Refuse gptq settings that vLLM refuses; arguments and returns as in `check_settings`.

    Each rule of `dynamic` is checked too, which gives some linears settings of their own. Source: `AutoGPTQConfig`
    in vLLM's `model_executor/layers/quantization/auto_gptq.py`.
    """
    checkpoint_format = str(settings.get("checkpoint_format") or settings.get("format") or "gptq").lower()
    for key in ("bits", "group_size", "desc_act", "sym"):
        required_setting(settings, "gptq", key)
    dynamic = settings.get("dynamic")
    schemes = [settings]
    for pattern, rule in (dynamic if isinstance(dynamic, dict) else {}).items():
        if isinstance(rule, dict) and not pattern.startswith("-:"):  # `-:` leaves linears unquantized
            schemes.append({**settings, **rule})
    for scheme in schemes:
        bits, symmetric, group_size = int(scheme["bits"]), bool(scheme["sym"]), int(scheme["group_size"])
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
    return int(settings["bits"])


def check_compressed_tensors(settings: dict[str, Any], device: str) -> int | None:
    """Refuse compressed-tensors settings that vLLM refuses; arguments and returns as in `check_settings`.

    Only config groups of packed integers with activations in half precision are judged; others are left to vLLM.
    Source: `schemes/compressed_tensors_wNa16.py` in vLLM's `model_executor/layers/quantization/compressed_tensors/`.
    """
    bits = None
    config_groups = settings.get("config_groups")
    for group in (config_groups if isinstance(config_groups, dict) else {}).values():
        weights = group.get("weights") if isinstance(group, dict) else None
        group_format = (group.get("format") if isinstance(group, dict) else None) or settings.get("format")
        if (
            not isinstance(weights, dict)
            or group_format != "pack-quantized"
            or group.get("input_activations")
        ):
            continue
        bits = int(required_setting(weights, "compressed-tensors", "num_bits"))
        if bits not in COMPRESSED_TENSORS_BITS:
            raise Refusal(
                f"vLLM reads packed weights of 2 to 8 bits and these have {bits}: quantize it again"
            )
        if str(weights.get("actorder")).lower() in ("group", "dynamic", "true"):
            raise Refusal(
                "groups follow the activation order (actorder 'group'), which vLLM no longer serves: quantize it "
                "again with static groups"
            )
        check_cpu_bits(bits, device)
    return bits


def check_cpu_bits(bits: int, device: str) -> None:
    """Refuse bits that vLLM's CPU build does not serve.

    Source: `CPUWNA16LinearKernel` in vLLM's `model_executor/kernels/linear/mixed_precision/cpu.py`.
    """
    if device == "cpu" and bits != CPU_BITS:
        raise Refusal(
            f"vLLM on a CPU serves 4-bit weights alone and these have {bits}: serve them on an NVIDIA GPU"
        )


def has_one_group_per_row(settings: dict[str, Any]) -> bool:
    """Tell whether the settings themselves make each row of weights one group (group size -1).

    A group size that happens to equal a linear's width does not count: vLLM treats it as groups.
    """
    config_groups = settings.get("config_groups")
    if isinstance(config_groups, dict):
        return all(group["weights"].get("strategy") == "channel" for group in config_groups.values())
    return int(settings["group_size"]) == -1
