"""One block, from its weights on disk to its integers at the writer: the steps, each by name."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing, suppress
from functools import partial

import torch
from torch import Tensor, nn

from llm_quantize.blockwise import tuning
from llm_quantize.blockwise.block_check import check_block
from llm_quantize.blockwise.block_solution import (
    STACKED_WEIGHTS,
    BlockProblem,
    Hessians,
    SolvedLinear,
    solve_block,
)
from llm_quantize.blockwise.channel_scaling import BlockScaling
from llm_quantize.blockwise.export import round_float_parameters, write_float_tensors, write_linear
from llm_quantize.blockwise.reference import ReferenceBlock
from llm_quantize.blockwise.run_context import ExecutionPlan, RunContext
from llm_quantize.checkpoint.writer import CheckpointWriter
from llm_quantize.console import Blocks
from llm_quantize.errors import InputError
from llm_quantize.kernels.streams import StreamPool
from llm_quantize.model import block_forward
from llm_quantize.model.awq_mappings import AWQMapping, exact_mappings, find_mappings, no_mapping
from llm_quantize.model.block_forward import BlockKwargs, capture_inputs, distinct_inputs, linear_at
from llm_quantize.model.states import States
from llm_quantize.model.suspended_forward import SuspendedForwards, resume_together, suspension_budget
from llm_quantize.solver.hessian import HessianAccumulator

# Matrices that a linear's solution holds at most: of the Hessian's size beside it, and of the weight's.
FACTOR_MATRICES, ROUNDING_MATRICES = 2, 8


class BlockWork:
    """The work on one block. `quantize` leaves the states as they are, and returns what takes them on.

    states: of the quantized model. reference: of the reference model, of the first windows; None without. kwargs: the
    block's other arguments. first: no block was worked on before in this run.
    """

    def __init__(
        self,
        context: RunContext,
        plan: ExecutionPlan,
        index: int,
        states: States,
        reference: States | None,
        kwargs: BlockKwargs,
        progress: Blocks,
        *,
        first: bool = False,
    ) -> None:
        self._context, self._plan, self._index, self._first = context, plan, index, first
        self._states, self._kwargs, self._progress = states, kwargs, progress
        self._reference_states = reference
        self._name, self._block = context.model.blocks[index], context.model.modules[index]
        self._stage = context.times.stage
        self._groups: list[list[str]] = []

    def quantize(self, writer: CheckpointWriter) -> SuspendedForwards | ReferenceBlock:
        """Quantize the block and hand everything of it to the writer.

        The result takes the states on, and is the caller's to close. Raises InputError for an architecture that is not
        supported, WorkError for what fails.
        """
        context = self._context
        self._load()
        if self._first:
            check_block(self._block, self._states, self._kwargs)
        self._find_inputs()
        budget = self._suspension_budget()
        reference = self._start_reference(budget)
        round_float_parameters(context, self._block, self._index)  # the reference has them as they were
        mappings = self._find_mappings() if context.solver.uses_mappings else []
        forwards = reference or SuspendedForwards(
            self._block, self._states, self._kwargs, self._stops, self._plan.batch, budget
        )
        try:
            scaling = BlockScaling(self._block, self._groups, mappings, context.solver, context.store_dtype)
            hessians, streams = self._hessians(forwards, bool(mappings))
            problem = BlockProblem(self._block, self._name, self._groups, hessians, context.solver, scaling)
            self._solve_and_write(problem, reference, streams, writer)
            with self._stage("pass through"):
                changed = scaling.changed_parameters()
                write_float_tensors(context, writer, self._block, self._index, changed)
        except BaseException:
            forwards.close()
            raise
        return forwards

    @property
    def _stops(self) -> list[str]:
        return [paths[0] for paths in self._groups]

    def _load(self) -> None:
        context = self._context
        self._progress.step("load")
        with self._stage("load"):
            context.model.load_block(self._index, context.device.torch, context.compute_dtype)
            context.model.prefetch(self._index + 1, context.device.torch)

    def _find_inputs(self) -> None:
        """Find which linears share an input. Raises InputError for a linear that is never reached."""
        linears = self._context.model.linears(self._index)
        paths = {linear.path for linear in linears}
        self._groups = distinct_inputs(self._block, self._states, self._kwargs, paths)
        reached = {path for group in self._groups for path in group}
        missed = [linear.name for linear in linears if linear.path not in reached]
        if missed:
            raise InputError(
                f"{missed[0]} is never used in the forward pass: this architecture is not supported"
            )

    def _suspension_budget(self) -> float:
        widest = max(linear_at(self._block, path).in_features for path in self._stops)
        largest = max(
            sum(linear_at(self._block, path).weight.numel() for path in paths) for paths in self._groups
        )
        return suspension_budget(self._context.device, widest, min(largest, STACKED_WEIGHTS))

    def _start_reference(self, budget: float) -> ReferenceBlock | None:
        if self._reference_states is None:
            return None
        return ReferenceBlock(
            self._block,
            self._reference_states,
            self._states,
            self._kwargs,
            self._groups,
            self._plan.batch,
            budget,
            partial(self._stage, "capture"),
        )

    def _find_mappings(self) -> list[AWQMapping]:
        """The mappings that hold for what the block computes. Raises InputError where the first block has none."""
        block = self._block
        named = find_mappings(block, self._context.model.config)

        def forward(hidden: Tensor) -> Tensor:
            return block_forward.forward(block, hidden, self._kwargs)

        # What stays as it is takes no scale.
        quantized = {linear.path for linear in self._context.model.linears(self._index)}
        linears = {path for path, module in block.named_modules() if isinstance(module, nn.Linear)}
        named = [m for m in named if not {m.smooth_layer, *m.balance_layers} & (linears - quantized)]
        mappings = exact_mappings(block, named, self._states.get(0, 1), forward)
        if self._index == 0 and not mappings:
            raise no_mapping(block)
        if self._index == 0 and len(mappings) < len(named):
            without = ", ".join(
                path for mapping in named if mapping not in mappings for path in mapping.balance_layers
            )
            self._context.console.warn(
                f"{type(block).__name__}: no channel scales fit {without}; rounded without them"
            )
        return mappings

    def _hessians(
        self, forwards: SuspendedForwards | ReferenceBlock, scaled: bool
    ) -> tuple[Hessians, StreamPool | None]:
        """Where the Hessians come from, and streams on which groups are solved in parallel.

        From one pass through the block as it is, for channel scales, or where the plan is not `in_order`; else from
        suspended passes, one group after another.
        """
        beside_reference = isinstance(forwards, ReferenceBlock)
        if scaled or (not beside_reference and not self._plan.in_order):
            self._progress.step("capture")
            with self._stage("capture"):
                captured = self._capture_all()
            parallel = self._plan.parallel and not beside_reference
            return captured.pop, self._streams() if parallel else None
        return partial(self._capture_in_order, forwards), None

    def _capture_all(self) -> dict[int, Tensor | None]:
        """The Hessians of all groups' inputs by their index, from one pass through the block as it is."""
        sums = [
            HessianAccumulator(linear_at(self._block, path).in_features, self._context.device.torch)
            for path in self._stops
        ]
        capture_inputs(
            self._block,
            self._states,
            self._kwargs,
            self._groups,
            self._plan.batch,
            lambda index, x: sums[index].add(x),
        )
        return {i: self._finished(i, total) for i, total in enumerate(sums)}

    def _capture_in_order(self, forwards: SuspendedForwards | ReferenceBlock, group: int) -> Tensor | None:
        """The Hessian of one group's input, all linears before it rounded."""
        assert isinstance(forwards, SuspendedForwards)
        path = self._stops[group]
        self._progress.step(f"capture {path}")
        with self._stage("capture"):
            total = HessianAccumulator(linear_at(self._block, path).in_features, self._context.device.torch)
            for (reached,) in resume_together((forwards,), group):
                assert reached is not None
                total.add(reached[0])
            return self._finished(group, total)

    def _finished(self, group: int, total: HessianAccumulator) -> Tensor | None:
        if total.finite():
            return total.finish()
        self._context.console.warn(
            f"{self._name}.{self._stops[group]}: its inputs overflow; rounded to nearest"
        )
        return None

    def _streams(self) -> StreamPool | None:
        """One for each group of linears, on a GPU with room for all of them and for what else lies there."""
        device = self._context.device
        if not device.is_gpu:
            return None
        needed = 0
        for paths in self._groups:
            width = linear_at(self._block, paths[0]).in_features
            rows = sum(linear_at(self._block, path).out_features for path in paths)
            needed += 4 * (FACTOR_MATRICES * width**2 + ROUNDING_MATRICES * width * rows)
        if not device.has_room(2 * needed):
            return None
        return StreamPool.create(device.torch, len(self._groups))

    def _solve_and_write(
        self,
        problem: BlockProblem,
        reference: ReferenceBlock | None,
        streams: StreamPool | None,
        writer: CheckpointWriter,
    ) -> None:
        tuned = self._context.solver.preset.tuning_steps and reference is not None and self._plan.tuned
        with self._stage("solve"), closing(solve_block(problem, reference, streams)) as linears:
            ready: Iterable[SolvedLinear] = linears
            if tuned:
                assert reference is not None
                ready = self._tune(list(linears), reference)
            for solved in ready:
                self._progress.step(f"solved {solved.path}")
                with self._stage("pack"):
                    write_linear(self._context, writer, self._index, solved)

    def _tune(self, solved: list[SolvedLinear], reference: ReferenceBlock) -> list[SolvedLinear]:
        """The linears after tuning; as they are where there is no memory for that, and then no later block is tuned."""
        context, length = self._context, self._states.length
        reference.drop()
        heads = int(getattr(context.model.text_config, "num_attention_heads", 1))
        needed = tuning.memory_needed(solved, length, heads)
        if context.device.has_room(needed):
            self._progress.step("tune")
            with self._stage("tune"), suppress(torch.cuda.OutOfMemoryError):
                preset = context.solver.preset
                windows = tuning.windows_used(preset.tuning_steps, length)
                return tuning.tune_block(
                    self._block,
                    solved,
                    context.scheme,
                    preset.tuning_steps,
                    self._states,
                    reference.target(self._name, windows),
                    self._kwargs,
                )
        self._plan.tuned = False
        context.console.warn(
            f"{self._name}: tuning takes about {needed / 2**30:.1f} GiB of {context.device}, which are not there: it "
            "is rounded without, as the blocks after it"
        )
        return solved
