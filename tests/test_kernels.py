"""Compare each Triton kernel with its PyTorch twin, and the twins with float64.

The kernels run on the GPU where there is one, else in Triton's interpreter. It has to be chosen before Triton is
imported: one test here runs this file again in a process of its own.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from llm_quantize.kernels import cholesky, coordinate_descent, gptq_columns, launcher, permutation, precision
from llm_quantize.kernels.coordinate_descent import Descent, descend_columns, descend_pieces
from llm_quantize.kernels.gptq_columns import Rounding, compensate_columns
from llm_quantize.kernels.launcher import compile_together, launch, need_contiguous_rows, triton_since
from llm_quantize.kernels.permutation import divide_, permute, transposed, transposed_back, turn_
from llm_quantize.kernels.precision import (
    halved,
    halved_error,
    power_of_two,
    representable,
    split,
    split_fourfold,
)
from llm_quantize.kernels.scale_search import can_search, search_groups
from llm_quantize.kernels.streams import SideStream
from llm_quantize.solver import qparams
from llm_quantize.solver.compensation import compensate, descend, output_forms, relative_error
from llm_quantize.solver.factorization import Factor, factorize
from llm_quantize.solver.qparams import QParams, ScaleSearch, dequantize
from llm_quantize.types import QuantScheme
from seams import KERNELS, everywhere

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
Case = TypeVar("Case", bound=Callable[..., None])
HALVES = (torch.float16, torch.bfloat16)


def _kernel_test(function: Case) -> Case:
    if INTERPRETED:
        return function
    skip = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device (or Triton's interpreter)")
    marked: Case = pytest.mark.gpu(skip(function))
    return marked


@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the kernels run natively")
def test_kernels_in_the_interpreter() -> None:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton has no build for this platform")
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        cwd=root,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed
    assert int(passed[1]) >= 20


_FLOAT = ["qmax", "middle", "zero_min"]
_DESCENT = {"REFIT": True, "TO_FP16": True, "TO_BF16": True, "C": 128, "S": 16, "B": 8, "K": 64}
_COLUMNS = {"C": 128, "S": 16, "K": 32}
_SEARCH = {"TO_FP16": True, "TO_BF16": True, "PRECISION": "tf32", "g": 128, "B": 64}


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset")
@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the kernels run natively")
@pytest.mark.parametrize(
    ("name", "pointers", "constants"),
    [
        ("descend", "gradient pending q:u8 delta:fp16 scale zero H coupled:fp16 column_units row_units",
         {"PENDING": False, "SEVERAL": True, "UNITS": True, **_DESCENT}),
        ("descend", "gradient pending q:u8 delta scale zero H coupled column_units row_units",
         {"PENDING": True, "SEVERAL": False, "UNITS": False, **_DESCENT}),
        ("compensate", "work errors q:u8 scale zero group:i64 R", {"SEVERAL": True, "B": 8, **_COLUMNS}),
        ("compensate", "work errors q:u8 scale zero group:i64 R", {"SEVERAL": False, "B": 16, **_COLUMNS}),
        ("search", "weights blocks factors losses scales zeros", {"SYMMETRIC": True, **_SEARCH}),
        ("search", "weights blocks factors losses scales zeros", {"SYMMETRIC": False, **_SEARCH}),
        ("error", "W q:u8 scale zero columns result:fp16", {"N": 64}),
        ("halved", "x minus rows columns out:fp16", {"MINUS": True, "COLUMNS": True, "N": 1024}),
        ("fourfold", "x out:fp16", {"N": 1024}),
        ("split", "x high low", {"N": 1024}),
        ("permute", "x y:fp64 order:i64 factor", {"N": 2048}),
        ("transpose", "x:u8 y:u8 index:i64", {"SOURCE": True, "TARGET": False, "N": 64}),
        ("turn", "A factor", {"N": 1024}),
        ("divide", "H scale", {"N": 1024}),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isalpha() else "",
)  # fmt: skip
def test_kernels_compile(name: str, pointers: str, constants: dict[str, object]) -> None:
    """Compile for a GPU, which need not be there: the interpreter accepts types that the compiler refuses."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    kernel = next(
        getattr(module, kernel) for module in KERNELS if hasattr(module, kernel := f"_{name}_kernel")
    )
    kinds = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
    kinds |= {number: "fp32" for number in _FLOAT if number in kinds}
    if name == "fourfold":
        kinds["factor"] = "fp32"
    for pointer in pointers.split():
        argument, _, kind = pointer.partition(":")
        assert argument in kinds
        kinds[argument] = f"*{kind or 'fp32'}"
    assert list(kinds) == kernel.arg_names
    compiled = compile(ASTSource(kernel, kinds, constants), target=GPUTarget("cuda", 90, 32))
    assert compiled.asm["cubin"]


class Recorded:
    """A kernel that records how it is compiled, loaded and launched."""

    def __init__(self) -> None:
        self.compiled: list[tuple[object, ...]] = []
        self.launched: list[tuple[object, ...]] = []
        self.loaded = 0

    def warmup(self, *args: object, **options: object) -> Recorded:
        self.compiled.append((*args, options))
        return self

    @property
    def run(self) -> None:
        self.loaded += 1

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: object, **options: object) -> None:
            self.launched.append(grid)

        return launch


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled")
def test_kernels_are_compiled_together_and_not_started(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    kernel, x, device = Recorded(), torch.zeros(4), torch.device("cuda", 1)
    given: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", given.append)

    def work() -> None:
        launch(kernel, (2,), x, 4, warps=1, N=16)
        launch(kernel, (3,), x, 4, warps=1, N=16)
        raise RuntimeError("no results")

    compile_together(work, device)
    asked = [(x, 4, {"grid": grid, "num_warps": 1, "N": 16}) for grid in ((2,), (3,))]
    assert kernel.compiled == asked
    assert kernel.loaded == 1
    assert given == [device]  # of the one thread that was needed
    assert kernel.launched == []
    launch(kernel, (2,), x, 4, warps=1, N=16)
    assert kernel.launched == [(2,)]
    assert kernel.compiled == asked


@pytest.mark.parametrize("why", ["old", "interpreted", "absent"])
def test_nothing_is_compiled_together(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kernels cannot be compiled together, the work is not called."""
    if why == "old":
        monkeypatch.setattr(launcher, "triton_since", lambda *_: False)
    elif why == "interpreted":
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    else:
        monkeypatch.setattr(launcher, "triton", None)
    compile_together(lambda: pytest.fail("called"), torch.device("cuda", 0))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.gpu
def test_launch_finds_what_is_compiled_together() -> None:
    """The launch that follows finds the kernel loaded and does not compile it again."""
    x = torch.randn(8, 4096, device="cuda")
    high, low = torch.zeros(2, 8, 4096, device="cuda")
    cache = precision._split_kernel.device_caches[x.device.index][0]
    cache.clear()
    compile_together(lambda: precision._split_triton(x, high, low), x.device)
    (compiled,) = cache.values()
    assert compiled.module is not None
    assert not high.any()
    precision._split_triton(x, high, low)
    assert list(cache.values()) == [compiled]
    torch.testing.assert_close(high + low, x)


def random_hessian(width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
    x = torch.randn(4 * width, width, generator=generator, dtype=torch.float64) @ mix
    H: Tensor = x.T @ x / (4 * width) + 0.01 * torch.eye(width, dtype=torch.float64)
    return H


def upper_factor(width: int) -> Tensor:
    """Upper `R` with `H^-1 = R^T R`."""
    R: Tensor = torch.linalg.cholesky(torch.linalg.inv(random_hessian(width)), upper=True)
    return R.float()


def weights(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def random_qparams(columns: int, out: int, groups: int, qmax: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return scale and zero (groups, out), some scales negative, and a random group of each column."""
    generator = torch.Generator().manual_seed(2)
    scale = (0.2 / qmax) * (0.7 + torch.rand(groups, out, generator=generator))
    scale[0, ::3] *= -1
    zero = torch.randint(0, qmax + 1, (groups, out), generator=generator).float()
    return scale, zero, torch.randint(0, groups, (columns,), generator=generator)


def on_device(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.to(DEVICE).clone() for t in tensors)


# ----------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def products_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute the twins' products in float32, which the kernels' are close to: in TF32 more integers would differ."""

    def addmm_(out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: float = 1.0) -> None:
        out.addmm_(a, b, alpha=alpha, beta=beta)

    everywhere(monkeypatch, "tf32_addmm_", addmm_)
    everywhere(monkeypatch, "tf32_matmul", torch.matmul)


@pytest.fixture(params=[False, pytest.param(True, marks=pytest.mark.gpu)], ids=["twin", "kernel"])
def twin_or_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test with the twins, then with the kernels."""
    if request.param and DEVICE == "cpu" and not INTERPRETED:
        pytest.skip("needs a CUDA device (or Triton's interpreter)")
    everywhere(monkeypatch, "on_triton", lambda _: request.param)


def emulated_tf32_addmm_(out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: float = 1.0) -> None:
    """Compute `tf32_addmm_` on inputs rounded as a GPU's tensor cores round them."""

    def rounded(x: Tensor) -> Tensor:
        bits = x.contiguous().view(torch.int32)
        return ((bits + 0x0FFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)

    out.addmm_(rounded(a), rounded(b), alpha=alpha, beta=beta)


@pytest.fixture(params=["plain", "three products", "halves"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test with plain products, with threefold products, and with those of half precision too.

    Threefold products are emulated, in small pieces.
    """
    kind: str = request.param
    if kind == "halves":
        request.getfixturevalue("halves")
    else:
        monkeypatch.setattr(cholesky, "has_half_products", lambda _: False)
    if kind != "plain":
        monkeypatch.setattr(cholesky, "_threefold", lambda a, b: a.dtype == torch.float32)
        monkeypatch.setattr(cholesky, "tf32_addmm_", emulated_tf32_addmm_)
        monkeypatch.setattr(cholesky, "DEPTH", 100)
    monkeypatch.setattr(cholesky, "PANEL", 128)
    monkeypatch.setattr(cholesky, "WIDE", 200)
    monkeypatch.setattr(cholesky, "LEAF", 32)
    return kind


def off(found: Tensor, truth: Tensor) -> float:
    return float((found.cpu().double() - truth).norm() / truth.norm())


def diagonal_blocks(L: Tensor, inverses: list[Tensor]) -> list[Tensor]:
    """Return the diagonal blocks of `L` to which `inverses` belong; they must cover the diagonal."""
    edges = list(accumulate((len(inverse) for inverse in inverses), initial=0))
    assert edges[-1] == len(L)
    return [L[a:b, a:b] for a, b in pairwise(edges)]


@pytest.mark.parametrize("n", [1, 64, 100, 129, 600])
def test_cholesky(n: int, products: str) -> None:
    H = random_hessian(n)
    truth = torch.linalg.cholesky(H)
    exact, single = H.clone(), H.float().to(DEVICE)
    for A, tolerance in ((exact, 1e-13), (single, 3e-6)):
        A.add_(torch.full_like(A, 1e3).triu(1))  # the upper triangle is not read
        failed, inverses = cholesky.cholesky_(A)
        assert not bool(failed)
        assert torch.equal(A, A.tril())
        assert off(A, truth) < tolerance
        plain = diagonal_blocks(torch.linalg.cholesky(H.to(A.dtype)), inverses)
        expected = [torch.linalg.inv(block) for block in diagonal_blocks(truth, inverses)]
        assert all(torch.equal(inverse, inverse.tril()) for inverse in inverses)
        # As accurate as the library in the same precision, up to a factor. Compared are the worst blocks, since the
        # library may invert a block of few columns exactly by chance.
        ours = max(map(off, inverses, expected))
        assert ours < 4 * max(map(off, map(torch.linalg.inv, plain), expected)) + 1e-7


@pytest.mark.parametrize("where", [3, 127, 128, 400, 599])
def test_cholesky_reports_failure(where: int, products: str) -> None:
    for bad in (-1.0, float("nan")):
        A = random_hessian(600).float().to(DEVICE)
        A[where, where] = bad
        failed, _ = cholesky.cholesky_(A)
        assert bool(failed) or bool(A.diagonal().isnan().any())


@pytest.mark.parametrize("products", ["three products"], indirect=True)
@pytest.mark.parametrize(("m", "k", "n"), [(300, 250, 200), (1, 1000, 64)])
def test_three_products_are_as_good_as_float32(m: int, k: int, n: int, products: str) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(*s, generator=generator) for s in ((m, k), (k, n), (m, n)))
    truth = c.double() * 0.5 - 2 * (a.double() @ b.double())
    out, once = c.clone(), c.clone()
    cholesky.product_(out, a, b, alpha=-2.0, beta=0.5)
    assert off(out, truth) < 3 * off(c * 0.5 - 2 * (a @ b), truth)
    emulated_tf32_addmm_(once, a, b, alpha=-2.0, beta=0.5)
    assert off(once, truth) > 50 * off(out, truth)
    turned = c.clone()
    cholesky.product_(turned, a, b.T.contiguous().T, alpha=-2.0, beta=0.5)
    torch.testing.assert_close(turned, out, atol=1e-4, rtol=1e-5)


def test_split() -> None:
    x = weights(37, 500) * torch.exp(8 * weights(37, 500, seed=5) / 0.05)
    for given in (x, x[:, 3:90], x.T, x.T[100:200]):
        high, low = split(given)
        assert torch.equal(high + low, given)
        assert int((high.contiguous().view(torch.int32) & 0x1FFF).count_nonzero()) == 0
        assert bool((low.abs() <= given.abs() * 2.0**-11).all())
        assert high.stride() == low.stride()


@_kernel_test
def test_split_kernel() -> None:
    (x,) = on_device(weights(5, 2100))
    given = x[:, 7:2090]
    results = []
    for run in (precision._split_triton, precision._split_torch):
        high, low = (torch.empty(given.shape, device=DEVICE) for _ in range(2))
        run(given, high, low)
        results.append((high, low))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.usefixtures("twin_or_kernel")
def test_split_fourfold() -> None:
    x = on_device(weights(7, 1300))[0][:, 5:1200]
    out = torch.full((9, 4 * 1195), torch.nan, dtype=torch.float16, device=DEVICE)
    split_fourfold(x, out[1:8], 1024.0)
    high, low, again, once_more = torch.split(out[1:8].float(), 1195, dim=1)
    assert torch.equal(high, (x * 1024).half().float())
    torch.testing.assert_close(high + low, x * 1024, atol=2.0**-25, rtol=2.0**-22)
    assert torch.equal(again, high)
    assert torch.equal(once_more, high)
    assert bool(out[[0, 8]].isnan().all())


@pytest.mark.usefixtures("twin_or_kernel")
def test_halved() -> None:
    x, minus = (each[:, 5:1200] for each in on_device(weights(7, 1300), weights(7, 1300, seed=3)))
    x[2, 9], x[3, 1] = 1e6, -1e6
    rows, columns = on_device(2.0 ** torch.arange(7), 2.0 ** (torch.arange(1195) % 9))
    for found, expected in (
        (halved(x, rows), x * rows[:, None]),
        (halved(x, rows, columns), x * rows[:, None] * columns),
        (halved(x, rows, minus=minus), (x - minus) * rows[:, None]),
    ):
        assert torch.equal(found, expected.clamp(-65504, 65504).half())
        assert found[2, 9] == 65504


@pytest.mark.usefixtures("twin_or_kernel")
def test_halved_error() -> None:
    out, width, size = 70, 120, 40
    W, columns = weights(out, width), 2.0 ** (torch.arange(out) % 12)
    W[5, 6] = 1e9
    scale, zero, _ = random_qparams(width, width // size, out, 15)
    q = torch.randint(0, 16, (out, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(4))
    V = (q.double() - zero.repeat_interleave(size, 1).double()) * scale.repeat_interleave(size, 1).double()
    expected = ((W.double() - V).T * columns).clamp(-65504, 65504)
    W, q, scale, zero, columns = on_device(W, q, scale, zero, columns)
    found = halved_error(W, q, scale, zero, size, columns)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double().cpu(), expected, atol=1e-6, rtol=2.0**-10)


def test_dequantize_groups() -> None:
    """The columns share among the groups of `scale` evenly; else there is no value."""
    q = torch.tensor([[0, 1, 2, 15], [8, 8, 7, 0]], dtype=torch.uint8)
    scale, zero = torch.tensor([[0.5, -2.0], [1.0, 4.0]]), torch.tensor([[8.0, 2.0], [0.0, 7.0]])
    found = precision.dequantize_groups(q, scale, zero)
    assert found.dtype == torch.float32
    assert found.tolist() == [[-4.0, -3.5, 0.0, -26.0], [8.0, 8.0, 0.0, -28.0]]
    with pytest.raises(RuntimeError):
        precision.dequantize_groups(q[:, :3], scale, zero)


def test_power_of_two() -> None:
    x = torch.tensor([1.0, 1.99, 2.0, 3.0, 0.3, 1e-20, 7e20])
    expected = [1.0, 1.0, 2.0, 2.0, 0.25, 2.0 ** math.floor(math.log2(1e-20)), 2.0**69]
    assert power_of_two(x).tolist() == expected
    assert power_of_two(torch.zeros(1)).item() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
@pytest.mark.parametrize("shape", [(1, 1), (5, 130), (128, 64)])
def test_transposition(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Transpose in any order, and back."""
    generator = torch.Generator().manual_seed(0)
    (wide,) = on_device(torch.randint(0, 256, (shape[0], shape[1] + 3), generator=generator).to(dtype))
    x = wide[:, 2 : 2 + shape[1]]
    (order,) = on_device(torch.randperm(shape[1], generator=generator))
    assert torch.equal(transposed(x), x.T)
    turned = transposed(x, order)
    assert torch.equal(turned, x.T[order])
    back = transposed_back(turned, order)
    assert torch.equal(back, x)
    assert turned.is_contiguous()
    assert back.is_contiguous()


@_kernel_test
@pytest.mark.parametrize("shape", [(1, 1), (5, 130), (128, 64)])
def test_transposition_kernel(shape: tuple[int, int]) -> None:
    x, order = on_device(weights(*shape), torch.randperm(shape[1]))
    inverse = torch.argsort(order)
    y = x.new_empty(shape[::-1])
    assert torch.equal(permutation._transpose_triton(x, y), x.T)
    assert torch.equal(permutation._transpose_triton(x, y, target=inverse), x.T[order])
    assert torch.equal(permutation._transpose_triton(y, torch.empty_like(x), source=inverse), x)


@pytest.mark.usefixtures("twin_or_kernel")
@pytest.mark.parametrize("n", [1, 2, 33, 1100])
def test_whole_matrices_in_place(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permutation, "STRIP", 32)
    H, scale, order = on_device(weights(n, n), weights(n).exp(), torch.randperm(n))
    for dtype in (torch.float32, torch.float64):
        out = torch.full((n, n), torch.nan, dtype=dtype, device=DEVICE)
        permute(H, order, scale[order], out)
        expected = H * scale[:, None] * scale
        torch.testing.assert_close(out, expected[order][:, order].to(dtype), atol=0, rtol=1e-6)
    expected = scale[:, None] * H.flip(0, 1)
    turned = H.clone()
    turn_(turned, scale)
    assert torch.equal(turned, expected)
    expected = H / (scale[:, None] * scale)
    divide_(H, scale)
    assert torch.equal(H, expected)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.gpu
def test_cholesky_on_a_side_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triangles on the side stream give the same bits as triangles on the caller's stream."""
    H = random_hessian(1500).float().to(DEVICE)
    monkeypatch.setattr(cholesky, "PANEL", 128)
    monkeypatch.setattr(cholesky, "WIDE", 256)
    monkeypatch.setattr(cholesky, "WHOLE", 0)
    plain, found = SideStream.use, []
    for use in (lambda self, behind=True: nullcontext(), plain, plain, plain):
        monkeypatch.setattr(SideStream, "use", use)
        A = H.clone()
        failed, inverses = cholesky.cholesky_(A)
        torch.randn(2048, 2048, device=DEVICE) @ torch.randn(2048, 2048, device=DEVICE)
        found.append((failed, A, *inverses))
    for each in found[1:]:
        assert all(map(torch.equal, each, found[0]))


@pytest.mark.parametrize("n", [1, 100, 128, 129, 600])
def test_library_cholesky(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cholesky, "PANEL", 128)
    H = random_hessian(n)
    truth = torch.linalg.cholesky(H)
    A = H.clone()
    failed, inverses = cholesky._library_cholesky_(A)
    assert not bool(failed)
    torch.testing.assert_close(A, truth, rtol=0, atol=1e-12)
    for block, inverse in zip(diagonal_blocks(truth, inverses), inverses, strict=True):
        assert torch.equal(inverse, inverse.tril())
        torch.testing.assert_close(block @ inverse, torch.eye(len(block), dtype=H.dtype), rtol=0, atol=1e-12)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.gpu
@pytest.mark.parametrize("whole", [0, 4096])
def test_factorization_on_the_gpu(whole: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Factor a matrix large enough for the tensor cores, where the GPU's are fast."""
    n = 3000
    monkeypatch.setattr(cholesky, "WHOLE", whole)
    H = random_hessian(n)
    L = H.float().to(DEVICE)
    failed, inverses = cholesky.cholesky_(L)
    assert not bool(failed)
    truth = torch.linalg.cholesky(H.to(DEVICE))
    plain = torch.linalg.cholesky(H.float().to(DEVICE))
    assert off(L, truth.cpu()) < 4 * off(plain, truth.cpu())
    known = diagonal_blocks(plain, inverses)
    for inverse, block, other in zip(inverses, diagonal_blocks(truth, inverses), known, strict=True):
        expected = torch.linalg.inv(block).cpu()
        assert off(inverse, expected) < 4 * off(torch.linalg.inv(other), expected)


@pytest.mark.parametrize("qmax", [3, 15, 255])
def test_compensation_against_float64(qmax: int) -> None:
    """Compare with the recursion as the paper writes it, one column at a time over the whole row, in float64."""
    columns, out = 24, 7
    work, R = weights(columns, out), upper_factor(columns)
    scale, zero, group = random_qparams(columns, out, 3, qmax)
    W, V = work.double().clone(), torch.empty(columns, out, dtype=torch.float64)
    expected = torch.empty(columns, out, dtype=torch.uint8)
    for j in range(columns):
        s, z = scale[group[j]].double(), zero[group[j]].double()
        integer = ((W[j] / s).round() + z).clamp(0, qmax)
        expected[j], V[j] = integer.to(torch.uint8), (integer - z) * s
        e = (W[j] - V[j]) / R[j, j].double()
        for later in range(j + 1, columns):
            W[later] -= R[j, later].double() * e
    q = torch.empty(columns, out, dtype=torch.uint8)
    errors = torch.empty(columns, out)
    compensate_columns(Rounding(work, scale, zero, group, R, qmax, q, errors), slice(0, columns))
    assert torch.equal(q, expected)
    torch.testing.assert_close(work.double(), V, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        errors.double(), (W - V) / R.diagonal()[:, None].double(), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize(("columns", "out", "qmax"), [(128, 40, 15), (96, 33, 255), (1, 5, 3), (17, 16, 7)])
@_kernel_test
def test_compensate_kernel(columns: int, out: int, qmax: int) -> None:
    # A view into wider rows, with numbers below the diagonal that must not be read.
    R = torch.randn(columns, columns + 9)
    R[:, :columns] = upper_factor(columns) + torch.full((columns, columns), 1e3).tril(-1)
    work, wide = on_device(weights(columns, out), R)
    R = wide[:, :columns]
    scale, zero, group = on_device(*random_qparams(columns, out, 5, qmax))
    twin = work.clone()
    q, q_twin = (torch.full((columns, out), 99, dtype=torch.uint8, device=DEVICE) for _ in range(2))
    errors, errors_twin = torch.empty_like(work), torch.empty_like(work)
    whole = slice(0, columns)
    gptq_columns._compensate_triton(Rounding(work, scale, zero, group, R, qmax, q, errors), whole)
    gptq_columns._compensate_torch(Rounding(twin, scale, zero, group, R, qmax, q_twin, errors_twin), whole)
    # Where a sum falls on the other side of a tie, the rest of the row differs too; that happens to a few rows at most.
    same = (q == q_twin).all(dim=0)
    assert float(same.float().mean()) > 0.9
    torch.testing.assert_close(work[:, same], twin[:, same], atol=0, rtol=0)
    torch.testing.assert_close(errors[:, same], errors_twin[:, same], atol=2e-5, rtol=1e-3)


@pytest.mark.usefixtures("twin_or_kernel")
def test_a_part_gives_the_same_as_its_own_tensors() -> None:
    """Columns in the middle of larger tensors give the same bits as tensors of these columns alone."""
    width, out, part, first = 96, 21, slice(32, 64), 16
    R = upper_factor(width).contiguous()
    W, R, H = on_device(weights(width, out), R, random_hessian(width).float())
    scale, zero, group = on_device(*random_qparams(width, out, 3, 15))
    works = W.clone(), W.clone()
    qs = [torch.full((width, out), 99, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    errors = [torch.zeros_like(W) for _ in range(2)]
    compensate_columns(Rounding(works[0], scale, zero, group, R, 15, qs[0], errors[0]), part)
    alone = Rounding(
        works[1][part], scale, zero, group[part], R[part, part], 15, qs[1][part], errors[1][part]
    )
    compensate_columns(alone, slice(0, 32))
    for pair in (works, qs, errors):
        assert torch.equal(*pair)
    assert not torch.equal(works[0], W)
    q = qs[0].clamp(max=15)
    gradient, pending = H @ (W - works[0]), torch.zeros(32, out, device=DEVICE)
    qs, scales = [q.clone(), q.clone()], [scale.clone(), scale.clone()]
    changes = [torch.zeros(width - first, out, dtype=torch.float16, device=DEVICE) for _ in range(2)]
    units = (2.0 ** (torch.arange(width, device=DEVICE) % 3), 2.0 ** (torch.arange(out, device=DEVICE) % 5))
    whole = Descent(gradient, scales[0], zero, H, 15, qs[0], changes[0], HALVES, 32, units)
    descend_columns(whole, part, first, pending)
    cut = Descent(
        gradient[part], scales[1][1:2], zero[1:2], H[part, part], 15, qs[1][part], changes[1][16:48], HALVES, 32,
        (units[0][part], units[1]),
    )  # fmt: skip
    descend_columns(cut, slice(0, 32), 0, pending)
    for pair in (qs, scales, changes):
        assert torch.equal(*pair)
    assert not torch.equal(qs[0], q)


@pytest.mark.parametrize(("columns", "out"), [(300, 21), (128, 40), (512, 16)])
@_kernel_test
def test_compensate_several_pieces(columns: int, out: int) -> None:
    """A kernel that takes several pieces gives the same as the twin with a product between pieces."""
    R = upper_factor(columns).contiguous()
    W, R, scale, zero, group = on_device(weights(columns, out), R, *random_qparams(columns, out, 3, 15))
    works, errors = (W.clone(), W.clone()), (torch.empty_like(W), torch.empty_like(W))
    qs = [torch.full((columns, out), 99, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    ours, twin = (
        Rounding(w, scale, zero, group, R, 15, q, e) for w, q, e in zip(works, qs, errors, strict=True)
    )
    gptq_columns._compensate_triton(ours, slice(0, columns))
    for start in range(0, columns, 128):
        part = slice(start, min(start + 128, columns))
        works[1][part].addmm_(R[:start, part].T, errors[1][:start], alpha=-1.0)
        gptq_columns._compensate_torch(twin, part)
    same = (qs[0] == qs[1]).all(dim=0)
    assert float(same.float().mean()) > 0.5  # a row may differ from a near tie on
    torch.testing.assert_close(works[0][:, same], works[1][:, same], atol=0, rtol=0)
    torch.testing.assert_close(errors[0][:, same], errors[1][:, same], atol=2e-4, rtol=1e-2)


@pytest.mark.parametrize("halves", [False, True], ids=["", "halves"])
@pytest.mark.parametrize(
    ("size", "columns", "refit"), [(32, 32, HALVES), (128, 128, HALVES), (256, 128, None)]
)
@_kernel_test
def test_descend_several_pieces(
    size: int,
    columns: int,
    refit: tuple[torch.dtype, ...] | None,
    halves: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A kernel that takes several pieces, from the middle on, gives the same as the twin with products between."""
    width, out, begin, end = 768, 24, 256, 768
    everywhere(monkeypatch, "on_triton", lambda _: True)
    W, H = on_device(weights(width, out), random_hessian(width).float())
    scale, zero = on_device(*random_qparams(width, out, width // size, 15)[:2])
    scale = representable(scale, HALVES)
    group = torch.arange(width, device=DEVICE) // size
    q = ((W / scale[group]).round() + zero[group]).clamp(0, 15).to(torch.uint8)
    coupled, units, dtype = H, None, torch.float32
    gradient = H @ (W - (q - zero[group]) * scale[group])
    if halves:
        a, b = 2.0 ** (torch.arange(width, device=DEVICE) % 3), 2.0 ** (torch.arange(out, device=DEVICE) % 4)
        coupled, units, dtype = halved(H, 1 / a), (a, b), torch.float16
        gradient = gradient / a[:, None] * b
    pieces = [slice(a, a + columns) for a in range(begin, end, columns)]
    qs, scales = (q.clone(), q.clone()), (scale.clone(), scale.clone())
    made = [torch.full((end - begin, out), torch.nan, dtype=dtype, device=DEVICE) for _ in range(2)]
    ours, twin = (
        Descent(gradient, s, zero, H, 15, u, d, refit, size, units, coupled)
        for s, u, d in zip(scales, qs, made, strict=True)
    )
    descend_pieces(ours, pieces)
    for part in pieces:
        pending = coupled[part, begin : part.start].float() @ made[1][: part.start - begin].float()
        coordinate_descent._descend_torch(twin, part, begin, pending)
    assert not torch.equal(qs[0], q)
    same = (qs[0] == qs[1]).all(dim=0) & (scales[0] == scales[1]).all(dim=0)
    assert float(same.float().mean()) > 0.5
    torch.testing.assert_close(made[0][:, same], made[1][:, same], atol=1e-6, rtol=2e-3)
    assert torch.equal(qs[0][:begin], q[:begin])


@_kernel_test
def test_older_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """An older Triton has tiles of sixteen rows; it gives nearly the same integers."""
    columns, out = 256, 40
    W, H, R = on_device(
        weights(columns, out), random_hessian(columns).float(), upper_factor(columns).contiguous()
    )
    scale, zero, group = on_device(*random_qparams(columns, out, 2, 15))
    found = []
    for since in (triton_since, lambda *_: False):
        everywhere(monkeypatch, "triton_since", since)
        q = torch.full((columns, out), 99, dtype=torch.uint8, device=DEVICE)
        v, errors, scales = W.clone(), torch.empty_like(W), scale.clone()
        gptq_columns._compensate_triton(Rounding(v, scale, zero, group, R, 15, q, errors), slice(0, columns))
        rounded = q.clone()
        state = Descent(H @ (W - v), scales, zero, H, 15, q, errors, HALVES, 128, coupled=H)
        coordinate_descent._descend_triton(state, slice(0, 256), 0, None, 128)
        found.append((rounded, q, scales))
    for one, other in zip(*found, strict=True):
        assert float((one == other).all(dim=0).float().mean()) > 0.9
    assert not torch.equal(found[0][0], found[0][1])


class Piece:
    """Columns of one group in the middle of a descent, whose gradient has not received the update `pending`."""

    def __init__(
        self,
        columns: int,
        out: int,
        qmax: int,
        *,
        pending: bool = True,
        units: bool = False,
        dtype: torch.dtype,
    ) -> None:
        scale, zero, _ = random_qparams(columns, out, 1, qmax)
        self.qmax = qmax
        self.W = weights(columns, out).to(dtype)
        self.H = random_hessian(columns).to(dtype)
        self.scale, self.zero = representable(scale[0], HALVES).to(dtype), zero[0].to(dtype)
        self.q = ((self.W / self.scale).round() + self.zero).clamp(0, qmax).to(torch.uint8)
        self.gradient = self.H @ (self.W - self.value)
        self.pending = 0.1 * torch.randn_like(self.gradient) if pending else None
        if self.pending is not None:
            self.gradient += self.pending
        self.delta = torch.full_like(self.gradient, float("nan"))
        self.by, self.unit = torch.ones(columns), torch.ones(out)
        if units:
            self.by, self.unit = 2.0 ** (torch.arange(columns) % 4), 2.0 ** (torch.arange(out) % 6)
            self.delta = self.delta.half()
            self.gradient *= self.unit / self.by[:, None]
            if self.pending is not None:
                self.pending *= self.unit / self.by[:, None]

    @property
    def value(self) -> Tensor:
        return (self.q.to(self.W.dtype) - self.zero) * self.scale

    def form(self) -> Tensor:
        error = (self.W - self.value).double()
        return (error * (self.H.double() @ error)).sum(dim=0)

    def descend(self, run: Callable[..., None], refit: tuple[torch.dtype, ...] | None) -> None:
        columns = len(self.q)
        units = (self.by, self.unit) if self.delta.dtype == torch.float16 else None
        group = self.scale[None], self.zero[None]
        state = Descent(self.gradient, *group, self.H, self.qmax, self.q, self.delta, refit, columns, units)
        run(state, slice(0, columns), 0, self.pending)

    def to(self, device: str) -> Piece:
        moved = copy.copy(self)
        for name, held in vars(self).items():
            setattr(moved, name, held.to(device).clone() if isinstance(held, Tensor) else held)
        return moved


@pytest.mark.parametrize("refit", [None, HALVES], ids=["fixed", "refit"])
@pytest.mark.parametrize("units", [False, True], ids=["", "units"])
@pytest.mark.parametrize(
    ("columns", "out", "qmax", "pending"), [(128, 40, 15, True), (32, 33, 255, False), (5, 3, 3, True)]
)
@_kernel_test
def test_descend_kernel(
    columns: int, out: int, qmax: int, pending: bool, units: bool, refit: tuple[torch.dtype, ...] | None
) -> None:
    ours = Piece(columns, out, qmax, pending=pending, units=units, dtype=torch.float32).to(DEVICE)
    twin, start = ours.to(DEVICE), ours.to(DEVICE)
    ours.descend(coordinate_descent._descend_triton, refit)
    twin.descend(coordinate_descent._descend_torch, refit)
    same = (ours.q == twin.q).all(dim=0) & (ours.scale == twin.scale)
    assert float(same.float().mean()) > 0.9
    exact = 2.0**-10 if units else 1e-5
    torch.testing.assert_close(ours.delta[:, same], twin.delta[:, same], atol=1e-7, rtol=exact / 10)
    change = (ours.value - start.value) * ours.unit
    torch.testing.assert_close(ours.delta.float(), change, atol=1e-6, rtol=exact)
    assert torch.equal(ours.gradient, start.gradient)
    if pending:
        assert not torch.equal(ours.q, start.q)
    if refit is None:
        assert torch.equal(ours.scale, start.scale)
    else:
        assert torch.equal(ours.scale, representable(ours.scale, refit))
        assert bool((ours.scale != start.scale).any())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("refit", [None, HALVES], ids=["fixed", "refit"])
def test_descent_never_adds_error(refit: tuple[torch.dtype, ...] | None, device: str) -> None:
    """No row's error grows: with the twin in float64, with the kernel in float32."""
    if device == "cuda" and DEVICE == "cpu":
        if not INTERPRETED:
            pytest.skip("needs a CUDA device (or Triton's interpreter)")
        run: Callable[..., None] = coordinate_descent._descend_triton
    else:
        run = descend_columns
    fast = device == "cuda"
    piece = Piece(64, 20, 15, pending=False, dtype=torch.float32 if fast else torch.float64)
    if device == DEVICE:
        piece = piece.to(device)
    before = piece.form()
    if refit is not None:
        # Some scales are too large, which a refit may correct.
        piece.scale[::4] = representable(piece.scale[::4].float() * 1.3, refit).to(piece.scale.dtype)
        piece.gradient = piece.H @ (piece.W - piece.value)
        before = piece.form()
    piece.descend(run, refit)
    assert bool((piece.form() <= before * (1 + (1e-5 if fast else 1e-12))).all())
    assert float(piece.form().sum()) < 0.9 * float(before.sum())


@pytest.mark.parametrize("step", [1.0, -0.25, 2.0**-14])
@_kernel_test
def test_ties_go_to_even(step: float) -> None:
    """As `torch.round` does: 0.5 to 0, 1.5 and 2.5 to 2."""
    halves = torch.arange(-8, 9).float() + 0.5
    work = (halves * step)[None].to(DEVICE)
    q = torch.empty(1, 17, dtype=torch.uint8, device=DEVICE)
    one = torch.ones(1, 17, device=DEVICE)
    first = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    state = Rounding(work, one * step, one * 100, first, one[:, :1], 255, q, one.clone())
    gptq_columns._compensate_triton(state, slice(0, 1))
    assert q[0].tolist() == (torch.round(halves) + 100).tolist()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("size", "dtypes"), [(128, HALVES), (64, (torch.float16,)), (32, (torch.bfloat16,)), (32, HALVES[::-1])]
)
@_kernel_test
def test_search_kernel(bits: int, symmetric: bool, size: int, dtypes: tuple[torch.dtype, ...]) -> None:
    out, groups = 70, 2
    if size != 32 and bits in (2, 8):
        out = 20
    W = weights(out, groups * size)
    W[0] = 0.0  # a dead row
    W[1] = W[1].abs()  # one sign alone
    W[2] *= 1e-4  # scales at the bottom of float16
    H = random_hessian(groups * size).float()
    W, M = on_device(W, qparams.hessian_blocks(H, size))
    spec = QuantScheme(bits, size, symmetric, zero_min=0 if bits > 2 else 1, scale_dtypes=dtypes)
    search = ScaleSearch(candidates=7, refits=2)
    grouped = W.reshape(out, groups, size)
    scale, zero, loss = search_groups(
        grouped, M, qparams._shrink_factors(bits, search.candidates), qmax=spec.qmax, symmetric=symmetric,
        zero_min=spec.zero_min, dtypes=dtypes, refits=search.refits, precision="tf32x3",
    )  # fmt: skip
    twin = qparams._search(grouped.transpose(0, 1).contiguous(), M, spec, search)
    assert torch.equal(scale, representable(scale, dtypes))
    assert bool(((zero >= spec.zero_min) & (zero <= spec.qmax) & (zero == zero.round())).all())
    same = (scale == twin.scale) & (zero == twin.zero)
    assert float(same.float().mean()) > 0.9
    # Kernel and twin may choose differently between nearly equal candidates; neither is better on the whole.
    assert float(loss.sum() / twin.loss.sum()) == pytest.approx(1.0, abs=1e-2)
    torch.testing.assert_close(loss[same], twin.loss[same], rtol=1e-3, atol=1e-12)
    # The error returned is the error of the scales and zeros returned.
    chosen = QParams(scale.T, zero.T)
    E = W - dequantize(qparams.round_to_nearest(W, chosen, spec), chosen)
    E = E.reshape(out, groups, size).double()
    truth = torch.einsum("ogi,gij,ogj->go", E, M.double(), E)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-3, atol=1e-12)


@_kernel_test
def test_search_kernel_in_low_precision() -> None:
    """TF32 may choose another of two nearly equal candidates; the mean error stays the same."""
    W, M = on_device(weights(96, 256), qparams.hessian_blocks(random_hessian(256).float(), 128))
    spec, grouped = QuantScheme(4, 128, True), W.reshape(96, 2, 128)
    exact, fast = (
        search_groups(
            grouped, M, qparams._shrink_factors(4, 24), qmax=15, symmetric=True, zero_min=0,
            dtypes=spec.scale_dtypes, refits=2, precision=precision,
        )
        for precision in ("tf32x3", "tf32")
    )  # fmt: skip
    chosen = QParams(fast[0].T, fast[1].T)
    E = (W - dequantize(qparams.round_to_nearest(W, chosen, spec), chosen)).reshape(96, 2, 128).double()
    truth = torch.einsum("ogi,gij,ogj->go", E, M.double(), E)
    ratio = truth / exact[2].double()
    assert float(ratio.mean()) == pytest.approx(1.0, abs=2e-3)
    assert float((ratio > 1.01).float().mean()) < 0.02


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.gpu
def test_solver_on_the_gpu_agrees_with_the_cpu() -> None:
    W, H = weights(300, 384), random_hessian(384).float()
    scheme = QuantScheme(4, 128, True)
    results = []
    for device in ("cpu", "cuda"):
        w, h = W.to(device), H.clone().to(device)
        found = qparams.search_qparams(w, qparams.hessian_blocks(h, 128), scheme)
        factor = factorize(h, 0.01, act_order=True)
        q = compensate(w, found, scheme, factor)
        q, found = descend(w, q, found, scheme, h, sweeps=1, refit=True)
        results.append(relative_error(output_forms(w, dequantize(q, found), h)))
    assert results[1] == pytest.approx(results[0], rel=0.01)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
@pytest.mark.gpu
def test_the_solver_hardly_waits_for_the_gpu(waits: Callable[[Callable[[], object]], int]) -> None:
    """It waits once for a factorization and once for an error, and not at all to choose scales or to round."""
    from llm_quantize.solver.awq import choose_scales

    W, H = weights(300, 1500).cuda(), random_hessian(1500).float().cuda()
    scheme, rows = QuantScheme(4, 60, True), torch.arange(1500, device="cuda")
    assert waits(lambda: float(W[0, 0])) == 1

    def factorized() -> Factor:
        return factorize(H.clone(), 0.1, act_order=True)

    factor, plain = factorized(), qparams.minmax_qparams(W, scheme)
    q = compensate(W, plain, scheme, factor)
    assert waits(factorized) <= 1
    assert waits(lambda: compensate(W, plain, scheme, factor)) == 0
    assert waits(lambda: descend(W, q, plain, scheme, H, sweeps=2, refit=True)) == 0
    assert waits(lambda: relative_error(output_forms(W, dequantize(q, plain), H))) <= 1
    assert waits(lambda: choose_scales(W, H, factor, rows, 1500, scheme)) == 0


def test_fallback_where_triton_cannot_run() -> None:
    W = weights(4, 64)
    if DEVICE == "cpu":
        assert not can_search(W.reshape(4, 2, 32), torch.zeros(2, 32, 32), (torch.float16,))
    with pytest.raises(ValueError, match="contiguous"):
        need_contiguous_rows(W.T)
