"""The reference model beside the quantized one: what the linears of a block should give.

Each linear is rounded for the inputs that the quantized model before it makes, but towards the outputs of the model as
it was (the target), and where its output is added to the residual stream, towards that stream too. So every linear
makes up for some of the error that all earlier ones left.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llm_quantize.model.block_forward import BlockKwargs, MicroBatch, linear_at, replay, residual_writers
from llm_quantize.model.states import States
from llm_quantize.model.suspended_forward import SuspendedForwards, resume_together
from llm_quantize.solver.hessian import CrossAccumulator, HessianAccumulator


@dataclass(frozen=True, slots=True)
class InputMismatch:
    """How the inputs `x` of a group differ from those of the reference model, `x~`. Means over tokens, float32.

    H: x x^T (in, in), over all windows. inputs: (x~ - x) x^T (in, in), over the reference model's windows.
    residual: (r~ - r) x^T (width, in), with `r` the residual stream that the output is added to; None where it is not.
    """

    H: Tensor
    inputs: Tensor
    residual: Tensor | None


class ReferenceBlock:
    """A block of the reference model and its states, beside the block that is being quantized. A context manager.

    reference: the reference model's states, of all windows or the first ones. groups: paths that share an input, in the
    order in which the block computes. budget: bytes that suspended passes may hold. within: entered while blocks run.
    `block` must be as it is to be rounded when `mismatch` is first asked for.
    """

    def __init__(
        self,
        block: nn.Module,
        reference: States,
        states: States,
        kwargs: BlockKwargs,
        groups: list[list[str]],
        batch: MicroBatch,
        budget: float,
        within: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.within = within
        self.block = copy.deepcopy(block)
        self._device = states.device
        self._groups = groups
        self.writers = residual_writers(block, states, kwargs)
        stops = [paths[0] for paths in groups]
        residuals = {
            index: self.writers[paths[0]]
            for index, paths in enumerate(groups)
            if len(paths) == 1 and paths[0] in self.writers
        }
        self._reference = SuspendedForwards(
            self.block, reference, kwargs, stops, batch, budget / 2, residuals
        )
        self._quantized = SuspendedForwards(block, states, kwargs, stops, batch, budget / 2, residuals)

    def __enter__(self) -> ReferenceBlock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Give up all passes."""
        self._reference.close()
        self._quantized.close()

    def drop(self) -> None:
        """Give up what waits, for the memory, or because linears that it has passed have changed."""
        self._quantized.drop()
        self._reference.drop()

    def target(self, name: str, windows: int) -> States:
        """What the reference model's block gives for the first windows. Raises FinalError as `finish`."""
        forwards = self._reference
        made = forwards.states.copy(min(windows, len(forwards.states)))
        replay(self.block, name, made, forwards.kwargs, forwards.batch, spare=forwards.drop)
        return made

    def finish(self, name: str) -> None:
        """Bring both models' states past this block. Raises FinalError where they are not finite."""
        self._quantized.finish(name)
        self._reference.finish(name)

    def weight(self, path: str) -> Tensor:
        """The reference model's weight of a linear, float32 (out, in)."""
        return linear_at(self.block, path).weight.detach().float()

    def mismatch(self, index: int, channels: Tensor | None) -> InputMismatch | None:
        """The input mismatch of group `index`, whose predecessors in the block are quantized; None if not finite.

        channels: what the group's inputs have been divided by since, float32 (in), or None.
        """
        with self.within():
            return self._mismatch(index, channels)

    def _mismatch(self, index: int, channels: Tensor | None) -> InputMismatch | None:
        first = linear_at(self.block, self._groups[index][0])
        H = HessianAccumulator(first.in_features, self._device)
        inputs = CrossAccumulator(first.in_features, first.in_features, self._device)
        residuals = None
        if index in self._quantized.residuals:
            residuals = CrossAccumulator(first.out_features, first.in_features, self._device)
        for quantized, reference in resume_together((self._quantized, self._reference), index):
            assert quantized is not None
            x, residual = quantized
            H.add(x)
            if reference is None:
                continue
            wanted, wanted_residual = reference
            x = x[: len(wanted)]
            target = wanted.float() if channels is None else wanted.float() / channels
            inputs.add((target - x.float()).to(x.dtype), x)
            if residuals is not None and residual is not None and wanted_residual is not None:
                behind = wanted_residual.float() - residual[: len(wanted)].float()
                residuals.add(behind.to(x.dtype), x)
        if not H.finite():
            return None
        found = InputMismatch(H.finish(), inputs.finish(), None if residuals is None else residuals.finish())
        for tensor in (found.inputs, found.residual):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                return None
        return found
