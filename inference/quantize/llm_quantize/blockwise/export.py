"""What a checkpoint holds: the plan of its tensors, those that are copied, config.json and the files beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_quantize.blockwise.block_solution import BlockChanges, Solved
from llm_quantize.blockwise.run_context import RunContext
from llm_quantize.checkpoint.writer import CheckpointWriter
from llm_quantize.errors import FinalError
from llm_quantize.evaluation import model_card
from llm_quantize.formats import packing
from llm_quantize.io.safetensors_files import Planned
from llm_quantize.model.source import Source

OWN = (
    "config.json",
    "quantize_config.json",
    *model_card.OWN,
)  # written anew, whatever the source has of that name


def plan(run: RunContext) -> list[Planned]:
    """Every tensor of the checkpoint, block by block and then the rest."""
    source, config = run.source, run.config
    planned: list[Planned] = []

    def copied(stored: str, name: str | None = None) -> Planned:
        dtype, shape = source.describe(stored)
        return Planned(name or stored, run.store if dtype.is_floating_point else dtype, shape)

    for index in range(len(source.blocks)):
        for linear in source.linears(index):
            tensors = packing.planned(
                config.file_layout,
                linear.out_features,
                linear.in_features,
                config.group_size,
                config.bits,
                scale_dtype=run.store,
                symmetric=config.symmetric,
            )
            prefix = source.stored_name(linear.name)
            planned += [Planned(f"{prefix}.{suffix}", *what) for suffix, what in tensors.items()]
        planned += [copied(stored) for stored in _others(source, index)]
    planned += [copied(stored) for stored in _others(source, None)]
    head = _head_copy(run)
    if head is not None:
        planned.append(copied(head[1], head[0]))
    return planned


def _others(source: Source, index: int | None) -> list[str]:
    """Stored names of what is not quantized: in block `index`, or (None) in no block."""
    prefixes = tuple(source.stored_name(f"{block}.") for block in source.blocks)
    if index is None:
        return sorted(name for name in source.files if not name.startswith(prefixes))
    quantized = {source.stored_name(f"{linear.name}.weight") for linear in source.linears(index)}
    return sorted(n for n in source.files if n.startswith(prefixes[index]) and n not in quantized)


def _head_copy(run: RunContext) -> tuple[str, str] | None:
    """The tied output head's name and tensor, where the file is to hold it twice.

    AutoGPTQ takes what the file does not hold for zero, tied or not; who asks for its layout by name gets a file
    that it can read.
    """
    return run.source.tied_head if run.config.layout == "gptq" else None


def write_linear(run: RunContext, writer: CheckpointWriter, name: str, solved: Solved) -> None:
    """Packs one linear of block `name`, hands it to the writer, and keeps and tells what happened to it."""
    config, prefix = run.config, run.source.stored_name(f"{name}.{solved.path}")
    tensors = packing.pack(
        config.file_layout,
        solved.q,
        solved.grid,
        config.group_size,
        config.bits,
        g_idx=solved.g_idx,
        scale_dtype=run.store,
        symmetric=config.symmetric,
    )
    for suffix, tensor in tensors.items():
        writer.add(f"{prefix}.{suffix}", tensor)
    if len(run.reports) % 7 == 0:  # a sample of layers is unpacked again and compared
        writer.remember(prefix, solved.q, solved.grid.scale, solved.grid.zero)
    report = solved.report
    run.reports.append(report)
    if report.fallback is not None:
        run.console.warn(f"{report.name}: {report.fallback}")
    elif report.damping > run.options.damping:
        run.console.warn(
            f"{report.name}: damping raised to {report.damping:g} before the factorization succeeded"
        )
    if report.dead and report.fallback is None:
        run.console.warn(
            f"{report.name}: {report.dead} of {solved.q.shape[1]} input channels carried nothing; their weights are "
            "rounded to nearest"
        )


def pass_through(
    run: RunContext, writer: CheckpointWriter, block: torch.nn.Module, index: int, changes: BlockChanges
) -> None:
    """Writes what is not quantized in block `index`: as folds changed it, or as it was."""
    source, prefix = run.source, f"{run.source.blocks[index]}."
    changed = {source.stored_name(f"{prefix}{name}"): name for name in changes.names}
    for stored in _others(source, index):
        tensor = block.get_parameter(changed[stored]) if stored in changed else source.read(stored)
        writer.add(stored, _stored(run, stored, tensor), fixed=stored not in changed)


def settle_others(run: RunContext, block: torch.nn.Module, index: int) -> None:
    """Gives what is not quantized in block `index` the digits that the file will hold.

    Before anything is computed with it, so that reading the file back gives the same states.
    """
    quantized = {f"{linear.path}.weight" for linear in run.source.linears(index)}
    for name, parameter in block.named_parameters():
        if name not in quantized:
            parameter.copy_(parameter.to(run.store))


def copy_outside(run: RunContext, writer: CheckpointWriter) -> None:
    """Writes what belongs to no block."""
    names = [(stored, stored) for stored in _others(run.source, None)]
    head = _head_copy(run)
    if head is not None:
        names.append(head)
    for name, of in names:
        tensor = run.source.read(of)
        stored = _stored(run, name, tensor)
        writer.add(name, stored, fixed=stored is tensor)  # a cast one takes memory, a mapped one does not


def _stored(run: RunContext, name: str, tensor: Tensor) -> Tensor:
    """A tensor in the dtype of the file. Errors: `FinalError` where float16 cannot hold it."""
    if not tensor.is_floating_point() or tensor.dtype == run.store:
        return tensor
    cast = tensor.to(run.store)
    if bool(torch.isfinite(tensor).all()) and not bool(torch.isfinite(cast).all()):
        raise FinalError(f"{name} does not fit float16: convert the model to BF16 first")
    return cast


def settings(run: RunContext) -> dict[str, Any]:
    """`quantization_config`; in the `gptq` layout also all of quantize_config.json."""
    config = run.config
    return packing.quantization_config(
        config.file_layout,
        method=config.method,
        bits=config.bits,
        group_size=config.group_size,
        symmetric=config.symmetric,
        desc_act=config.dynamic_groups,
        damp_percent=run.options.damping,
        not_converted=["lm_head"],
    )


def config_json(run: RunContext) -> dict[str, Any]:
    """The source's config with what was done to it."""
    raw = run.source.published_config()
    raw["dtype" if "dtype" in raw else "torch_dtype"] = str(run.store).removeprefix("torch.")
    raw["quantization_config"] = settings(run)
    return raw


def side_files(run: RunContext) -> list[Path]:
    """What is copied of the source as it is."""
    return [path for path in run.source.side_files() if path.name not in OWN]
