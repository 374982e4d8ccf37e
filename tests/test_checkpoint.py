"""Directories complete or absent: damage is found, failures leave the old one, nothing stays behind."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from checkpoint import CheckpointWriter, Published, check_target
from errors import InputError, WorkError
from grid import Grid
from packing import pack
from reference import read_layers, read_tensors

CONFIG: dict[str, Any] = {
    "model_type": "tiny",
    "_name_or_path": "/home/somebody/model",
    "quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"},
}
LAYERS = ("blocks.0.up", "blocks.0.down", "blocks.1.up")


def layer(seed: int) -> tuple[torch.Tensor, Grid]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randint(0, 16, (64, 32), generator=generator, dtype=torch.uint8)
    scale = torch.rand(64, 2, generator=generator).half().float() + 0.5
    return q, Grid(scale.half().float(), torch.randint(0, 16, (64, 2), generator=generator).float())


def fill(writer: CheckpointWriter, *, spoil: str = "") -> None:
    """Three packed layers, a half-precision norm, an embedding in bfloat16, a scalar; `spoil` gets a NaN."""
    writer.add("embed.weight", torch.arange(512).reshape(32, 16).to(torch.bfloat16))
    for seed, name in enumerate(LAYERS):
        q, grid = layer(seed)
        for suffix, tensor in pack("awq", q, grid, 16, 4, symmetric=False).items():
            if f"{name}.{suffix}" == spoil:
                tensor[0, 3] = float("nan")
            writer.add(f"{name}.{suffix}", tensor)
        writer.remember(name, q, grid.scale, grid.zero)
    writer.add("norm.weight", torch.ones(16, dtype=torch.float16))
    writer.add("step", torch.tensor(3))


def finish(writer: CheckpointWriter, side_files: list[Path] | None = None) -> Published:
    return writer.finish(
        CONFIG, side_files or [], {"extra.json": {"a": "é"}}, layout="awq", bits=4, group_size=16
    )


def write(
    target: Path,
    *,
    overwrite: bool = False,
    shard_bytes: int = 1 << 30,
    spoil: str = "",
    side_files: list[Path] | None = None,
    before_finish: Callable[[CheckpointWriter], object] = lambda writer: None,
) -> Published:
    with CheckpointWriter(target, overwrite=overwrite, shard_bytes=shard_bytes) as writer:
        fill(writer, spoil=spoil)
        before_finish(writer)
        return finish(writer, side_files)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def content(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


# --- what is written --------------------------------------------------------------------------------------


def check_content(target: Path) -> None:
    layers, rest = read_layers(target)
    assert set(layers) == set(LAYERS)
    for seed, name in enumerate(LAYERS):
        q, grid = layer(seed)
        np.testing.assert_array_equal(layers[name].q, q.numpy())
        np.testing.assert_array_equal(layers[name].scales, grid.scale.numpy())
        np.testing.assert_array_equal(layers[name].zeros, grid.zero.numpy())
    assert set(rest) == {"embed.weight", "norm.weight", "step"}
    assert rest["step"] == 3
    _, dtypes = read_tensors(target)
    assert dtypes["embed.weight"] == torch.bfloat16


def test_one_file(tmp_path: Path) -> None:
    published = write(tmp_path / "out")
    assert names(tmp_path) == {"out"}
    assert names(tmp_path / "out") == {"model.safetensors", "config.json", "extra.json"}
    assert published.shards == ("model.safetensors",)
    check_content(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {key: value for key, value in CONFIG.items() if key != "_name_or_path"}
    assert json.loads((tmp_path / "out" / "extra.json").read_text(encoding="utf-8")) == {"a": "é"}


def test_shards_and_index(tmp_path: Path) -> None:
    target = tmp_path / "out"
    published = write(target, shard_bytes=2000)
    count = len(published.shards)
    assert count > 2
    expected = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    assert list(published.shards) == expected
    check_content(target)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    stored = {name: file for file in expected for name in load_file(target / file)}
    assert index["weight_map"] == stored
    total = sum(t.nbytes for file in expected for t in load_file(target / file).values())
    assert index["metadata"]["total_size"] == total == published.tensor_bytes
    for file in expected:
        tensors = load_file(target / file)
        assert sum(t.nbytes for t in tensors.values()) <= 2000 or len(tensors) == 1


def test_same_bytes_every_time(tmp_path: Path) -> None:
    write(tmp_path / "one", shard_bytes=2000)
    write(tmp_path / "two", shard_bytes=2000)
    assert content(tmp_path / "one") == content(tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert b"somebody" not in path.read_bytes()
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
    with CheckpointWriter(tmp_path / "out", overwrite=False) as writer:
        tensor = torch.zeros(4, 6)
        writer.add("a", tensor.T)  # not contiguous
        writer.add("b", tensor)  # the same memory
        tensor.fill_(7)
        with pytest.raises(ValueError, match="a is there already"):
            writer.add("a", tensor)
        finish(writer)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert tensors["a"].shape == (6, 4)
    assert not tensors["a"].any()
    assert not tensors["b"].any()


def test_side_files(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "secret").write_text("outside")
    (source / "tokenizer.json").write_text("{}")
    (source / "extra.json").write_text("the source's own")
    (source / "inner.txt").symlink_to("tokenizer.json")
    (source / "outer.txt").symlink_to(tmp_path / "secret")
    with CheckpointWriter(tmp_path / "out", overwrite=False) as writer:
        fill(writer)
        published = finish(writer, sorted(source.iterdir()))
    assert published.skipped == ("outer.txt",)
    out = tmp_path / "out"
    assert names(out) == {"config.json", "extra.json", "model.safetensors", "tokenizer.json", "inner.txt"}
    assert (out / "inner.txt").read_text() == "{}"
    assert not (out / "inner.txt").is_symlink()
    assert json.loads((out / "extra.json").read_text()) == {"a": "é"}


def test_side_files_of_a_hub_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--x" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (tmp_path / "models--x" / "blobs").mkdir()
    (tmp_path / "models--x" / "blobs" / "1234").write_text("vocabulary")
    (snapshot / "vocab.txt").symlink_to("../../blobs/1234")
    with CheckpointWriter(tmp_path / "out", overwrite=False) as writer:
        fill(writer)
        assert finish(writer, [snapshot / "vocab.txt"]).skipped == ()
    assert (tmp_path / "out" / "vocab.txt").read_text() == "vocabulary"


# --- damage between writing and reading back --------------------------------------------------------------


def damaging(monkeypatch: pytest.MonkeyPatch, damage: Any) -> None:
    """After each shard is saved, `damage(path)` is done to it."""

    def save(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
        save_file(tensors, path, metadata=metadata)
        damage(path)

    monkeypatch.setattr("checkpoint.save_file", save)


def flip(path: Path, tensor: str, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if tensor in header:
        data[8 + length + header[tensor]["data_offsets"][1] - 1] ^= 1 << bit
        path.write_bytes(data)


@pytest.mark.parametrize("shard_bytes", [2000, 1 << 30])
@pytest.mark.parametrize("tensor", ["blocks.0.down.qweight", "blocks.1.up.scales", "embed.weight", "step"])
def test_flipped_bit_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensor: str, shard_bytes: int
) -> None:
    damaging(monkeypatch, lambda path: flip(path, tensor))
    with pytest.raises(WorkError, match=rf"^{tensor} in \S+ differs from what was written") as caught:
        write(tmp_path / "out", shard_bytes=shard_bytes)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == set()


def resave(path: Path, change: Any) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm.weight"), "norm.weight is missing"),
        (lambda t: t.update(new=torch.ones(1)), r"new in model.safetensors was never written"),
        (
            lambda t: t.update(step=t["step"].reshape(1)),
            r"step in \S+ is torch.int64 \(1,\), not",
        ),
        (lambda t: t.update(step=t["step"].int()), r"step in \S+ is torch.int32"),
    ],
)
def test_other_tensors_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, message: str
) -> None:
    damaging(monkeypatch, lambda path: resave(path, change))
    with pytest.raises(WorkError, match=message):
        write(tmp_path / "out")
    assert names(tmp_path) == set()


def test_cut_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaging(monkeypatch, lambda path: os.truncate(path, path.stat().st_size - 5))
    with pytest.raises(WorkError, match=r"model.safetensors cannot be read back"):
        write(tmp_path / "out")
    assert names(tmp_path) == set()


def test_nan_scale_is_found(tmp_path: Path) -> None:
    with pytest.raises(WorkError, match=r"^blocks.0.down.scales has NaN or infinite values"):
        write(tmp_path / "out", spoil="blocks.0.down.scales")
    assert names(tmp_path) == set()


@pytest.mark.parametrize("what", ["integers", "scales", "zero points"])
def test_wrong_packing_is_found(tmp_path: Path, what: str) -> None:
    q, grid = layer(0)
    parts = {"integers": q, "scales": grid.scale, "zero points": grid.zero}
    parts[what] = parts[what].clone()
    parts[what][5, 1] = 15 - parts[what][5, 1]
    with pytest.raises(WorkError, match=rf"blocks.0.up: the {what} in the files are not those"):
        write(tmp_path / "out", before_finish=lambda writer: writer.remember("blocks.0.up", *parts.values()))
    assert names(tmp_path) == set()


def test_remembered_layer_without_tensors_is_found(tmp_path: Path) -> None:
    q, grid = layer(0)
    with pytest.raises(WorkError, match=r"blocks\.7\.up cannot be unpacked"):
        write(
            tmp_path / "out",
            before_finish=lambda writer: writer.remember("blocks.7.up", q, grid.scale, grid.zero),
        )


# --- failures in writing ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
)
def test_full_disk_surfaces_at_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    write(tmp_path / "out")
    before = content(tmp_path / "out")

    def save(*_: Any, **__: Any) -> None:
        raise error

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("checkpoint.save_file", save)
    monkeypatch.setattr("checkpoint.shutil.disk_usage", lambda _: usage(10**6, 10**6 - 1024, 1024))

    def work() -> None:
        with CheckpointWriter(tmp_path / "out", overwrite=True, shard_bytes=4000) as writer:
            for number in range(100):
                writer.add(str(number), torch.zeros(1000))
        pytest.fail("the thread's error never surfaced")

    with pytest.raises(WorkError, match=r"disk full at .*: 4 KiB to write, 1 KiB free: free 3 KiB") as caught:
        work()
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == {"out"}
    assert content(tmp_path / "out") == before


def test_full_disk_for_the_last_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setattr("checkpoint.shutil.copyfile", copy)
    with pytest.raises(WorkError, match="disk full at"):
        write(tmp_path / "out", side_files=[tmp_path / "tokenizer.json"])
    assert names(tmp_path) == {"tokenizer.json"}


def test_other_write_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("checkpoint.save_file", save)
    with pytest.raises(WorkError, match=r"cannot write to .*: Input/output error"):
        write(tmp_path / "out")
    assert names(tmp_path) == set()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupt_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def stop(_: CheckpointWriter) -> None:
        assert [name.startswith(".out.partial-") for name in names(tmp_path / "new")] == [True]
        raise error

    with pytest.raises(error):
        write(tmp_path / "new" / "out", shard_bytes=2000, before_finish=stop)
    assert names(tmp_path) == set()  # nor the parent that was made for it


def test_leaving_without_finish_leaves_nothing(tmp_path: Path) -> None:
    with CheckpointWriter(tmp_path / "out", overwrite=False) as writer:
        fill(writer)
    assert names(tmp_path) == set()


def test_nothing_to_write(tmp_path: Path) -> None:
    with (
        CheckpointWriter(tmp_path / "out", overwrite=False) as writer,
        pytest.raises(WorkError, match="no tensors"),
    ):
        finish(writer)


# --- overwriting ------------------------------------------------------------------------------------------


def test_overwrite_replaces_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    (out / "old.bin").write_text("old")
    with CheckpointWriter(out, overwrite=True) as writer:
        fill(writer)
        assert (out / "config.json").read_text() == "old"
        finish(writer)
    assert names(tmp_path) == {"out"}
    assert names(out) == {"model.safetensors", "config.json", "extra.json"}
    check_content(out)


def test_overwrite_through_a_link_keeps_the_link(tmp_path: Path) -> None:
    write(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", overwrite=True, shard_bytes=2000)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "model.safetensors.index.json").exists()
    assert names(tmp_path) == {"real", "link"}


def test_old_is_kept_when_the_new_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out")
    before = content(tmp_path / "out")
    damaging(monkeypatch, lambda path: flip(path, "embed.weight"))
    with pytest.raises(WorkError, match=r"embed.weight"):
        write(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == {"out"}
    assert content(tmp_path / "out") == before


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_old_comes_back_when_the_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    write(tmp_path / "out")
    before = content(tmp_path / "out")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.startswith(".out.partial-"):
            assert "out" not in names(tmp_path)  # the old one is aside at this moment
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises((WorkError, KeyboardInterrupt)):
        write(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == {"out"}
    assert content(tmp_path / "out") == before


def test_target_that_appears_meanwhile(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def appear(_: CheckpointWriter) -> None:
        out.mkdir()
        (out / "config.json").write_text("someone else's")

    with pytest.raises(InputError, match="exists: use --overwrite"):
        write(out, before_finish=appear)
    assert names(tmp_path) == {"out"}
    assert (out / "config.json").read_text() == "someone else's"


# --- the target before the work ---------------------------------------------------------------------------


def test_good_targets(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "source").mkdir()
    check_target(tmp_path / "a" / "b", False, 1000, tmp_path / "source")
    check_target(tmp_path / "empty", True)
    assert names(tmp_path) == {"empty", "source"}


def test_targets_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("x")
    (tmp_path / "models" / "source").mkdir(parents=True)
    (tmp_path / "models" / "config.json").write_text("{}")
    source = tmp_path / "models" / "source"
    (source / "config.json").write_text("{}")
    (tmp_path / "link").symlink_to(source)

    def refused(message: str, path: Path, overwrite: bool = True, needed: int = 0) -> None:
        with pytest.raises(InputError, match=message) as caught:
            check_target(path, overwrite, needed, source)
        assert "\n" not in str(caught.value)

    refused("exists: use --overwrite", tmp_path / "photos", overwrite=False)
    refused("no checkpoint that --overwrite may delete", tmp_path / "photos")
    refused("exists and is not a directory", tmp_path / "file")
    refused("file is not a directory", tmp_path / "file" / "out")
    refused("source model's directory or inside", source)
    refused("source model's directory or inside", source / "out")
    refused("source model's directory or inside", tmp_path / "link")
    refused("holds the source model", tmp_path / "models")
    refused(r"too little disk at .* free \d+\.\d\d GiB or choose", tmp_path / "out", needed=1 << 60)
    monkeypatch.setattr("checkpoint.os.access", lambda *_: False)
    refused("is not writable", tmp_path / "new" / "out")
    assert names(tmp_path) == {"file", "photos", "models", "link"}


def test_mount_point_is_refused() -> None:
    with pytest.raises(InputError, match="mount point"):
        check_target(Path("/proc"), True)


def test_writer_asks_again(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("x")
    with pytest.raises(InputError, match="no checkpoint"):
        write(tmp_path / "photos", overwrite=True)
    shutil.rmtree(tmp_path / "photos")
    with pytest.raises(InputError, match="cannot write to"):
        write(tmp_path / "new" / ("x" * 250))
    assert names(tmp_path) == set()
