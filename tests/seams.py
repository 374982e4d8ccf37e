"""List the modules with Triton kernels, and replace a name in all of them."""

from __future__ import annotations

import pytest

from llm_quantize.kernels import (
    coordinate_descent,
    gptq_columns,
    launcher,
    permutation,
    precision,
    scale_search,
    tiling,
)

KERNELS = (launcher, precision, permutation, tiling, gptq_columns, coordinate_descent, scale_search)


def everywhere(monkeypatch: pytest.MonkeyPatch, name: str, value: object) -> None:
    """Set `name` to `value` in each module with kernels that has it, until the test ends."""
    holders = [module for module in KERNELS if hasattr(module, name)]
    assert len(holders) > 1
    for module in holders:
        monkeypatch.setattr(module, name, value)
