"""GPTQ: rounding with error compensation (Frantar et al., arXiv:2210.17323)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llm_quantize.solver.base import ChannelScales
from llm_quantize.solver.problem import PendingProblem, Problem, QuantizedWeight, quantize_weight
from llm_quantize.solver.quality import QualityPreset
from llm_quantize.types import QuantScheme


@dataclass(frozen=True, slots=True)
class GPTQSolver:
    """A `Solver`. act_order: channels are processed by falling activation. dynamic_groups: groups follow that order."""

    scheme: QuantScheme
    preset: QualityPreset
    damping: float
    act_order: bool = True
    dynamic_groups: bool = False
    uses_mappings: bool = False

    def prepare(self, H: Tensor | None, in_features: int, device: torch.device) -> PendingProblem:
        return PendingProblem(H, in_features, device, damping=self.damping, act_order=self.act_order)

    def choose_scales(self, W: Tensor, problem: Problem, rows: Tensor, count: int) -> ChannelScales:
        ones = torch.ones(count, device=W.device)
        return ChannelScales(ones, torch.zeros(1, device=W.device), (0.0,))

    def quantize(self, W: Tensor, problem: Problem) -> QuantizedWeight:
        return quantize_weight(W, problem, self.scheme, self.preset, dynamic_groups=self.dynamic_groups)
