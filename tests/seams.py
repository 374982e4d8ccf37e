"""The modules that hold Triton kernels, and a way to put something in the place of what all of them use."""

from __future__ import annotations

import pytest

from llm_quantize.kernels import columns, descent, group_search, launching, precision, reorder, rounding

KERNELS = (launching, precision, reorder, columns, rounding, descent, group_search)


def everywhere(monkeypatch: pytest.MonkeyPatch, name: str, value: object) -> None:
    """Sets `name` in each of them that has it."""
    holders = [module for module in KERNELS if hasattr(module, name)]
    assert len(holders) > 1
    for module in holders:
        monkeypatch.setattr(module, name, value)
