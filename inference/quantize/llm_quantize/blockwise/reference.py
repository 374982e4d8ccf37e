"""The stream of the model as it was, beside the quantized one: what the linears of a block should have given.

Each linear is rounded for the inputs that the quantized model before it makes, but towards the outputs of the
unquantized model, and where its output is added to the stream of states, towards that stream too. So every linear
makes up for some of the error that all earlier ones left.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llm_quantize.model import block_forward
from llm_quantize.model.suspended_forward import SuspendedForwards, resume_together
from llm_quantize.solver.hessian import CrossAccumulator, HessianAccumulator


@dataclass(frozen=True, slots=True)
class InputMismatch:
    """Means over the calibration tokens, float32; of those with `x~` over the windows of the source's states.

    `x`: a group's input in the quantized model, `x~` in the source.

    `H`: x x^T (in, in); `inputs`: (x~ - x) x^T (in, in); `stream`: (r~ - r) x^T (width, in) with `r` the states that
    the output is added to, or None where it is not.
    """

    H: Tensor
    inputs: Tensor
    stream: Tensor | None


class ReferenceBlock:
    """One block of the source and its states, beside the block that is being quantized.

    reference: the source's own states, of all windows or the first ones; groups: paths that share an input, in the
    order in which the block computes; room: bytes that halted passes may hold; within: entered while the block runs.
    `block` must be as it is to be rounded when `drift` is first asked for. Context manager.
    """

    def __init__(
        self,
        block: nn.Module,
        reference: block_forward.States,
        states: block_forward.States,
        kwargs: dict[str, Any],
        groups: list[list[str]],
        batch: block_forward.MicroBatch,
        suspension_budget: float,
        within: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.within = within
        self.twin = copy.deepcopy(block)
        self.device = states.device
        self.writers = block_forward.residual_writers(block, states, kwargs)
        stops = [paths[0] for paths in groups]
        before = {
            index: self.writers[paths[0]]
            for index, paths in enumerate(groups)
            if len(paths) == 1 and paths[0] in self.writers
        }
        self._groups = groups
        self._far = SuspendedForwards(
            self.twin, reference, kwargs, stops, batch, suspension_budget / 2, before
        )
        self._near = SuspendedForwards(block, states, kwargs, stops, batch, suspension_budget / 2, before)

    def __enter__(self) -> ReferenceBlock:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Gives up all passes."""
        self._far.close()
        self._near.close()

    def drop(self) -> None:
        """Gives up what is halted, for the memory, or because linears that it has passed have changed."""
        self._near.drop()
        self._far.drop()

    def goal(self, name: str, windows: int) -> block_forward.States:
        """What the source's block gives for the first windows. Errors: as `advance`."""
        made = block_forward.copied(self._far.states, min(windows, len(self._far.states)))
        block_forward.replay(self.twin, name, made, self._far.kwargs, self._far.batch, spare=self._far.drop)
        return made

    def advance(self, name: str) -> None:
        """Brings both streams of states past this block. Errors: `FinalError` where they are not finite."""
        self._near.advance(name)
        self._far.advance(name)

    def weight(self, path: str) -> Tensor:
        """The source's weight of a linear, float32 (out, in)."""
        return block_forward.linear_at(self.twin, path).weight.detach().float()

    def mismatch(self, index: int, channels: Tensor | None) -> InputMismatch | None:
        """The drift of group `index`, whose predecessors in the block are quantized; None where it is not finite.

        channels: what the group's inputs have been divided by since (in), or None.
        """
        with self.within():
            return self._drift(index, channels)

    def _drift(self, index: int, channels: Tensor | None) -> InputMismatch | None:
        first = block_forward.linear_at(self.twin, self._groups[index][0])
        H = HessianAccumulator(first.in_features, self.device)
        inputs = CrossAccumulator(first.in_features, first.in_features, self.device)
        stream = None
        if index in self._near.before:
            stream = CrossAccumulator(first.out_features, first.in_features, self.device)
        for near, far in resume_together((self._near, self._far), index):
            assert near is not None
            x, r = near
            H.add(x)
            if far is None:
                continue
            aimed, r_aimed = far
            x = x[: len(aimed)]
            goal = aimed.float() if channels is None else aimed.float() / channels
            inputs.add((goal - x.float()).to(x.dtype), x)
            if stream is not None and r is not None and r_aimed is not None:
                stream.add((r_aimed.float() - r[: len(aimed)].float()).to(x.dtype), x)
        if not H.finite():
            return None
        found = InputMismatch(H.finish(), inputs.finish(), None if stream is None else stream.finish())
        for tensor in (found.inputs, found.stream):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                return None
        return found
