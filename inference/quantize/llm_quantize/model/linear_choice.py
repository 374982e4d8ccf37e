"""Which linears of the blocks are quantized, and which stay as they are."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llm_quantize.errors import InputError, is_failure
from llm_quantize.model.skeleton import LinearLayer, blocks_alike, find_blocks
from llm_quantize.model.source import Model

FEW = 0.01  # of a block's linear weights: linears that hold no more may stay as they are
UNUSED = 0.1  # the same for linears that a block never calls
_PROBED_TOKENS = 8


@dataclass(frozen=True, slots=True)
class FloatLinear:
    """A linear of a block that stays as it is. why: in the middle of a sentence."""

    linear: LinearLayer
    why: str


def choose_linears(model: Model, misfit: Callable[[LinearLayer], str | None]) -> list[FloatLinear]:
    """Leave linears of the blocks as they are that cannot be quantized and hold little; return them.

    misfit: why a linear cannot be stored in the format, None where it can. Raises InputError where linears that cannot
    be quantized hold more, naming one.
    """
    called = called_linears(model)
    left: list[FloatLinear] = []
    for index in range(len(model.blocks)):
        linears = model.linears(index)
        total = sum(linear.weights for linear in linears)
        unused = [linear for linear in linears if called is not None and linear.name not in called]
        if sum(linear.weights for linear in unused) > UNUSED * total:
            raise InputError(
                f"{unused[0].name} is never used in the forward pass: this architecture is not supported"
            )
        left += [FloatLinear(linear, "it is not called as a linear layer") for linear in unused]
        used = [linear for linear in linears if called is None or linear.name in called]
        misfits = [(linear, why) for linear in used if (why := misfit(linear)) is not None]
        if sum(linear.weights for linear, _ in misfits) > FEW * total:
            raise InputError(misfits[0][1])
        left += [FloatLinear(linear, f"its {_widths(linear)} channels do not fit") for linear, _ in misfits]
    model.leave_float({each.linear.name for each in left})
    return left


def called_linears(model: Model) -> set[str] | None:
    """The names of the linears that a forward pass calls; None where the model does not run without its weights.

    It runs on PyTorch's fake tensors, which have shapes and no numbers. Of blocks that are made alike one runs.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    skeleton: Any = copy.deepcopy(model.skeleton)
    _, blocks = find_blocks(skeleton, model.config)
    called: set[str] = set()
    for first, *others in blocks_alike(blocks):
        for path, module in blocks[first].named_modules():
            if isinstance(module, nn.Linear):
                names = [f"{model.blocks[index]}.{path}" for index in (first, *others)]
                module.register_forward_pre_hook(lambda _, args, names=names: called.update(names))
        made: list[Any] = []
        blocks[first].register_forward_hook(lambda _, args, out, made=made: made.append(out))
        for index in others:
            blocks[index].forward = lambda *args, made=made, **kwargs: made[0]
    log = logging.getLogger("torch._subclasses.fake_tensor")
    silent, log.disabled = log.disabled, True
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            _make_fake(skeleton)
            tokens = torch.zeros((1, _PROBED_TOKENS), dtype=torch.int64)
            skeleton.base_model(input_ids=tokens, use_cache=False)
    except BaseException as error:
        if not is_failure(error):
            raise
        return None
    finally:
        log.disabled = silent
    return called


def _make_fake(skeleton: nn.Module) -> None:
    """Give every parameter and buffer, under a `FakeTensorMode`, a fake tensor in its place."""
    for module in skeleton.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                made = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(made, requires_grad=False)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


def _widths(linear: LinearLayer) -> str:
    return f"{linear.in_features} input and {linear.out_features} output"
