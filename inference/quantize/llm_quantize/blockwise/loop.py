"""The only loop over blocks: from calibration tokens to everything of the checkpoint handed to its writer."""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from llm_quantize.blockwise import tuning
from llm_quantize.blockwise.block_solution import (
    STACK,
    BlockChanges,
    Hessians,
    LayerReport,
    Solved,
    solve_block,
)
from llm_quantize.blockwise.export import copy_outside, pass_through, settle_others, write_linear
from llm_quantize.blockwise.reference import ReferenceBlock
from llm_quantize.blockwise.resume import KeptStates
from llm_quantize.blockwise.run_context import RunContext
from llm_quantize.calibration.windows import Windows
from llm_quantize.checkpoint.writer import CheckpointWriter
from llm_quantize.console import Blocks
from llm_quantize.errors import WorkError
from llm_quantize.evaluation.perplexity import QuantizedSource
from llm_quantize.kernels.streams import StreamPool
from llm_quantize.model import block_forward, suspended_forward
from llm_quantize.model.awq_mappings import AWQMapping, exact_mappings, find_mappings, unknown
from llm_quantize.model.block_forward import linear_at
from llm_quantize.model.source import Source
from llm_quantize.model.suspended_forward import SuspendedForwards, resume_together
from llm_quantize.solver.hessian import HessianAccumulator

# Matrices that a linear's solution holds at most: of the second moment's size beside it, and of the weight's.
FACTOR, ROUNDING = 2, 8


@dataclass(slots=True)
class ExecutionPlan:
    """How a run goes, which resuming it must not change, since the last bits depend on it.

    batch: as large as the run began with; home: where the states live; in_order: each linear of a block is rounded for
    what those before it, rounded, make of its inputs, by passes that halt. That takes the states again for every input,
    which is slow where they come from the host: there all inputs are taken at once, of the block as it was.

    side_by_side: linears with different inputs are rounded at the same time where there is room; tuned: blocks are
    tuned where the effort has it and there is room; these may change.
    """

    batch: block_forward.MicroBatch
    storage: torch.device
    in_order: bool
    side_by_side: bool = True
    tuned: bool = True


def quantize_blocks(
    run: RunContext, windows: Windows, writer: CheckpointWriter, kept: KeptStates, execution: ExecutionPlan
) -> None:
    """Quantizes every block that the writer's journal does not list, one step each. What belongs to no block goes with
    the first one: it may be large, and is written while the others are worked on.

    Errors: `InputError` for an architecture that is not supported, `WorkError` for what fails.
    """
    source, device, batch = run.source, run.device, execution.batch
    done = len(writer.steps)
    for step in writer.steps:
        run.reports += [LayerReport(**report) for report in step["reports"]]
    with run.console.blocks(len(source.blocks)) as progress:
        if done < len(source.blocks):
            source.prefetch(done, device)
            with run.stage("embed"):
                reference_windows = run.options.effort.reference_windows(*windows.tokens.shape)
                loading = partial(run.stage, "load")
                tokens, storage = windows.tokens, execution.storage
                states, calls = block_forward.embed(source, tokens, storage, device, run.compute, loading)
                reference = block_forward.copied(states, reference_windows) if reference_windows else None
        if done:
            run.console.note(f"going on after {done} of {len(source.blocks)} blocks that an earlier run did")
            if done < len(source.blocks):
                progress.step("replay of what is done")
                with run.stage("replay of what is done"):
                    _catch_up(run, writer, kept, states, reference, calls, batch)
            progress.skip(done)
        for index in range(done, len(source.blocks)):
            while True:
                reported = len(run.reports)
                try:
                    if index == 0:
                        with run.stage("pass through"):
                            copy_outside(run, writer)
                    kwargs = calls.kwargs[index]
                    onward = _block(run, index, writer, states, reference, kwargs, execution, progress)
                    break
                except torch.cuda.OutOfMemoryError as error:
                    told = str(error)
                # Outside of the handler, which would keep what the failed attempt held.
                source.release(source.modules[index])
                writer.forget()
                del run.reports[reported:]
                execution.side_by_side = False
                streams = [states] if reference is None else [states, reference]
                _relieve(run, source.blocks[index], streams, batch, told)
            with onward:
                if index + 1 < len(source.blocks):
                    progress.step("replay")
                    with run.stage("replay"):
                        kept.wait()
                        onward.advance(source.blocks[index])
            del onward
            source.release(source.modules[index])
            writer.commit({"reports": [asdict(r) for r in run.reports[reported:]], "windows": batch.windows})
            if index + 1 < len(source.blocks):
                kept.offer(states, index + 1)
            progress.advance()


def _block(
    run: RunContext,
    index: int,
    writer: CheckpointWriter,
    states: block_forward.States,
    reference: block_forward.States | None,
    kwargs: dict[str, Any],
    execution: ExecutionPlan,
    progress: Blocks,
) -> SuspendedForwards | ReferenceBlock:
    """Quantizes one block and hands everything of it to the writer; the states stay as they are.

    reference: the source's own states of the first windows, where they are followed. The result takes the states on;
    it is the caller's to close.
    """
    source, name, block = run.source, run.source.blocks[index], run.source.modules[index]
    batch = execution.batch
    progress.step("load")
    with run.stage("load"):
        source.load(block, name, run.device, run.compute)
        source.prefetch(index + 1, run.device)
    groups = block_forward.distinct_inputs(block, states, kwargs)
    _all_reached(source, index, groups)
    stops = [paths[0] for paths in groups]
    widest = max(linear_at(block, path).in_features for path in stops)
    largest = max(sum(linear_at(block, path).weight.numel() for path in paths) for paths in groups)
    suspension_budget = suspended_forward.suspension_budget(
        run.device, run.config.max_memory, widest, min(largest, STACK)
    )
    reference_block = None
    if reference is not None:
        within = partial(run.stage, "capture")
        reference_block = ReferenceBlock(
            block, reference, states, kwargs, groups, batch, suspension_budget, within
        )
    settle_others(run, block, index)  # the follower has them as they were
    mappings = _folds(run, index, states, kwargs) if run.config.method == "awq" else []
    onward = reference_block or SuspendedForwards(block, states, kwargs, stops, batch, suspension_budget)

    def in_order(group: int) -> Tensor | None:
        """The moment of one group's input, all before it rounded."""
        assert isinstance(onward, SuspendedForwards)
        progress.step(f"capture {stops[group]}")
        with run.stage("capture"):
            total = HessianAccumulator(linear_at(block, stops[group]).in_features, run.device)
            for (reached,) in resume_together((onward,), group):
                assert reached is not None
                total.add(reached[0])
            return _finished(run, f"{name}.{stops[group]}", total)

    hessians: Hessians = in_order
    streams = None
    try:
        if mappings or (reference_block is None and not execution.in_order):
            progress.step("capture")
            with run.stage("capture"):
                hessians = _at_once(run, block, name, states, kwargs, groups, batch).pop
            if execution.side_by_side and reference_block is None:
                streams = _lanes(run, block, groups)
        changes = BlockChanges()
        args = (block, name, groups, hessians, mappings, run.options, changes, reference_block, streams)
        with run.stage("solve"), closing(solve_block(*args)) as linears:
            ready: Iterable[Solved] = linears
            if run.options.effort.tune and reference_block is not None and execution.tuned:
                ready = _tuned(
                    run, index, list(linears), reference_block, states, kwargs, execution, progress
                )
            for solved in ready:
                progress.step(f"solved {solved.path}")
                with run.stage("pack"):
                    write_linear(run, writer, name, solved)
        with run.stage("pass through"):
            pass_through(run, writer, block, index, changes)
    except BaseException:
        onward.close()
        raise
    return onward


def _tuned(
    run: RunContext,
    index: int,
    solved: list[Solved],
    reference_block: ReferenceBlock,
    states: block_forward.States,
    kwargs: dict[str, Any],
    execution: ExecutionPlan,
    progress: Blocks,
) -> list[Solved]:
    """The linears of block `index` after tuning; as they are where there is no memory for that, and then no other
    block is tuned either."""
    block, name = run.source.modules[index], run.source.blocks[index]
    reference_block.drop()
    heads = int(getattr(run.source.config.get_text_config(), "num_attention_heads", 1))
    needed = tuning.memory(solved, states.length, heads)
    if _fits(run, needed):
        progress.step("tune")
        with run.stage("tune"), suppress(torch.cuda.OutOfMemoryError):
            windows = tuning.windows_used(run.options.effort.tune, states.length)
            goal = reference_block.goal(name, windows)
            return tuning.tune_block(block, solved, run.options, states, goal, kwargs)
    execution.tuned = False
    run.console.warn(
        f"{name}: tuning takes about {needed / 2**30:.1f} GiB of {run.device}, which are not there: it is rounded "
        "without, as the blocks after it"
    )
    return solved


def _fits(run: RunContext, needed: int) -> bool:
    return run.device.type != "cuda" or needed < block_forward.free_memory(run.device, run.config.max_memory)


def _relieve(
    run: RunContext,
    name: str,
    streams: list[block_forward.States],
    batch: block_forward.MicroBatch,
    told: str,
) -> None:
    """After memory ran out in a block: gives up what can be done without, for another attempt.

    Errors: `WorkError` where nothing is left, saying how much would have been needed; `told`: PyTorch's words.
    """
    moved = sum(states.to_host() for states in streams) > 0
    if moved or batch.halve():
        torch.cuda.empty_cache()
        how = "the states in host memory" if moved else f"{batch.windows} windows at a time"
        run.console.warn(f"{name}: out of memory on {run.device}, tried again with {how}")
        return
    match = re.search(r"allocate ([\d.]+) ([KMG])iB", told)
    more = f" ({match[1]} {match[2]}iB more were asked for)" if match else ""
    raise WorkError(
        f"out of memory on {run.device} in {name}{more}, with one window at a time and the states in host memory: "
        "free the GPU, raise --max_memory, lower --calib_seq_len, or take --device cpu"
    )


def _catch_up(
    run: RunContext,
    writer: CheckpointWriter,
    kept: KeptStates,
    states: block_forward.States,
    reference: block_forward.States | None,
    calls: block_forward.BlockKwargs,
    batch: block_forward.MicroBatch,
) -> None:
    """Brings the states to where the first block that is not done takes them, through those in the files; and the
    source's own, where they are followed, through the source's blocks.

    In the same micro-batches as then: their size can change the last bits of a product.
    """
    done = len(writer.steps)
    if reference is not None:
        for index in range(done):
            batch.windows = writer.steps[index]["windows"]
            name, block = run.source.blocks[index], run.source.modules[index]
            run.source.load(block, name, run.device, run.compute)
            block_forward.replay(block, name, reference, calls.kwargs[index], batch)
            run.source.release(block)
    start = kept.restore(states, done)
    if start < done:
        quantized = QuantizedSource(run.source, writer.directory)
        for index in range(start, done):
            batch.windows = writer.steps[index]["windows"]
            name, block = run.source.blocks[index], quantized.modules[index]
            quantized.load(block, name, run.device, run.compute)
            block_forward.replay(block, name, states, calls.kwargs[index], batch)
            quantized.release(block)
    batch.windows = writer.steps[-1]["windows"]


def choose_storage(run: RunContext, tokens: Tensor) -> torch.device:
    """Where the states live, and those of the source that are followed: on the device if they take at most a third of
    what is free, else in host memory."""
    if run.device.type == "cpu":
        return run.device
    width = run.source.skeleton.get_input_embeddings().weight.shape[1]
    windows, length = tokens.shape
    reference_windows = run.options.effort.reference_windows(windows, length)
    needed = (windows + reference_windows) * length * width * run.compute.itemsize
    free = block_forward.free_memory(run.device, run.config.max_memory)
    return run.device if needed < free / 3 else torch.device("cpu")


def _all_reached(source: Source, index: int, groups: list[list[str]]) -> None:
    reached = {path for group in groups for path in group}
    missed = [linear.name for linear in source.linears(index) if linear.path not in reached]
    if missed:
        raise WorkError(f"{missed[0]} is never used in the forward pass: this architecture is not supported")


def _folds(
    run: RunContext, index: int, states: block_forward.States, kwargs: dict[str, Any]
) -> list[AWQMapping]:
    """The folds of block `index` that hold for what it computes. Errors: `InputError` where the first has none."""
    block = run.source.modules[index]
    named = find_mappings(block, run.source.config)
    mappings = exact_mappings(
        block, named, states.get(0, 1), lambda hidden: block_forward.forward(block, hidden, kwargs)
    )
    if index == 0 and not mappings:
        raise unknown(block)
    if index == 0 and len(mappings) < len(named):
        without = ", ".join(t for mapping in named if mapping not in mappings for t in mapping.targets)
        run.console.warn(f"{type(block).__name__}: no channel scales fit {without}; rounded without them")
    return mappings


def _at_once(
    run: RunContext,
    block: torch.nn.Module,
    name: str,
    states: block_forward.States,
    kwargs: dict[str, Any],
    groups: list[list[str]],
    batch: block_forward.MicroBatch,
) -> dict[int, Tensor | None]:
    """The moments of all groups' inputs by their numbers, from one pass through the block as it is."""
    sums = [HessianAccumulator(linear_at(block, paths[0]).in_features, run.device) for paths in groups]
    block_forward.capture(block, states, kwargs, groups, batch, lambda index, x: sums[index].add(x))
    return {i: _finished(run, f"{name}.{groups[i][0]}", total) for i, total in enumerate(sums)}


def _lanes(run: RunContext, block: torch.nn.Module, groups: list[list[str]]) -> StreamPool | None:
    """One for each group of linears, on a GPU with room for all of them and for what else lies there."""
    if run.device.type != "cuda":
        return None
    needed = 0
    for paths in groups:
        width = linear_at(block, paths[0]).in_features
        needed += 4 * (
            FACTOR * width**2 + ROUNDING * width * sum(linear_at(block, p).out_features for p in paths)
        )
    free = block_forward.free_memory(run.device, run.config.max_memory)
    return StreamPool.on(run.device, len(groups)) if 2 * needed < free else None


def _finished(run: RunContext, name: str, total: HessianAccumulator) -> Tensor | None:
    if total.finite():
        return total.finish()
    run.console.warn(f"{name}: its inputs overflow; rounded to nearest")
    return None
