"""Which file layout holds what, and which of it vLLM serves. Pure functions of the settings; no tensors.

Facts: AutoAWQ's and AutoGPTQ's packers, compressed-tensors' `pack-quantized`, vLLM 0.30 to 0.33's loaders.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_quantize.errors import InputError

if TYPE_CHECKING:
    from llm_quantize.config import Layout, Method

HOLDS: dict[str, tuple[int, ...]] = {
    "awq": (4,),
    "gptq": (2, 3, 4, 8),
    "compressed-tensors": (2, 3, 4, 8),
}
SERVED_GPTQ_GROUPS = (-1, 32, 64, 128)


def choose_layout(method: Method, bits: int, symmetric: bool) -> Layout:
    """The layout that vLLM serves for these settings: the method's own, else compressed-tensors."""
    if method == "awq" and bits == 4:
        return "awq"
    if method == "gptq" and bits in (4, 8) and symmetric:
        return "gptq"
    return "compressed-tensors"


def check_layout(
    layout: Layout, method: Method, bits: int, group_size: int, symmetric: bool, dynamic_groups: bool
) -> None:
    """Refuses what `layout` cannot hold. Raises InputError, one line with the remedy.

    Every layout holds either method's integers and either symmetry: what counts is the width of an integer,
    whole words per group, and `g_idx`, which only `gptq` has.
    """
    if bits not in HOLDS[layout]:
        held = ", ".join(map(str, HOLDS[layout]))
        raise InputError(
            f"--format {layout} cannot hold --bits {bits} (only {held}): leave --format out, and {method} at "
            f"{bits} bits is written as {choose_layout(method, bits, symmetric)}"
        )
    if group_size != -1 and (group_size <= 0 or group_size % 32):
        raise InputError(
            f"--group_size {group_size} does not fill whole 32-bit words: take 32, 64, 128, 256 or -1"
        )
    if dynamic_groups and layout != "gptq":
        raise InputError(
            f"--act_order_groups dynamic needs --format gptq, since {layout} has no g_idx: "
            "take --format gptq or --act_order_groups static"
        )


def not_served(
    layout: Layout, bits: int, group_size: int, symmetric: bool, dynamic_groups: bool
) -> str | None:
    """Why vLLM refuses such a file and what to take instead; None where it serves it. One line."""
    if layout != "gptq":
        return None
    if dynamic_groups and group_size != -1:
        return (
            "vLLM 0.30 and later refuse --act_order_groups dynamic in groups: take static to serve it there"
        )
    if bits not in (4, 8) or not symmetric:
        kind = f"{bits} bits" if bits not in (4, 8) else "asymmetric weights"
        return f"vLLM refuses {kind} in --format gptq: take --format compressed-tensors to serve it there"
    if group_size not in SERVED_GPTQ_GROUPS:
        groups = ", ".join(map(str, SERVED_GPTQ_GROUPS))
        return (
            f"vLLM refuses --group_size {group_size} in --format gptq: take one of {groups} to serve it there"
        )
    return None
