"""Fixtures for whole runs of the commands."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

# Small operations on a busy machine: threads that wait for each other take ten times as long as one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("LLM_QUANTIZE_DEBUG", None)  # would show tracebacks where one line is tested

import pytest
import torch
from torch import Tensor

import awq_quantize
import gptq_quantize
from llm_quantize.model.block_forward import BlockKwargs
from llm_quantize.model.model_forward import embed
from llm_quantize.model.source import SourceModel
from llm_quantize.model.states import States
from models import CPU, FAMILIES, write

MAIN: dict[str, Callable[[list[str]], int]] = {"awq": awq_quantize.main, "gptq": gptq_quantize.main}


@dataclass(frozen=True, slots=True)
class Finished:
    """A run that published `path`. weights: as the solver left them in the blocks, float32, by full name."""

    path: Path
    method: str
    weights: dict[str, Tensor] = field(repr=False)


class Runs:
    """Run the commands in this process, each combination of arguments once a session."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._done: dict[tuple[Any, ...], Finished] = {}

    def __call__(self, method: str, *words: str, again: bool = False) -> Finished:
        """Run once for these arguments; `again`: once more, into another directory."""
        key = (method, words, again)
        if key not in self._done:
            self._done[key] = self._run(method, list(words))
        return self._done[key]

    def _run(self, method: str, words: list[str]) -> Finished:
        from llm_quantize.blockwise import block as block_module

        path = self.root / f"run-{len(self._done)}"
        weights: dict[str, Tensor] = {}

        write_linear = block_module.write_linear

        def spied(context: Any, writer: Any, index: int, solved: Any) -> None:
            weight = context.model.modules[index].get_submodule(solved.path).weight
            assert isinstance(weight, Tensor)
            weights[f"{context.model.blocks[index]}.{solved.path}.weight"] = weight.detach().clone()
            write_linear(context, writer, index, solved)

        defaults = {
            "--calib_samples": "16",
            "--calib_seq_len": "128",
            "--eval_data": "off",
            "--device": "cpu",
            "--output_path": str(path),
        }
        rest = [w for flag, value in defaults.items() if flag not in words for w in (flag, value)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(block_module, "write_linear", spied)
            assert MAIN[method]([*words, *rest]) == 0
        return Finished(path, method, weights)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The directory of a random model of a family, made once; not to be changed."""
    made: dict[tuple[str, torch.dtype], Path] = {}

    def find(family: str, dtype: torch.dtype = torch.float32) -> Path:
        if (family, dtype) not in made:
            made[family, dtype] = write(
                tmp_path_factory.mktemp(family) / "model", FAMILIES[family](), dtype=dtype
            )
        return made[family, dtype]

    return find


class Opened(NamedTuple):
    """A model whose first block is loaded, with states that enter the block, and the block's other arguments."""

    model: SourceModel
    states: States
    kwargs: BlockKwargs


@pytest.fixture
def opened(saved: Callable[..., Path]) -> Callable[[str], Opened]:
    """A family's model on the CPU, with states of seven windows."""

    def find(family: str) -> Opened:
        model = SourceModel.open(saved(family, torch.float32))
        tokens = torch.randint(3, 2048, (7, 16), generator=torch.Generator().manual_seed(1))
        states, kwargs = embed(model, tokens, CPU, CPU, torch.float32)
        model.load_block(0, CPU, torch.float32)
        return Opened(model, states, kwargs[0])

    return find


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Emulate a GPU's products of half precision; return the list to which each appends its inner dimension."""
    from llm_quantize.kernels import cholesky

    depths: list[int] = []

    def multiply_(out: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: float = 1.0) -> None:
        assert a.dtype == b.dtype == torch.float16
        assert out.dtype == torch.float32
        depths.append(a.shape[1])
        out.addmm_(a.float(), b.float(), alpha=alpha, beta=beta)

    monkeypatch.setattr(cholesky, "has_half_products", lambda tensor: tensor.dtype == torch.float32)
    monkeypatch.setattr(cholesky, "half_product_", multiply_)
    return depths


@pytest.fixture
def waits() -> Callable[[Callable[[], object]], int]:
    """Return a function that counts how often the host waits for the GPU during some work.

    It does the work once before, to fill the caches.
    """

    def count(work: Callable[[], object]) -> int:
        work()
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:  # the mode itself warns of being a prototype
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                work()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("called a synchronizing" in str(warning.message) for warning in caught)

    return count
