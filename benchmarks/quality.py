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
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "inference" / "quantize"))

from llm_quantize.blockwise import block_solution, tuning
from llm_quantize.blockwise.block_solution import BlockChanges, QualityPreset, SolveOptions, solve_block
from llm_quantize.blockwise.reference import ReferenceBlock
from llm_quantize.calibration.windows import load_windows
from llm_quantize.config import CalibrationConfig
from llm_quantize.model import block_forward
from llm_quantize.model.awq_mappings import find_mappings
from llm_quantize.model.source import Source
from llm_quantize.model.suspended_forward import SuspendedForwards, resume_together
from llm_quantize.solver.hessian import HessianAccumulator
from llm_quantize.solver.qparams import QParams, QuantScheme, ScaleSearch, minmax_qparams


@dataclass(frozen=True, slots=True)
class Variant:
    """One row: which method, which options; `minmax` switches the scale search off, `nearest` the compensation."""

    name: str
    awq: bool
    symmetric: bool
    effort: QualityPreset
    act_order: bool = True
    damping: float = 0.1
    minmax: bool = False
    nearest: bool = False
    aim: float = block_solution.AIM
    at_once: bool = False  # moments of the block as it is, not in order


ROOM = 8e9  # bytes of halted passes
SEARCHED = QualityPreset(ScaleSearch(24, 2), sweeps=0, refit=False)
DEFAULT, BEST = block_solution.QUALITY_PRESETS["default"], block_solution.QUALITY_PRESETS["best"]
FOLLOWED = replace(DEFAULT, follow=1.0)


def variants() -> list[Variant]:
    """The table's rows, from plain to all of it."""
    rows = []
    for symmetric, word in ((True, "symmetric"), (False, "asymmetric")):

        def gptq(
            name: str, effort: QualityPreset, symmetric: bool = symmetric, word: str = word, **more: Any
        ) -> Variant:
            return Variant(f"{name}, {word}", False, symmetric, effort, **more)

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
            gptq("GPTQ with the search and sweeps of best", replace(BEST, follow=0.0, tune=0)),
            gptq("GPTQ default, following at 0.5", FOLLOWED, aim=0.5),
            gptq("GPTQ default, following", FOLLOWED),
            gptq("GPTQ default, following at 1", FOLLOWED, aim=1.0),
            gptq("GPTQ default, following, damping 0.03", FOLLOWED, damping=0.03),
            gptq("GPTQ default, following, damping 0.01", FOLLOWED, damping=0.01),
            gptq("GPTQ best, not tuned", replace(BEST, tune=0)),
            gptq("GPTQ best, tuned", BEST),
        ]
    efforts = {"default": DEFAULT, "default, following": FOLLOWED}
    efforts |= {"best, not tuned": replace(BEST, tune=0), "best, tuned": BEST}
    for name, effort in efforts.items():
        rows.append(Variant(f"AWQ {name}, asymmetric", True, False, effort, damping=0.05))
    rows.append(Variant("AWQ default, damping 0.1, asymmetric", True, False, DEFAULT))
    return rows


def run(
    variant: Variant, bits: int, group_size: int, model: Path, windows: Tensor, device: torch.device
) -> dict[str, Tensor]:
    """De-quantized block weights and changed norms by parameter name."""
    source = Source.open(model)
    states, calls = block_forward.embed(source, windows, device, device, torch.float32)
    batch = block_forward.MicroBatch(device, states.length, 4096, tokens=16384)
    options = SolveOptions(
        bits,
        group_size,
        variant.symmetric,
        variant.act_order,
        False,
        variant.damping,
        variant.effort,
        0,
        (torch.float16,),
        torch.float32,
    )
    result: dict[str, Tensor] = {}
    search, compensate, aim = block_solution.search_qparams, block_solution.compensate, block_solution.AIM
    reference_windows = variant.effort.reference_windows(*windows.shape)
    reference = block_forward.copied(states, reference_windows) if reference_windows else None

    def plain(W: Tensor, M: Tensor, spec: QuantScheme, effort: ScaleSearch) -> QParams:
        return minmax_qparams(W, spec)

    block_solution.AIM = variant.aim
    if variant.minmax:
        block_solution.search_qparams = plain
    if variant.nearest:
        block_solution.compensate = lambda W, grid, spec, factor: block_solution.round_to_nearest(
            W, grid, spec
        )
    try:
        for index, name in enumerate(source.blocks):
            block = source.modules[index]
            source.load(block, name, device, torch.float32)
            kwargs = calls.kwargs[index]
            groups = block_forward.distinct_inputs(block, states, kwargs)
            widths = [block.get_submodule(paths[0]).in_features for paths in groups]
            mappings = find_mappings(block, source.config) if variant.awq else []
            sums = [HessianAccumulator(width, device) for width in widths]
            if mappings or variant.at_once:
                block_forward.capture(
                    block, states, kwargs, groups, batch, lambda i, x, sums=sums: sums[i].add(x)
                )
            stops = [paths[0] for paths in groups]
            onward: SuspendedForwards | ReferenceBlock = SuspendedForwards(
                block, states, kwargs, stops, batch, ROOM
            )
            if reference is not None:
                onward = ReferenceBlock(block, reference, states, kwargs, groups, batch, ROOM)

            def hessians(
                group: int, onward: Any = onward, sums: Any = sums, mappings: Any = mappings
            ) -> Tensor:
                if not mappings and not variant.at_once:
                    for (reached,) in resume_together((onward,), group):
                        sums[group].add(reached[0])
                return sums[group].finish()

            reference_block = onward if isinstance(onward, ReferenceBlock) else None
            with onward:
                args = (block, name, groups, hessians, mappings, options, BlockChanges(), reference_block)
                solved = list(solve_block(*args))
                if options.effort.tune and reference_block is not None:
                    reference_block.drop()
                    goal = reference_block.goal(name, tuning.windows_used(options.effort.tune, states.length))
                    tuning.tune_block(block, solved, options, states, goal, kwargs)
                onward.advance(name)
            result |= {f"{name}.{k}": v.detach().clone() for k, v in block.named_parameters()}
            source.release(block)
    finally:
        block_solution.search_qparams, block_solution.compensate, block_solution.AIM = search, compensate, aim
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

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
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
            weights = run(variant, bits, args.group_size, args.model, windows, device)
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
