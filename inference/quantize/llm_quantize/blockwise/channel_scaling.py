"""AWQ's channel scales in a block: which group has a mapping, which scales were chosen, what they do to weights."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from llm_quantize.model.awq_mappings import AWQMapping, Smoothed, scale_count, smooth
from llm_quantize.solver.base import ChannelScales, Solver
from llm_quantize.solver.problem import Problem


class MappedGroups:
    """Which groups of linears that share an input have a mapping.

    groups: paths of linears, in the order in which the block computes. device: of the mappings' indices.
    """

    def __init__(self, groups: list[list[str]], mappings: list[AWQMapping], device: torch.device) -> None:
        self._groups = groups
        self._mappings = {
            index: replace(mapping, rows=mapping.rows.to(device))
            for index, paths in enumerate(groups)
            for mapping in mappings
            if set(mapping.balance_layers) == set(paths)
        }

    def __bool__(self) -> bool:
        return bool(self._mappings)

    def get(self, index: int) -> AWQMapping | None:
        """The mapping of group `index`, None where it has none."""
        return self._mappings.get(index)

    def prerequisites(self, index: int) -> set[int]:
        """The groups whose scales must have been chosen before those of group `index`: they divide its rows."""
        paths = self._groups[index]
        return {i for i, mapping in self._mappings.items() if mapping.smooth_layer in paths}


@dataclass(slots=True)
class WeightFactors:
    """What smoothing does to weights, by path: `rows`, float32 (out), divide; `channels`, float32 (in), multiply.

    No scaling is a scale of one, which changes nothing: so nobody has to wait to know which was chosen.
    """

    rows: dict[str, Tensor] = field(default_factory=dict)
    channels: dict[str, Tensor] = field(default_factory=dict)

    def add(self, mapping: AWQMapping, smoothed: Smoothed) -> None:
        """Take in what smoothing a layer did."""
        if smoothed.rows is not None:
            self.rows[mapping.smooth_layer] = smoothed.rows
        for path in mapping.balance_layers:
            self.channels[path] = smoothed.channels

    def apply(self, path: str, W: Tensor) -> Tensor:
        """The weight of a linear, float32 (out, in), as its factors make it."""
        W = W / self.rows[path][:, None] if path in self.rows else W
        return W * self.channels[path] if path in self.channels else W


class BlockScaling:
    """Chooses the channel scales of a block, group by group, and knows what has been chosen.

    store_dtype: in which norms are saved.
    """

    def __init__(
        self,
        block: nn.Module,
        groups: list[list[str]],
        mappings: list[AWQMapping],
        solver: Solver,
        store_dtype: torch.dtype,
    ) -> None:
        device = next(block.parameters()).device
        self.groups = groups
        self.mapped = MappedGroups(groups, mappings, device)
        self.factors = WeightFactors()
        self._block, self._solver, self._store_dtype = block, solver, store_dtype
        self._chosen: dict[int, tuple[ChannelScales, tuple[str, ...]]] = {}

    def choose(self, index: int, weights: list[Tensor], problem: Problem, *, keep: bool) -> None:
        """Scale the inputs of group `index`, where it has a mapping and a factor. Asynchronous.

        weights: of its linears, unscaled, float32 (out, in). keep: the problem becomes that of the scaled inputs.
        """
        mapping = self.mapped.get(index)
        if mapping is None or problem.factor is None:
            return
        paths = self.groups[index]
        stacked = torch.cat([self.factors.apply(path, W) for path, W in zip(paths, weights, strict=True)])
        count = scale_count(self._block, mapping)
        chosen = self._solver.choose_scales(stacked, problem, mapping.rows, count)
        smoothed = smooth(self._block, mapping, chosen.scale, self._store_dtype)
        self._chosen[index] = chosen, smoothed.changed
        self.factors.add(mapping, smoothed)
        if keep:
            problem.scale_inputs_(smoothed.channels)

    def alpha(self, index: int) -> float | None:
        """The exponent of the scales of group `index`, None where it has none. Waits for the device."""
        return self._chosen[index][0].alpha if index in self._chosen else None

    def changed_parameters(self) -> set[str]:
        """The block's parameters that smoothing changed, other than weights of linears. Waits for the device."""
        return {name for chosen, names in self._chosen.values() if chosen.alpha > 0 for name in names}
