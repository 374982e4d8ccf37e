"""Test planned safetensors files: they equal the library's, and are readable while they are being filled."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llm_quantize.io import safetensors_files
from llm_quantize.io.safetensors_files import DTYPES, PlannedTensor, plan_shards


def tensors() -> dict[str, torch.Tensor]:
    """Return two tensors of every dtype, unsorted, a scalar and an empty one; most names are not ASCII."""
    found = {}
    for number, dtype in enumerate(DTYPES):
        for copy in range(2):
            name = f"{(7 * number + copy) % 5}.é.{dtype}"
            found[name] = (torch.arange(15 + 5 * copy).reshape(-1, 5) % 2).to(dtype)
    return found | {"scalar": torch.tensor(3), "empty": torch.zeros(0, 4)}


def planned(found: dict[str, torch.Tensor]) -> list[PlannedTensor]:
    return [PlannedTensor(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()]


def test_the_same_bytes_as_the_library(tmp_path: Path) -> None:
    found = tensors()
    [shard] = plan_shards(planned(found), 1 << 40)
    handle = safetensors_files.create(shard, tmp_path)
    for name in reversed(found):
        safetensors_files.write_at(handle, safetensors_files.raw_bytes(found[name]), shard.offsets[name])
    save_file(found, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / shard.file).read_bytes() == (tmp_path / "theirs").read_bytes()
    assert (tmp_path / shard.file).stat().st_size == shard.size


def test_readable_from_the_start(tmp_path: Path) -> None:
    found = tensors()
    [shard] = plan_shards(planned(found), 1 << 40)
    handle = safetensors_files.create(shard, tmp_path)
    name = "2.é.torch.uint8"
    safetensors_files.write_at(handle, safetensors_files.raw_bytes(found[name]), shard.offsets[name])
    with safe_open(tmp_path / shard.file, framework="pt") as stored:
        assert set(stored.keys()) == set(found)
        assert torch.equal(stored.get_tensor(name), found[name])
        assert not stored.get_tensor("scalar")


def test_split_into_files() -> None:
    sizes = [40, 40, 40, 200, 10, 10]
    cut = plan_shards([PlannedTensor(str(i), torch.uint8, (n,)) for i, n in enumerate(sizes)], 100)
    assert [list(shard.offsets) for shard in cut] == [["0", "1"], ["2"], ["3"], ["4", "5"]]
    assert [shard.file for shard in cut] == [f"model-{i:05d}-of-00004.safetensors" for i in range(1, 5)]
    assert plan_shards([PlannedTensor("a", torch.uint8, (1,))], 100)[0].file == "model.safetensors"


def test_refusals() -> None:
    with pytest.raises(ValueError, match="twice"):
        plan_shards([PlannedTensor("a", torch.uint8, (1,)), PlannedTensor("a", torch.uint8, (2,))], 100)
    with pytest.raises(ValueError, match=r"a is torch\.complex128, which safetensors"):
        plan_shards([PlannedTensor("a", torch.complex128, (1,))], 100)


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, offset: real(handle, data[:3], offset))
    [shard] = plan_shards([PlannedTensor("a", torch.int32, (5,))], 100)
    handle = safetensors_files.create(shard, tmp_path)
    safetensors_files.write_at(
        handle, safetensors_files.raw_bytes(torch.arange(5, dtype=torch.int32)), shard.offsets["a"]
    )
    with safe_open(tmp_path / shard.file, framework="pt") as stored:
        assert stored.get_tensor("a").tolist() == [0, 1, 2, 3, 4]
