"""The only loop over blocks: from calibration tokens to everything of the checkpoint handed to its writer."""

from __future__ import annotations

import re
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor

from llm_quantize.blockwise.block import BlockWork
from llm_quantize.blockwise.block_check import check_other_kinds
from llm_quantize.blockwise.export import write_outside_blocks
from llm_quantize.blockwise.layer_report import LayerReport
from llm_quantize.blockwise.run_context import ExecutionPlan, RunContext
from llm_quantize.checkpoint.reader import open_quantized
from llm_quantize.checkpoint.writer import CheckpointWriter
from llm_quantize.errors import WorkError
from llm_quantize.model.block_forward import BlockKwargs, MicroBatch, replay
from llm_quantize.model.model_forward import embed
from llm_quantize.model.states import States


def quantize_blocks(
    context: RunContext, tokens: Tensor, writer: CheckpointWriter, plan: ExecutionPlan
) -> None:
    """Quantize every block that the writer's journal does not list, one step each.

    tokens: int64 (windows, length), of the calibration text. What belongs to no block goes with the first one: it may
    be large, and is written while the others are worked on. Raises InputError for an architecture that is not
    supported, WorkError for what fails.
    """
    model, batch = context.model, plan.batch
    blocks, done = len(model.blocks), len(writer.steps)
    for step in writer.steps:
        context.reports += [LayerReport(**report) for report in step["reports"]]
    with context.console.blocks(blocks) as progress:
        if done == blocks:
            _note_resumed(context, done)
            progress.skip(done)
            return
        states, reference, kwargs = _embed(context, tokens, plan, done)
        if done:
            _note_resumed(context, done)
            progress.step("replay of what is done")
            with context.times.stage("replay of what is done"):
                _replay_done(context, writer, states, reference, kwargs, batch)
            progress.skip(done)
        check_other_kinds(context, states, kwargs, done)
        for index in range(done, blocks):
            reported = len(context.reports)
            while True:
                work = BlockWork(
                    context, plan, index, states, reference, kwargs[index], progress, first=index == done
                )
                try:
                    if index == 0:
                        with context.times.stage("pass through"):
                            write_outside_blocks(context, writer)
                    forwards = work.quantize(writer)
                    break
                except torch.cuda.OutOfMemoryError as error:
                    said = str(error)
                # Outside of the handler, which would keep what the failed attempt held.
                del work
                model.release(model.modules[index])
                writer.forget()
                del context.reports[reported:]
                plan.parallel = False
                streams = [states] if reference is None else [states, reference]
                _relieve_memory(context, model.blocks[index], streams, batch, said)
            with forwards:
                if index + 1 < blocks:
                    progress.step("replay")
                    with context.times.stage("replay"):
                        forwards.finish(model.blocks[index])
            del forwards, work
            model.release(model.modules[index])
            reports = [asdict(report) for report in context.reports[reported:]]
            writer.commit({"reports": reports, "windows": batch.windows})
            progress.advance()


def _note_resumed(context: RunContext, done: int) -> None:
    if done:
        context.console.note(
            f"going on after {done} of {len(context.model.blocks)} blocks that an earlier run did"
        )


def _embed(
    context: RunContext, tokens: Tensor, plan: ExecutionPlan, done: int
) -> tuple[States, States | None, list[BlockKwargs]]:
    """The states that enter block 0, the reference model's (None without), and each block's other arguments."""
    device = context.device.torch
    context.model.prefetch(done, device)
    with context.times.stage("embed"):
        windows = context.solver.preset.reference_windows(*tokens.shape)
        loading = partial(context.times.stage, "load")
        states, kwargs = embed(context.model, tokens, plan.storage, device, context.compute_dtype, loading)
        return states, states.copy(windows) if windows else None, kwargs


def _relieve_memory(
    context: RunContext, name: str, streams: list[States], batch: MicroBatch, said: str
) -> None:
    """After memory ran out in a block, give up what can be done without, for another attempt.

    said: PyTorch's words. Raises WorkError where nothing is left, saying how much would have been needed.
    """
    moved = sum(states.to_host() for states in streams) > 0
    if moved or batch.halve():
        torch.cuda.empty_cache()
        how = "the states in host memory" if moved else f"{batch.windows} windows at a time"
        context.console.warn(f"{name}: out of memory on {context.device}, tried again with {how}")
        return
    match = re.search(r"allocate ([\d.]+) ([KMG])iB", said)
    more = f" ({match[1]} {match[2]}iB more were asked for)" if match else ""
    raise WorkError(
        f"out of memory on {context.device} in {name}{more}, with one window at a time and the states in host memory: "
        "free the GPU, raise --max_memory, lower --calib_seq_len, or take --device cpu"
    )


def _replay_done(
    context: RunContext,
    writer: CheckpointWriter,
    states: States,
    reference: States | None,
    kwargs: list[BlockKwargs],
    batch: MicroBatch,
) -> None:
    """Bring the states through the blocks that are done, and the reference model's through the source's blocks.

    In the same micro-batches as then: their size can change the last bits of a product.
    """
    models = [(open_quantized(context.model, writer.directory), states)]
    if reference is not None:
        models.insert(0, (context.model, reference))
    for model, entered in models:
        for index, step in enumerate(writer.steps):
            batch.windows = step["windows"]
            block = model.load_block(index, context.device.torch, context.compute_dtype)
            replay(block, model.blocks[index], entered, kwargs[index], batch)
            model.release(block)
    batch.windows = writer.steps[-1]["windows"]
