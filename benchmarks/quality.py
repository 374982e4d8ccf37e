"""Ablation: what each part of the method is worth, as KL divergence on held-out text.

python benchmarks/quality.py MODEL --calib FILE --heldout FILE [FILE ...] [--samples 128 --seq_len 1024]
    [--bits 4 3 2] [--only NAME ...] [--json OUT]

Everything stays in memory and only the rounding changes between rows; the same windows and the same judge for all.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "inference" / "quantize"))

from llm_quantize.blockwise import block_solution, tuning
from llm_quantize.blockwise.block_solution import BlockProblem, solve_block
from llm_quantize.blockwise.channel_scaling import BlockScaling
from llm_quantize.blockwise.reference import ReferenceBlock
from llm_quantize.calibration.windows import CalibrationConfig, load_windows
from llm_quantize.device import Device
from llm_quantize.model.awq_mappings import find_mappings
from llm_quantize.model.block_forward import MicroBatch, capture_inputs, distinct_inputs, linear_at
from llm_quantize.model.model_forward import embed
from llm_quantize.model.source import SourceModel
from llm_quantize.model.suspended_forward import SuspendedForwards, resume_together
from llm_quantize.solver import problem
from llm_quantize.solver.awq import AWQSolver
from llm_quantize.solver.base import Solver
from llm_quantize.solver.gptq import GPTQSolver
from llm_quantize.solver.hessian import HessianAccumulator
from llm_quantize.solver.qparams import QParams, ScaleSearch, minmax_qparams, round_to_nearest
from llm_quantize.solver.quality import PRESETS, QualityPreset
from llm_quantize.types import QuantScheme

BUDGET = 8e9  # bytes of suspended passes
SEARCHED = QualityPreset(ScaleSearch(24, 2), sweeps=0, refit=False)
DEFAULT, BEST = PRESETS["default"], PRESETS["best"]
REFERENCE = replace(DEFAULT, reference_share=1.0)


@dataclass(frozen=True, slots=True)
class Variant:
    """One row: which method, which settings.

    minmax: no search of scales. nearest: no compensation. at_once: Hessians of the block as it is, not in order.
    """

    name: str
    awq: bool
    symmetric: bool
    preset: QualityPreset
    act_order: bool = True
    damping: float = 0.1
    minmax: bool = False
    nearest: bool = False
    target_share: float = block_solution.TARGET_SHARE
    at_once: bool = False

    def solver(self, bits: int, group_size: int) -> Solver:
        """The solver of this row."""
        scheme = QuantScheme(bits, group_size, self.symmetric)
        if self.awq:
            return AWQSolver(scheme, self.preset, self.damping)
        return GPTQSolver(scheme, self.preset, self.damping, self.act_order)


def variants() -> list[Variant]:
    """The table's rows, from plain to all of it."""
    rows = []
    for symmetric, word in ((True, "symmetric"), (False, "asymmetric")):

        def gptq(
            name: str, preset: QualityPreset, symmetric: bool = symmetric, word: str = word, **more: Any
        ) -> Variant:
            return Variant(f"{name}, {word}", False, symmetric, preset, **more)

        rows += [
            gptq("nearest, min-max", SEARCHED, minmax=True, nearest=True),
            gptq("nearest, searched", SEARCHED, nearest=True),
            gptq("GPTQ, min-max", SEARCHED, minmax=True),
            gptq("GPTQ, searched", SEARCHED),
            gptq("GPTQ + 2 sweeps", replace(DEFAULT, refit=False)),
            gptq("GPTQ default", DEFAULT),
            gptq("GPTQ default, not in order", DEFAULT, at_once=True),
            gptq("GPTQ default, no act order", DEFAULT, act_order=False),
            gptq("GPTQ default, damping 0.01", DEFAULT, damping=0.01),
            gptq("GPTQ default, damping 0.03", DEFAULT, damping=0.03),
            gptq("GPTQ default, damping 0.3", DEFAULT, damping=0.3),
            gptq(
                "GPTQ with the search and sweeps of best", replace(BEST, reference_share=0.0, tuning_steps=0)
            ),
            gptq("GPTQ default, reference at 0.5", REFERENCE, target_share=0.5),
            gptq("GPTQ default, reference", REFERENCE),
            gptq("GPTQ default, reference at 1", REFERENCE, target_share=1.0),
            gptq("GPTQ default, reference, damping 0.03", REFERENCE, damping=0.03),
            gptq("GPTQ default, reference, damping 0.01", REFERENCE, damping=0.01),
            gptq("GPTQ best, not tuned", replace(BEST, tuning_steps=0)),
            gptq("GPTQ best, tuned", BEST),
        ]
    presets = {"default": DEFAULT, "default, reference": REFERENCE}
    presets |= {"best, not tuned": replace(BEST, tuning_steps=0), "best, tuned": BEST}
    for name, preset in presets.items():
        rows.append(Variant(f"AWQ {name}, asymmetric", True, False, preset, damping=0.05))
    rows.append(Variant("AWQ default, damping 0.1, asymmetric", True, False, DEFAULT))
    return rows


@contextmanager
def patched(variant: Variant) -> Iterator[None]:
    """Switches off what the variant is to do without."""
    before = problem.search_qparams, problem.compensate, block_solution.TARGET_SHARE

    def plain(W: Tensor, M: Tensor, scheme: QuantScheme, search: ScaleSearch) -> QParams:
        return minmax_qparams(W, scheme)

    def nearest(W: Tensor, qparams: QParams, scheme: QuantScheme, factor: object) -> Tensor:
        return round_to_nearest(W, qparams, scheme)

    changes: Any = problem
    if variant.minmax:
        changes.search_qparams = plain
    if variant.nearest:
        changes.compensate = nearest
    block_solution.TARGET_SHARE = variant.target_share
    try:
        yield
    finally:
        changes.search_qparams, changes.compensate, block_solution.TARGET_SHARE = before


def run(
    variant: Variant, bits: int, group_size: int, directory: Path, windows: Tensor, device: Device
) -> dict[str, Tensor]:
    """De-quantized block weights and changed norms by parameter name."""
    model, place = SourceModel.open(directory), device.torch
    states, all_kwargs = embed(model, windows, place, place, torch.float32)
    batch = MicroBatch(device, states.length, 4096, tokens=16384)
    solver = variant.solver(bits, group_size)
    preset = solver.preset
    reference_windows = preset.reference_windows(*windows.shape)
    reference = states.copy(reference_windows) if reference_windows else None
    result: dict[str, Tensor] = {}
    with patched(variant):
        for index, name in enumerate(model.blocks):
            block, kwargs = model.load_block(index, place, torch.float32), all_kwargs[index]
            groups = distinct_inputs(block, states, kwargs)
            stops = [paths[0] for paths in groups]
            mappings = find_mappings(block, model.config) if variant.awq else []
            sums = [HessianAccumulator(linear_at(block, path).in_features, place) for path in stops]
            if mappings or variant.at_once:
                capture_inputs(block, states, kwargs, groups, batch, lambda i, x, sums=sums: sums[i].add(x))
            forwards: SuspendedForwards | ReferenceBlock = SuspendedForwards(
                block, states, kwargs, stops, batch, BUDGET
            )
            if reference is not None:
                forwards = ReferenceBlock(block, reference, states, kwargs, groups, batch, BUDGET)

            def hessians(
                group: int, forwards: Any = forwards, sums: Any = sums, mappings: Any = mappings
            ) -> Tensor:
                if not mappings and not variant.at_once:
                    for (reached,) in resume_together((forwards,), group):
                        sums[group].add(reached[0])
                H: Tensor = sums[group].finish()
                return H

            beside = forwards if isinstance(forwards, ReferenceBlock) else None
            with forwards:
                scaling = BlockScaling(block, groups, mappings, solver, torch.float32)
                task = BlockProblem(block, name, groups, hessians, solver, scaling)
                solved = list(solve_block(task, beside))
                if preset.tuning_steps and beside is not None:
                    beside.drop()
                    target = beside.target(name, tuning.windows_used(preset.tuning_steps, states.length))
                    tuning.tune_block(
                        block, solved, solver.scheme, preset.tuning_steps, states, target, kwargs
                    )
                forwards.finish(name)
            result |= {f"{name}.{k}": v.detach().clone() for k, v in block.named_parameters()}
            model.release(block)
    return result


@torch.no_grad()
def judge(reference: torch.nn.Module, other: torch.nn.Module, tokens: Tensor) -> tuple[float, float, float]:
    """KL divergence in nats per token, perplexity of the reference and of the other."""
    kl = loss_a = loss_b = 0.0
    for row in tokens.split(4):
        a = reference(row).logits.float().log_softmax(-1)
        b = other(row).logits.float().log_softmax(-1)
        kl += float((a.exp() * (a - b)).sum())
        target = row[:, 1:, None]
        loss_a -= float(a[:, :-1].gather(2, target).sum())
        loss_b -= float(b[:, :-1].gather(2, target).sum())
    predicted = tokens.shape[0] * (tokens.shape[1] - 1)
    return kl / tokens.numel(), math.exp(loss_a / predicted), math.exp(loss_b / predicted)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--calib", required=True)
    parser.add_argument("--heldout", required=True, nargs="+")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq_len", type=int, default=1024)
    parser.add_argument("--heldout_samples", type=int, default=48)
    parser.add_argument("--group_size", type=int, default=128)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    picked = Device.pick("auto")
    device = picked.torch
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr)  # noqa: E731
    windows = load_windows(
        CalibrationConfig(data=args.calib, samples=args.samples, seq_len=args.seq_len), tokenizer, log=say
    ).tokens
    texts = [
        load_windows(
            CalibrationConfig(data=t, samples=args.heldout_samples, seq_len=512, seed=1), tokenizer, log=say
        ).tokens.to(device)
        for t in args.heldout
    ]
    reference = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device).eval()
    # On a CPU that others use too, the time of the process says more.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    found = []
    for variant in variants():
        if args.only and not any(word in variant.name for word in args.only):
            continue
        row: dict[str, object] = {"variant": variant.name}
        for bits in args.bits:
            start = clock()
            weights = run(variant, bits, args.group_size, args.model, windows, picked)
            seconds = clock() - start
            other = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(device).eval()
            other.load_state_dict(weights, strict=False)
            row[f"kl{bits}"] = [float(f"{judge(reference, other, t)[0]:.4g}") for t in texts]
            row[f"s{bits}"] = round(seconds, 1)
        found.append(row)
        print(json.dumps(row), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
