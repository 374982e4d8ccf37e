"""The modules that hold Triton kernels, and a way to put something in the place of what all of them use."""

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
    """Sets `name` in each of them that has it."""
    holders = [module for module in KERNELS if hasattr(module, name)]
    assert len(holders) > 1
    for module in holders:
        monkeypatch.setattr(module, name, value)
