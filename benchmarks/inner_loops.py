"""Times the inner loops on one GPU at Qwen2.5-7B's widths against their floors; checks them in float64.

    uv run python benchmarks/inner_loops.py

The floor of a step is its least arithmetic over the rate that this GPU reaches in one large matrix product of the same
kind, measured here, a float32 product of the factorization counting as three of half precision; for the loops over
columns it is one read and one write of all that they touch.
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

from llm_quantize.kernels import cholesky
from llm_quantize.kernels.coordinate_descent import Descent, descend_columns
from llm_quantize.kernels.gptq_columns import Rounding, compensate_columns
from llm_quantize.kernels.launcher import on_triton
from llm_quantize.kernels.permutation import permute
from llm_quantize.kernels.precision import tf32_matmul
from llm_quantize.kernels.tiling import COLUMNS
from llm_quantize.solver import awq, compensation, factorization, qparams
from llm_quantize.solver.hessian import HessianAccumulator
from llm_quantize.solver.qparams import QParams
from llm_quantize.types import QuantScheme

HIDDEN, MLP, TOKENS = 3584, 18944, 32768
SCHEME = QuantScheme(bits=4, group_size=128, symmetric=True)


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
    return 2 * n**3 / timed(lambda: tf32_matmul(a, b) if tf32 else a @ b)


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


def _normed(A: Tensor, H: Tensor) -> None:
    """`A` becomes `H` with a diagonal of about one, as Cholesky takes it."""
    permute(H, torch.arange(len(H), device=H.device), 1 / factorization.diagonal_norms(H), A)


def _cholesky(A: Tensor, H: Tensor) -> list[Tensor]:
    _normed(A, H)
    return cholesky.cholesky_(A)[1]


def time_factorization(H: Tensor, rates: dict[str, float]) -> factorization.Factor:
    """Times the factorization of `H` (n, n) and its parts; the floor is three products on the tensor cores."""
    n = H.shape[0]
    floor = 3 * n**3 / 3 / rates["half"]
    A = torch.empty_like(H)
    copying = timed(partial(_normed, A, H), 1)
    plain = cholesky.PANEL
    for panel in PANELS:
        cholesky.PANEL = panel
        row(f"Cholesky of {n} by panels of {panel}", timed(partial(_cholesky, A, H), 1) - copying, floor)
    cholesky.PANEL = plain
    row("  the library's", timed(partial(torch.linalg.cholesky_ex, H), 1), floor)
    del A
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    factor = factorization.factorize(H, 0.0, act_order=True)
    used = (torch.cuda.max_memory_allocated() - base) / (n * n * 4)
    seconds = timed(lambda: factorization.factorize(H, 0.0, act_order=True))
    row(f"factorize {n} (all of it)", seconds, floor)
    print(f"  beside H it took {used:.2f} of its size", flush=True)
    if n == MLP:
        check("factor and two fifths of H, little more", used < 1.42)
    return factor


PANELS = (512, 1024, 2048)


def solve_width(width: int, out: int, rates: dict[str, float]) -> None:
    """Times everything for W (out, width)."""
    label = f"{out} x {width}"
    hessian = HessianAccumulator(width, "cuda")
    seconds = timed(partial(hessian.add, inputs(width, TOKENS)), 2)
    row(f"Hessian, {TOKENS} tokens of {width}", seconds, TOKENS * width * (width + 1) / rates["half"])
    H = hessian.finish()
    factorization.condition_(H, 0.1)
    factor = time_factorization(H, rates)

    W = 0.02 * torch.randn(out, width, device="cuda")
    M = qparams.hessian_blocks(H, SCHEME.group_size)
    tries = 2 * qparams.ScaleSearch().candidates + 2 * qparams.ScaleSearch().refits
    seconds = timed(lambda: qparams.search_qparams(W, M, SCHEME), 2)
    row(f"search {label}", seconds, 2.0 * tries * SCHEME.group_size * W.numel() / rates["tf32"])
    found = qparams.search_qparams(W, M, SCHEME)

    # The floor: the products on the tensor cores, and every weight read and written once.
    pieces = range(0, width, COLUMNS)
    seconds = timed(lambda: compensation.compensate(W, found, SCHEME, factor), 2)
    floor = 1.0 * out * width**2 / rates["half"] + W.numel() * 13 / rates["copy"]
    row(f"compensate {label} (all of it)", seconds, floor)
    scale, zero = found.scale.T.contiguous(), found.zero.T.contiguous()
    group = torch.div(factor.order, SCHEME.group_size, rounding_mode="floor")
    work, q = W.T.contiguous(), torch.empty(width, out, dtype=torch.uint8, device="cuda")
    errors = torch.empty(COLUMNS, out, device="cuda")
    R = factor.inverses[-1][:COLUMNS, :COLUMNS]  # one piece for all

    def columns_alone() -> None:
        for a in pieces:
            s = slice(a, a + COLUMNS)
            state = Rounding(work[s], scale, zero, group[s], R, SCHEME.qmax, q[s], errors)
            compensate_columns(state, slice(0, COLUMNS))

    row("  of it the loops over columns", timed(columns_alone, 2), W.numel() * 13 / rates["copy"])
    done = compensation.compensate(W, found, SCHEME, factor)

    def descend(sweeps: int) -> tuple[Tensor, QParams]:
        return compensation.descend(W, done, found, SCHEME, H, sweeps=sweeps, refit=True)

    product = 2.0 * out * width**2 / rates["half"]  # the gradient at the start costs as much as a whole sweep
    traffic = W.numel() * 10 / rates["copy"]
    once, twice = timed(lambda: descend(1)), timed(lambda: descend(2))
    row(f"descend {label}, two sweeps (all of it)", twice, 2.5 * product + 2 * traffic)
    row("  of it one more sweep", twice - once, product + traffic)
    gradient, integers = torch.randn(width, out, device="cuda"), done.T.contiguous()
    state = Descent(
        gradient, scale, zero, H, SCHEME.qmax, integers, errors, SCHEME.scale_dtypes, SCHEME.group_size
    )

    def descent_alone() -> None:
        for a in pieces:
            descend_columns(state, slice(a, a + COLUMNS), a)

    row("  of it the loops over columns", timed(descent_alone, 2), W.numel() * 10 / rates["copy"])

    rows = torch.arange(width, device="cuda")
    scheme = QuantScheme(bits=4, group_size=128, symmetric=False)

    def choose() -> object:
        return awq.choose_scales(W, H, factor, rows, width, scheme)

    # Compensation and one product with H for the sampled rows and each candidate.
    floor = 3.0 * awq.SAMPLED_ROWS * len(awq.ALPHAS) * width**2 / rates["tf32"]
    row(f"AWQ's scales for {label}", timed(choose, 2), floor)

    descended, refitted = descend(1)
    plain = qparams.minmax_qparams(W, SCHEME)
    losses = [
        output_error(W, qparams.dequantize(integers, chosen), H)
        for integers, chosen in (
            (qparams.round_to_nearest(W, plain, SCHEME), plain),
            (qparams.round_to_nearest(W, found, SCHEME), found),
            (done, found),
            (descended, refitted),
            descend(2),
        )
    ]
    print("  relative output error: " + " > ".join(f"{loss:.3e}" for loss in losses))
    check("each step lowers the error", sorted(losses, reverse=True) == losses)


def output_error(W: Tensor, V: Tensor, H: Tensor) -> float:
    """The relative squared output error of a linear whose weights are `V` instead of `W`."""
    return compensation.relative_error(compensation.output_forms(W, V, H))


def quadratic(W: Tensor, q: Tensor, chosen: QParams, H: Tensor) -> Tensor:
    """The squared output error of each row, float64."""
    E = (W - qparams.dequantize(q, chosen)).double()
    return ((E @ H.double()) * E).sum(1)


FAILED: list[str] = []


def check(name: str, passed: bool) -> None:
    print(f"  {'ok' if passed else 'FAILED'}: {name}", flush=True)
    if not passed:
        FAILED.append(name)


def check_against_float64() -> None:
    width, out = HIDDEN, 512
    x = inputs(width, 8192)
    hessian = HessianAccumulator(width, "cuda")
    for part in torch.split(x, 1000):
        hessian.add(part)
    H = hessian.finish()
    truth = x.double().T @ x.double() / x.shape[0]
    size = truth.diagonal().sqrt()
    check("Hessian to 2e-5", float(((H - truth).abs() / (size[:, None] * size)).max()) < 2e-5)

    factor = factorization.factorize(H, 0.1, act_order=False)
    damped = H.double()
    U = factor.U.double()
    exact, library = (torch.linalg.cholesky(A.flip(0, 1)).flip(0, 1) for A in (damped, H))
    off, plain = (float((found.double() - exact).norm() / exact.norm()) for found in (U, library))
    check(f"U is off by {off:.1e}, with the library's float32 by {plain:.1e}", off < 4 * plain)
    error = 0.0
    for span, inverse in factor.spans():
        eye = torch.eye(len(inverse), device="cuda", dtype=torch.float64)
        error = max(error, float((U[span, span] @ inverse.double() - eye).abs().max()))
    check(f"the inverses of its blocks are ({error:.1e})", error < 1e-3)

    R = torch.linalg.inv(U)
    W = 0.02 * torch.randn(out, width, device="cuda")
    M = qparams.hessian_blocks(H, SCHEME.group_size)
    fast = qparams.search_qparams(W, M, SCHEME)
    parts = W.reshape(out, -1, SCHEME.group_size).transpose(0, 1).contiguous()
    slow = qparams._search(parts, M, SCHEME, qparams.ScaleSearch())
    slow_qparams = QParams(slow.scale.T, slow.zero.T)
    errors = []
    for chosen in (fast, slow_qparams):
        E = W - qparams.dequantize(qparams.round_to_nearest(W, chosen, SCHEME), chosen)
        E = E.reshape(out, -1, SCHEME.group_size).double()
        errors.append(torch.einsum("ogi,gij,ogj->og", E, M.double(), E))
    ratio = errors[0] / errors[1]
    same = float((fast.scale == slow_qparams.scale).float().mean())
    # Near ties part the two ways: single groups end better or worse, and on the whole nothing is lost.
    mean, worse = float(ratio.mean()), float((ratio > 1.01).float().mean())
    check(
        f"search: {same:.2%} as the twin, mean ratio of errors {mean:.6f}, {worse:.4%} worse by 1 %",
        mean < 1.001 and worse < 0.002,
    )

    # The recursion in float64 from the same factor: rows part ways at near ties, the error must not.
    q = compensation.compensate(W, fast, SCHEME, factor)
    s, z = (t.repeat_interleave(SCHEME.group_size, 1).double() for t in (fast.scale, fast.zero))
    work, V = W.double().clone(), torch.empty(out, width, dtype=torch.float64, device="cuda")
    exact = torch.empty_like(q)
    for j in range(width):
        integer = ((work[:, j] / s[:, j]).round() + z[:, j]).clamp(0, SCHEME.qmax)
        exact[:, j], V[:, j] = integer.to(torch.uint8), (integer - z[:, j]) * s[:, j]
        work[:, j + 1 :] -= ((work[:, j] - V[:, j]) / R[j, j])[:, None] * R[j, j + 1 :]
    same = float((q == exact).float().mean())
    ours = output_error(W, qparams.dequantize(q, fast), H)
    theirs = output_error(W, V.float(), H)
    check(
        f"compensate: {same:.2%} of integers as float64, error {ours / theirs:.5f} of its",
        abs(ours / theirs - 1) < 2e-3,
    )

    # Descent beside its twin on the CPU's float32: no row may lose, and the two must end alike.
    form = quadratic(W, q, fast, H)
    descended, refitted = compensation.descend(W, q, fast, SCHEME, H, sweeps=2, refit=True)
    after = quadratic(W, descended, refitted, H)
    worst = float((after / form).max())
    check(f"descend: no row's error grows (at most {worst:.6f} of what it was)", worst < 1 + 1e-4)
    few = slice(0, 64)
    on_cpu = QParams(fast.scale[few].cpu(), fast.zero[few].cpu())
    twin, its = compensation.descend(
        W[few].cpu(), q[few].cpu(), on_cpu, SCHEME, H.cpu(), sweeps=2, refit=True
    )
    moved = QParams(its.scale.cuda(), its.zero.cuda())
    alike = float((descended[few].cpu() == twin).float().mean())
    end = float(after[few].sum() / quadratic(W[few], twin.cuda(), moved, H).sum())
    check(f"descend: {alike:.2%} of integers as the twin, error {end:.5f} of its", abs(end - 1) < 2e-3)


def main() -> int:
    if not torch.cuda.is_available():
        print(
            "benchmarks/inner_loops.py: no CUDA device here; run it on a machine with a GPU", file=sys.stderr
        )
        return 2
    torch.manual_seed(0)
    triton = "with" if on_triton(torch.empty(1, device="cuda")) else "without"
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
