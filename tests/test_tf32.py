"""Test that TF32 is allowed during one library product at a time, and that no other call sees it allowed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from llm_quantize.kernels import cholesky, precision
from llm_quantize.kernels.precision import tf32_addmm_, tf32_matmul
from llm_quantize.solver.compensation import compensate, descend, output_forms
from llm_quantize.solver.factorization import factorize
from llm_quantize.solver.qparams import dequantize, minmax_qparams
from llm_quantize.types import QuantScheme

SETTINGS = torch.backends.cuda.matmul
NAME = "fp32_precision" if hasattr(SETTINGS, "fp32_precision") else "allow_tf32"
TF32 = ("tf32", True)
PRODUCTS = ("addmm_", "matmul", "__matmul__")


def setting() -> Any:
    return getattr(SETTINGS, NAME)


@pytest.fixture
def before() -> Iterator[Any]:
    """Return the setting of this process; fail unless the test leaves it so."""
    value = setting()
    assert value not in TF32
    yield value
    after = setting()
    setattr(SETTINGS, NAME, value)
    assert after == value


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch the setting for tensors on the CPU too, where it has no effect."""
    monkeypatch.setattr(precision, "_has_tf32", lambda _: True)


class Spy(TorchFunctionMode):
    """Record the name of each function of PyTorch that is called, and the setting that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Any]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen.append((func.__name__, setting()))
        return func(*args, **(kwargs or {}))


class Product:
    """A tensor whose products run a function instead."""

    is_cuda = True

    def __init__(self, run: Callable[[], None]) -> None:
        self._run = run

    def addmm_(self, *_: Any, **__: Any) -> None:
        self._run()

    def __matmul__(self, _: object) -> None:
        self._run()


def multiply(kind: str, run: Callable[[], None]) -> None:
    """Start a product in TF32 that calls `run` in the place of the library."""
    product: Any = Product(run)
    if kind == "addmm_":
        tf32_addmm_(product, product, product)
    else:
        tf32_matmul(product, product)


both_products = pytest.mark.parametrize("kind", ["addmm_", "matmul"])


@pytest.mark.usefixtures("before")
def test_products_on_the_cpu_are_plain() -> None:
    """They are the library's to the last bit, and the setting is not switched."""
    a, b, c = (torch.randn(*shape) for shape in ((5, 7), (7, 3), (5, 3)))
    found, expected = c.clone(), c.clone()
    with Spy() as spy:
        tf32_addmm_(found, a, b, alpha=-2.0, beta=0.5)
        product = tf32_matmul(a, b)
    assert torch.equal(found, expected.addmm_(a, b, alpha=-2.0, beta=0.5))
    assert torch.equal(product, a @ b)
    tf32_addmm_(found, a, b)
    assert torch.equal(found, expected.addmm_(a, b))
    assert [name for name, _ in spy.seen if name in PRODUCTS]
    assert {value for _, value in spy.seen} == {setting()}


@both_products
def test_setting_is_put_back(kind: str, before: Any) -> None:
    """A product sees TF32 allowed; after it, also after an error, the setting is as before."""
    inside = []

    def fail() -> None:
        inside.append(setting())
        raise KeyError

    for _ in range(2):
        with pytest.raises(KeyError):
            multiply(kind, fail)
        assert setting() == before
    assert inside[0] == inside[1] != before
    assert inside[0] in TF32
    multiply(kind, lambda: inside.append(setting()))
    assert inside[2] == inside[0]


@both_products
def test_setting_of_the_process_is_kept(kind: str, before: Any) -> None:
    """Where the process allows TF32 itself, it still does afterwards."""
    allowed = "tf32" if NAME == "fp32_precision" else True
    setattr(SETTINGS, NAME, allowed)
    multiply(kind, lambda: None)
    assert setting() == allowed
    setattr(SETTINGS, NAME, before)


@both_products
def test_products_of_two_threads_take_turns(kind: str, before: Any) -> None:
    """Otherwise the second would save what the first has set, and put that back at the end."""
    begun, go, second = threading.Event(), threading.Event(), threading.Event()
    seen: list[Any] = []

    def slow() -> None:
        begun.set()
        go.wait(60)
        seen.append(setting())

    def quick() -> None:
        second.set()
        seen.append(setting())

    threads = [threading.Thread(target=multiply, args=(kind, run)) for run in (slow, quick)]
    threads[0].start()
    assert begun.wait(60)
    threads[1].start()
    overtaken = second.wait(0.2)
    go.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not overtaken
    assert len(seen) == 2
    assert all(value in TF32 for value in seen)
    assert setting() == before


def solve(H: Tensor, W: Tensor) -> None:
    """Factor, round and descend, and compute the error."""
    scheme = QuantScheme(4, 32, True)
    chosen = minmax_qparams(W, scheme)
    factor = factorize(H.clone(), 0.05, act_order=True)
    q = compensate(W, chosen, scheme, factor)
    q, chosen = descend(W, q, chosen, scheme, H, sweeps=2, refit=True)
    output_forms(W, dequantize(q, chosen), H)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_only_products_see_tf32(before: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a whole solution, each call of PyTorch but the products sees the setting of the process."""
    monkeypatch.setattr(cholesky, "_threefold", lambda a, b: a.dtype == torch.float32)
    monkeypatch.setattr(cholesky, "PANEL", 64)
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(800, 192, generator=generator), torch.randn(24, 192, generator=generator)
    with Spy() as spy:
        solve(x.T @ x / len(x), W)
    changed = {name for name, value in spy.seen if value != before}
    assert changed
    assert changed <= set(PRODUCTS)
    assert {value for _, value in spy.seen if value != before} <= set(TF32)
