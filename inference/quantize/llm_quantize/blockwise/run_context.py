"""What is fixed before the first block, and the choices that resuming must not change."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from llm_quantize.blockwise.layer_report import LayerReport
from llm_quantize.console import Console
from llm_quantize.device import Device
from llm_quantize.formats.base import CheckpointFormat
from llm_quantize.model.block_forward import MicroBatch
from llm_quantize.model.source import SourceModel
from llm_quantize.solver.base import Solver
from llm_quantize.timing import StageTimes
from llm_quantize.types import QuantScheme


@dataclass(slots=True)
class RunContext:
    """A run's fixed facts, and the reports that it collects.

    format: of the checkpoint. compute_dtype: in which blocks run. store_dtype: in which float tensors are saved.
    dynamic_groups: whether groups follow the activation order. repeat_tied_head: whether a tied output head is saved
    too. reports: of the linears, in the order in which they were quantized.
    """

    model: SourceModel
    device: Device
    scheme: QuantScheme
    format: CheckpointFormat
    solver: Solver
    compute_dtype: torch.dtype
    store_dtype: torch.dtype
    console: Console
    times: StageTimes
    dynamic_groups: bool = False
    repeat_tied_head: bool = False
    reports: list[LayerReport] = field(default_factory=list)

    def published_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In which a tensor is saved that is not quantized: as it is, unless it has the dtype of the blocks' weights.

        Tensors that a model has in another dtype need it (a router's correction, a state space's decay).
        """
        return self.store_dtype if dtype == self.model.dtype else dtype


@dataclass(slots=True)
class ExecutionPlan:
    """How a run goes. Resuming must not change the first three, since the last bits depend on them.

    batch: as large as the run began with.
    storage: where the hidden states are kept.
    in_order: each linear of a block is rounded for the inputs that those before it, rounded, really make, by suspended
        forward passes. That takes the states again for every input, which is slow where they come from the host: there
        all inputs are captured at once, of the block as it was.
    parallel: linears with different inputs are solved at the same time where there is room.
    tuned: blocks are tuned where the preset has it and there is room.
    """

    batch: MicroBatch
    storage: torch.device
    in_order: bool
    parallel: bool = True
    tuned: bool = True


def choose_storage(context: RunContext, windows: int, length: int) -> torch.device:
    """Where the hidden states are kept, and those of the reference model.

    On the device if they take at most a third of what is free, else in host memory.
    """
    device = context.device
    if not device.is_gpu:
        return device.torch
    reference = context.solver.preset.reference_windows(windows, length)
    needed = (windows + reference) * length * context.model.hidden_size * context.compute_dtype.itemsize
    return device.torch if needed < device.free_memory() / 3 else torch.device("cpu")
