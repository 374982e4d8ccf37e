#!/usr/bin/env python3
"""What rounding the solvers' products to TF32 costs in KL divergence, emulated where there are no tensor cores.

    tf32.py {awq,gptq} BITS DIRECTORY     quantizes the embedded model twice, and prints both summaries

The inputs of every float32 product inside `compensate` and `descend` are rounded to ten bits of mantissa first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "inference" / "quantize"))

import torch
from torch import Tensor

import awq_search
import cli
import solve


def rounded(x: Tensor) -> Tensor:
    """float32 to the nearest TF32 number, ties to even."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def emulated(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with TF32 products."""
    add, multiply = Tensor.addmm_, Tensor.__matmul__

    def run(*args: Any, **kwargs: Any) -> Any:
        patches: Any = Tensor
        patches.addmm_ = lambda self, a, b, **more: add(self, rounded(a), rounded(b), **more)
        patches.__matmul__ = lambda self, other: multiply(rounded(self), rounded(other))
        try:
            return function(*args, **kwargs)
        finally:
            patches.addmm_, patches.__matmul__ = add, multiply

    return run


def main() -> None:
    method, bits, directory = sys.argv[1:]
    words = ["--bits", bits, "--overwrite", "--calib_samples", "64", "--eval_samples", "32", "--no_resume"]
    for name in ("float32", "TF32"):
        if name == "TF32":
            modules: tuple[Any, ...] = (solve, awq_search)
            for module in modules:
                module.compensate = emulated(module.compensate)
            modules[0].descend = emulated(modules[0].descend)
        print(f"--- {name}")
        cli.run("awq" if method == "awq" else "gptq", [*words, "--output_path", f"{directory}/{name}"])


if __name__ == "__main__":
    main()
