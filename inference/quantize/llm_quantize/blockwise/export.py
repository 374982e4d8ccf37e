"""What a published checkpoint holds: the plan of its tensors, those that are copied, and config.json."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from llm_quantize.blockwise.block_solution import SolvedLinear
from llm_quantize.blockwise.run_context import RunContext
from llm_quantize.checkpoint.writer import CheckpointWriter
from llm_quantize.errors import FinalError, InputError
from llm_quantize.formats.base import ModuleNames
from llm_quantize.io.safetensors_files import PlannedTensor
from llm_quantize.model.config_file import published_config
from llm_quantize.model.source import SourceModel
from llm_quantize.serving.float_in_transformers import FloatInTransformers
from llm_quantize.serving.float_modules import LINEAR, FloatModules

_HEADER_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
SAMPLED_EVERY = 7  # one of so many layers is unpacked again and compared


def planned_tensors(context: RunContext) -> list[PlannedTensor]:
    """Every tensor of the checkpoint, block by block and then the rest."""
    model = context.model
    planned: list[PlannedTensor] = []

    def copied(stored: str, name: str | None = None) -> PlannedTensor:
        dtype, shape = model.store.describe(stored)
        return PlannedTensor(name or stored, context.published_dtype(dtype), shape)

    for index in range(len(model.blocks)):
        for linear in model.linears(index):
            tensors = context.format.plan(
                linear.out_features, linear.in_features, context.scheme, context.store_dtype
            )
            prefix = model.stored_linear(linear.name)
            planned += [PlannedTensor(f"{prefix}.{suffix}", *what) for suffix, what in tensors.items()]
        planned += [copied(stored) for stored in model.float_tensors(index)]
    planned += [copied(stored) for stored in model.float_tensors(None)]
    head = _repeated_head(context)
    if head is not None:
        planned.append(copied(head[1], head[0]))
    return planned


def _repeated_head(context: RunContext) -> tuple[str, str] | None:
    """The tied output head's name and tensor, where the file is to hold it twice."""
    return context.model.tied_head if context.repeat_tied_head else None


def write_linear(context: RunContext, writer: CheckpointWriter, index: int, solved: SolvedLinear) -> None:
    """Pack one linear of block `index`, hand it to the writer, and report what happened to it."""
    model = context.model
    prefix = model.stored_linear(f"{model.blocks[index]}.{solved.path}")
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
    names = {model.weights.stored_name(f"{prefix}{name}"): name for name in changed}
    for stored in model.float_tensors(index):
        if stored in names:  # it has the dtype of the computation
            dtype = context.published_dtype(model.store.dtype(stored))
            writer.add(stored, _cast(stored, block.get_parameter(names[stored]), dtype))
        else:
            writer.add(stored, _as_stored(context, stored, model.store.read(stored)), fixed=True)


def round_float_parameters(context: RunContext, block: torch.nn.Module, index: int) -> None:
    """Round what is not quantized in block `index` to the dtype in which it is stored.

    Before anything is computed with it, so that reading the file back gives the same states.
    """
    model = context.model
    quantized = {f"{linear.path}.weight" for linear in model.linears(index)}
    for name, parameter in block.named_parameters():
        if name not in quantized:
            sources = model.weights.sources(f"{model.blocks[index]}.{name}")
            for dtype in {context.published_dtype(model.store.dtype(stored)) for stored in sources}:
                parameter.copy_(parameter.to(dtype))


def write_outside_blocks(context: RunContext, writer: CheckpointWriter) -> None:
    """Write what belongs to no block."""
    model = context.model
    names = [(stored, stored) for stored in model.float_tensors(None)]
    head = _repeated_head(context)
    if head is not None:
        names.append(head)
    for name, of in names:
        tensor = model.store.read(of)
        _check_finite(of, tensor)
        stored = _as_stored(context, name, tensor)
        writer.add(name, stored, fixed=stored is tensor)  # a cast one takes memory, a mapped one does not


def _as_stored(context: RunContext, name: str, tensor: Tensor) -> Tensor:
    """A tensor in the dtype of the file. Raises FinalError where float16 cannot hold it."""
    return _cast(name, tensor, context.published_dtype(tensor.dtype))


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in `dtype`. Raises FinalError where float16 cannot hold it."""
    if tensor.dtype == dtype:
        return tensor
    cast = tensor.to(dtype)
    if dtype == torch.float16 and bool(torch.isfinite(tensor).all()) and not bool(torch.isfinite(cast).all()):
        raise FinalError(f"{name} does not fit float16: convert the model to BF16 first")
    return cast


def _check_finite(name: str, tensor: Tensor) -> None:
    """Raise FinalError for NaN and infinity: what the last reading of the files would refuse is refused at once."""
    if (
        tensor.is_floating_point()
        and tensor.numel()
        and not all(map(math.isfinite, map(float, tensor.aminmax())))
    ):
        raise FinalError(f"{name} has NaN or infinite weights: the source model is broken")


def quantization_settings(context: RunContext) -> dict[str, Any]:
    """The checkpoint's `quantization_config`."""
    return context.format.quantization_config(
        context.scheme,
        dynamic_groups=context.dynamic_groups,
        damping=context.solver.damping,
        modules=_module_names(context.model),
    )


def _module_names(model: SourceModel) -> ModuleNames:
    names = [model.stored_linear(linear.name) for linear in model.all_linears()]
    blocks = model.stored_blocks
    paths = dict.fromkeys(name.removeprefix(f"{blocks}.").partition(".")[2] for name in names)
    return ModuleNames(tuple(model.float_modules()), model.head, blocks, tuple(paths))


def check_settings(context: RunContext, planned: list[PlannedTensor]) -> None:
    """Refuse a model whose float linears the format cannot tell apart. Raises InputError naming one.

    Readers build each linear with integers or floats by the settings' own rule, before they read a tensor.
    """
    settings = quantization_settings(context)
    dtypes = {tensor.name: _HEADER_NAMES.get(tensor.dtype, "I32") for tensor in planned}
    rules = (FloatModules(settings, dtypes).is_float, FloatInTransformers(settings).is_float)
    model = context.model
    names = [model.stored_linear(linear.name) for linear in model.all_linears()]
    wanted = dict.fromkeys(names, False) | dict.fromkeys(model.float_modules(), True)
    for name, floating in wanted.items():
        if any(rule(name, LINEAR) is not floating for rule in rules):
            raise InputError(
                f"the {context.format.name} format cannot say that {name} is {'not ' * (not floating)}float beside the "
                "other linears: use --format compressed-tensors"
            )


def config_json(context: RunContext) -> dict[str, Any]:
    """The source's config with what was done to it."""
    raw = published_config(context.model.raw_config, context.model.directory)
    raw["dtype" if "dtype" in raw else "torch_dtype"] = str(context.store_dtype).removeprefix("torch.")
    raw["quantization_config"] = quantization_settings(context)
    if context.model.untied_head is not None:
        # Readers that tie it all the same would take the embedding for the head.
        for part in (raw, raw.get("text_config")):
            if isinstance(part, dict) and (part is raw or "tie_word_embeddings" in part):
                part["tie_word_embeddings"] = False
    return raw
