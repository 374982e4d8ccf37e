"""The stream of the model as it was, beside the quantized one: what the linears of a block should have given.

Each linear is rounded for the inputs that the quantized model before it makes, but towards the outputs of the
unquantized model, and where its output is added to the stream of states, towards that stream too. So every linear
makes up for some of the error that all earlier ones left.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import capture
from moments import CrossMoment, SecondMoment


@dataclass(frozen=True, slots=True)
class Drift:
    """Means over the calibration tokens, float32. `x`: a group's input in the quantized model, `x~` in the source.

    `H`: x x^T (in, in); `inputs`: (x~ - x) x^T (in, in); `stream`: (r~ - r) x^T (width, in) with `r` the states that
    the output is added to, or None where it is not.
    """

    H: Tensor
    inputs: Tensor
    stream: Tensor | None


class Follower:
    """One block of the source and its states, beside the block that is being quantized."""

    def __init__(
        self,
        block: nn.Module,
        reference: capture.States,
        states: capture.States,
        kwargs: dict[str, Any],
        batch: capture.MicroBatch,
    ) -> None:
        self.twin = copy.deepcopy(block)
        self.reference, self.states, self.kwargs, self.batch = reference, states, kwargs, batch
        self.writers = capture.residual_writers(block, states, kwargs)

    def advance(self, name: str) -> None:
        """Brings the source's states past this block. Errors: `FinalError` where they are not finite."""
        capture.replay(self.twin, name, self.reference, self.kwargs, self.batch)

    def weight(self, path: str) -> Tensor:
        """The source's weight of a linear, float32 (out, in)."""
        module = self.twin.get_submodule(path)
        assert isinstance(module, nn.Linear)
        return module.weight.detach().float()

    def drift(self, block: nn.Module, paths: list[str], channels: Tensor | None) -> Drift | None:
        """The drift of the group `paths`, whose predecessors in `block` are quantized; None where it is not finite.

        channels: what the group's inputs have been divided by since (in), or None.
        """
        path, device = paths[0], self.states.device
        first = self.twin.get_submodule(path)
        assert isinstance(first, nn.Linear)
        writes = len(paths) == 1 and path in self.writers
        before = self.writers[path] if writes else None
        H = SecondMoment(first.in_features, device)
        inputs = CrossMoment(first.in_features, first.in_features, device)
        stream = CrossMoment(first.out_features, first.in_features, device) if writes else None
        start = 0
        while start < len(self.states):
            stop = min(start + self.batch.windows, len(self.states))
            try:
                aimed, r_aimed = capture.inputs_of(
                    self.twin, self.reference.get(start, stop), self.kwargs, path, before
                )
                x, r = capture.inputs_of(block, self.states.get(start, stop), self.kwargs, path, before)
            except torch.cuda.OutOfMemoryError:
                if not self.batch.halve():
                    raise
                torch.cuda.empty_cache()
                continue
            far = aimed.float() if channels is None else aimed.float() / channels
            H.add(x)
            inputs.add((far - x.float()).to(x.dtype), x)
            if stream is not None:
                stream.add((r_aimed.float() - r.float()).to(x.dtype), x)
            start = stop
        if not H.finite():
            return None
        found = Drift(H.finish(), inputs.finish(), None if stream is None else stream.finish())
        for tensor in (found.inputs, found.stream):
            if tensor is not None and not bool(torch.isfinite(tensor).all()):
                return None
        return found
