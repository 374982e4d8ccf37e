"""What happened to one linear layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class LayerReport:
    """How one linear was quantized.

    error: relative squared output error of its rounding on calibration inputs, before its block was tuned. damping:
    that it took, a fraction of the Hessian's mean diagonal. dead: input channels that carried nothing. alpha: the
    exponent of its channel scales, None without. fallback: why it was rounded to nearest, None where it was not.
    seconds: it took.
    """

    name: str
    error: float
    damping: float
    dead: int
    alpha: float | None
    fallback: str | None
    seconds: float
