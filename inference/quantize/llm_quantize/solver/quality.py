"""What `--quality` buys: how finely scales are searched, and what follows the rounding."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from llm_quantize.solver.qparams import ScaleSearch
from llm_quantize.types import Quality

ENOUGH_TOKENS = 1 << 18  # fewer do not tell the input mismatch from noise
FEW_BITS = 3  # up to so many, `default` looks at the reference model too, and `best` tunes blocks
DEFAULT_REFERENCE_SHARE = 0.25  # of the windows


@dataclass(frozen=True, slots=True)
class QualityPreset:
    """How a block is quantized.

    search: of the scales.
    sweeps: of coordinate descent after the rounding. refit: whether they set the scales anew, too.
    reference_share: of the calibration windows, on which the reference model runs beside the quantized one and gives
        every linear its target.
    tuning_steps: by gradient, of a whole block after its rounding.
    """

    search: ScaleSearch
    sweeps: int
    refit: bool
    reference_share: float = 0.0
    tuning_steps: int = 0

    def reference_windows(self, windows: int, length: int) -> int:
        """On how many of `windows` of `length` tokens the reference model runs: the share, and never too few."""
        if not self.reference_share:
            return 0
        return min(windows, max(math.ceil(self.reference_share * windows), -(-ENOUGH_TOKENS // length)))


PRESETS: dict[str, QualityPreset] = {
    "fast": QualityPreset(ScaleSearch(candidates=16, refits=1), sweeps=0, refit=False),
    "default": QualityPreset(ScaleSearch(candidates=24, refits=2), sweeps=2, refit=True),
    "best": QualityPreset(
        ScaleSearch(candidates=48, refits=3), sweeps=8, refit=True, reference_share=1.0, tuning_steps=384
    ),
}


def quality_preset(quality: Quality, bits: int) -> QualityPreset:
    """What `--quality` means at so many bits: at few the reference model pays by default, and tuning pays at all."""
    preset = PRESETS[quality]
    if bits > FEW_BITS:
        return replace(preset, tuning_steps=0)
    return replace(preset, reference_share=DEFAULT_REFERENCE_SHARE) if quality == "default" else preset
