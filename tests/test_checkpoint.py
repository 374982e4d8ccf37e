"""Test checkpoint files: damage is found, a failed write is reported and not listed, and a later run resumes."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llm_quantize.checkpoint.verification import verify_written
from llm_quantize.checkpoint.writer import CheckpointWriter
from llm_quantize.errors import WorkError
from llm_quantize.formats import FORMATS
from llm_quantize.io import safetensors_files
from llm_quantize.io.atomic_directory import AtomicDirectory
from llm_quantize.io.safetensors_files import PlannedTensor
from llm_quantize.solver.qparams import QParams
from llm_quantize.types import QuantScheme
from reference import read_layers, read_tensors

CONFIG: dict[str, Any] = {
    "model_type": "tiny",
    "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"},
}
SCHEME = QuantScheme(bits=4, group_size=16, symmetric=False)
LAYERS = ("blocks.0.up", "blocks.0.down", "blocks.1.up")


def layer(seed: int) -> tuple[torch.Tensor, QParams]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (64, 32), generator=generator, dtype=torch.uint8)
    scale = torch.rand(64, 2, generator=generator).half().float() + 0.5
    return q, QParams(scale.half().float(), torch.randint(0, 16, (64, 2), generator=generator).float())


def tensors(*, spoil: str = "") -> dict[str, torch.Tensor]:
    """Make three packed layers, a float16 norm, a bfloat16 embedding and a scalar; the tensor `spoil` gets a NaN."""
    found = {"embed.weight": torch.arange(512).reshape(32, 16).to(torch.bfloat16)}
    for seed, name in enumerate(LAYERS):
        q, qparams = layer(seed)
        for suffix, tensor in FORMATS["awq"].pack(q, qparams, SCHEME, torch.float16).items():
            if f"{name}.{suffix}" == spoil:
                tensor[0, 3] = float("nan")
            found[f"{name}.{suffix}"] = tensor
    return found | {"norm.weight": torch.ones(16, dtype=torch.float16), "step": torch.tensor(3)}


def planned(found: dict[str, torch.Tensor]) -> list[PlannedTensor]:
    return [PlannedTensor(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in found.items()]


FIRST = {"run": {"--bits": 4}}


def fill(writer: CheckpointWriter, found: dict[str, torch.Tensor], after: int = 0) -> None:
    """Commit a step for each layer and one for the rest; the first `after` are there already."""
    for number, name in enumerate(LAYERS):
        if number >= after:
            for suffix in ("qweight", "qzeros", "scales"):
                writer.add(f"{name}.{suffix}", found[f"{name}.{suffix}"])
            q, qparams = layer(number)
            writer.remember(name, (q, qparams.scale, qparams.zero))
            writer.commit({"number": number})
    for name in ("embed.weight", "norm.weight", "step"):
        writer.add(name, found[name])
    writer.commit({"number": "rest"})


def write(
    target: Path,
    *,
    overwrite: bool = False,
    shard_bytes: int = 1 << 30,
    spoil: str = "",
    side_files: dict[str, bytes] | None = None,
    before_end: Callable[[CheckpointWriter], object] = lambda writer: None,
) -> CheckpointWriter:
    """Write, verify and publish; a step that an earlier run did is not done again."""
    found = tensors(spoil=spoil)
    with AtomicDirectory(target, overwrite=overwrite) as output_dir:
        with CheckpointWriter(output_dir, planned(found), FIRST, shard_bytes=shard_bytes) as writer:
            output_dir.write_json("config.json", CONFIG)
            for name, data in (side_files or {}).items():
                output_dir.write(name, data)
            if len(writer.steps) < 4:
                fill(writer, found, len(writer.steps))
            writer.wait()
            before_end(writer)
            verify(writer)
        output_dir.write_json("extra.json", {"a": "é"})
        output_dir.publish()
    return writer


def verify(writer: CheckpointWriter) -> None:
    verify_written(writer, FORMATS["awq"], CONFIG["quantization_config"])


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


# --- what is written --------------------------------------------------------------------------------------


def check_content(target: Path) -> None:
    layers, rest = read_layers(target)
    assert set(layers) == set(LAYERS)
    for seed, name in enumerate(LAYERS):
        q, qparams = layer(seed)
        np.testing.assert_array_equal(layers[name].q, q.numpy())
        np.testing.assert_array_equal(layers[name].scales, qparams.scale.numpy())
        np.testing.assert_array_equal(layers[name].zeros, qparams.zero.numpy())
    assert set(rest) == {"embed.weight", "norm.weight", "step"}
    assert rest["step"] == 3
    _, dtypes = read_tensors(target)
    assert dtypes["embed.weight"] == torch.bfloat16


def test_one_file(tmp_path: Path) -> None:
    writer = write(tmp_path / "out")
    assert names(tmp_path) == {"out"}
    assert names(tmp_path / "out") == {"model.safetensors", "config.json", "extra.json"}
    check_content(tmp_path / "out")
    assert writer.tensor_bytes == sum(t.nbytes for t in tensors().values())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == CONFIG
    assert json.loads((tmp_path / "out" / "extra.json").read_text(encoding="utf-8")) == {"a": "é"}


def test_shards_and_index(tmp_path: Path) -> None:
    target = tmp_path / "out"
    total = write(target, shard_bytes=2000).tensor_bytes
    shards = sorted(path.name for path in target.glob("*.safetensors"))
    count = len(shards)
    assert count > 2
    assert shards == [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    check_content(target)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file in shards for name in load_file(target / file)}
    assert index["metadata"]["total_size"] == total
    for file in shards:
        found = load_file(target / file)
        assert sum(t.nbytes for t in found.values()) <= 2000 or len(found) == 1


@pytest.mark.parametrize("shard_bytes", [2000, 1 << 30])
def test_same_bytes_every_time(tmp_path: Path, shard_bytes: int) -> None:
    write(tmp_path / "one", shard_bytes=shard_bytes)
    write(tmp_path / "two", shard_bytes=shard_bytes)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes()


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        write(tmp_path / "out")
    finally:
        os.umask(old)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()} == {0o644}


def test_tensors_are_copied_when_added(tmp_path: Path) -> None:
    tensor = torch.zeros(4, 6)
    with AtomicDirectory(tmp_path / "out", overwrite=False) as output_dir:
        plan = [PlannedTensor("a", torch.float32, (6, 4)), PlannedTensor("b", torch.float32, (4, 6))]
        with CheckpointWriter(output_dir, plan, FIRST) as writer:
            writer.add("a", tensor.T)  # not contiguous
            writer.add("b", tensor)  # the same memory
            tensor.fill_(7)
            with pytest.raises(ValueError, match="a is there already"):
                writer.add("a", tensor.T)
            verify(writer)
        output_dir.publish()
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found["a"].shape == (6, 4)
    assert not found["a"].any()
    assert not found["b"].any()


def test_only_what_was_planned(tmp_path: Path) -> None:
    with (
        AtomicDirectory(tmp_path / "out", overwrite=False) as output_dir,
        CheckpointWriter(output_dir, planned(tensors()), FIRST) as writer,
    ):
        for name, tensor in (
            ("other", torch.zeros(3)),
            ("step", torch.zeros(1, dtype=torch.int64)),
            ("norm.weight", torch.ones(16)),
        ):
            with pytest.raises(ValueError, match=f"{name}: .* is not what was planned"):
                writer.add(name, tensor)
        writer.add("step", torch.tensor(3))
        with pytest.raises(WorkError, match="was never written"):
            verify(writer)
    with (
        AtomicDirectory(tmp_path / "out", overwrite=False) as output_dir,
        pytest.raises(WorkError, match="no tensors"),
    ):
        CheckpointWriter(output_dir, [], FIRST)
    assert names(tmp_path) == set()


# --- damage between writing and reading back --------------------------------------------------------------


def flip(path: Path, tensor: str, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if tensor in header:
        data[8 + length + header[tensor]["data_offsets"][1] - 1] ^= 1 << bit
        path.write_bytes(data)


def damaging(damage: Callable[[Path], object]) -> Callable[[CheckpointWriter], None]:
    """Make a function that calls `damage` with the path of every shard."""

    def spoil(writer: CheckpointWriter) -> None:
        for path in writer.directory.glob("*.safetensors"):
            damage(path)

    return spoil


@pytest.mark.parametrize("shard_bytes", [2000, 1 << 30])
@pytest.mark.parametrize("tensor", ["blocks.0.down.qweight", "blocks.1.up.scales", "embed.weight", "step"])
def test_flipped_bit_is_found(tmp_path: Path, tensor: str, shard_bytes: int) -> None:
    """Nothing is published, and the same command does the damaged step again."""
    with pytest.raises(WorkError, match=rf"^{tensor} in \S+ differs from what was written") as caught:
        write(tmp_path / "out", shard_bytes=shard_bytes, before_end=damaging(lambda path: flip(path, tensor)))
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == {".out.partial"}
    writer = write(tmp_path / "out", shard_bytes=shard_bytes)
    assert len(writer.steps) == {"blocks.0.down.qweight": 1, "blocks.1.up.scales": 2}.get(tensor, 3)
    check_content(tmp_path / "out")
    assert names(tmp_path) == {"out"}


def resave(path: Path, change: Any) -> None:
    found = load_file(path)
    change(found)
    save_file(found, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.weight"), "norm.weight is missing"),
        (lambda t: t.update(step=t["step"].reshape(1)), r"step in \S+ is torch.int64 \(1,\), not"),
        (lambda t: t.update(step=t["step"].int()), r"step in \S+ is torch.int32"),
    ],
)
def test_other_tensors_are_found(tmp_path: Path, change: Any, message: str) -> None:
    with pytest.raises(WorkError, match=message):
        write(tmp_path / "out", before_end=damaging(lambda path: resave(path, change)))
    assert names(tmp_path) == {".out.partial"}
    assert len(write(tmp_path / "out").steps) == 0
    check_content(tmp_path / "out")


def test_cut_file_is_found(tmp_path: Path) -> None:
    with pytest.raises(WorkError, match=r"model.safetensors cannot be read back"):
        write(
            tmp_path / "out",
            before_end=damaging(lambda path: os.truncate(path, path.stat().st_size - 5)),
        )
    assert names(tmp_path) == {".out.partial"}
    assert len(write(tmp_path / "out").steps) == 0
    check_content(tmp_path / "out")


def test_nan_scale_is_found(tmp_path: Path) -> None:
    with pytest.raises(WorkError, match=r"^blocks.0.down.scales has NaN or infinite values"):
        write(tmp_path / "out", spoil="blocks.0.down.scales")
    assert names(tmp_path) == {".out.partial"}


@pytest.mark.parametrize("what", ["integers", "scales", "zero points"])
def test_wrong_packing_is_found(tmp_path: Path, what: str) -> None:
    q, qparams = layer(0)
    parts = {"integers": q, "scales": qparams.scale, "zero points": qparams.zero}
    parts[what] = parts[what].clone()
    parts[what][5, 1] = 15 - parts[what][5, 1]
    with pytest.raises(WorkError, match=rf"blocks.0.up: the {what} in the files are not those"):
        write(
            tmp_path / "out", before_end=lambda writer: writer.remember("blocks.0.up", list(parts.values()))
        )
    assert names(tmp_path) == {".out.partial"}


def test_remembered_layer_without_tensors_is_found(tmp_path: Path) -> None:
    q, qparams = layer(0)
    with pytest.raises(WorkError, match=r"blocks\.7\.up cannot be unpacked"):
        write(
            tmp_path / "out",
            before_end=lambda writer: writer.remember("blocks.7.up", (q, qparams.scale, qparams.zero)),
        )


# --- failures in writing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_surfaces_at_a_later_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    write(tmp_path / "out")
    before = content(tmp_path / "out")
    usage = namedtuple("usage", "total used free")
    many = {str(n): torch.zeros(1000) for n in range(100)}

    def full(*_: Any) -> None:
        raise OSError(number, "No space left on device")

    def work() -> None:
        with (
            AtomicDirectory(tmp_path / "out", overwrite=True) as output_dir,
            CheckpointWriter(output_dir, planned(many), FIRST) as writer,
        ):
            monkeypatch.setattr("llm_quantize.io.safetensors_files.write_at", full)
            monkeypatch.setattr(
                "llm_quantize.io.atomic_directory.shutil.disk_usage",
                lambda _: usage(10**6, 10**6 - 1024, 1024),
            )
            for name, tensor in many.items():
                writer.add(name, tensor)
                writer.commit({})
            writer.wait()
        pytest.fail("the thread's error never surfaced")

    with pytest.raises(WorkError, match=r"disk full at .*: 4 KiB to write, 1 KiB free: free 3 KiB") as caught:
        work()
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == {"out"}  # no step was done, so there is nothing to keep
    assert content(tmp_path / "out") == before


def test_full_disk_for_the_last_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bytes = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name == "tokenizer.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(WorkError, match="disk full at"):
        write(tmp_path / "out", side_files={"tokenizer.json": b"{}"})
    assert names(tmp_path) == set()


def test_other_write_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed write nothing is listed any more, not even tensors that were written well."""
    real, count = safetensors_files.write_at, [0]

    def failing(*arguments: Any) -> None:
        count[0] += 1
        if count[0] == 6:  # one header, then the layers' three tensors each: in the second step
            raise OSError(errno.EIO, "Input/output error")
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("llm_quantize.io.safetensors_files.write_at", failing)
        with pytest.raises(WorkError, match=r"cannot write to .*: Input/output error"):
            write(tmp_path / "out")
    assert names(tmp_path) == {".out.partial"}
    assert [step["number"] for step in write(tmp_path / "out").steps] == [0]
    check_content(tmp_path / "out")


# --- resuming ---------------------------------------------------------------------------------------------


def stop(_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("shard_bytes", [2000, 1 << 30])
def test_steps_that_are_done_are_not_repeated(tmp_path: Path, shard_bytes: int) -> None:
    write(tmp_path / "whole", shard_bytes=shard_bytes)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "new" / "out", shard_bytes=shard_bytes, before_end=stop)
    assert names(tmp_path / "new") == {".out.partial"}
    writer = write(tmp_path / "new" / "out", shard_bytes=shard_bytes)
    assert [step["number"] for step in writer.steps] == [0, 1, 2, "rest"]
    assert content(tmp_path / "new" / "out") == content(tmp_path / "whole")
    assert names(tmp_path / "new") == {"out"}


def test_another_run_starts_over(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", before_end=stop)
    with (
        AtomicDirectory(tmp_path / "out", overwrite=False) as output_dir,
        CheckpointWriter(output_dir, planned(tensors()), {"run": {"--bits": 3}}) as writer,
    ):
        assert writer.steps == []
        assert output_dir.keep is False


@pytest.mark.parametrize("change", ["header", "index", "shorter", "journal"])
def test_files_that_do_not_fit_are_started_over(tmp_path: Path, change: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", shard_bytes=2000, before_end=stop)
    place = tmp_path / ".out.partial"
    shard = sorted((place / "checkpoint").glob("*.safetensors"))[1]
    if change == "header":
        data = bytearray(shard.read_bytes())
        data[20] ^= 1
        shard.write_bytes(data)
    elif change == "shorter":
        os.truncate(shard, shard.stat().st_size - 1)
    elif change == "index":
        (place / "checkpoint" / "model.safetensors.index.json").write_text("{}")
    else:
        (place / "journal").write_bytes(b"nothing of ours\n" * 3)
    assert write(tmp_path / "out", shard_bytes=2000).steps == []
    check_content(tmp_path / "out")


def test_leaving_without_a_step_leaves_nothing(tmp_path: Path) -> None:
    with (
        AtomicDirectory(tmp_path / "new" / "out", overwrite=False) as output_dir,
        CheckpointWriter(output_dir, planned(tensors()), FIRST) as writer,
    ):
        writer.add("step", torch.tensor(3))
    assert names(tmp_path) == set()  # nor the parent that was made for it


def test_nothing_is_kept_where_that_is_not_wanted(tmp_path: Path) -> None:
    with (
        AtomicDirectory(tmp_path / "out", overwrite=False) as output_dir,
        CheckpointWriter(output_dir, planned(tensors()), FIRST, keep=False) as writer,
    ):
        fill(writer, tensors())
    assert names(tmp_path) == set()
