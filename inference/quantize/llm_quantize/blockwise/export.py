"""What a published checkpoint holds: the plan of its tensors, those that are copied, and config.json."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from llm_quantize.blockwise.block_solution import SolvedLinear
from llm_quantize.blockwise.run_context import RunContext
from llm_quantize.checkpoint.writer import CheckpointWriter
from llm_quantize.errors import FinalError
from llm_quantize.io.safetensors_files import PlannedTensor
from llm_quantize.model.config_file import published_config

SAMPLED_EVERY = 7  # one of so many layers is unpacked again and compared


def planned_tensors(context: RunContext) -> list[PlannedTensor]:
    """Every tensor of the checkpoint, block by block and then the rest."""
    model = context.model
    planned: list[PlannedTensor] = []

    def copied(stored: str, name: str | None = None) -> PlannedTensor:
        dtype, shape = model.store.describe(stored)
        return PlannedTensor(name or stored, context.store_dtype if dtype.is_floating_point else dtype, shape)

    for index in range(len(model.blocks)):
        for linear in model.linears(index):
            tensors = context.format.plan(
                linear.out_features, linear.in_features, context.scheme, context.store_dtype
            )
            prefix = model.names.of(linear.name)
            planned += [PlannedTensor(f"{prefix}.{suffix}", *what) for suffix, what in tensors.items()]
        planned += [copied(stored) for stored in model.float_tensors(index)]
    planned += [copied(stored) for stored in model.float_tensors(None)]
    head = _repeated_head(context)
    if head is not None:
        planned.append(copied(head[1], head[0]))
    return planned


def _repeated_head(context: RunContext) -> tuple[str, str] | None:
    """The tied output head's name and tensor, where the file is to hold it twice."""
    return context.model.names.tied_head if context.repeat_tied_head else None


def write_linear(context: RunContext, writer: CheckpointWriter, index: int, solved: SolvedLinear) -> None:
    """Pack one linear of block `index`, hand it to the writer, and report what happened to it."""
    model = context.model
    prefix = model.names.of(f"{model.blocks[index]}.{solved.path}")
    tensors = context.format.pack(solved.q, solved.qparams, context.scheme, context.store_dtype, solved.g_idx)
    for suffix, tensor in tensors.items():
        writer.add(f"{prefix}.{suffix}", tensor)
    position = [linear.path for linear in model.linears(index)].index(solved.path)
    if (index + position) % SAMPLED_EVERY == 0:
        writer.remember(prefix, (solved.q, solved.qparams.scale, solved.qparams.zero))
    report = solved.report
    context.reports.append(report)
    if report.fallback is not None:
        context.console.warn(f"{report.name}: {report.fallback}")
    elif report.damping > context.solver.damping:
        context.console.warn(
            f"{report.name}: damping raised to {report.damping:g} before the factorization succeeded"
        )
    if report.dead and report.fallback is None:
        context.console.warn(
            f"{report.name}: {report.dead} of {solved.q.shape[1]} input channels carried nothing; their weights are "
            "rounded to nearest"
        )


def write_float_tensors(
    context: RunContext, writer: CheckpointWriter, block: torch.nn.Module, index: int, changed: set[str]
) -> None:
    """Write what is not quantized in block `index`. changed: parameters of the block that channel scales changed."""
    model, prefix = context.model, f"{context.model.blocks[index]}."
    names = {model.names.of(f"{prefix}{name}"): name for name in changed}
    for stored in model.float_tensors(index):
        tensor = block.get_parameter(names[stored]) if stored in names else model.store.read(stored)
        writer.add(stored, _as_stored(context, stored, tensor), fixed=stored not in names)


def round_float_parameters(context: RunContext, block: torch.nn.Module, index: int) -> None:
    """Round what is not quantized in block `index` to the dtype in which it is stored.

    Before anything is computed with it, so that reading the file back gives the same states.
    """
    quantized = {f"{linear.path}.weight" for linear in context.model.linears(index)}
    for name, parameter in block.named_parameters():
        if name not in quantized:
            parameter.copy_(parameter.to(context.store_dtype))


def write_outside_blocks(context: RunContext, writer: CheckpointWriter) -> None:
    """Write what belongs to no block."""
    model = context.model
    names = [(stored, stored) for stored in model.float_tensors(None)]
    head = _repeated_head(context)
    if head is not None:
        names.append(head)
    for name, of in names:
        tensor = model.store.read(of)
        stored = _as_stored(context, name, tensor)
        writer.add(name, stored, fixed=stored is tensor)  # a cast one takes memory, a mapped one does not


def _as_stored(context: RunContext, name: str, tensor: Tensor) -> Tensor:
    """A tensor in the dtype of the file. Raises FinalError where float16 cannot hold it."""
    if not tensor.is_floating_point() or tensor.dtype == context.store_dtype:
        return tensor
    cast = tensor.to(context.store_dtype)
    if bool(torch.isfinite(tensor).all()) and not bool(torch.isfinite(cast).all()):
        raise FinalError(f"{name} does not fit float16: convert the model to BF16 first")
    return cast


def quantization_settings(context: RunContext) -> dict[str, Any]:
    """The checkpoint's `quantization_config`."""
    return context.format.quantization_config(
        context.scheme,
        dynamic_groups=context.dynamic_groups,
        damping=context.solver.damping,
        float_modules=["lm_head"],
    )


def config_json(context: RunContext) -> dict[str, Any]:
    """The source's config with what was done to it."""
    raw = published_config(context.model.raw_config, context.model.directory)
    raw["dtype" if "dtype" in raw else "torch_dtype"] = str(context.store_dtype).removeprefix("torch.")
    raw["quantization_config"] = quantization_settings(context)
    return raw
