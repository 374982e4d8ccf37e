"""Whether a block runs as this program runs blocks: by itself, over several windows at once.

Asked of one block of each kind, before the work.
"""

from __future__ import annotations

import torch
from torch import nn

from llm_quantize.blockwise.run_context import RunContext
from llm_quantize.errors import InputError, is_failure, one_line
from llm_quantize.model.block_forward import BlockKwargs, forward
from llm_quantize.model.skeleton import blocks_alike
from llm_quantize.model.states import States

TOLERANCE = 0.05  # of the mean change that a block makes: by so much a batch may differ from its windows


def check_other_kinds(context: RunContext, states: States, kwargs: list[BlockKwargs], begun: int) -> None:
    """Check a block of each kind but that of block `begun`, which is checked when its turn comes. Raises InputError."""
    model, device = context.model, context.device.torch
    for alike in blocks_alike(model.modules):
        if begun in alike or alike[-1] < begun:
            continue
        index = next(each for each in alike if each >= begun)
        block = model.load_block(index, device, context.compute_dtype)
        try:
            check_block(block, states, kwargs[index])
        finally:
            model.release(block)


@torch.no_grad()
def check_block(block: nn.Module, states: States, kwargs: BlockKwargs) -> None:
    """Raise InputError unless `block` makes of two windows what it makes of each. states: that enter a block."""
    name = type(block).__name__
    windows = states.get(0, min(2, len(states)))
    try:
        together = forward(block, windows, kwargs)
        alone = forward(block, windows[:1], kwargs)
    except torch.cuda.OutOfMemoryError:
        return  # the work goes on with less at a time
    except BaseException as error:
        if not is_failure(error):
            raise
        raise InputError(f"{name} does not run by itself ({one_line(error)}): not supported") from None
    if together.shape != windows.shape:
        raise InputError(f"{name} makes states of another shape than it takes: not supported")
    change = (alone - windows[:1]).abs().mean()
    if bool((together[:1] - alone).abs().mean() > TOLERANCE * change):
        raise InputError(f"{name} computes a window otherwise beside others: not supported")
