#!/usr/bin/env python3
"""What the precision of the solvers' products on a GPU costs in KL divergence, emulated where there is none.

    products.py {awq,gptq} BITS DIRECTORY     quantizes the embedded model twice, and prints both summaries

The wide products of `compensate` and `descend` take half precision there; the inputs of every other one are rounded to
ten bits of mantissa, as TF32 has them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "inference" / "quantize"))

import torch
from torch import Tensor

from llm_quantize import cli
from llm_quantize.kernels import cholesky
from llm_quantize.solver import awq, problem


def rounded(x: Tensor) -> Tensor:
    """float32 to the nearest TF32 number, ties to even."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def emulated(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with a GPU's products."""
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


def multiply_halves_(out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: float = 1.0) -> None:
    """`cholesky.half_product_` anywhere."""
    out.addmm_(a.float(), b.float(), alpha=alpha, beta=beta)


def main() -> None:
    method, bits, directory = sys.argv[1:]
    words = ["--bits", bits, "--overwrite", "--calib_samples", "64", "--eval_samples", "32", "--no_resume"]
    for name in ("float32", "as on a GPU"):
        if name != "float32":
            cholesky.has_half_products, cholesky.half_product_ = (lambda _: True), multiply_halves_
            modules: tuple[Any, ...] = (problem, awq)
            for module in modules:
                module.compensate = emulated(module.compensate)
            modules[0].descend = emulated(modules[0].descend)
        print(f"--- {name}")
        cli.run(
            "awq" if method == "awq" else "gptq",
            [*words, "--output_path", f"{directory}/{name.replace(' ', '-')}"],
        )


if __name__ == "__main__":
    main()
