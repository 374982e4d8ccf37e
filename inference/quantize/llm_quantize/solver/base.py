"""What a solver is: one file that has this protocol. Solvers take and return tensors, and never import each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from llm_quantize.solver.problem import PendingProblem, Problem, QuantizedWeight
from llm_quantize.solver.quality import QualityPreset
from llm_quantize.types import QuantScheme


@dataclass(frozen=True, slots=True)
class ChannelScales:
    """Factors on input channels. Both tensors are on the device, and nobody has waited for them.

    scale: float32 (sources), one for each channel of the smooth layer.
    losses: float32 (candidates), the output error of each.
    alphas: the candidates' exponents; zero stands for no scaling, whose scales are exactly one.
    """

    scale: Tensor
    losses: Tensor
    alphas: tuple[float, ...]

    @property
    def alpha(self) -> float:
        """The best candidate's exponent. Waits for the device."""
        return self.alphas[int(best_candidate(self.losses))]


def best_candidate(losses: Tensor) -> Tensor:
    """The index of the smallest loss, of the first of equals: int64 (1). NaN is never the smallest, unless all are."""
    return losses.nan_to_num(nan=torch.inf).argmin(0, keepdim=True)


class Solver(Protocol):
    """Turns the weights of linears that share an input into integers, from the Hessian of that input.

    scheme, preset: as the run has them. damping: of the Hessian, asked for; what it took is in the `Problem`.
    uses_mappings: whether `choose_scales` is to be called, for inputs that a smooth layer makes.
    """

    @property
    def scheme(self) -> QuantScheme: ...

    @property
    def preset(self) -> QualityPreset: ...

    @property
    def damping(self) -> float: ...

    @property
    def uses_mappings(self) -> bool: ...

    def prepare(self, H: Tensor | None, in_features: int, device: torch.device) -> PendingProblem:
        """Begin to make a problem of `H`, float32 (in, in), which is used up. Asynchronous."""
        ...

    def choose_scales(self, W: Tensor, problem: Problem, rows: Tensor, count: int) -> ChannelScales:
        """Choose channel scales for the weights `W`, float32 (out, in), of all balance layers together. Asynchronous.

        rows: int64 (in), the channel of the smooth layer that each input channel comes from, below `count`.
        """
        ...

    def quantize(self, W: Tensor, problem: Problem) -> QuantizedWeight:
        """Quantize `W`, float32 (out, in). Asynchronous."""
        ...
