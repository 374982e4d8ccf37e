"""Fixtures for whole runs of the commands."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Small operations on a busy machine: threads that wait for each other take ten times as long as one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.pop("LLM_QUANTIZE_DEBUG", None)  # would show tracebacks where one line is tested

import pytest
import torch
from torch import Tensor

import awq_quantize
import gptq_quantize
from llm_quantize.model import block_forward
from llm_quantize.model.source import Source
from models import CPU, FAMILIES, write

MAIN: dict[str, Callable[[list[str]], int]] = {"awq": awq_quantize.main, "gptq": gptq_quantize.main}


@dataclass(frozen=True, slots=True)
class Finished:
    """A run that published `path`. `weights`: what the solver put into the block, float32, by full name."""

    path: Path
    method: str
    weights: dict[str, Tensor] = field(repr=False)


class Runs:
    """Runs the commands in this process, each combination of arguments once a session."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._done: dict[tuple[Any, ...], Finished] = {}

    def __call__(self, method: str, *words: str, again: bool = False) -> Finished:
        """`again`: another run of the same arguments, into another directory."""
        key = (method, words, again)
        if key not in self._done:
            self._done[key] = self._run(method, list(words))
        return self._done[key]

    def _run(self, method: str, words: list[str]) -> Finished:
        from llm_quantize.blockwise import loop

        path = self.root / f"run-{len(self._done)}"
        weights: dict[str, Tensor] = {}

        write = loop.write_linear

        def spied(run: Any, writer: Any, name: str, solved: Any) -> None:
            block = run.source.modules[run.source.blocks.index(name)]
            weight = block.get_submodule(solved.path).weight
            assert isinstance(weight, Tensor)
            weights[f"{name}.{solved.path}.weight"] = weight.detach().clone()
            write(run, writer, name, solved)

        defaults = {
            "--calib_samples": "16",
            "--calib_seq_len": "128",
            "--eval_data": "off",
            "--device": "cpu",
            "--output_path": str(path),
        }
        rest = [w for flag, value in defaults.items() if flag not in words for w in (flag, value)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "write_linear", spied)
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


@pytest.fixture
def opened(
    saved: Callable[..., Path],
) -> Callable[[str], tuple[Source, block_forward.States, dict[str, Any]]]:
    """A family's source with its first block loaded, states of seven windows, and what the block is called with."""

    def find(family: str) -> tuple[Source, block_forward.States, dict[str, Any]]:
        source = Source.open(saved(family, torch.float32))
        tokens = torch.randint(3, 2048, (7, 16), generator=torch.Generator().manual_seed(1))
        states, calls = block_forward.embed(source, tokens, CPU, CPU, torch.float32)
        source.load(source.modules[0], source.blocks[0], CPU, torch.float32)
        return source, states, calls.kwargs[0]

    return find


@pytest.fixture
def halves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Matrices of half precision are multiplied as a GPU does, also where there is none: the depth of each product."""
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
    """How often the host waits for the GPU while it does some work, done once before to fill what is kept."""

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
