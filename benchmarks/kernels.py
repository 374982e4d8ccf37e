"""Times the inner loops on one GPU at Qwen2.5-7B's widths against their floors; checks them in float64.

    uv run python benchmarks/kernels.py

The floor of a step is its least arithmetic over the rate that this GPU reaches in one large matrix product
of the same kind, measured here; for the loops over columns it is one read and one write of the weights.
Compiling the kernels is not timed. Exit code 1 where a check fails.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "inference" / "quantize"))

import gptq_solver
import grid
import kernels
from grid import Grid, GridSpec
from moments import SecondMoment

HIDDEN, MLP, TOKENS = 3584, 18944, 32768
SPEC = GridSpec(bits=4, group_size=128, symmetric=True)


def timed(work: Callable[[], object], repeats: int = 3) -> float:
    """Seconds of the fastest run, after one that is not counted."""
    work()
    best = float("inf")
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        best = min(best, start.elapsed_time(stop) / 1e3)
    return best


def product_rate(dtype: torch.dtype, *, tf32: bool = False) -> float:
    """Operations a second of a large product."""
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=dtype) for _ in range(2))
    torch.backends.cuda.matmul.allow_tf32 = tf32
    seconds = timed(lambda: a @ b)
    torch.backends.cuda.matmul.allow_tf32 = False
    return 2 * n**3 / seconds


def copy_rate() -> float:
    """Bytes a second, read and written."""
    a = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.numel() / timed(lambda: b.copy_(a))


def row(name: str, seconds: float, floor: float) -> None:
    print(f"{name:<44}{seconds * 1e3:10.2f} ms{floor * 1e3:10.2f} ms{seconds / floor:8.1f}x", flush=True)


def inputs(width: int, tokens: int) -> Tensor:
    """Channels of very different size with a common part, float16."""
    x = torch.randn(tokens, width, device="cuda") * torch.exp(0.7 * torch.randn(width, device="cuda"))
    x += torch.randn(tokens, 8, device="cuda") @ torch.randn(8, width, device="cuda")
    return (0.3 * x).to(torch.float16)


def _inverse(L: Tensor) -> None:
    kernels.lower_inverse_(L.clone())


def solve_width(width: int, out: int, rates: dict[str, float]) -> Tensor:
    """Times everything for W (out, width); returns its H."""
    label = f"{out} x {width}"
    moment = SecondMoment(width, "cuda")
    seconds = timed(partial(moment.add, inputs(width, TOKENS)))
    row(f"second moment, {TOKENS} tokens of {width}", seconds, TOKENS * width * (width + 1) / rates["half"])
    H = moment.finish()

    gptq_solver.condition_(H, 0.1)
    L = torch.linalg.cholesky(H)
    row(
        f"Cholesky of {width}",
        timed(partial(torch.linalg.cholesky, H), 2),
        width**3 / 3 / rates["single"],
    )
    row(
        f"lower_inverse of {width}",
        timed(partial(_inverse, L), 2),
        width**3 / 3 / rates["single"],
    )
    del L
    factor = gptq_solver.factorize(H, 0.0, act_order=True)
    seconds = timed(lambda: gptq_solver.factorize(H, 0.0, act_order=True), 2)
    row(f"factorize {width} (all of it)", seconds, 2 * width**3 / 3 / rates["single"])

    W = 0.02 * torch.randn(out, width, device="cuda")
    M = grid.metric_blocks(H, SPEC.group_size)
    candidates = 2 * grid.SearchEffort().sweep + 2 * grid.SearchEffort().refits
    seconds = timed(lambda: grid.search_grid(W, M, SPEC), 2)
    row(f"search {label}", seconds, 2.0 * candidates * SPEC.group_size * W.numel() / rates["tf32"])
    found = grid.search_grid(W, M, SPEC)

    seconds = timed(lambda: gptq_solver.compensate(W, found, SPEC, factor), 2)
    row(f"compensate {label} (all of it)", seconds, 1.0 * out * width**2 / rates["single"])
    scale, zero = found.scale.T.contiguous(), found.zero.T.contiguous()
    group = torch.arange(width, device="cuda") // SPEC.group_size
    work, q = W.T.contiguous(), torch.empty(width, out, dtype=torch.uint8, device="cuda")

    def columns_alone() -> None:
        for a in range(0, width, 128):
            s = slice(a, a + 128)
            kernels.compensate_columns(work[s], scale, zero, group[s], factor.R[s, s], SPEC.levels, q[s])

    traffic = W.numel() * (4 + 4 + 4 + 1)
    row("  of it the loops over columns", timed(columns_alone, 2), traffic / rates["copy"])
    q = gptq_solver.compensate(W, found, SPEC, factor)
    seconds = timed(lambda: gptq_solver.descend(W, q, found, SPEC, H, sweeps=1, refit=True), 1)
    row(f"descend {label}, one sweep (all of it)", seconds, 4.0 * out * width**2 / rates["single"])

    descended, refitted = gptq_solver.descend(W, q, found, SPEC, H, sweeps=1, refit=True)
    plain = grid.minmax_grid(W, SPEC)
    losses = [
        gptq_solver.output_error(W, grid.dequantize(integers, chosen, SPEC.group_size), H)
        for integers, chosen in (
            (grid.round_to_nearest(W, plain, SPEC), plain),
            (grid.round_to_nearest(W, found, SPEC), found),
            (q, found),
            (descended, refitted),
        )
    ]
    print("  relative output error: " + " > ".join(f"{loss:.3e}" for loss in losses))
    check("each step lowers the error", sorted(losses, reverse=True) == losses)
    return H


FAILED: list[str] = []


def check(name: str, passed: bool) -> None:
    print(f"  {'ok' if passed else 'FAILED'}: {name}", flush=True)
    if not passed:
        FAILED.append(name)


def check_against_float64() -> None:
    width, out = HIDDEN, 512
    x = inputs(width, 8192)
    moment = SecondMoment(width, "cuda")
    for part in torch.split(x, 1000):
        moment.add(part)
    H = moment.finish()
    truth = x.double().T @ x.double() / x.shape[0]
    size = truth.diagonal().sqrt()
    check("second moment to 2e-5", float(((H - truth).abs() / (size[:, None] * size)).max()) < 2e-5)

    factor = gptq_solver.factorize(H, 0.1, act_order=False)
    damped = H.double()
    R = factor.R.double()
    identity = R @ damped @ R.T  # R^T R = H^-1
    error = float((identity - torch.eye(width, device="cuda", dtype=torch.float64)).abs().max())
    check(f"R H R^T is the identity to 1e-3 ({error:.1e})", error < 1e-3)

    W = 0.02 * torch.randn(out, width, device="cuda")
    M = grid.metric_blocks(H, SPEC.group_size)
    fast = grid.search_grid(W, M, SPEC)
    parts = W.reshape(out, -1, SPEC.group_size).transpose(0, 1).contiguous()
    slow = grid._search(parts, M, SPEC, grid.SearchEffort())
    slow_grid = Grid(slow.scale.T, slow.zero.T)
    errors = []
    for chosen in (fast, slow_grid):
        E = W - grid.dequantize(grid.round_to_nearest(W, chosen, SPEC), chosen, SPEC.group_size)
        E = E.reshape(out, -1, SPEC.group_size).double()
        errors.append(torch.einsum("ogi,gij,ogj->og", E, M.double(), E))
    ratio = errors[0] / errors[1]
    same = float((fast.scale == slow_grid.scale).float().mean())
    # Near ties part the two ways: single groups end better or worse, and on the whole nothing is lost.
    mean, worse = float(ratio.mean()), float((ratio > 1.01).float().mean())
    check(
        f"search: {same:.2%} as the twin, mean ratio of errors {mean:.6f}, {worse:.4%} worse by 1 %",
        mean < 1.001 and worse < 0.002,
    )

    # The recursion in float64 from the same factor: rows part ways at near ties, the error must not.
    q = gptq_solver.compensate(W, fast, SPEC, factor)
    s, z = (t.double() for t in grid.expand(fast, SPEC.group_size))
    work, V = W.double().clone(), torch.empty(out, width, dtype=torch.float64, device="cuda")
    exact = torch.empty_like(q)
    for j in range(width):
        integer = ((work[:, j] / s[:, j]).round() + z[:, j]).clamp(0, SPEC.levels)
        exact[:, j], V[:, j] = integer.to(torch.uint8), (integer - z[:, j]) * s[:, j]
        work[:, j + 1 :] -= ((work[:, j] - V[:, j]) / R[j, j])[:, None] * R[j, j + 1 :]
    same = float((q == exact).float().mean())
    ours = gptq_solver.output_error(W, grid.dequantize(q, fast, SPEC.group_size), H)
    theirs = gptq_solver.output_error(W, V.float(), H)
    check(
        f"compensate: {same:.2%} of integers as float64, error {ours / theirs:.5f} of its",
        abs(ours / theirs - 1) < 2e-3,
    )


def main() -> int:
    if not torch.cuda.is_available():
        print("benchmarks/kernels.py: no CUDA device here; run it on a machine with a GPU", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    triton = "with" if kernels.on_triton(torch.empty(1, device="cuda")) else "without"
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {triton} Triton")
    check_against_float64()
    rates = {
        "half": product_rate(torch.float16),
        "tf32": product_rate(torch.float32, tf32=True),
        "single": product_rate(torch.float32),
        "copy": copy_rate(),
    }
    print("10^12 a second: " + ", ".join(f"{name} {rate / 1e12:.1f}" for name, rate in rates.items()))
    print(f"{'':<44}{'time':>13}{'floor':>13}{'ratio':>9}")
    solve_width(HIDDEN, MLP, rates)
    torch.cuda.empty_cache()
    solve_width(MLP, HIDDEN, rates)
    print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")
    return 1 if FAILED else 0


if __name__ == "__main__":
    sys.exit(main())
